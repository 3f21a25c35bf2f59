"""Starting a process and learning of its end, on both event loops."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvloop
from runrecovery_service.process import evidence
from runrecovery_service.process.evidence import COOKIE_VARIABLE
from runrecovery_service.process.launch import (
    LaunchedProcess,
    LaunchFailed,
    agent_environment,
    dispose,
    launch,
    wait_exit,
)

Loop = Callable[[Awaitable[int]], int]


def run_on_asyncio(task: Awaitable[int]) -> int:
    with asyncio.Runner() as runner:
        return runner.run(as_coroutine(task))


def run_on_uvloop(task: Awaitable[int]) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(as_coroutine(task))


async def as_coroutine(task: Awaitable[int]) -> int:
    return await task


both_loops = pytest.mark.parametrize("run", [run_on_asyncio, run_on_uvloop])


@contextmanager
def python(code: str, cwd: Path, **env: str) -> Iterator[LaunchedProcess]:
    """Launch a program that ends by itself, or when its stdin is closed."""
    process = launch([sys.executable, "-I", "-S", "-c", code], cwd=cwd, env=env)
    try:
        yield process
    finally:
        dispose(process)


def test_the_process_leads_its_own_session(tmp_path: Path) -> None:
    with python("input()", tmp_path) as process:
        found = evidence.read_proc(process.pid)

    assert found is not None
    assert (found.session, found.group) == (process.pid, process.pid)
    assert found.identity == (process.pid, process.start_ticks)


def test_the_process_gets_exactly_this_environment_and_directory(tmp_path: Path) -> None:
    code = "import os, json; print(json.dumps([dict(os.environ), os.getcwd()]))"
    with python(code, tmp_path, A="1", **{COOKIE_VARIABLE: "1.ab"}) as process:
        environment, cwd = json.loads(process.stdout.readline())

    environment.pop("LC_CTYPE", None)  # Python's own doing
    assert environment == {"A": "1", COOKIE_VARIABLE: "1.ab"}
    assert cwd == str(tmp_path)


def test_the_process_inherits_no_descriptor_and_no_ignored_signal(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)  # noqa: FBT003 - that is its signature
    script = f"test -e /proc/self/fd/{write} && echo leaked; grep SigIgn /proc/self/status"
    process = launch(["/bin/sh", "-c", script], cwd=tmp_path, env={"PATH": os.defpath})
    said = process.stdout.read()
    dispose(process)
    os.close(read)
    os.close(write)

    ignored = int(said.removeprefix(b"SigIgn:"), 16)  # "leaked" is no number
    assert not ignored & (1 << (signal.SIGPIPE - 1))


def test_talks_through_its_pipes(tmp_path: Path) -> None:
    code = "import sys; print(input()); print('oops', file=sys.stderr)"
    with python(code, tmp_path) as process:
        process.stdin.write(b"hello\n")

        assert process.stdout.readline() == b"hello\n"
        assert process.stderr.readline() == b"oops\n"


def test_finds_the_command_on_the_childs_path(tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "some-tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho found\n")
    tool.chmod(0o755)

    process = launch(["some-tool"], cwd=tmp_path, env={"PATH": f"/nowhere:{tool.parent}"})
    said = process.stdout.read()
    dispose(process)

    assert said == b"found\n"


def test_a_relative_entry_of_the_path_chooses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tool = tmp_path / "some-tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)

    with pytest.raises(LaunchFailed):
        launch(["some-tool"], cwd=tmp_path, env={"PATH": ".:"})


def test_a_relative_command_is_below_the_working_directory(tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\necho here\n")
    tool.chmod(0o755)

    process = launch(["./tool"], cwd=tmp_path, env={})
    said = process.stdout.read()
    dispose(process)

    assert said == b"here\n"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ((), "the engine's command is empty"),
        (("",), "the engine's command is empty"),
        (("no-such-tool",), "no-such-tool is not found on the engine's PATH"),
        (("/no/such/tool",), "/no/such/tool is not found"),
        (("./plain",), "./plain is not executable"),
        (("./no-format",), "Exec format error"),
        (("/bin/true", "a\0b"), "embedded null byte"),
    ],
)
def test_says_why_a_command_cannot_start(
    tmp_path: Path, command: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "plain").write_text("no program")
    (tmp_path / "no-format").write_bytes(b"\x7fBAD")
    (tmp_path / "no-format").chmod(0o755)

    with pytest.raises(LaunchFailed, match=reason):
        launch(command, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})


def test_says_that_the_working_directory_is_missing(tmp_path: Path) -> None:
    with pytest.raises(LaunchFailed, match=r"No such file or directory: .*/gone"):
        launch(["/bin/true"], cwd=tmp_path / "gone", env={})


def test_a_failed_launch_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"\x7fBAD")
    (tmp_path / "bad").chmod(0o755)
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208

    with pytest.raises(LaunchFailed):
        launch(["./bad"], cwd=tmp_path, env={})

    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@both_loops
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("import sys; sys.exit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_waits_for_the_exit_code(tmp_path: Path, run: Loop, code: str, expected: int) -> None:
    with python(code, tmp_path) as process:
        assert run(wait_exit(process.popen)) == expected

        assert dispose(process) == expected


@both_loops
def test_waiting_does_not_reap(tmp_path: Path, run: Loop) -> None:
    with python("", tmp_path) as process:
        run(wait_exit(process.popen))
        found = evidence.read_proc(process.pid)

    assert found is not None
    assert found.dead
    assert evidence.read_proc(process.pid) is None


@both_loops
def test_waits_for_one_that_has_been_reaped(tmp_path: Path, run: Loop) -> None:
    with python("import sys; sys.exit(5)", tmp_path) as process:
        process.popen.wait()

        assert run(wait_exit(process.popen)) == 5


@both_loops
def test_waits_without_a_pidfd_too(
    tmp_path: Path, run: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_descriptor_left(_: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", no_descriptor_left)
    with python("import sys; sys.exit(6)", tmp_path) as process:
        assert run(wait_exit(process.popen)) == 6


@both_loops
def test_many_waits_end_with_their_own_process(tmp_path: Path, run: Loop) -> None:
    async def all_of(processes: list[LaunchedProcess]) -> int:
        codes = await asyncio.gather(*(wait_exit(one.popen) for one in processes))
        return int(codes == [*range(20)])

    code = "import sys; sys.exit(int(sys.argv[1]))"
    command = [sys.executable, "-I", "-S", "-c", code]
    processes = [launch([*command, str(n)], cwd=tmp_path, env={}) for n in range(20)]
    try:
        assert run(all_of(processes)) == 1
    finally:
        for one in processes:
            dispose(one)


@both_loops
def test_a_cancelled_wait_leaves_nothing_behind(
    tmp_path: Path, run: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    real = os.pidfd_open

    def pidfd_open(pid: int) -> int:
        opened.append(real(pid))
        return opened[-1]

    async def give_up(process: LaunchedProcess) -> int:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wait_exit(process.popen), 0.05)
        assert not asyncio.get_running_loop().remove_reader(opened[0])
        return len(os.listdir("/proc/self/fd")) - before  # noqa: PTH208

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    with python("input()", tmp_path) as process:
        assert run(give_up(process)) == 0


@both_loops
def test_asyncios_own_children_do_not_disturb_the_wait(tmp_path: Path, run: Loop) -> None:
    async def beside(process: LaunchedProcess) -> int:
        waiting = asyncio.ensure_future(wait_exit(process.popen))
        other = await asyncio.create_subprocess_exec("/bin/true", stdin=subprocess.DEVNULL)
        assert await other.wait() == 0
        process.stdin.write(b"\n")
        return await waiting

    with python("import sys; input(); sys.exit(9)", tmp_path) as process:
        assert run(beside(process)) == 9


def test_passes_only_allowed_variables() -> None:
    source = {"PATH": "/bin", "SECRET": "x", COOKIE_VARIABLE: "somebody else's"}

    found = agent_environment(["PATH", "HOME", COOKIE_VARIABLE], source, {"LANG": "C"})

    assert found == {"PATH": "/bin", "LANG": "C"}


def test_what_the_service_sets_wins() -> None:
    found = agent_environment(["A"], {"A": "inherited"}, {"A": "set", COOKIE_VARIABLE: "1.ab"})

    assert found == {"A": "set", COOKIE_VARIABLE: "1.ab"}
