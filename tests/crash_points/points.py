"""Named crash points, which this module adds to a service when the service is forked.

The service itself has no such points, and no switch for them. `prepare` wraps what EFFECTS names,
and the COMMIT of the database. A point is named `PHASE: before|after EFFECT` or
`PHASE: commit of USE CASE`. A use case is the outermost function of `storage/` on the stack of a
statement that changes rows, so a new use case is a new point by itself.

The folder in the environment variable FOLDER has two files. Each point that a service passes is
appended to `passed`. A service that passes one of the points that `armed` names is killed.
"""

from __future__ import annotations

import inspect
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import runrecovery_service

FOLDER: Final = "TESTS_CRASH_POINTS"
MUTANT: Final = "TESTS_CRASH_POINTS_MUTANT"
ROOT: Final = Path(runrecovery_service.__file__).parent
INFRASTRUCTURE: Final = frozenset(
    {
        "async_storage", "commit_count", "database", "group_commit", "postgresql",
        "reserved_connection", "sqlite_file", "statements", "store_timer", "trial", "use_case",
    }
)  # fmt: skip
"""Modules of `storage/` that carry use cases out. `trial` rolls back what it writes."""
CHANGES: Final = re.compile(r"\s*(WITH\b.*\b)?(INSERT|UPDATE|DELETE|REPLACE)\b", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Effect:
    """A function that changes something outside of the database, or lets others act.

    Attributes:
        name: the effect, in the names of its two points.
        module: the module below `runrecovery_service`.
        attribute: the function, or `Class.method`.
    """

    name: str
    module: str
    attribute: str


EFFECTS: Final = (
    Effect("spawn of a shim", "process.launch", "_spawn"),
    Effect("order to a shim", "process.shimmed_process", "ShimmedProcess.send_order"),
    Effect("release of a gate", "process.shimmed_process", "ShimmedProcess.release"),
    Effect("close of a gate", "process.shimmed_process", "ShimmedProcess.close_gate"),
    Effect("leaving output", "process.shimmed_process", "ShimmedProcess.leave_output"),
    Effect("signal", "process.signals", "_send"),
    Effect("first input", "execution.pipes", "fill"),
    Effect("input", "execution.pipes", "write_all"),
    Effect("making a workspace", "agents.workspaces", "Workspaces.prepare"),
    Effect("files of a CLI", "execution.cli_launch", "write_files"),
    Effect("keeping output", "agents.output", "OutputFiles.append"),
    Effect("position of output", "process.spool", "Spool._write_position"),
    Effect("record of kept output", "process.shim_journal", "record_kept"),
    Effect("completing output", "execution.output_completer", "OutputCompleter._complete"),
    Effect("making a trust file", "trust.files", "_write"),
    Effect("replacing a trust file", "trust.files", "_swap"),
    Effect("rotating backups", "trust.files", "_rotate_backups"),
    Effect("count of commits", "storage.commit_count", "CommitMarker.write"),
    Effect("synced file", "storage.durable_files", "durably_write"),
    Effect("note of a renewal", "renewal_note", "RenewalNote._write"),
    Effect("webhook", "webhooks.http_post", "post"),
    Effect("listening", "listeners", "Listeners.bind"),
    Effect("opening to callers", "rpc.gate", "Gate.open"),
    Effect("closing to callers", "rpc.gate", "Gate.close"),
    Effect("hand-over", "recovery.hand_over", "HandOver.run"),
    Effect("takeover", "recovery.takeover", "TakeoverLoop._recover"),
)


def find(module: str, attribute: str) -> tuple[Any, str, Callable[..., Any]]:
    """Return the owner of a function below `runrecovery_service`, its name, and the function.

    Raises:
        ImportError, AttributeError: the function does not exist.
    """
    owner: Any = import_module(f"runrecovery_service.{module}")
    *classes, name = attribute.split(".")
    for each in classes:
        owner = getattr(owner, each)
    return owner, name, getattr(owner, name)


# -- passing a point -------------------------------------------------------------------------------


class _Passing:
    """The points that this process passes."""

    def __init__(self, folder: Path) -> None:
        self.phase = "start"
        self._folder = folder
        self._passed = os.open(folder / "passed", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def point(self, name: str) -> None:
        """Record that a point is passed, and kill this process if the point is armed."""
        full = f"{'takeover' if _thread.in_takeover else self.phase}: {name}"
        os.write(self._passed, f"{os.getpid()}\t{full}\n".encode())
        armed = self._folder / "armed"
        try:
            order = armed.read_text("utf-8")
        except FileNotFoundError:
            return
        facts, *wanted = order.split("\n")
        if full not in wanted:
            return
        times, shims, _ = facts.split()
        with self._lock:
            self._counts[order, full] += 1
            if self._counts[order, full] != int(times):
                return
        with suppress(FileNotFoundError):  # another process was first
            armed.rename(fired := self._folder / f"fired-{os.getpid()}")
            fired.write_text(full, "utf-8")
            _crash(with_shims=shims == "1")


def _crash(*, with_shims: bool) -> None:
    """Kill this process, and its shims before it if agents shall outlive both."""
    for pid in shims_of(os.getpid()) if with_shims else ():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def shims_of(service: int) -> list[int]:
    """Return the pids of the shims of a service."""
    found = []
    for entry in os.scandir("/proc"):
        with suppress(OSError, ValueError, IndexError):
            parent = Path(entry.path, "stat").read_text("utf-8", "replace").rpartition(")")[2]
            is_child = int(parent.split()[1]) == service
            if is_child and b"shim_main" in Path(entry.path, "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


class _ThreadState(threading.local):
    """What the current thread does.

    Attributes:
        in_takeover: whether it takes over a dead instance.
        use_cases: the use cases whose statements belong to the open transaction.
        before: the connection's number of changed rows at the beginning of the transaction.
    """

    def __init__(self) -> None:
        self.in_takeover = False
        self.use_cases: dict[str, None] = {}
        self.before = 0


_thread: Final = _ThreadState()


# -- installing ------------------------------------------------------------------------------------


def prepare() -> None:
    """Add the points to the service of this process, which has not started yet."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    passing = _Passing(Path(os.environ.pop(FOLDER)))
    # A turn that two kills have interrupted would be resumed after 10 s. The eleventh pause must be
    # the longest nevertheless.
    interruption: Any = import_module("runrecovery_service.domain.interruption")
    interruption.FIRST_DELAY_S = 0.3
    if mutant := os.environ.pop(MUTANT, None):
        import_module("crash_points.mutants").MUTANTS[mutant].apply()
    for effect in EFFECTS:
        owner, name, found = find(effect.module, effect.attribute)
        _replace(owner, name, _with_points(passing, effect.name, found))
    _follow_phases(passing)
    _follow_commits(passing)


def _replace(owner: Any, name: str, wrapped: Callable[..., Any]) -> None:
    """Replace a function, also where other modules have imported it by its name."""
    original = getattr(owner, name)
    setattr(owner, name, wrapped)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("runrecovery_service"):
            for alias, value in list(vars(module).items()):
                if value is original:
                    setattr(module, alias, wrapped)


def _with_points(passing: _Passing, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @wraps(function)
        async def run_async(*args: Any, **named: Any) -> Any:
            passing.point(f"before {name}")
            result = await function(*args, **named)
            passing.point(f"after {name}")
            return result

        return run_async

    @wraps(function)
    def run(*args: Any, **named: Any) -> Any:
        passing.point(f"before {name}")
        result = function(*args, **named)
        passing.point(f"after {name}")
        return result

    return run


def _follow_phases(passing: _Passing) -> None:
    """Keep the phase of the process, and whether a thread is in a takeover."""
    lifecycle: Any = import_module("runrecovery_service.lifecycle")
    takeover: Any = import_module("runrecovery_service.recovery.takeover")
    serve, shut_down = lifecycle.Service._serve, lifecycle.Service._shut_down
    recover = takeover.TakeoverLoop._recover

    def serve_in_phase(self: Any, report: Any) -> None:
        serve(self, report)
        passing.phase = "serving"

    async def shut_down_in_phase(self: Any) -> None:
        passing.phase = "stop"
        await shut_down(self)

    def recover_in_takeover(self: Any, *args: Any) -> Any:
        _thread.in_takeover = True
        try:
            return recover(self, *args)
        finally:
            _thread.in_takeover = False

    lifecycle.Service._serve = serve_in_phase
    lifecycle.Service._shut_down = shut_down_in_phase
    takeover.TakeoverLoop._recover = recover_in_takeover


def _follow_commits(passing: _Passing) -> None:
    """Pass a point after each COMMIT that has changed rows, before anything learns of it."""
    peewee: Any = import_module("peewee")
    sqlite: Any = import_module("runrecovery_service.storage.sqlite_file")
    postgresql: Any = import_module("runrecovery_service.storage.postgresql")
    ours = (sqlite._Sqlite, postgresql.PostgreSQL)
    for kind in (peewee.Database, peewee.SqliteDatabase, peewee.PostgresqlDatabase, *ours):
        for name, follow in (
            ("execute_sql", _executing),
            ("begin", _beginning),
            ("commit", partial(_committing, passing)),
        ):
            if name in vars(kind):
                setattr(kind, name, follow(getattr(kind, name)))


def _executing(execute_sql: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(execute_sql)
    def execute(self: Any, sql: str, params: Any = None) -> Any:
        if CHANGES.match(sql) and (name := use_case_on_stack()) is not None:
            _thread.use_cases[name] = None
        return execute_sql(self, sql, params)

    return execute


def _committing(passing: _Passing, commit: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(commit)
    def committed(self: Any) -> None:
        commit(self)
        use_cases, _thread.use_cases = _thread.use_cases, {}
        if _changed_rows(self) != _thread.before:
            for name in use_cases:
                passing.point(f"commit of {name}")

    return committed


def _beginning(begin: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(begin)
    def begin_and_note(self: Any, *args: Any, **named: Any) -> None:
        begin(self, *args, **named)
        _thread.use_cases, _thread.before = {}, _changed_rows(self)

    return begin_and_note


def _changed_rows(peewee: Any) -> int:
    rows = getattr(peewee, "changed_rows", None)
    return int(peewee.connection().total_changes if rows is None else rows)


def use_case_on_stack() -> str | None:
    """Return the outermost use case that the calling thread runs, as `module.function`."""
    frame, found = sys._getframe(1), None
    for code in _codes(frame):
        path = Path(code.co_filename)
        if path.parent == ROOT / "storage" and path.stem not in INFRASTRUCTURE:
            found = f"{path.stem}.{code.co_qualname.partition('.<locals>')[0]}"
    return found


def _codes(frame: Any) -> Iterator[Any]:
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back
