"""Which calls of tools a pattern of `ask_for` names."""

from __future__ import annotations

import pytest
from runrecovery_service.engines.tool_patterns import first_match, pattern_problem


@pytest.mark.parametrize(
    ("pattern", "tool", "given", "matches"),
    [
        ("Bash", "Bash", {"command": "ls"}, True),
        ("Bash", "BashOutput", {}, False),
        ("Bash", "bash", {}, False),
        ("Bash*", "BashOutput", {}, True),
        ("*", "Read", {}, True),
        ("mcp__*", "mcp__git__push", {}, True),
        ("mcp__*__push", "mcp__git__push", {}, True),
        ("mcp__*__push", "mcp__push", {}, False),
        ("Bash(git push*)", "Bash", {"command": "git push --force"}, True),
        ("Bash(git push*)", "Bash", {"command": "cd x; git push"}, False),
        ("Bash(*git push*)", "Bash", {"command": "cd x\ngit push"}, True),
        ("Bash(git push*)", "Write", {"command": "git push"}, False),
        ("Bash(ls)", "Bash", {"command": "ls -l"}, False),
        ("Bash(*)", "Bash", {"command": ""}, True),
        ("Bash(*)", "Bash", {"timeout": 3}, False),
        ("Write(/etc/*)", "Write", {"file_path": "/etc/a/b", "content": "x"}, True),
        ("Write(/etc/*)", "Write", {"file_path": "/srv/a", "content": "/etc/"}, True),
        ("Write(/etc/*)", "Write", {"file_path": "/srv/a", "content": "x"}, False),
        ("*(*secret*)", "mcp__a", {"deep": [{"er": ["the secret is"]}]}, True),
        ("Bash(echo (a))", "Bash", {"command": "echo (a)"}, True),
        ("Bash(ab*ba)", "Bash", {"command": "aba"}, False),
        ("Bash(a*b*a)", "Bash", {"command": "aabxa"}, True),
        ("Bash(a*bc*c)", "Bash", {"command": "abc"}, False),
    ],
)
def test_a_pattern_names_a_tool_and_maybe_a_text_of_its_input(
    pattern: str, tool: str, given: object, *, matches: bool
) -> None:
    assert pattern_problem(pattern) is None
    assert first_match([pattern], tool, given) == (pattern if matches else None)


def test_the_first_pattern_that_matches_is_named() -> None:
    assert first_match(["Read", "B*", "Bash"], "Bash", {}) == "B*"


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("", "must begin with the name of a tool"),
        ("(ls)", "must begin with the name of a tool"),
        ("Bash ls", "must begin with the name of a tool"),
        ("Bash, Write", "must begin with the name of a tool"),
        ("Bash(ls", 'must end with ")"'),
        ("Bash(ls) ", 'must end with ")"'),
        ("Bash(ls)x", 'must end with ")"'),
        ("Bash()", "must have an argument"),
        ("B" * 1001, "at most 1000 characters"),
    ],
)
def test_what_is_not_a_pattern_is_named(pattern: str, problem: str) -> None:
    assert problem in str(pattern_problem(pattern))


def test_many_stars_do_not_take_for_ever() -> None:
    pattern = f"Bash({'a*' * 400}b)"

    assert first_match([pattern], "Bash", {"command": "a" * 200_000}) is None
