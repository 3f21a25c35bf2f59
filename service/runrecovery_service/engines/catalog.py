"""The engines that the operator configured. Callers name one; they never choose a command."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runrecovery_service.domain.errors import UnknownEngine
from runrecovery_service.domain.run import Profile

_FILE_SAFE: Final = re.compile(r"[A-Za-z0-9._-]{1,512}")
_PLACEHOLDER: Final = re.compile(r"\{(workspace|value)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One configured engine.

    Attributes:
        command: the words of its command; the first is looked up in the engine's own PATH.
        profile: how its runs wait, unless CreateRun says otherwise.
        env_allow: names of the service's environment variables that it gets.
        max_concurrent: its processes at one time; None: only the service's own limit holds.
        session_file: where it keeps a conversation, with `{workspace}` and `{value}` (the session
            handle) filled in; None: its handles cannot be checked.
        session_timeout_s: how long a question waits: always that of a sticky process, and any
            that does not require its user's reply.
        require_user_reply: False: a question that waited so long is decided automatically.
        max_run_time_s: what a run may take from its first launch; None: any time.
        niceness, max_memory, max_open_files, max_processes: what its processes may use
            (`process.launch.Bounds`); None: no limit of ours.
    """

    name: str
    command: tuple[str, ...]
    profile: Profile
    env_allow: tuple[str, ...]
    max_concurrent: int | None
    session_file: str | None
    session_timeout_s: float = 1_200.0
    require_user_reply: bool = True
    max_run_time_s: float | None = None
    niceness: int = 0
    max_memory: int | None = None
    max_open_files: int | None = None
    max_processes: int | None = None

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


def check_session(engine: Engine, workspace: Path, handle: str) -> bool:
    """Return whether a session can be resumed, as far as that can be told without the engine.

    Its file must exist, be a regular file (or lead to one) and hold something. An engine without
    `session_file` is taken at its word.
    """
    if not handle:
        return False
    if engine.session_file is None:
        return True
    path = engine.session_path(workspace, handle)
    try:
        return path is not None and path.is_file() and path.stat().st_size > 0
    except OSError:  # too long a name, no permission, gone in between
        return False


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

    def get(self, name: str) -> Engine:
        """Return the engine of that name.

        Raises:
            UnknownEngine: the configuration has none.
        """
        engine = self._engines.get(name)
        if engine is None:
            raise UnknownEngine(engine=name, known=self.names)
        return engine
