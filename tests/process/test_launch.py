"""Launches: the agent's environment, refused starts, and the messages between service and shim."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from process.trees import PATIENCE_S, Start, alive, in_ns, processes_with_watermark
from runrecovery_service.process import launch, procfs, wire
from runrecovery_service.process.agent_command import agent_environment, launch_problem
from runrecovery_service.process.launch_errors import LaunchFailed
from runrecovery_service.process.markers import COOKIE_VARIABLE
from runrecovery_service.process.pipe_size import stdout_pipe_bytes
from runrecovery_service.process.shim_events import (
    Empty,
    EndsItself,
    Exited,
    Gated,
    NotStarted,
    Started,
    parse_event,
)
from runrecovery_service.process.shim_journal import killed_by_shim
from runrecovery_service.process.watermark import (
    LEAST_WATERMARK_BITS,
    WATERMARK_BITS,
    watermark_bits,
)

CODE = [sys.executable, "-I", "-S", "-c"]

KILLED = '{"pid": 7, "start_ticks": 9, "signal": "SIGKILL", "outcome": "sent"}\n'


def program(place: Path, text: str, name: str = "some-tool") -> Path:
    tool = place / name
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(text)
    tool.chmod(0o755)
    return tool


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))  # noqa: PTH208


# -- what the agent gets ------------------------------------------------------------------------


def test_the_agent_gets_exactly_this_environment_and_directory(
    start: Start, tmp_path: Path
) -> None:
    code = "import os, json; print(json.dumps([dict(os.environ), os.getcwd()]))"
    tree = start([*CODE, code], env={"A": "1", "B": "x=y"})
    environment, cwd = json.loads(tree.process.stdout.readline())

    environment.pop("LC_CTYPE", None)  # set by Python itself
    assert environment == {"A": "1", "B": "x=y", COOKIE_VARIABLE: tree.lease.token}
    assert cwd == str(tmp_path)


def test_the_agent_gets_its_arguments_unchanged(start: Start) -> None:
    words = ["", "two words", "$HOME;ls", "line\nline", "\udcff", "ü", "=", ""]
    code = "import sys; sys.stdout.buffer.write(repr(sys.argv[1:]).encode())"
    tree = start([*CODE, code, *words], env={"LC_ALL": "C.UTF-8"})

    assert tree.process.stdout.read() == repr(words).encode()


def test_the_agent_reads_and_writes_its_pipes(start: Start) -> None:
    tree = start([*CODE, "import sys; print(input()); print('oops', file=sys.stderr)"])
    tree.process.stdin.write(b"hello\n")

    assert tree.process.stdout.readline() == b"hello\n"
    assert tree.process.stderr.readline() == b"oops\n"


def test_the_pipe_of_standard_output_takes_a_mebibyte(start: Start) -> None:
    pipe = start(["/bin/cat"]).process.stdout.fileno()

    assert fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ) == 1 << 20


def test_a_pipe_that_the_kernel_does_not_widen_is_used_as_it_is(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses a wider pipe beyond fs.pipe-user-pages-soft, except to root."""
    change = fcntl.fcntl

    def refused(descriptor: int, command: int, size: int = 0) -> int:
        if command == fcntl.F_SETPIPE_SZ:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return change(descriptor, command, size)

    monkeypatch.setattr(fcntl, "fcntl", refused)
    tree = start([*CODE, "print('here')"])

    assert change(tree.process.stdout.fileno(), fcntl.F_GETPIPE_SZ) == 65_536
    assert tree.process.stdout.read() == b"here\n"


@pytest.mark.parametrize(
    ("pages", "processes", "expected"),
    [
        ("16384\n", 1, 1_048_576),
        ("16384\n", 32, 1_048_576),
        ("16384\n", 33, 524_288),
        ("16384\n", 64, 524_288),
        ("16384\n", 257, 65_536),
        ("16384\n", 10_000, 65_536),
        ("0\n", 10_000, 1_048_576),
        ("", 1, 65_536),
    ],
)
def test_all_pipes_together_take_half_of_what_the_kernel_grants_a_user(
    tmp_path: Path, pages: str, processes: int, expected: int
) -> None:
    limit = tmp_path / "pipe-user-pages-soft"
    limit.write_text(pages)

    assert stdout_pipe_bytes(processes, limit=limit) == expected


def test_finds_the_command_on_the_agents_path(start: Start, tmp_path: Path) -> None:
    tool = program(tmp_path / "bin", "#!/bin/sh\necho found\n")

    tree = start(["some-tool"], env={"PATH": f"/nowhere:{tool.parent}"})

    assert tree.process.stdout.read() == b"found\n"


def test_a_relative_entry_of_path_is_ignored(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program(tmp_path, "#!/bin/sh\n")

    with pytest.raises(LaunchFailed):
        start(["some-tool"], env={"PATH": ".:"})


def test_a_relative_command_is_below_the_working_directory(start: Start, tmp_path: Path) -> None:
    program(tmp_path, "#!/bin/sh\necho here\n")

    assert start(["./some-tool"]).process.stdout.read() == b"here\n"


def test_passes_only_allowed_variables() -> None:
    source = {"PATH": "/bin", "SECRET": "x", COOKIE_VARIABLE: "somebody else's"}

    found = agent_environment(["PATH", "HOME", COOKIE_VARIABLE], source, {"LANG": "C"})

    assert found == {"PATH": "/bin", "LANG": "C"}


def test_variables_of_the_service_override_the_others() -> None:
    found = agent_environment(["A"], {"A": "inherited"}, {"A": "set", COOKIE_VARIABLE: "1.ab"})

    assert found == {"A": "set", COOKIE_VARIABLE: "1.ab"}


# -- why it cannot start -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ((), "the engine's command is empty"),
        (("",), "the engine's command is empty"),
        (("no-such-tool",), "no-such-tool is not found on the engine's PATH"),
        (("/no/such/tool",), "/no/such/tool is not found"),
        (("./plain",), "./plain is not executable"),
        (("/bin/true", "a\0b"), "embedded null byte"),
        (("/bin\0/true",), r"is not found"),
    ],
)
def test_says_why_a_command_cannot_be_prepared(
    start: Start, tmp_path: Path, command: tuple[str, ...], reason: str
) -> None:
    (tmp_path / "plain").write_text("no program")
    before = descriptors()

    with pytest.raises(LaunchFailed, match=reason):
        start(command, env={"PATH": "/usr/bin:/bin"})

    assert descriptors() == before
    assert not list(tmp_path.glob("journal*"))  # no shim has been started for it


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["some-tool"], None),
        (["other-tool"], "other-tool is not found on the engine's PATH"),
        ([], "the engine's command is empty"),
    ],
)
def test_launch_problem_names_a_command_that_could_not_be_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], expected: str | None
) -> None:
    monkeypatch.setenv("PATH", str(program(tmp_path, "#!/bin/sh\n").parent))

    assert launch_problem(command, env_allow=["PATH"]) == expected


def test_an_allowed_path_alone_finds_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(program(tmp_path, "#!/bin/sh\n").parent))

    assert launch_problem(["some-tool"], env_allow=[]) is not None


def test_a_launch_without_a_shim_says_so_and_leaves_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()

    monkeypatch.setattr(launch, "SHIM", "/no/such/shim")
    with pytest.raises(LaunchFailed, match=r"the shim ended: .*no/such/shim"):
        start(["/bin/true"])
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(LaunchFailed, match="No such file or directory: /no/such/python"):
        start(["/bin/true"])

    assert descriptors() == before


def test_a_journal_that_cannot_be_opened_stops_the_launch(start: Start, tmp_path: Path) -> None:
    first = start(["/bin/true"])
    (tmp_path / f"journal{first.lease.launch_key + 1}").mkdir()
    before = descriptors()

    with pytest.raises(LaunchFailed, match="Is a directory"):
        start(["/bin/true"])

    assert descriptors() == before


def test_a_failed_start_leaves_no_descriptor(start: Start) -> None:
    before = descriptors()
    tree = start(["/bin/true"], cwd=Path("/no/such/place"), release=False)

    with pytest.raises(LaunchFailed):
        tree.process.release(in_ns(PATIENCE_S))
    tree.process.dispose()

    assert descriptors() == before
    assert tree.process.popen.returncode == 0


def test_a_launch_leaves_no_descriptor(start: Start) -> None:
    before = descriptors()
    tree = start(["/bin/true"])
    tree.events(Exited)

    tree.process.dispose()
    tree.process.dispose()  # twice does no harm

    assert descriptors() == before


def test_dispose_of_a_waiting_or_running_launch_leaves_nothing(start: Start) -> None:
    before = descriptors()
    waiting, running = start(["/bin/true"], release=False), start([*CODE, "input()"])

    waiting.process.dispose()
    running.process.dispose()

    assert descriptors() == before
    for tree in (waiting, running):
        assert not alive(tree.shim)
        assert processes_with_watermark(tree.lease) == []


# -- messages between service and shim -----------------------------------------------------------

# Whatever bytes the system has, as Python shows them: undecodable ones become surrogates.
WORDS = st.binary(max_size=20).filter(lambda word: b"\0" not in word).map(os.fsdecode)
NAMES = WORDS.filter(lambda name: bool(name) and "=" not in name)
ORDERS = st.builds(
    wire.Order,
    deadline_ns=st.integers(0, 2**63),
    watermark=st.integers(0, 2**62),
    program=WORDS,
    argv=st.lists(WORDS, max_size=5),
    env=st.dictionaries(NAMES, WORDS, max_size=5),
    cwd=WORDS,
    confinement=st.builds(
        wire.Confinement,
        niceness=st.integers(-20, 19),
        rlimits=st.dictionaries(st.integers(0, 15), st.integers(0, 2**62), max_size=4),
        cgroup_procs=WORDS,
        soft_open_files=st.integers(0, 2**20),
    ),
)


def fields_of(order: wire.Order) -> Mapping[str, object]:
    confinement = {name: getattr(order.confinement, name) for name in wire.Confinement.__slots__}
    return {name: getattr(order, name) for name in wire.Order.__slots__} | {
        "confinement": confinement
    }


@given(ORDERS)
@example(
    wire.Order(
        deadline_ns=0,
        watermark=0,
        program="/bin/\udcff",
        argv=["", "a=b", "1", "\n"],
        env={"A": "b=c=d", "B": "", "\udcfe": "\udcff"},
        cwd="",
        confinement=wire.Confinement(),
    )
)
def test_an_order_arrives_as_it_was_given(order: wire.Order) -> None:
    length, _, body = wire.pack(order).partition(b"\n")

    assert int(length) == len(body)
    assert fields_of(wire.unpack(body)) == fields_of(order)


@pytest.mark.parametrize("place", ["argv", "env", "cwd", "program", "cgroup_procs"])
def test_an_order_with_a_nul_is_refused(place: str) -> None:
    words: dict[str, Any] = {"argv": [], "env": {}, "cwd": "", "program": "", "cgroup_procs": ""}
    words[place] = {"argv": ["a\0b"], "env": {"A": "\0"}}.get(place, "\0")
    confinement = wire.Confinement(cgroup_procs=words.pop("cgroup_procs"))
    order = wire.Order(deadline_ns=0, watermark=0, confinement=confinement, **words)

    with pytest.raises(ValueError, match="null byte"):
        wire.pack(order)


@pytest.mark.parametrize(
    ("line", "event"),
    [
        ("gated 1", Gated(watermarked=True)),
        ("gated 0", Gated(watermarked=False)),
        ("started 12 345", Started(12, 345)),
        ("refused 2 /a b/tool", NotStarted("No such file or directory: /a b/tool")),
        ("refused 0 limit 7", NotStarted("refused: limit 7")),
        ("exited -9 10 20 3000", Exited(-9, 10, 20, 3000)),
        ("ending lease_over", EndsItself("lease_over")),
        ("empty", Empty()),
    ],
)
def test_parses_every_event_of_the_shim(line: str, event: object) -> None:
    assert parse_event(line) == event


@pytest.mark.parametrize(
    "line",
    ["", "gated", "gated 1 2", "started 1", "started a b", "exited 0", "exited", "refused x y",
     "ending", "empty now", "Traceback (most recent call last):", " empty"],
)  # fmt: skip
def test_refuses_a_line_that_no_shim_writes(line: str) -> None:
    with pytest.raises(ValueError, match=r"not an event|invalid literal"):
        parse_event(line)


def test_events_arrive_however_the_pipe_cuts_them(start: Start) -> None:
    process = start(["/bin/true"], release=False).process
    data = b"exited 0 1 2 3\nempty\n"

    pieces = [process.parse_report(data[i : i + 1]) for i in range(len(data))]

    assert [event for piece in pieces for event in piece] == [Exited(0, 1, 2, 3), Empty()]


# -- watermarks --------------------------------------------------------------------------------


@given(st.one_of(st.integers(0, 2**64 - 2), st.just(resource.RLIM_INFINITY)))
def test_a_watermark_is_long_enough_and_within_the_limit(hard: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resource, "getrlimit", lambda _: (hard, hard))
        bits = watermark_bits()

    assert bits == 0 or LEAST_WATERMARK_BITS <= bits <= WATERMARK_BITS
    assert hard == resource.RLIM_INFINITY or 2**bits - 1 <= hard
    assert bits or 0 <= hard < 2**LEAST_WATERMARK_BITS


def test_without_a_limit_a_watermark_has_all_its_bits() -> None:
    hard = resource.getrlimit(procfs.RLIMIT_LOCKS)[1]
    if hard != resource.RLIM_INFINITY:
        pytest.skip("the tests run under a limit on file locks")

    assert watermark_bits() == WATERMARK_BITS


@pytest.mark.skipif(os.geteuid() == 0, reason="root may set any watermark")
def test_a_launch_that_cannot_set_its_watermark_says_so(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim = tmp_path / "shim.py"
    shim.write_text(
        "import resource, runpy\n"
        f"resource.setrlimit({procfs.RLIMIT_LOCKS}, (5, 5))\n"
        f"runpy.run_path({launch.SHIM!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(launch, "SHIM", str(shim))

    tree = start([*CODE, "input()"])

    assert not tree.process.watermarked
    assert alive(tree.shim)


def test_a_launch_works_beside_more_than_a_thousand_descriptors(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("this user may not open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        tree = start(["/bin/cat"])
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert max(tree.process.gate, tree.process.report) > 1023
    assert tree.process.agent is not None


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_file_that_an_agent_put_in_place_of_the_journal_is_not_read(
    tmp_path: Path, kind: str
) -> None:
    journal = tmp_path / "journal"
    match kind:
        case "pipe":
            os.mkfifo(journal)
        case "link":
            (tmp_path / "other").write_text(KILLED)
            journal.symlink_to(tmp_path / "other")
        case _:
            journal.mkdir()

    assert killed_by_shim(journal) == frozenset()


def test_only_the_start_of_a_long_journal_is_read(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    journal.write_text(KILLED)
    os.truncate(journal, 1 << 33)

    assert killed_by_shim(journal) == {(7, 9)}
