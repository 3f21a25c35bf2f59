"""Patterns of tool calls: `NAME` or `NAME(ARGUMENT)`. docs/permissions.md defines them.

The permission hook imports this module in a process of its own, so it imports nothing.
"""

from __future__ import annotations

MAX_PATTERNS = 100
MAX_CHARS = 1000
_NAME_CHARS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.*")


def pattern_problem(pattern: str) -> str | None:
    """Return why a text is not a pattern; None if it is one."""
    name, bracket, argument = pattern.partition("(")
    if len(pattern) > MAX_CHARS:
        return f"must have at most {MAX_CHARS} characters"
    if not name or not _NAME_CHARS.issuperset(name):
        return "must begin with the name of a tool: letters, digits, _, -, . and *"
    if bracket and not argument.endswith(")"):
        return 'must end with ")" after an argument'
    if bracket and argument == ")":
        return "must have an argument between the parentheses, or no parentheses"
    return None


def first_match(patterns: list[str] | tuple[str, ...], tool: str, given: object) -> str | None:
    """Return the first pattern that a call of the tool with this input matches, or None."""
    return next((pattern for pattern in patterns if _matches(pattern, tool, given)), None)


def _matches(pattern: str, tool: str, given: object) -> bool:
    name, bracket, argument = pattern.partition("(")
    if not _fits(name, tool):
        return False
    return not bracket or any(_fits(argument[:-1], text) for text in _texts(given))


def _fits(pattern: str, text: str) -> bool:
    """Return whether the whole text matches; `*` stands for any characters. In linear time."""
    first, *rest = pattern.split("*")
    if not rest:
        return pattern == text
    *middle, last = rest
    at, end = len(first), len(text) - len(last)
    if at > end or not text.startswith(first) or not text.endswith(last):
        return False
    for part in middle:
        found = text.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True


def _texts(value: object) -> list[str]:
    """Return every text in the input of a call, at any depth."""
    found, left = [], [value]
    while left:
        match left.pop():
            case str() as text:
                found.append(text)
            case dict() as members:
                left += members.values()
            case list() as items:
                left += items
    return found
