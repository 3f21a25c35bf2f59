"""Finds the result or question of a turn that had ended before the service could record it.

The stored output is parsed by the same dialect and the same rules as the output of a living
process. An end counts only under three conditions. The shim has recorded that the agent exited with
0. A record says that all of the output was stored. The machine has not been booted since.
"""

from __future__ import annotations

from typing import Final

import structlog

from runrecovery_service.agents.output import OutputChannel, OutputFiles
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.domain.errors import UnknownEngine
from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.turn import Asked, ProcessEnd, Succeeded, is_repeated, judge
from runrecovery_service.domain.usage import TurnUsage
from runrecovery_service.engines.catalog import Catalog
from runrecovery_service.engines.dialect import (
    Dialect,
    HandleUnusable,
    KeptTurn,
    Listener,
    ProtocolError,
)
from runrecovery_service.engines.permissions import deferred_calls
from runrecovery_service.execution.turn_state import (
    CompareEnds,
    LineRead,
    RecordQuestion,
    RecordSession,
    TurnRules,
    TurnState,
    advance,
)
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.shim_journal import read_end
from runrecovery_service.storage.found_ends import OpenTurn

log = structlog.get_logger()

REREAD_BYTES: Final = 16 << 20
REREAD_LINES: Final = 100_000
"""The most bytes and lines of one turn's output that are parsed again, because parsing delays the
start. A line of a few bytes takes some 10 µs, a report of usage 50 µs."""


class NothingFound(Exception):
    """The stored output does not show with certainty how the turn ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndFinder:
    """Finds the ends of turns in the stored output.

    Attributes:
        boot_id: the current boot of the machine.
    """

    catalog: Catalog
    workspaces: Workspaces
    output: OutputFiles
    boot_id: str

    def find(self, turn: OpenTurn) -> FoundEnd | None:
        """Return the end that a turn's stored output shows, or None if it is unclear. Blocking."""
        try:
            end, used = self._find(turn)
            wait_s = turn.session_timeout_s or self.catalog.get(turn.engine).session_timeout_s
        except (NothingFound, ProtocolError, HandleUnusable, UnknownEngine, OSError):
            return None
        except Exception as error:
            kind = type(error).__name__
            log.warning("recovery.output_not_read", run_id=turn.run_id, error=kind, exc_info=True)
            return None
        return FoundEnd(
            end=end,
            wait_s=None if turn.require_user_reply else wait_s,
            used=used,
            is_last=turn.budget.why_used_up_by(used, before=turn.used_before) is not None,
        )

    def _find(self, turn: OpenTurn) -> tuple[Asked | Succeeded, TurnUsage | None]:
        if turn.boot_id != self.boot_id:  # a crash of the machine can have lost the last output
            raise NothingFound
        journal = self.workspaces.shim_journal(turn.run_key, turn.attempt, turn.turn)
        ended = read_end(journal, turn.shim)
        if ended is None or ended.exit_code != 0 or ended.end - ended.begin > REREAD_BYTES:
            raise NothingFound
        size = ended.end - ended.begin
        kept = self.output.read(turn.run_key, turn.attempt, OutputChannel.STDOUT, ended.begin, size)
        if len(kept.data) != size or kept.data.count(b"\n") > REREAD_LINES:
            raise NothingFound
        dialect = self.catalog.get(turn.engine).dialect
        return end_of_output(kept.data, dialect, turn, kept_turn(self.workspaces, turn))


def kept_turn(workspaces: Workspaces, turn: OpenTurn) -> KeptTurn:
    """Return the facts that are needed to parse the stored output of a turn."""
    session, place = turn.session, (turn.run_key, turn.attempt)
    return KeptTurn(
        handle=None if session is None else session.handle,
        is_resumed=session is not None and session.turn < turn.turn,
        used_before=turn.session_usage,
        workspace=str(workspaces.workspace(*place)),
        deferred=deferred_calls(workspaces.permissions(*place), turn.turn),
    )


def end_of_output(
    output: bytes, dialect: Dialect, turn: OpenTurn, kept: KeptTurn
) -> tuple[Asked | Succeeded, TurnUsage | None]:
    """Return the result or question at the end of a process's whole output, and the usage in it.

    Raises:
        NothingFound, ProtocolError, HandleUnusable: the output does not end with a usable result or
            question by the rules for a living process.
    """
    session = turn.session
    if session is not None and session.type != dialect.session_type:
        raise HandleUnusable
    listener = dialect.reread(kept)
    rules = TurnRules(
        profile=turn.profile,
        resumes=session is not None,
        ends_once=dialect.ends_once,
        exit_grace_s=0.0,
    )
    state, sessions_named = TurnState(), 0
    for line in _lines(output):
        state, named = _take_line(state, line, listener, rules)
        sessions_named += named
    end = judge(state, ProcessEnd(exit_code=0, failure=listener.failure(0, "")))
    if state.is_at_work or not isinstance(end, Asked | Succeeded):
        raise NothingFound
    # The session that the process named last must be the recorded one.
    if isinstance(end, Asked) and sessions_named > (session is not None and not kept.is_resumed):
        raise NothingFound
    return end, state.used


def _lines(output: bytes) -> list[bytes]:
    *lines, last = output.split(b"\n")
    return [*lines, last] if last else lines


def _take_line(
    state: TurnState, line: bytes, listener: Listener, rules: TurnRules
) -> tuple[TurnState, int]:
    """Return the state after a line, and the number of sessions that the line named."""
    heard, sessions_named = listener.hear(line), 0
    for event in (*heard.messages, LineRead(heard.at_work)):
        state, action = advance(state, event, rules, now_s=0.0)
        match action:
            case CompareEnds(first, second) if not is_repeated(first, second):
                raise NothingFound
            case RecordQuestion():  # the output does not show whether a reply followed
                raise NothingFound
            case RecordSession():
                sessions_named += 1
            case _:
                pass
        if state.protocol_error is not None:
            raise NothingFound
    return state, sessions_named
