"""Services and commands that are forked from a process which has imported everything already.

An ordinary start spends most of its CPU time on imports. Each test worker keeps one forker: this
file as a program. It imports the service once and forks a child for each request. The child gets
its own session, working directory, environment and standard streams, and then calls the same
`main` as `python -m runrecovery_service` with the same arguments. From there on, both are alike.

The forker ends when its standard input closes, so also when its worker was killed.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Final

COMMAND_S: Final = 60.0
"""The most that a command may take."""
PREPARE: Final = "TESTS_PREPARE_SERVICE"
"""Environment variable: a program whose `prepare` is called in the child, before `main`."""
_MAX_REQUEST: Final = 1 << 20
_CANNOT_BE_SET_LATER: Final = ("GRPC_", "PYTHON", "LD_", "MALLOC_", "GLIBC_")
"""Environment variables that the interpreter and libraries read once, before `main` runs."""
_EXAMPLE: Final = Path(__file__).parents[2] / "runrecovery.example.toml"


# -- in the test -----------------------------------------------------------------------------------


class ForkedService:
    """A process that was forked, with the part of the interface of `Popen` that tests use."""

    def __init__(self, pid: int, pidfd: int, report: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = pidfd
        self._report = report

    def poll(self) -> int | None:
        """Return the exit code, or None while the service runs."""
        return self._read_code(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code.

        Raises:
            subprocess.TimeoutExpired: the service still runs.
        """
        code = self._read_code(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("serve", timeout or 0.0)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the service has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _read_code(self, timeout_s: float | None) -> int | None:
        if self.returncode is None and select.select([self._report], [], [], timeout_s)[0]:
            self.returncode = int(self._report.recv(64))
            self._report.close()
            os.close(self._pidfd)
        return self.returncode


class _Forker:
    """The forker of this process."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_REQUEST)
        with theirs:
            self.program = subprocess.Popen(
                [sys.executable, __file__],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for the tests
            )
        atexit.register(self._end)

    def _end(self) -> None:
        self._control.close()
        self.program.wait()

    def fork(
        self, arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], streams: Sequence[int]
    ) -> ForkedService:
        report, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {
            "arguments": list(arguments),
            "cwd": str(cwd),
            "env": dict(env),
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        }
        with theirs:
            fds = [*streams, theirs.fileno()]
            socket.send_fds(self._control, [json.dumps(request).encode()], fds)
        pid, (pidfd,), _, _ = socket.recv_fds(report, 64, 1)
        return ForkedService(int(pid), pidfd, report)


@cache
def _forker() -> _Forker:
    return _Forker()


def can_be_forked(env: Mapping[str, str]) -> bool:
    """Return whether a service with these variables of its own may be forked.

    With TESTS_EXEC_SERVICES=1 in the environment of the tests, none is.
    """
    late = not any(name.startswith(_CANNOT_BE_SET_LATER) for name in env)
    return late and os.environ.get("TESTS_EXEC_SERVICES", "") in ("", "0")


def fork_service(
    arguments: Sequence[str], *, cwd: Path, env: Mapping[str, str], streams: Sequence[int]
) -> ForkedService:
    """Start `runrecovery ARGUMENTS` in a session of its own.

    Args:
        streams: the descriptors that become standard input, output and error.
    """
    return _forker().fork(arguments, cwd=cwd, env=env, streams=streams)


def run_command(
    *words: str | Path, cwd: Path, timeout_s: float = COMMAND_S
) -> subprocess.CompletedProcess[str]:
    """Run `runrecovery WORDS` in a process of its own, without any input.

    Raises:
        subprocess.TimeoutExpired: the command still runs; it was killed.
    """
    with (
        Path(os.devnull).open("rb") as nothing,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as error,
    ):
        streams = (nothing.fileno(), out.fileno(), error.fileno())
        command = _start_command([str(word) for word in words], cwd, streams)
        try:
            code = command.wait(timeout_s)
        except subprocess.TimeoutExpired:
            command.kill()
            command.wait()
            raise
        texts = [os.pread(file.fileno(), 1 << 24, 0) for file in (out, error)]
    said, errors = (text.decode("utf-8", "backslashreplace") for text in texts)
    return subprocess.CompletedProcess(words, code, said, errors)


def _start_command(
    words: list[str], cwd: Path, streams: Sequence[int]
) -> subprocess.Popen[bytes] | ForkedService:
    if can_be_forked({}):
        return fork_service(words, cwd=cwd, env=os.environ, streams=streams)
    stdin, stdout, stderr = streams
    return subprocess.Popen(
        [sys.executable, "-m", "runrecovery_service", *words],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
    )


# -- the program -----------------------------------------------------------------------------------


def _import_all() -> None:
    """Import what `runrecovery serve` and the commands without a service import."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # as the command does
    sys.path.remove(str(Path(__file__).parent))
    import runrecovery_service.app
    import runrecovery_service.cli.local
    import runrecovery_service.config.reading
    import runrecovery_service.logs
    import runrecovery_service.offline

    for late in ("encodings.idna", "playhouse.migrations", "psycopg"):
        import_module(late)
    for folder in ("engines", "engines.sessions", "trust"):
        for cli in ("claude", "codex", "gemini"):
            import_module(f"runrecovery_service.{folder}.{cli}")
    # Reads the type hints of the keys, which are the same for each configuration.
    runrecovery_service.config.reading.load(path=_EXAMPLE, flags={}, environ={})
    gc.collect()
    gc.freeze()  # a collection in a child copies no page of what was imported here


def _run_forker(control: socket.socket) -> dict[str, Any]:
    """Fork a child for each request. Return, in a child, its request; exit in the forker."""
    reports: dict[int, tuple[int, socket.socket]] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd in reports:
                pid, report = reports.pop(fd)
                poll.unregister(fd)
                _report_end(pid, report)
                os.close(fd)
                continue
            text, fds, _, _ = socket.recv_fds(control, _MAX_REQUEST, 4)
            if not text:
                sys.exit(0)
            pid = os.fork()
            if pid == 0:
                for inherited in (control, *(report for _, report in reports.values())):
                    inherited.close()
                return _become(json.loads(text), fds)
            pidfd = os.pidfd_open(pid)
            report = socket.socket(fileno=fds.pop())
            for stream in fds:
                os.close(stream)
            with suppress(OSError):  # the test has gone
                socket.send_fds(report, [b"%d" % pid], [pidfd])
            reports[pidfd] = (pid, report)
            poll.register(pidfd, select.POLLIN)


def _report_end(pid: int, report: socket.socket) -> None:
    _, status = os.waitpid(pid, 0)
    with report, suppress(OSError):
        report.send(b"%d" % os.waitstatus_to_exitcode(status))


def _become(request: dict[str, Any], fds: list[int]) -> dict[str, Any]:
    """Make this child what a new process of the service would be."""
    os.setsid()
    for number, fd in enumerate(fds[:3]):
        os.dup2(fd, number)
    os.closerange(3, max(int(name) for name in os.listdir("/proc/self/fd")) + 1)  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, tuple(request["open_files"]))
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    return request


def main() -> None:
    """Run as the forker, and in a child as the service."""
    _import_all()
    request = _run_forker(socket.socket(fileno=os.dup(0)))
    from runrecovery_service import __main__ as command

    if program := os.environ.pop(PREPARE, ""):
        runpy.run_path(program)["prepare"]()
    sys.argv = [str(command.__file__), *request["arguments"]]
    command.main()


if __name__ == "__main__":
    main()
