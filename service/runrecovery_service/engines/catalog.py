"""The engines that the operator configured. Callers name one; they never choose a command."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from runrecovery_service.domain.errors import UnknownEngine
from runrecovery_service.domain.run import Profile
from runrecovery_service.domain.session_check import (
    SessionCheck,
    SessionFinding,
    StoredHandle,
    UnknownSession,
    apply_policy,
    weaken_if_never_seen,
)
from runrecovery_service.engines.dialect import Dialect
from runrecovery_service.engines.jsonl import JSON_LINES
from runrecovery_service.engines.sessions.files import CliSessions, NamedFiles, SessionStore

_FILE_SAFE: Final = re.compile(r"[A-Za-z0-9._-]{1,512}")
_PLACEHOLDER: Final = re.compile(r"\{(workspace|value)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One configured engine.

    Attributes:
        command: the words of its command; the first is looked up in the engine's own PATH.
        profile: how its runs wait, unless CreateRun says otherwise.
        dialect: how its processes are spoken with.
        env_allow: names of the service's environment variables that it gets.
        env: variables that it gets beside those; they win.
        max_concurrent: its processes at one time; None: only the service's own limit holds.
        session_file: where it keeps a conversation, with `{workspace}` and `{value}` (the session
            handle) filled in; None: it does not say.
        sessions: where a CLI that this version knows keeps its conversations; it goes before
            `session_file`.
        unknown_session: what a restart does with a run whose session cannot be judged.
        session_timeout_s: how long a question waits: always that of a sticky process, and any
            that does not require its user's reply.
        require_user_reply: False: a question that waited so long is decided automatically.
        max_run_time_s: what a run may take from its first launch; None: any time.
        niceness, max_memory, max_open_files, max_processes: what its processes may use
            (`process.resource_limits`); None: no limit of ours.
        trust: the CLI (`trust.config_files.AgentCli`) that is to trust the workspaces of its
            runs; None: none.
    """

    name: str
    command: tuple[str, ...]
    profile: Profile
    env_allow: tuple[str, ...]
    max_concurrent: int | None
    session_file: str | None
    dialect: Dialect = JSON_LINES
    env: Mapping[str, str] = field(default_factory=dict)
    sessions: CliSessions | None = None
    unknown_session: UnknownSession = UnknownSession.KEEP
    session_timeout_s: float = 1_200.0
    require_user_reply: bool = True
    max_run_time_s: float | None = None
    niceness: int = 0
    max_memory: int | None = None
    max_open_files: int | None = None
    max_processes: int | None = None
    trust: str | None = None

    def session_path(self, workspace: Path, value: str) -> Path | None:
        """Return the file of the conversation `value`.

        None when the engine names no file, or when the handle could lead elsewhere: it came from
        the engine's output, and only letters, digits and `._-` (512 at most) go into a path.
        """
        if self.session_file is None or not _FILE_SAFE.fullmatch(value) or value in {".", ".."}:
            return None
        words = {"workspace": str(workspace), "value": value}
        # One pass: a workspace whose own path holds a placeholder is not filled in again.
        return Path(_PLACEHOLDER.sub(lambda found: words[found[1]], self.session_file))

    @property
    def session_store(self) -> SessionStore | None:
        """Where its sessions can be looked for; None: it is taken at its word."""
        if self.sessions is not None or self.session_file is None:
            return self.sessions
        return NamedFiles(lambda stored: self.session_path(stored.workspace, stored.handle))

    @property
    def session_check(self) -> SessionCheck | None:
        """What looks at its sessions; None: it is taken at its word."""
        if self.session_store is None:
            return None
        return SessionCheck(partial(check_sessions, self), self.unknown_session)


def check_sessions(
    engine: Engine, handles: Sequence[StoredHandle], *, seen_before: bool = True
) -> Iterator[SessionFinding]:
    """Say of each session whether it can be resumed, as far as that can be told without the
    engine; nothing of an engine without `session_store`.

    Args:
        seen_before: the handles are those that the engine named, which were marked if they could
            be seen. False: somebody else names one, and is to show that it can be resumed.
    """
    store = engine.session_store
    if store is None:
        return
    for stored, found in zip(handles, store.look(handles), strict=True):
        by_marks = seen_before and engine.sessions is not None
        finding = weaken_if_never_seen(found, stored.fingerprint) if by_marks else found
        yield apply_policy(finding, engine.unknown_session)


class Catalog:
    """The engines by name."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._engines = {engine.name: engine for engine in engines}

    @property
    def names(self) -> tuple[str, ...]:
        """The names, sorted."""
        return tuple(sorted(self._engines))

    @property
    def limits(self) -> dict[str, int]:
        """The engines that have a limit of their own, and that limit."""
        return {
            name: engine.max_concurrent
            for name, engine in self._engines.items()
            if engine.max_concurrent is not None
        }

    def session_type(self, name: str) -> str:
        """Return the type of the handles of an engine, which may be configured no more."""
        engine = self._engines.get(name)
        return JSON_LINES.session_type if engine is None else engine.dialect.session_type

    def get(self, name: str) -> Engine:
        """Return the engine of that name.

        Raises:
            UnknownEngine: the configuration has none.
        """
        engine = self._engines.get(name)
        if engine is None:
            raise UnknownEngine(engine=name, known=self.names)
        return engine
