"""The session files of Codex: where they are, and what they contain.

The path is `<home>/sessions/<year>/<month>/<day>/rollout-<time>-<id>.jsonl`, with the local day on
which the session began. The first line is a `session_meta` of some 20 KiB. The last line of a turn
is a `task_complete`. Codex can compress old files (`.zst`), which are found but not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.domain.session_check import SessionReason, StoredHandle
from runrecovery_service.domain.usage import StoredUsage, Usage
from runrecovery_service.engines.cli_usage import codex_tokens
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.engines.sessions.folders import Cache, home_of, names_in
from runrecovery_service.lazy_dataclass import dataclass

_SUFFIXES: Final = (".jsonl", ".jsonl.zst")
_ID_CHARACTERS: Final = 36
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
END_OF_TIME_MS: Final = 32_503_680_000_000
"""The year 3000. Later times count as invalid: an id can have a time that no `datetime` has."""
_ENDS: Final = frozenset({"task_complete", "turn_complete", "turn_aborted"})
_BEGINS: Final = frozenset({"task_started", "turn_started", "user_message"})


def sessions(env: Mapping[str, str]) -> CliSessions:
    """Return the sessions of Codex with these environment variables."""
    home = home_of(env, "CODEX_HOME", ".codex")
    if home is None:
        return CliSessions(None, None, CodexLayout())
    return CliSessions(
        home, lambda: CodexFinder(home / "sessions"), CodexLayout(), ledger=CodexLedger()
    )


def days_of(session_id: str) -> list[str]:
    """Return the folders, `year/month/day`, that can contain a session.

    The session's id (a UUID of version 7) contains a time in UTC. The folder is named by the local
    day, so it is the day of this time, the day before or the day after. For an id without a valid
    time, return no folders.
    """
    milliseconds = int(session_id[:8] + session_id[9:13], 16)
    if session_id[14] != "7" or milliseconds >= END_OF_TIME_MS:
        return []
    at = _EPOCH + timedelta(milliseconds=milliseconds)
    return [f"{at + timedelta(days=by):%Y/%m/%d}" for by in (0, -1, 1)]


def id_of(name: str) -> str:
    """Return the session id in the name of a file; empty for another file."""
    if not name.startswith("rollout-") or not name.endswith(_SUFFIXES):
        return ""
    return name.removesuffix(".zst").removesuffix(".jsonl")[-_ID_CHARACTERS:]


@dataclass(frozen=True, slots=True)
class CodexFinder:
    """Searches the likely day folders of a session, and then, once per batch, all folders."""

    root: Path
    _files: Cache[dict[str, Path]] = field(default_factory=Cache)

    def paths(self, stored: StoredHandle) -> Iterator[Path]:
        """Yield the file of the session, if there is one."""
        for day in days_of(stored.handle):
            if found := self._of_day(day).get(stored.handle):
                yield found
                return
        if found := self._files.get("all", self._of_all_days).get(stored.handle):
            yield found

    def _of_day(self, day: str) -> dict[str, Path]:
        return self._files.get(day, lambda: _files_in(self.root / day))

    def _of_all_days(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for year in names_in(self.root):
            for month in names_in(self.root / year):
                for day in names_in(self.root / year / month):
                    files |= self._of_day(f"{year}/{month}/{day}")
        return files


def _files_in(folder: Path) -> dict[str, Path]:
    names = reversed(names_in(folder))  # the file that is not compressed overrides the other
    return {found: folder / name for name in names if (found := id_of(name))}


class CodexLayout:
    """The format of Codex's session files."""

    def identify(self, head: Iterator[JsonObject], stored: StoredHandle) -> SessionReason | None:
        """Return why the first lines are not of this session, or None."""
        first = next(head)
        payload = first.get("payload")
        if first.get("type") != "session_meta" or not isinstance(payload, dict):
            return SessionReason.NOT_KNOWN
        if not isinstance(payload.get("id"), str) or not isinstance(payload.get("cwd"), str):
            return SessionReason.NOT_KNOWN
        own = (payload["id"], payload["cwd"]) == (stored.handle, str(stored.workspace))
        return None if own else SessionReason.ELSEWHERE

    def may_follow_end(self, line: JsonObject) -> bool:
        """Return False: Codex has no such lines."""
        return False

    def is_end_of_turn(self, line: JsonObject) -> bool | None:
        """Return whether a turn ends with the line, or None if the line does not show it."""
        payload = line.get("payload")
        kind = payload.get("type") if isinstance(payload, dict) else None
        if not isinstance(payload, dict) or not isinstance(kind, str):
            return None
        if line.get("type") == "event_msg":
            return True if kind in _ENDS else False if kind in _BEGINS else None
        if line.get("type") != "response_item":
            return None
        if kind == "message":
            return {"assistant": True, "user": False}.get(str(payload.get("role")))
        return False if kind.endswith(("_call", "_output")) else None


class CodexLedger:
    """The calls in a session file of Codex, which has two totals of the session.

    Codex writes a `token_usage_record` with the answer of each call. After the tools of the answer
    have run, it writes a `token_count`, and a resumed process adds to the total of the last one. So
    a call whose tool was interrupted is missing in every later `token_count`, and in the usage that
    Codex prints.
    """

    marks = (b'"token_usage_record"', b'"token_count"')
    is_in_output = False

    def sum(self, lines: Iterable[JsonObject]) -> StoredUsage:
        """Return the latest values of both totals. Older versions have only `token_count`."""
        calls = total = None
        for line in lines:
            match line:
                case {
                    "type": "token_usage_record",
                    "payload": {"thread_token_usage": dict(said)},
                }:
                    calls = codex_tokens(said)
                case {
                    "type": "event_msg",
                    "payload": {
                        "type": "token_count",
                        "info": {"total_token_usage": dict(said)},
                    },
                }:
                    total = codex_tokens(said)
        return StoredUsage(calls=calls or total or Usage(), total=total)
