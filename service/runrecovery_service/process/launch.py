"""Starting one process of an engine, and learning of its end. Linux only."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from runrecovery_service.process.evidence import COOKIE_VARIABLE, read_proc

_POLL_S: Final = 0.02


@dataclass(eq=False)
class LaunchFailed(Exception):
    """The command could not be started; no process is left of the attempt."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LaunchedProcess:
    """A running process, leader of its own session, with pipes to its standard streams.

    The pipes are unbuffered and blocking. Whoever hands one to an event loop hands over closing
    it too; `dispose` closes what is left.
    """

    pid: int
    start_ticks: int
    popen: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]


def launch(command: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> LaunchedProcess:
    """Start `command` in a new session and return once it has replaced the fork.

    Blocks for some milliseconds: call it in a thread. No shell is involved. The first word is
    looked up in the PATH of `env`, not in the service's own; a relative path is one below `cwd`.

    Args:
        env: the whole environment of the process; nothing of the service's is added.

    Raises:
        LaunchFailed: not found, not executable, or refused by the system.
    """
    if read_proc(os.getpid()) is None:
        raise LaunchFailed("launching needs /proc, to record what was launched")
    program = _resolve(command, cwd=cwd, path=env.get("PATH", os.defpath))
    try:
        popen = subprocess.Popen(  # noqa: S603 - an operator's configuration names the command
            command,
            executable=program,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=env,
            close_fds=True,
            start_new_session=True,
        )
    except OSError as error:
        raise LaunchFailed(f"{error.strerror}: {error.filename or command[0]}") from error
    except ValueError as error:  # a NUL in a word, a "=" in a variable's name
        raise LaunchFailed(f"{command[0]}: {error}") from error
    return _describe(popen)


def _describe(popen: subprocess.Popen[bytes]) -> LaunchedProcess:
    # Readable even if it has ended already: nobody has reaped it.
    proc = read_proc(popen.pid)
    if proc is None or popen.stdin is None or popen.stdout is None or popen.stderr is None:
        raise LaunchFailed(f"/proc does not show the new process {popen.pid}")
    return LaunchedProcess(
        pid=popen.pid,
        start_ticks=proc.start_ticks,
        popen=popen,
        stdin=popen.stdin,
        stdout=popen.stdout,
        stderr=popen.stderr,
    )


def _resolve(command: Sequence[str], *, cwd: Path, path: str) -> str:
    if not command or not command[0]:
        raise LaunchFailed("the engine's command is empty")
    name = command[0]
    if "/" in name:
        places = [(cwd / name).absolute()]
    else:
        # Relative entries would let a run's workspace choose the program.
        places = [Path(entry) / name for entry in path.split(os.pathsep) if entry.startswith("/")]
    files = [place for place in places if _is_file(place)]
    for file in files:
        if os.access(file, os.X_OK):
            return str(file)
    where = "" if "/" in name else " on the engine's PATH"
    raise LaunchFailed(f"{name} is not {'executable' if files else 'found'}{where}")


def why_not_launchable(command: Sequence[str], *, env_allow: Iterable[str]) -> str | None:
    """Return why a command could not be launched from here, None if it could be found."""
    env = agent_environment(env_allow, os.environ, {})
    try:
        _resolve(command, cwd=Path.cwd(), path=env.get("PATH", os.defpath))
    except LaunchFailed as error:
        return error.reason
    return None


def _is_file(place: Path) -> bool:
    try:
        return place.is_file()
    except (OSError, ValueError):
        return False


def agent_environment(
    allow: Iterable[str], source: Mapping[str, str], extra: Mapping[str, str]
) -> dict[str, str]:
    """Return the allowed variables of `source`, then `extra`, which wins.

    The lease's own variable comes from `extra` alone: one that the service inherited names a
    lease of somebody else.
    """
    passed = {name: source[name] for name in allow if name in source and name != COOKIE_VARIABLE}
    return passed | dict(extra)


async def wait_exit(popen: subprocess.Popen[bytes]) -> int:
    """Wait until the process ends; return its exit code, negative for the signal that ended it.

    The process is *not* reaped: as a zombie it keeps its pid and session number from being given
    away, so that a sweep can still prove who was in its session. Sweep first, then `dispose`.
    """
    if popen.returncode is None:  # else it is reaped, and its pid may be somebody else's
        await _ended(popen.pid)
    while (code := _exit_code(popen)) is None:  # noqa: ASYNC110 - nothing would set an Event
        await asyncio.sleep(_POLL_S)
    return code


async def _ended(pid: int) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return  # no file descriptor left: the caller asks now and then
    try:
        await _readable(pidfd)
    finally:
        os.close(pidfd)


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def note() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, note)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def _exit_code(popen: subprocess.Popen[bytes]) -> int | None:
    if popen.returncode is not None:
        return popen.returncode
    try:
        seen = os.waitid(os.P_PID, popen.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:  # reaped by somebody else; Popen knows how to say so
        return popen.poll()
    if seen is None:
        return None
    return seen.si_status if seen.si_code == os.CLD_EXITED else -seen.si_status


def dispose(process: LaunchedProcess) -> int:
    """Close the pipes that are still open, reap the process and return its exit code.

    Blocks until the process has ended; afterwards its pid may be given away.
    """
    for pipe in (process.stdin, process.stdout, process.stderr):
        pipe.close()
    return process.popen.wait()
