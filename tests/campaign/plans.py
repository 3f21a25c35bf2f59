"""What a trial does, from its seed. Pure."""

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
"""Of so many seeds in a row one, this one, is a trial of what cannot be ended."""
MOST_NODES: Final = 9
MOST_DEPTH: Final = 4
STORM: Final = (60, 250)
FLICKERS: Final = (200, 3000)
MOST_PAUSE_S: Final = 0.12


class Node(TypedDict):
    """A process of a tree, as adversary.py reads it."""

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
    """Return a process that does nothing special and has nobody below."""
    return {
        "mark": mark, "how": how, "executes": executes, "acts": [], "below": [],
        "storm": 0, "shim": 0, "end": end, "generations": 0,
    }  # fmt: skip


class Kind(StrEnum):
    """What a trial is about."""

    ORDINARY = "ordinary"
    """Everything that lives is ended, and nothing else."""
    UNENDED = "unended"
    """What may not be signalled stays, and is told of until it is gone."""


class Way(StrEnum):
    """How the service and its shims are struck."""

    SERVICE = "service"
    """The service alone: the shims see it."""
    SERVICE_THEN_SHIMS = "service, then shims"
    """At once after each other: some shims have begun to end their trees."""
    SHIMS_THEN_SERVICE = "shims, then service"
    """With a moment between, in which the service may have seen it."""
    SHIMS_UNSEEN = "shims while the service is stopped, then service"
    """Nobody has begun to end anything."""
    SHIMS_STOPPED = "shims stopped, then service"
    """The shims live, and can do nothing."""


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
    """A run of a trial: whether it waits (as a sticky process), how it restarts, what it grows."""

    mark: str
    asks: bool
    policy: run_pb2.RestartPolicy.ValueType
    node: Node

    @property
    def engine(self) -> str:
        """The engine that it is created with."""
        return "sticky" if self.asks else "resumable"

    @property
    def requeues(self) -> bool:
        """True when a restart starts it again."""
        return self.policy == run_pb2.RESTART_POLICY_REQUEUE


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One trial. `early`: it is struck without waiting for the trees to have begun; `pause_s`:
    else so long after they have."""

    seed: int
    kind: Kind
    way: Way
    early: bool
    pause_s: float
    runs: tuple[RunPlan, ...]

    @property
    def only_watermark_tells(self) -> bool:
        """True when somebody will live of whom nothing but his watermark tells whose he is."""
        lost = any(
            node["how"] == "daemon" and node["executes"] == "scrubbed" and node["end"] == "rest"
            for run in self.runs
            for node in nodes(run.node)
        )
        return self.kind is Kind.ORDINARY and self.way is Way.SHIMS_UNSEEN and lost


def plan(seed: int, mark: str, *, root: bool) -> Plan:
    """Return the trial of a seed. `mark` begins the mark of each run; it is not of the seed."""
    dice = random.Random(seed)  # noqa: S311 - choices, not secrets
    unended = root and seed % UNENDED_EVERY == UNENDED_AT
    way = dice.choices(list(_WAYS), weights=list(_WAYS.values()))[0]
    runs = tuple(
        _run(dice, f"{mark}.{number}.", root=root and not unended)
        for number in range(dice.randint(2, 4))
    )
    if not unended:  # there the trees are to live until they are struck
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
        """Return a process and what is below it, as long as there are some left."""
        self.left -= 1
        dice = self.dice
        acts = [act for act, chance in _ACTS.items() if dice.random() < chance]
        if depth == 0 and "close" in acts:
            acts.remove("close")  # its output ended, the service would end it by itself
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
    """Add what a trial has once at most."""
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
    """Return a process and all that are below it."""
    found = [root]
    for node in found:
        found += node["below"]
    return found


def seeds(first: int, suits: Callable[[Plan], bool], *, root: bool) -> Iterator[int]:
    """Yield, from `first` on, the seeds of trials that suit."""
    return (seed for seed in count(first) if suits(plan(seed, "", root=root)))
