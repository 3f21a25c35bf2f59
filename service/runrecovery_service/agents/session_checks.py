"""Looks at one session, while somebody waits: not for ever."""

from __future__ import annotations

from typing import Final

from runrecovery_service import daemon_threads
from runrecovery_service.domain.session_check import (
    NOT_ANSWERED,
    SessionFinding,
    StoredHandle,
    apply_policy,
)
from runrecovery_service.engines.catalog import Engine, check_sessions
from runrecovery_service.engines.sessions.files import CliSessions, SessionObservation

LOOK_S: Final = 10.0
"""How long storage may take to answer."""


async def check_session(
    engine: Engine, stored: StoredHandle, *, look_s: float, seen_before: bool = True
) -> SessionFinding | None:
    """Return what a session's check says; None: its engine has none."""

    def look() -> list[SessionFinding]:
        return list(check_sessions(engine, [stored], seen_before=seen_before))

    if engine.session_store is None:
        return None
    try:
        (finding,) = await daemon_threads.run_within(look_s, look)
    except TimeoutError:
        return apply_policy(NOT_ANSWERED, engine.unknown_session)
    return finding


async def fingerprint_session(
    sessions: CliSessions, stored: StoredHandle, *, look_s: float
) -> SessionObservation:
    """Return what is seen of a session, to be marked."""
    try:
        return await daemon_threads.run_within(look_s, lambda: sessions.observe(stored))
    except TimeoutError:
        return SessionObservation(NOT_ANSWERED, None)
