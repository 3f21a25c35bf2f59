"""Many sessions are checked at once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from runrecovery_service.domain.session_check import (
    SessionFinding,
    SessionFingerprint,
    SessionReason,
    StoredHandle,
)
from runrecovery_service.engines.sessions.lines import FOUND
from support.sessions import PRESETS, SessionHome


@pytest.mark.parametrize("preset", PRESETS)
def test_a_bulk_check_returns_its_findings_in_order(preset: str, tmp_path: Path) -> None:
    home = SessionHome(preset, tmp_path / "home")
    chosen = random.Random(7)  # noqa: S311 - cases, no secrets
    stored: list[StoredHandle] = []
    expected: list[SessionFinding] = []
    workspaces = [tmp_path / str(at) for at in range(50)]
    for at in range(1000):
        handle, workspace = home.new_id(at), workspaces[at % len(workspaces)]
        reason = chosen.choice(
            [
                SessionReason.WHOLE,
                SessionReason.UNCHANGED,
                SessionReason.MISSING,
                SessionReason.CUT_OFF,
                SessionReason.UNUSABLE,
            ]
        )
        fingerprint = None
        if reason in {SessionReason.WHOLE, SessionReason.UNCHANGED, SessionReason.CUT_OFF}:
            found = home.write(handle, workspace).stat()
            fingerprint = SessionFingerprint(found.st_size, found.st_mtime_ns)
        if reason is SessionReason.WHOLE:
            fingerprint = None
        elif reason is SessionReason.CUT_OFF and fingerprint is not None:
            fingerprint = SessionFingerprint(fingerprint.size + 1, fingerprint.mtime_ns)
        elif reason is SessionReason.UNUSABLE:
            handle = f"../{handle}"
        stored.append(StoredHandle(handle=handle, workspace=workspace, fingerprint=fingerprint))
        expected.append(FOUND[reason])

    assert list(home.store.check(stored)) == expected
