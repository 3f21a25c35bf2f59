"""Scripts of simulated agents. Chance decides what each process does."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Final

from simulation.processes import READ, Script, SimulatedProcesses, Tree
from simulation.world import World

MOST_PROCESSES: Final = 4
"""From this process of a run on, agents only return results, so that every run ends."""
SESSION: Final = "session"
"""The handle of every session, and the name of its file in the workspace."""
ENDS: Final = (
    ("result",) * 5 + ("ask",) * 10 + ("fails", "is silent", "hangs", "breaks the protocol")
)


@dataclass
class Memory:
    """What the agents of one run have done.

    Attributes:
        processes: how many of them have started.
        results: the results that they have printed.
        replies: the replies that they have read, by the number of the question.
    """

    processes: int = 0
    results: list[dict[str, Any]] = field(default_factory=list)
    replies: dict[int, Any] = field(default_factory=dict)


class Agents(SimulatedProcesses):
    """The processes of the machine, with scripts for the agents."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.memories: defaultdict[str, Memory] = defaultdict(Memory)

    def script_of(self, tree: Tree) -> Script:
        """Return what the agent of a launch does."""
        memory = self.memories[tree.run_id]
        memory.processes += 1
        is_sticky = tree.plan.command[1] == "sticky"
        return _sticky(tree, memory) if is_sticky else _resumable(tree, memory)


def _choose(tree: Tree, memory: Memory) -> str:
    rng = tree.world.rng
    if memory.processes >= MOST_PROCESSES or tree.world.is_calm:
        return "result"
    tree.is_stubborn = rng.random() < 0.05
    tree.has_child = rng.random() < 0.25
    return rng.choice(ENDS)


def _read(tree: Tree, memory: Memory) -> bool:
    message = tree.take_line()
    if message is None:
        return False
    reply = message if message["type"] == "reply" else message.get("reply")
    if reply is not None and "interrupted" not in message:
        memory.replies[reply["interaction_id"]] = reply["response"]
    return True


def _work_s(tree: Tree) -> float:
    return tree.world.rng.choice((0.0, 0.0, 0.01, 0.2, 1.5))


def _say_result(tree: Tree, memory: Memory) -> None:
    result = {"n": len(memory.results), "of": tree.run_id}
    memory.results.append(result)
    tree.say({"type": "result", "output": result})


def _resumable(tree: Tree, memory: Memory) -> Script:
    end = _choose(tree, memory)
    yield READ
    if not _read(tree, memory):
        return 1
    if tree.world.rng.random() < 0.95:
        (tree.plan.cwd / SESSION).write_text("{}")
        tree.say({"type": "session", "value": SESSION})
    yield _work_s(tree)
    if end == "result":
        _say_result(tree, memory)
    elif end == "ask":
        tree.say({"type": "ask", "kind": "open_text", "prompt": "What?"})
    elif end == "breaks the protocol":
        tree.say({"no": "type"})
    elif end == "hangs":
        yield 10_000.0
    yield tree.world.rng.choice((0.0, 0.0, 0.0, 0.1))
    return 3 if end == "fails" else 0


def _sticky(tree: Tree, memory: Memory) -> Script:
    end = _choose(tree, memory)
    yield READ
    if not _read(tree, memory):
        return 1
    yield _work_s(tree)
    if end == "hangs":
        yield 10_000.0
    questions = tree.world.rng.randint(1, 2) if end == "ask" else 0
    for _ in range(questions):
        tree.say({"type": "ask", "kind": "open_text", "prompt": "What?"})
        yield READ
        if not _read(tree, memory):
            return 1
        yield _work_s(tree)
    if end in ("ask", "result"):
        _say_result(tree, memory)
    elif end == "breaks the protocol":
        tree.say({"no": "type"})
    return 3 if end == "fails" else 0
