"""Finds, in the source of `storage/`, the use cases that change rows.

A use case is a function that other packages of the service name. It changes rows if it, or a
function of `storage/` that it names, has a statement that does.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

from crash_points.points import CHANGES, INFRASTRUCTURE, ROOT

MODEL_CALLS: Final = frozenset({"insert", "insert_many", "delete"})
"""Methods of peewee's models that change rows. Updates of the service are written by hand."""


@dataclass(slots=True)
class _Function:
    """A function of `storage/`: whether it has a changing statement itself, and what it names."""

    changes: bool = False
    names: set[tuple[str, str]] = field(default_factory=set)


def changing_use_cases() -> frozenset[str]:
    """Return every use case that changes rows, as `module.function`."""
    functions = _functions()
    changing = {key for key, function in functions.items() if function.changes}
    while more := {
        key
        for key, function in functions.items()
        if key not in changing and function.names & changing
    }:
        changing |= more
    used = _named_outside()
    return frozenset(".".join(key) for key in changing if key in used)


@cache
def _functions() -> dict[tuple[str, str], _Function]:
    found: dict[tuple[str, str], _Function] = {}
    for path in sorted((ROOT / "storage").glob("*.py")):
        if path.stem not in INFRASTRUCTURE:
            found |= _functions_of(path)
    return found


def _functions_of(path: Path) -> dict[tuple[str, str], _Function]:
    tree = ast.parse(path.read_text("utf-8"))
    constants = {
        name.id
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        if node.value is not None and _changes(node.value, set())
        for name in ast.walk(node)
        if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store)
    }
    imported = _imported(tree)
    found = {}
    for node in tree.body:
        parts = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        for part in parts:
            if isinstance(part, ast.FunctionDef):
                function = _Function(changes=_changes(part, constants))
                function.names = _names(part, path.stem, imported)
                found[path.stem, prefix + part.name] = function
    return found


def _changes(node: ast.AST, constants: set[str]) -> bool:
    for each in ast.walk(node):
        match each:
            case ast.Constant(value=str(text)) if CHANGES.match(text):
                return True
            case ast.Name(id=name) if name in constants:
                return True
            case ast.Call(func=ast.Attribute(attr=name)) if name in MODEL_CALLS:
                return True
    return False


def _imported(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Return what local names mean: (module, "") for a module of `storage/`, or (module, name)."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, module = node.module.rpartition(".")
            for alias in node.names:
                local = alias.asname or alias.name
                if node.module == "runrecovery_service.storage":
                    found[local] = (alias.name, "")
                elif package == "runrecovery_service.storage":
                    found[local] = (module, alias.name)
    return found


def _names(node: ast.AST, own: str, imported: dict[str, tuple[str, str]]) -> set[tuple[str, str]]:
    found = set()
    modules = {local: module for local, (module, name) in imported.items() if not name}
    for each in ast.walk(node):
        match each:
            case ast.Attribute(value=ast.Name(id=local), attr=name) if local in modules:
                found.add((modules[local], name))
            case ast.Name(id=name):
                found.add(imported.get(name) or (own, name))
    return found


def _named_outside() -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for path in ROOT.rglob("*.py"):
        if path.parent != ROOT / "storage" or path.stem in INFRASTRUCTURE:
            tree = ast.parse(path.read_text("utf-8"))
            found |= _names(tree, "", _imported(tree))
    return found
