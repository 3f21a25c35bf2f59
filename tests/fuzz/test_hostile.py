"""A short campaign of hostile input. `make fuzz` plays more cases, and detects every mutant."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from fuzz import wire
from fuzz.cases import METHODS, OURS, Case, cases
from fuzz.hostile import SEEDS, is_detected, run_cases
from fuzz.lexicon import Lexicon
from fuzz.mutants import MUTANTS
from fuzz.oracle import documented, leaks, parsed, request_problems
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from runrecovery.v1 import errors_pb2

CASES: Final = 120
MUTANT_CASES: Final = 400
QUICK_MUTANT: Final = "unknown"
"""Found out within a few dozen cases."""


def made(seed: int) -> list[Case]:
    """The first cases of a seed."""
    found: list[Case] = []

    @seeded(seed)
    @settings(
        max_examples=60,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(Lexicon(tokens=[b"@t00@"], report_ids=[b"@r00@"])))
    def keep(case: Case) -> None:
        found.append(case)

    keep()
    return found


def test_no_input_gets_more_than_a_documented_refusal() -> None:
    summary = run_cases(secrets.randbelow(SEEDS), CASES)

    assert list(summary.found) == [], [*summary.lines()]
    assert summary.played >= CASES


@pytest.mark.parametrize("script", ["fuzz/hostile.py", "campaign/processes.py"])
def test_the_command_of_a_campaign_starts(script: str) -> None:
    path = Path(__file__).parents[1] / script
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    done = subprocess.run(
        [sys.executable, path, "--help"], capture_output=True, check=False, env=environ
    )

    assert (done.returncode, done.stderr) == (0, b"")


def test_the_campaign_finds_the_fault_of_a_broken_service() -> None:
    assert is_detected(QUICK_MUTANT, 1, MUTANT_CASES)


def test_a_seed_gives_the_same_cases_again() -> None:
    assert made(7) == made(7)
    assert made(7) != made(8)


def test_every_method_of_the_contract_is_called() -> None:
    missing = set(OURS)
    for seed in range(20):
        missing -= {case.method for case in made(seed)}
        if not missing:
            return
    raise AssertionError(f"in no case of 20 seeds: {missing}")


def test_every_mutant_names_existing_faults() -> None:
    from fuzz.oracle import Fault

    assert all(mutant.faults <= Fault.__members__.keys() for mutant in MUTANTS.values())


def test_docs_api_has_the_status_code_of_every_reason() -> None:
    reasons = {name.removeprefix("ERROR_REASON_") for name in errors_pb2.ErrorReason.keys()}  # noqa: SIM118

    assert documented().codes.keys() == reasons - {"UNSPECIFIED"}


CREATE: Final = "/runrecovery.v1.RunService/CreateRun"
WRONG: Final = {
    "NUL": wire.sized(2, b"a\0b"),
    "no run_id": wire.sized(1, b"UPPER"),
    "NaN": wire.sized(4, wire.json_struct([("a", float("nan"))])),
    "33 deep": wire.sized(4, wire.entry(1, b"a", wire.deep_value(32, lists=False))),
    "no kind": wire.sized(4, wire.entry(1, b"a", b"")),
    "unknown enum": wire.number(5, 99),
    "33 labels": b"".join(wire.entry(3, b"l%d" % number, b"") for number in range(33)),
    "no request_id": wire.sized(7, b"1"),
}


@pytest.mark.parametrize("payload", WRONG.values(), ids=WRONG)
def test_the_oracle_finds_what_is_wrong_with_an_invalid_request(payload: bytes) -> None:
    request = parsed(Case(method=CREATE, payload=payload), payload)

    assert request is not None
    assert list(request_problems(request))


def test_the_oracle_finds_nothing_wrong_with_a_valid_request() -> None:
    deepest = wire.entry(1, b"a", wire.deep_value(31, lists=False))
    payload = wire.sized(1, b"a-1") + wire.sized(4, deepest) + wire.number(5, 2)
    request = parsed(Case(method=CREATE, payload=payload), payload)

    assert request is not None
    assert list(request_problems(request)) == []


def test_bytes_that_are_no_message_are_parsed_as_none() -> None:
    for method in METHODS:
        assert parsed(Case(method=method, payload=b"\xff"), b"\xff") is None


@pytest.mark.parametrize(
    "text",
    [
        'Traceback (most recent call last):\n  File "x"',
        "no such file: /var/lib/x/runrecovery.db",
        "UNIQUE constraint failed in INSERT INTO run",
        "Unexpected <class 'google.protobuf.message.DecodeError'>",
        "<Task object at 0x7f00deadbeef>",
        "runrecovery_service.storage.runs",
    ],
)
def test_an_internal_detail_is_a_leak_unless_the_caller_sent_it(text: str) -> None:
    assert list(leaks([text], b""))
    assert list(leaks([text], text.encode())) == []


def test_a_documented_text_is_no_leak() -> None:
    told = "run_id: must match [a-z0-9][a-z0-9_-]{0,63}; labels['UPPER']: the key must match"

    assert (
        list(leaks([told, "type.googleapis.com/google.rpc.ErrorInfo", "runs/nightly-7"], b"")) == []
    )
