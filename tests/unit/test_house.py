"""Rules of the house that import-linter cannot see."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SERVICE = Path(__file__).parents[2] / "service" / "runrecovery_service"
SENDERS = {"kill", "killpg", "send_signal", "pidfd_send_signal", "terminate", "raise_signal"}
SENDS_SIGNALS = {
    "process/sweep.py",  # the one way in which the service ends processes
    "cli/demo.py",  # ends the service that it has started itself
}


def calls(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr


def sources() -> Iterator[tuple[str, ast.AST]]:
    for path in SERVICE.rglob("*.py"):
        yield str(path.relative_to(SERVICE)), ast.parse(path.read_text("utf-8"))


def test_signals_are_sent_in_one_place_only() -> None:
    senders = {name for name, tree in sources() if SENDERS & set(calls(tree))}

    assert senders == SENDS_SIGNALS


def test_the_sweep_sends_signals_in_one_function_only() -> None:
    tree = ast.parse((SERVICE / "process" / "sweep.py").read_text("utf-8"))
    senders = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and SENDERS & set(calls(node))
    ]

    assert senders == ["_signal"]


def test_a_run_changes_by_compare_and_set_only() -> None:
    writers = {
        name
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.lstrip().startswith("UPDATE run ")
    }

    assert writers == {"storage/runs.py", "storage/converge.py"}
