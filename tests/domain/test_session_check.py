"""The finding of a session check: how it is recorded, explained, and changed by policy."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.explanation import RecordedDecision, explain_facts
from runrecovery_service.domain.recovery_matrix import NOTHING, Fact
from runrecovery_service.domain.run import (
    Profile,
    RecoveryInfo,
    RecoveryState,
    RestartPolicy,
    RunStatus,
)
from runrecovery_service.domain.session_check import (
    REASON_TEXTS,
    SessionFinding,
    SessionFingerprint,
    SessionReason,
    SessionVerdict,
    StoredHandle,
    UnknownSession,
    apply_policy,
    weaken_if_never_seen,
)
from runrecovery_service.engines.sessions.lines import FOUND
from runrecovery_service.storage.rows import finding_from

AT = datetime(2026, 11, 28, tzinfo=UTC)


def handle_source(finding: SessionFinding | None, *, held: bool, **changes: Any) -> str:
    """Return the explanation of the fact HANDLE."""
    info = RecoveryInfo(
        recovery_state=RecoveryState.RECOVERED_WAITING,
        recovery_reason="resumable_waiting_preserved",
        recovered_at=AT,
        reconciliation_id="r",
        recovery_count=1,
        status_before=RunStatus.WAITING_USER,
        status_after=RunStatus.WAITING_USER,
        error_code=None,
        instance="default",
        epoch=2,
        processes_ended=0,
    )
    seen = RecordedDecision(
        info=info,
        facts=Fact.HANDLE if held else NOTHING,
        profile=Profile.RESUMABLE,
        attempt=1,
        interaction_id=1,
        session_turn=3,
        session_finding=finding,
        restart_policy=RestartPolicy.FAIL,
        max_attempts=1,
        canceled_at=None,
        launches=(),
    )
    (source,) = (fact.source for fact in explain_facts(seen) if fact.name == "HANDLE")
    return source


@pytest.mark.parametrize("reason", SessionReason)
@pytest.mark.parametrize("unknown", UnknownSession)
def test_an_explanation_contains_the_reason_of_the_finding(
    reason: SessionReason, unknown: UnknownSession
) -> None:
    finding = apply_policy(FOUND[reason], unknown)

    source = handle_source(finding, held=finding.holds)

    assert source.startswith("A session handle of turn 3 was stored, ")
    assert REASON_TEXTS[reason] in source
    assert (f'unknown_session = "{unknown}"' in source) is (
        FOUND[reason].verdict is SessionVerdict.UNKNOWN
    )
    assert (", but " in source) is not finding.holds


def test_an_explanation_of_a_finding_without_a_reason_contains_its_verdict() -> None:
    assert "returned INVALID" in handle_source(
        SessionFinding(SessionVerdict.INVALID, None), held=False
    )


def test_an_explanation_distinguishes_an_unchecked_handle_from_no_handle() -> None:
    assert "no session check" in handle_source(None, held=True)
    assert handle_source(None, held=False) == "No session handle was stored."


def test_an_explanation_says_when_a_finding_proves_little() -> None:
    never_seen = weaken_if_never_seen(
        SessionFinding(SessionVerdict.INVALID, SessionReason.MISSING), None
    )
    inconclusive = SessionFinding(SessionVerdict.UNKNOWN, SessionReason.NOT_ANSWERED)
    proves_little = "which proves little because the session had never been seen intact"

    assert proves_little in handle_source(never_seen, held=True)
    assert proves_little not in handle_source(inconclusive, held=True)


@pytest.mark.parametrize("reason", SessionReason)
def test_unknown_session_changes_only_unknown_findings(reason: SessionReason) -> None:
    found = FOUND[reason]

    refused = apply_policy(found, UnknownSession.FAIL)

    assert apply_policy(found, UnknownSession.KEEP) == found
    assert refused.reason is reason
    assert refused.holds is (found.verdict is SessionVerdict.VALID)
    assert (refused == found) is (found.verdict is not SessionVerdict.UNKNOWN)


@given(st.integers(0, 2**63 - 1), st.integers(-(2**62), 2**63 - 1))
def test_a_fingerprint_is_read_as_it_was_written(size: int, mtime_ns: int) -> None:
    fingerprint = SessionFingerprint(size, mtime_ns)

    assert SessionFingerprint.read(str(fingerprint)) == fingerprint


@pytest.mark.parametrize("text", [None, "", "5", "5 x", "-5 1", "5 1 2", "5 1\n", "\uff19 1"])
def test_a_fingerprint_that_cannot_be_parsed_is_none(text: str | None) -> None:
    assert SessionFingerprint.read(text) is None


def test_unknown_parts_of_a_finding_of_another_version_are_none() -> None:
    assert finding_from("INVALID", None) == SessionFinding(SessionVerdict.INVALID, None)
    assert finding_from("VALID", "by_magic") == SessionFinding(SessionVerdict.VALID, None)
    assert finding_from("PERHAPS", "missing") is None
    assert finding_from(None, None) is None


def test_the_repr_of_a_handle_hides_it() -> None:
    assert "secret" not in repr(StoredHandle(handle="secret", workspace=Path("/w")))


@pytest.mark.parametrize("reason", SessionReason)
def test_a_lost_session_is_only_unknown_if_the_service_never_saw_it(reason: SessionReason) -> None:
    found = FOUND[reason]
    lost = found.verdict is SessionVerdict.INVALID and reason is not SessionReason.UNUSABLE

    assert weaken_if_never_seen(found, SessionFingerprint(1, 2)) == found
    assert weaken_if_never_seen(found, None) == (
        SessionFinding(SessionVerdict.UNKNOWN, reason) if lost else found
    )
