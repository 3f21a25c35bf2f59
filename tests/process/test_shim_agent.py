"""How a shim starts its agent, what the agent gets, and how its end is reported."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from process.trees import PATIENCE_S, Grow, Start, Tree, alive, in_ns, send_signal, until
from runrecovery_service.process import launch, procfs
from runrecovery_service.process.launch_errors import LaunchDelayed, LaunchFailed
from runrecovery_service.process.markers import COOKIE_VARIABLE
from runrecovery_service.process.resource_limits import ResourceLimits
from runrecovery_service.process.shim_events import Empty, Exited
from runrecovery_service.process.shim_journal import killed_by_shim

ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not ROOT, reason="only root may do this")
CODE = [sys.executable, "-I", "-S", "-c"]


def status(pid: int) -> dict[str, str]:
    """Return the fields of /proc/<pid>/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def exit_of(tree: Tree) -> Exited:
    exited = tree.events(Exited)[-1]
    assert isinstance(exited, Exited)
    return exited


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", 0),
        ("import sys; sys.exit(3)", 3),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_reports_the_exit_of_the_agent(start: Start, code: str, expected: int) -> None:
    tree = start([*CODE, code])

    assert exit_of(tree).code == expected
    assert tree.events() == [Empty()]
    assert tree.shim_exit() == 0


def test_reports_the_resources_that_the_agent_used(start: Start) -> None:
    idle = exit_of(start([*CODE, ""]))
    busy = exit_of(
        start([*CODE, "import time; x = b'x' * (64 << 20)\nwhile time.process_time() < 0.2: pass"])
    )

    assert busy.user_us + busy.system_us >= 200_000 > idle.user_us
    assert busy.max_rss_kib > 64 << 10 > idle.max_rss_kib > 1 << 10


def test_the_shim_lives_as_long_as_processes_that_the_agent_left(grow: Grow) -> None:
    tree = grow("scrubbed-daemon")
    tree.end_leader()
    assert exit_of(tree).code == -signal.SIGKILL
    assert alive(tree.shim)

    send_signal(tree.procs["scrubbed-daemon"], signal.SIGKILL)

    assert tree.events() == [Empty()]
    assert tree.shim_exit() == 0


def test_processes_that_the_agent_left_are_killed_at_the_deadline(grow: Grow) -> None:
    tree = grow("escapee")
    tree.end_leader()

    tree.process.heartbeat(in_ns(0.1))

    assert tree.shim_exit() == 0
    assert tree.nobody_alive()
    assert killed_by_shim(tree.journal) == {tree.procs["escapee"].identity}


def test_the_shim_reaps_orphans(grow: Grow) -> None:
    tree = grow("daemon", "scrubbed-daemon")
    orphans = [tree.procs["daemon"].pid, tree.procs["scrubbed-daemon"].pid]
    assert {one.ppid for one in procfs.scan(orphans).values()} == {tree.shim.pid}

    for role in ("daemon", "scrubbed-daemon"):
        send_signal(tree.procs[role], signal.SIGKILL)

    until(lambda: procfs.scan(orphans) == {})
    assert tree.alive("leader")


def test_the_agents_streams_are_its_own(start: Start) -> None:
    """The shim keeps neither end open, so the service and the agent notice the end of a stream.

    Only the agent's processes keep a pipe open, and never the shim.
    """
    close = "import os, time; os.close(1); os.close(2); os.read(0, 1); time.sleep(60)"
    tree = start([*CODE, close])

    assert tree.process.stdout.read() == b""
    assert tree.process.stderr.read() == b""
    assert alive(tree.shim)

    echo = start([*CODE, "import os; os.read(0, 1); os.write(1, b'the end')"])
    echo.process.stdin.close()
    assert echo.process.stdout.read() == b"the end"


def test_the_shim_is_small(grow: Grow) -> None:
    tree = grow("child")

    assert int(status(tree.shim.pid)["VmHWM"].split()[0]) < 12 << 10


def test_the_shim_survives_signals_that_are_sent_to_its_tree(grow: Grow) -> None:
    tree = grow()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        send_signal(tree.shim, number)
    tree.process.heartbeat(in_ns(PATIENCE_S))
    until(tree.heard_everything)  # and so, before it, the signals

    assert alive(tree.shim)
    assert tree.alive("leader")


def test_nothing_of_the_agent_is_on_the_shims_command_line(start: Start) -> None:
    tree = start([*CODE, "input()", "an-argument"], env={"SECRET": "a-secret"})

    words = procfs.read(f"/proc/{tree.shim.pid}/cmdline").split(b"\0")

    assert words[:4] == [os.fsencode(word) for word in (sys.executable, "-I", "-S", launch.SHIM)]
    assert all(word.isdigit() for word in words[4:8])
    assert words[8:] == [b""]


@only_root  # its own user may not look: see the next test
def test_the_shim_has_the_cookie_alone_and_stays_at_the_root(start: Start) -> None:
    tree = start([*CODE, "input()"], env={"SECRET": "a-secret"})

    mark = f"{COOKIE_VARIABLE}={tree.lease.token}\0".encode()
    assert procfs.environment(tree.shim.pid) == mark
    assert os.readlink(f"/proc/{tree.shim.pid}/cwd") == "/"  # noqa: PTH115 - as it is written


def test_no_other_user_can_read_the_shim_in_proc(tmp_path: Path) -> None:
    """In /proc a process that is not dumpable belongs to the user *and* the group of root."""
    script = Path(__file__).with_name("launch_once.py")
    said = subprocess.run(
        [sys.executable, script, "look", str(tmp_path / "journal")],
        group=65534 if ROOT else None,  # so that an undumpable process differs from one of root
        extra_groups=[] if ROOT else None,
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
    )
    told = json.loads(said.stdout)

    assert told["shim_owner"] == [0, 0]
    assert told["agent_owner"] == [os.geteuid(), 65534 if ROOT else os.getegid()]


@contextmanager
def inherited_by_mistake() -> Iterator[None]:
    """Open an inheritable pipe, and ignore and block signals. The agent must get none of it."""
    read, write = os.pipe()
    os.set_inheritable(write, True)  # noqa: FBT003 - that is its signature
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGHUP, before)
        os.close(read)
        os.close(write)


def test_no_signal_is_ignored_or_blocked_in_the_agent(start: Start) -> None:
    with inherited_by_mistake():
        tree = start(["/bin/cat", "/proc/self/status"])
    said = dict(line.split(b":", 1) for line in tree.process.stdout.read().splitlines())

    of_libc = 0b11 << 31  # 32 and 33: nobody else can set them
    masks = {name: int(said[name], 16) & ~of_libc for name in (b"SigIgn", b"SigBlk", b"SigCgt")}
    assert masks == dict.fromkeys(masks, 0)


def test_the_shim_gets_signals_that_its_service_blocks(start: Start) -> None:
    with inherited_by_mistake():
        tree = start([*CODE, "input()"])

    assert int(status(tree.shim.pid)["SigBlk"], 16) == 0


def test_the_agent_has_its_three_streams_and_nothing_else(start: Start) -> None:
    with inherited_by_mistake():
        tree = start([*CODE, "import time; print(flush=True); time.sleep(60)"])
    tree.process.stdout.readline()
    assert tree.process.agent is not None

    open_ones = {path.name for path in Path(f"/proc/{tree.process.agent.pid}/fd").iterdir()}
    assert open_ones == {"0", "1", "2"}


def test_the_agent_leads_its_own_session_below_the_shim(grow: Grow) -> None:
    tree = grow()
    leader, shim = tree.procs["leader"], tree.shim
    agent = tree.process.agent

    assert agent is not None
    assert leader.identity == (agent.pid, agent.start_ticks)
    assert leader.ppid == shim.pid
    assert (leader.session, leader.group) == (leader.pid, leader.pid)
    assert (shim.session, shim.group) == (shim.pid, shim.pid)


def test_bounds_reach_the_agent_and_not_the_shim(start: Start) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    processes = 50_000 if hard == resource.RLIM_INFINITY else hard - 1
    limits = ResourceLimits(
        niceness=3, max_memory=512 << 20, max_open_files=77, max_processes=processes
    )
    tree = start([*CODE, "input()"], limits=limits)
    agent = tree.process.agent
    assert agent is not None

    names = (resource.RLIMIT_DATA, resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)
    ours = [resource.getrlimit(name) for name in names]
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    expected = [(value, value) for value in (512 << 20, 77, processes)]
    assert limits_of(agent.pid) == expected
    assert os.getpriority(os.PRIO_PROCESS, agent.pid) == min(19, niceness + 3)
    assert limits_of(tree.shim.pid) == ours
    assert os.getpriority(os.PRIO_PROCESS, tree.shim.pid) == niceness


def limits_of(pid: int) -> list[tuple[int, int]]:
    """Return data, open files and processes, soft and hard, of a process."""
    text = Path(f"/proc/{pid}/limits").read_text()
    found = []
    for name in ("Max data size", "Max open files", "Max processes"):
        line = next(line for line in text.splitlines() if line.startswith(name))
        soft, hard = line.removeprefix(name).split()[:2]
        found.append((_number(soft), _number(hard)))
    return found


def _number(word: str) -> int:
    return resource.RLIM_INFINITY if word == "unlimited" else int(word)


# Becomes an agent that prints its score. Only a privileged process may have a negative score, so
# the first argument is what is read as the score of the service.
SHOWS_SCORE = """
import os, sys
from runrecovery_service.process import procfs, shim, wire

file, read = "/proc/self/oom_score_adj", procfs.read
procfs.read = lambda path: sys.argv[1].encode() if path == file else read(path)
with open(file, "w") as own:
    own.write("9")
order = wire.Order(
    deadline_ns=0, watermark=0, program="/bin/cat", argv=["cat", file], env={}, cwd="/",
    confinement=wire.Confinement(),
)
shim._become_agent(order, os.open(os.devnull, os.O_WRONLY))
"""


@pytest.mark.parametrize(("of_the_service", "of_the_agent"), [("-17\n", "0\n"), ("9\n", "9\n")])
def test_an_agent_is_not_protected_from_the_out_of_memory_killer_as_its_service_may_be(
    of_the_service: str, of_the_agent: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHOWS_SCORE, of_the_service],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout, done.stderr) == (0, of_the_agent, "")


def test_the_memory_limit_is_enforced(start: Start) -> None:
    code = "import sys\ntry: b'x' * (300 << 20)\nexcept MemoryError: sys.exit(9)"

    assert exit_of(start([*CODE, code])).code == 0
    assert exit_of(start([*CODE, code], limits=ResourceLimits(max_memory=200 << 20))).code == 9


def test_an_agent_without_bounds_has_the_services_limits(start: Start) -> None:
    tree = start([*CODE, "input()"])
    assert tree.process.agent is not None

    assert limits_of(tree.process.agent.pid) == limits_of(os.getpid())


def missing_interpreter(place: Path) -> tuple[str, Path, ResourceLimits]:
    tool = place / "tool"
    tool.write_text("#!/no/such/interpreter\n")
    tool.chmod(0o755)
    return str(tool), place, ResourceLimits()


def no_program(place: Path) -> tuple[str, Path, ResourceLimits]:
    tool = place / "tool"
    tool.write_bytes(b"\x7fBAD")
    tool.chmod(0o755)
    return str(tool), place, ResourceLimits()


def missing_directory(place: Path) -> tuple[str, Path, ResourceLimits]:
    return "/bin/true", place / "gone", ResourceLimits()


def impossible_limit(place: Path) -> tuple[str, Path, ResourceLimits]:
    return "/bin/true", place, ResourceLimits(max_open_files=2**50)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (missing_interpreter, r"No such file or directory: .*/tool"),
        (no_program, r"Exec format error: .*/tool"),
        (missing_directory, r"No such file or directory: the working directory .*/gone"),
        (impossible_limit, rf"limit {resource.RLIMIT_NOFILE}"),
    ],
)
def test_says_why_the_agent_could_not_start(
    start: Start,
    tmp_path: Path,
    case: Callable[[Path], tuple[str, Path, ResourceLimits]],
    reason: str,
) -> None:
    program, cwd, limits = case(tmp_path)
    tree = start([program], cwd=cwd, limits=limits, release=False)

    with pytest.raises(LaunchFailed, match=reason):
        tree.process.release(in_ns(PATIENCE_S))

    assert tree.shim_exit() == 0
    assert tree.process.agent is None
    assert tree.nobody_alive()


@pytest.fixture
def lacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have shims meet ENFILE once, in a function of theirs."""

    def lack(patch: str) -> None:
        program = tmp_path / "lacking_shim.py"
        program.write_text(
            f"""
import os, sys
sys.path.append({str(Path(procfs.__file__).parents[2])!r})
from runrecovery_service.process import procfs
from runrecovery_service.process.shim import Shim

def once(function, wanted):
    left = [1]
    def call(*args):
        if left and wanted(*args):
            left.clear()
            raise OSError(23, "Too many open files in system")
        return function(*args)
    return call

{patch}
sys.exit(Shim(*map(int, sys.argv[1:5])).run())
"""
        )
        monkeypatch.setattr(launch, "SHIM", str(program))

    return lack


def test_a_shim_that_cannot_read_proc_guards_its_agent(
    start: Start, lacking: Callable[[str], None]
) -> None:
    lacking("procfs.read_proc = once(procfs.read_proc, lambda pid: pid != os.getpid())")
    tree = start(["/bin/sleep", "600"])

    assert tree.process.agent is not None
    assert tree.process.agent.start_ticks == 0
    tree.process.close_gate()
    assert tree.shim_exit() == 0
    assert tree.nobody_alive()


def test_a_shim_without_a_descriptor_for_its_streams_starts_no_agent(
    start: Start, lacking: Callable[[str], None]
) -> None:
    lacking("os.open = once(os.open, lambda path, flags: path == os.devnull)")
    tree = start(["/bin/sleep", "600"], release=False)

    with pytest.raises(LaunchDelayed, match="Too many open files in system"):
        tree.process.release(in_ns(PATIENCE_S))

    assert tree.shim_exit() == 0
    assert tree.nobody_alive()
