"""The plan of a trial, as a pure function of its seed."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from typing import Final, TypedDict

from runrecovery.v1 import run_pb2

UNENDED_EVERY, UNENDED_AT = 40, 7
"""One seed in so many, at this remainder, is a trial with a process that cannot be killed."""
MOST_NODES: Final = 9
MOST_DEPTH: Final = 4
STORM: Final = (60, 250)
FLICKERS: Final = (200, 3000)
MOST_PAUSE_S: Final = 0.12


class Node(TypedDict):
    """A process of a tree, as hostile_agent.py reads it."""

    mark: str
    how: str
    executes: str
    acts: list[str]
    below: list[Node]
    storm: int
    shim: int
    end: str
    generations: int


def leaf(mark: str, *, how: str = "leader", executes: str = "", end: str = "rest") -> Node:
    """Return a plain process without children."""
    return {
        "mark": mark, "how": how, "executes": executes, "acts": [], "below": [],
        "storm": 0, "shim": 0, "end": end, "generations": 0,
    }  # fmt: skip


class Kind(StrEnum):
    """What a trial proves."""

    ORDINARY = "ordinary"
    """Every process of a tree is killed, and no other process."""
    UNENDED = "unended"
    """A process that may not be signalled stays, and is reported until it is gone."""


class Way(StrEnum):
    """How the service and its shims are killed."""

    SERVICE = "service"
    """The service alone, which the shims notice."""
    SERVICE_THEN_SHIMS = "service, then shims"
    """At once after each other: some shims have begun to kill their trees."""
    SHIMS_THEN_SERVICE = "shims, then service"
    """With a pause between, in which the service may notice."""
    SHIMS_UNSEEN = "shims while the service is stopped, then service"
    """Neither has begun to kill anything."""
    SHIMS_STOPPED = "shims stopped, then service"
    """The shims live, but cannot act."""


_WAYS: Final = {
    Way.SERVICE: 30,
    Way.SERVICE_THEN_SHIMS: 15,
    Way.SHIMS_THEN_SERVICE: 15,
    Way.SHIMS_UNSEEN: 22,
    Way.SHIMS_STOPPED: 18,
}
_ACTS: Final = {
    "ignore": 0.35,
    "undumpable": 0.2,
    "rename": 0.15,
    "chdir": 0.25,
    "close": 0.15,
    "group": 0.15,
    "limits": 0.2,
    "hydra": 0.05,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """A run of a trial: whether it asks (as a sticky process), its restart policy, its tree."""

    mark: str
    asks: bool
    policy: run_pb2.RestartPolicy.ValueType
    node: Node

    @property
    def engine(self) -> str:
        """The engine of the run."""
        return "sticky" if self.asks else "resumable"

    @property
    def requeues(self) -> bool:
        """Whether a restart queues it again."""
        return self.policy == run_pb2.RESTART_POLICY_REQUEUE


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One trial.

    Attributes:
        early: whether the service is killed before the trees have begun to grow.
        pause_s: otherwise, the pause between that moment and the kill.
    """

    seed: int
    kind: Kind
    way: Way
    early: bool
    pause_s: float
    runs: tuple[RunPlan, ...]

    @property
    def only_watermark_tells(self) -> bool:
        """Whether a process will live that only its watermark ties to its launch."""
        lost = any(
            node["how"] == "daemon" and node["executes"] == "scrubbed" and node["end"] == "rest"
            for run in self.runs
            for node in nodes(run.node)
        )
        return self.kind is Kind.ORDINARY and self.way is Way.SHIMS_UNSEEN and lost


def plan(seed: int, mark: str, *, root: bool) -> Plan:
    """Return the trial of a seed. `mark` is the prefix of the mark of each run."""
    dice = random.Random(seed)  # noqa: S311 - choices, not secrets
    unended = root and seed % UNENDED_EVERY == UNENDED_AT
    way = dice.choices(list(_WAYS), weights=list(_WAYS.values()))[0]
    runs = tuple(
        _run(dice, f"{mark}.{number}.", root=root and not unended)
        for number in range(dice.randint(2, 4))
    )
    if not unended:  # in an unended trial the trees must live until the kill
        _add_rarities(dice, runs)
    return Plan(
        seed=seed,
        kind=Kind.UNENDED if unended else Kind.ORDINARY,
        way=way,
        early=not unended and dice.random() < 0.15,
        pause_s=dice.uniform(0, MOST_PAUSE_S),
        runs=runs,
    )


def _run(dice: random.Random, mark: str, *, root: bool) -> RunPlan:
    left = dice.randint(1, MOST_NODES)
    asks = dice.random() < 0.35
    policies = (run_pb2.RESTART_POLICY_FAIL, run_pb2.RESTART_POLICY_REQUEUE)
    node = _Growth(dice, mark, root=root, left=left).node(0)
    return RunPlan(
        mark=mark, asks=asks, policy=dice.choices(policies, weights=(3, 1))[0], node=node
    )


@dataclass(slots=True)
class _Growth:
    dice: random.Random
    mark: str
    root: bool
    left: int

    def node(self, depth: int) -> Node:
        """Return a process with its children, until `left` is used up."""
        self.left -= 1
        dice = self.dice
        acts = [act for act, chance in _ACTS.items() if dice.random() < chance]
        if depth == 0 and "close" in acts:
            acts.remove("close")  # the service itself kills an agent that closes its output
        if self.root and dice.random() < 0.1:
            acts.append("nobody")
        below = []
        while depth < MOST_DEPTH and self.left > 0 and dice.random() < 0.75:
            below.append(self.node(depth + 1))
        ends = ("rest", "stop", "exit") if depth else ("rest", "stop")
        node = leaf(self.mark)
        if depth:
            node["how"] = dice.choice(("child", "session", "daemon", "daemon"))
            node["executes"] = dice.choice(("", "", "scrubbed", "kept"))
        node["acts"], node["below"] = acts, below
        node["end"] = dice.choices(ends, weights=(6, 2, 2)[: len(ends)])[0]
        return node


def _add_rarities(dice: random.Random, runs: tuple[RunPlan, ...]) -> None:
    """Add behaviour that a trial has at most once."""
    if dice.random() < 0.1:
        _any_node(dice, runs)["storm"] = dice.randint(*STORM)
    if dice.random() < 0.25:
        flickering = _any_node(dice, runs)
        flickering["end"], flickering["generations"] = "flicker", dice.randint(*FLICKERS)
    if dice.random() < 0.1:
        dice.choice(runs).node["end"] = "exit"
    if dice.random() < 0.12:
        dice.choice(runs).node["shim"] = dice.choice((signal.SIGKILL, signal.SIGSTOP))


def _any_node(dice: random.Random, runs: tuple[RunPlan, ...]) -> Node:
    return dice.choice(nodes(dice.choice(runs).node))


def nodes(root: Node) -> list[Node]:
    """Return a process and all its descendants."""
    found = [root]
    for node in found:
        found += node["below"]
    return found


def seeds(first: int, suits: Callable[[Plan], bool], *, root: bool) -> Iterator[int]:
    """Yield, from `first` on, the seeds whose plans suit."""
    return (seed for seed in count(first) if suits(plan(seed, "", root=root)))
