"""Syntax trees of the project's files, for tests of the code itself."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from pathlib import Path


def syntax_tree(text: str) -> ast.Module:
    """Return the tree of a file's text.

    Without a collection of garbage on the way: before Python 3.11.8, a finalizer or a thread that
    runs then and parses too makes both fail with SystemError (python/cpython#106905).
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if collects:
            gc.enable()


def syntax_trees(folder: Path, *words: str) -> Iterator[tuple[Path, ast.Module]]:
    """Yield the Python files below a folder that contain one of these words, with their trees."""
    for path in folder.rglob("*.py"):
        text = path.read_text("utf-8")
        if any(word in text for word in words):
            yield path, syntax_tree(text)
