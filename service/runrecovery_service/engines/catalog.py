"""The configured engines. A caller names an engine and never chooses a command."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Final

from runrecovery_service.domain.errors import UnknownEngine
from runrecovery_service.domain.run import Profile, RestartPolicy, Run
from runrecovery_service.domain.session_check import (
    SessionCheck,
    SessionFinding,
    StoredHandle,
    UnknownSession,
    apply_policy,
    weaken_if_never_seen,
)
from runrecovery_service.domain.usage import UNLIMITED, Budget
from runrecovery_service.engines.dialect import Dialect
from runrecovery_service.engines.jsonl import JSON_LINES
from runrecovery_service.engines.sessions.files import CliSessions, NamedFiles, SessionStore
from runrecovery_service.lazy_dataclass import dataclass

_FILE_SAFE: Final = re.compile(r"[A-Za-z0-9._-]{1,512}")
_PLACEHOLDER: Final = re.compile(r"\{(workspace|value)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One configured engine.

    Attributes:
        command: the words of its command. The first word is searched in the engine's own PATH.
        profile: the profile of its runs. CreateRun is refused if it names another one.
        dialect: how its processes communicate with the service.
        env_allow: names of the service's environment variables that its processes get.
        env: further variables of its processes, which override the variables of `env_allow`.
        max_concurrent: the most of its processes at one time. None: only the limit of the service.
        session_file: the path of a session's file, with `{workspace}` and `{value}` (the session
            handle) as placeholders. None: not known.
        sessions: the sessions of its agent CLI, which override `session_file`. None: the engine is
            no agent CLI that this version knows.
        unknown_session: how a session counts when its check could not decide.
        session_timeout_s: how long a question waits if its process is sticky, or if no reply of the
            user is required.
        require_user_reply: whether only the user can answer. If not, a question is decided
            automatically after `session_timeout_s`.
        restart_policy: the policy of its runs, unless CreateRun names another one.
        max_resumes: how often one turn can be resumed after interruptions. 0: the engine cannot be
            resumed in the middle of a turn.
        max_run_time_s: the longest time of a run since its first launch. None: no limit.
        budget: the limits on the usage of one of its runs, unless CreateRun names lower ones.
        niceness, max_memory, max_open_files, max_processes: limits of its processes
            (`process.resource_limits`). None: the service sets no limit.
        trust: the CLI (`trust.config_files.AgentCli`) that the service makes trust the workspaces
            of its runs. None: no CLI.
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
    restart_policy: RestartPolicy = RestartPolicy.FAIL
    max_resumes: int = 0
    max_run_time_s: float | None = None
    budget: Budget = UNLIMITED
    niceness: int = 0
    max_memory: int | None = None
    max_open_files: int | None = None
    max_processes: int | None = None
    trust: str | None = None

    def session_path(self, workspace: Path, value: str) -> Path | None:
        """Return the file of the session with the handle `value`, or None if there is no safe path.

        There is none if the engine has no `session_file`, or if the handle, which comes from the
        engine's output, is anything but up to 512 letters, digits and `._-`.
        """
        if self.session_file is None or not _FILE_SAFE.fullmatch(value) or value in {".", ".."}:
            return None
        words = {"workspace": str(workspace), "value": value}
        # One pass, so that a placeholder in the path of the workspace itself stays.
        return Path(_PLACEHOLDER.sub(lambda found: words[found[1]], self.session_file))

    @property
    def session_store(self) -> SessionStore | None:
        """The sessions of the engine. None: they cannot be checked, so all handles are valid."""
        if self.sessions is not None or self.session_file is None:
            return self.sessions
        return NamedFiles(lambda stored: self.session_path(stored.workspace, stored.handle))

    @property
    def session_check(self) -> SessionCheck | None:
        """The check of the engine's sessions. None: every handle counts as valid."""
        if self.session_store is None:
            return None
        return SessionCheck(partial(check_sessions, self), self.unknown_session)


def check_sessions(
    engine: Engine, handles: Sequence[StoredHandle], *, seen_before: bool = True
) -> Iterator[SessionFinding]:
    """Yield for each session whether it can be resumed; nothing if the engine has no check.

    Args:
        seen_before: True if the engine named these handles. If a handle then has no fingerprint,
            its session was never seen, and INVALID becomes UNKNOWN. False if a caller names a
            handle, whose session must be seen now.
    """
    store = engine.session_store
    if store is None:
        return
    for stored, found in zip(handles, store.check(handles), strict=True):
        has_fingerprints = seen_before and engine.sessions is not None
        finding = weaken_if_never_seen(found, stored.fingerprint) if has_fingerprints else found
        yield apply_policy(finding, engine.unknown_session)


class Catalog:
    """The configured engines, by name. Thread-safe: `replace` changes all engines at once."""

    def __init__(self, engines: Iterable[Engine]) -> None:
        self._engines = {engine.name: engine for engine in engines}

    def replace(self, other: Catalog) -> None:
        """Take the engines of another catalog. Earlier snapshots keep their engines."""
        self._engines = other._engines

    def snapshot(self) -> Catalog:
        """Return the present engines, for work that must use the same engines until its end."""
        return Catalog(self._engines.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The sorted names of the engines."""
        return tuple(sorted(self._engines))

    @property
    def limits(self) -> dict[str, int]:
        """The `max_concurrent` of each engine that has one."""
        return {
            name: engine.max_concurrent
            for name, engine in self._engines.items()
            if engine.max_concurrent is not None
        }

    def session_type(self, name: str) -> str:
        """Return the type of an engine's session handles, also if the engine was removed."""
        engine = self._engines.get(name)
        return JSON_LINES.session_type if engine is None else engine.dialect.session_type

    def wait_s(self, run: Run) -> float:
        """Return how many seconds a question waits: the run's own time, else that of its engine.

        Raises:
            UnknownEngine: the run has no time of its own, and its engine is not configured.
        """
        return run.session_timeout_s or self.get(run.engine).session_timeout_s

    def get(self, name: str) -> Engine:
        """Return the engine of that name.

        Raises:
            UnknownEngine: the configuration has none.
        """
        engine = self._engines.get(name)
        if engine is None:
            raise UnknownEngine(engine=name, known=self.names)
        return engine
