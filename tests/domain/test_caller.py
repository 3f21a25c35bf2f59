"""What a caller may do, and which tokens are long enough."""

from __future__ import annotations

import base64
import random

import pytest
from runrecovery_service.domain.caller import Caller, token_problem
from runrecovery_service.domain.errors import EngineNotAllowed, RoleNotSufficient, RunNotFound
from runrecovery_service.domain.role import Role

RANDOM = random.Random(1)  # noqa: S311 - the same in every run
BYTES = RANDOM.randbytes(16)
LEAST = "must have at least 128 random bits, for example 32 hexadecimal digits"


@pytest.mark.parametrize(
    "token",
    [
        BYTES.hex(),
        BYTES.hex().upper(),
        base64.urlsafe_b64encode(BYTES).decode(),
        base64.b64encode(RANDOM.randbytes(32)).decode(),
        base64.b32encode(BYTES).decode().lower(),
        f"ghp_{base64.urlsafe_b64encode(BYTES).decode().rstrip('=')}",
    ],
)
def test_128_random_bits_are_enough_in_every_usual_form(token: str) -> None:
    assert token_problem(token) is None


@pytest.mark.parametrize(
    ("token", "problem"),
    [
        ("hunter2", LEAST),
        (BYTES.hex()[:31], LEAST),
        ("1234567890" * 3, LEAST),
        ("a" * 64, LEAST),
        ("abcabc" * 12, LEAST),
        (base64.urlsafe_b64encode(BYTES[:15]).decode(), LEAST),
        ("", "must be one line of letters, digits and -._~+/="),
        ("two words " * 8, "must be one line of letters, digits and -._~+/="),
        ("\u00e4" * 64, "must be one line of letters, digits and -._~+/="),
        (BYTES.hex() + "\n", "must be one line of letters, digits and -._~+/="),
    ],
)
def test_weak_tokens_are_refused(token: str, problem: str) -> None:
    assert token_problem(token) == problem


def test_each_role_includes_the_ones_before_it() -> None:
    allowed = {}
    for role in Role:
        caller = Caller(name="c", role=role)
        allowed[role.name] = ""
        for needed in Role:
            try:
                caller.demand_role(needed)
            except RoleNotSufficient:
                continue
            allowed[role.name] += needed.name[0]

    assert allowed == {"VIEWER": "V", "REPLIER": "VR", "CREATOR": "VRC", "OPERATOR": "VRCO"}


def test_a_caller_of_some_engines_sees_and_creates_their_runs_only() -> None:
    caller = Caller(name="c", role=Role.CREATOR, engines=frozenset({"a"}))

    caller.demand_engine("a")
    caller.demand_visible("r", "a")
    with pytest.raises(EngineNotAllowed, match="caller 'c' may not create runs of engine 'b'"):
        caller.demand_engine("b")
    with pytest.raises(RunNotFound, match="no run has the id 'r'"):
        caller.demand_visible("r", "b")
