"""Markers prove which processes belong to a launch."""

from __future__ import annotations

import os
import resource
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from process.trees import Grow, Tree
from runrecovery_service.process import host as host_module
from runrecovery_service.process import markers, procfs
from runrecovery_service.process.host import Host
from runrecovery_service.process.markers import (
    COOKIE_VARIABLE,
    LaunchMarkers,
    MarkerIndex,
    Member,
    Membership,
    Proof,
    find_members,
    launch_token,
    protected_pids,
)
from runrecovery_service.process.procfs import RLIMIT_LOCKS, Proc

COOKIE = "0123456789abcdef" * 2
MARK = 2**61 + 12345


def proc(
    pid: int, *, ppid: int = 1, group: int | None = None, ticks: int = 100, state: str = "S"
) -> Proc:
    group = pid if group is None else group
    return Proc(
        pid=pid,
        ppid=ppid,
        group=group,
        session=group,
        start_ticks=ticks,
        state=state,
        threads=1,
    )


def lease(key: int = 7, pid: int | None = None, ticks: int | None = None) -> LaunchMarkers:
    return LaunchMarkers(
        launch_key=key,
        run_key=key,
        cookie=COOKIE,
        watermark=None,
        pid=pid,
        start_ticks=ticks,
        host=Host(host_id="h", boot_id="b", pid_namespace=1),
    )


# -- the markers of a process ----------------------------------------------------------------------


bare = {"pid": None, "start_ticks": None, "watermark": None, "cookie": "", "cgroup": None}
"""A lease of which nothing is recorded."""


def kind(tree: Tree, role: str, **recorded: object) -> Proof | None:
    """Return the marker by which a role of a tree is found."""
    index = MarkerIndex([replace(tree.lease, **(bare | recorded))])  # type: ignore[arg-type]
    found = procfs.read_proc(tree.procs[role].pid)
    assert found is not None
    member = index.find_member(found)
    assert member is None or (member.proc, member.launch_key) == (found, tree.lease.launch_key)
    return None if member is None else member.proof


def test_a_shim_is_found_by_its_pid_and_start_ticks(grow: Grow) -> None:
    tree = grow()
    recorded = MarkerIndex([replace(tree.lease, watermark=None, cookie="")])
    later = MarkerIndex([replace(tree.lease, watermark=None, cookie="", start_ticks=1)])

    assert recorded.find_member(tree.shim) == Member(
        proc=tree.shim, launch_key=tree.lease.launch_key, proof=Proof.SHIM
    )
    assert later.find_member(tree.shim) is None


@pytest.mark.parametrize(
    "role",
    ["child", "session", "daemon", "scrubbed", "scrubbed-daemon", "undumpable", "escapee"],
)
def test_every_descendant_has_the_watermark_whatever_it_does(grow: Grow, role: str) -> None:
    tree = grow(role)
    tree.kill_shim()
    tree.end_leader()

    assert kind(tree, role, watermark=tree.lease.watermark) is Proof.WATERMARK
    assert kind(tree, role, watermark=(tree.lease.watermark or 0) + 1) is None


@pytest.mark.parametrize("role", ["leader", "daemon", "thread", "stopped"])
def test_the_full_cookie_is_found_in_the_environment(grow: Grow, role: str) -> None:
    tree = grow(*({role} - {"leader"}))

    assert kind(tree, role, cookie=tree.lease.cookie) is Proof.COOKIE


@pytest.mark.parametrize("role", ["scrubbed", "scrubbed-daemon", "escapee"])
def test_an_empty_environment_has_no_cookie(grow: Grow, role: str) -> None:
    tree = grow(role)

    assert kind(tree, role, cookie=tree.lease.cookie) is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may look into every process")
def test_an_undumpable_process_hides_its_cookie_but_not_its_watermark(grow: Grow) -> None:
    tree = grow("undumpable")

    assert kind(tree, "undumpable", cookie=tree.lease.cookie) is None
    assert kind(tree, "undumpable", watermark=tree.lease.watermark) is Proof.WATERMARK


def test_a_watermark_can_be_removed_on_purpose(grow: Grow) -> None:
    tree = grow("renegade")

    assert kind(tree, "renegade", watermark=tree.lease.watermark) is None


@pytest.mark.parametrize(
    "forge",
    [
        lambda cookie: cookie[:16] + secrets.token_hex(8),
        lambda cookie: cookie[:16],
        lambda cookie: cookie.upper(),
        lambda cookie: cookie + "0",
        lambda _: "",
    ],
    ids=["prefix", "half", "upper", "longer", "empty"],
)
def test_half_a_cookie_proves_nothing(grow: Grow, forge: Callable[[str], str]) -> None:
    tree = grow()

    assert kind(tree, "leader", cookie=forge(tree.lease.cookie)) is None


def test_the_cookie_of_another_key_proves_nothing(grow: Grow) -> None:
    tree = grow()
    other = tree.lease.launch_key + 1_000_000

    assert kind(tree, "leader", cookie=tree.lease.cookie, launch_key=other) is None


@pytest.mark.parametrize("cookie", ["", "0123", COOKIE.upper(), COOKIE + "0"])
def test_a_damaged_cookie_in_the_record_matches_no_process(cookie: str) -> None:
    damaged = replace(lease(), cookie=cookie)

    with sleeper(env={COOKIE_VARIABLE: launch_token(7, cookie)}) as pid:
        found = procfs.read_proc(pid)
        assert found is not None
        assert MarkerIndex([damaged]).find_member(found) is None


@pytest.mark.parametrize("text", ["uninitialized\n", "", "\n", "ä"])
def test_the_host_id_of_a_machine_without_one_is_its_host_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    file = tmp_path / "machine-id"
    file.write_text(text, encoding="utf-8")
    monkeypatch.setattr(
        host_module, "Path", lambda path: file if path == "/etc/machine-id" else Path(path)
    )
    monkeypatch.setattr("socket.gethostname", lambda: "box")

    assert Host.here().host_id == "box"


def test_a_process_is_found_by_its_own_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"12:cpu:/not/that\n0::/agents/lease-7\n"
    real = procfs.read
    monkeypatch.setattr(
        procfs, "read", lambda path, **more: lines if "cgroup" in path else real(path, **more)
    )
    us = procfs.read_proc(os.getpid())
    assert us is not None

    def found_in(cgroup: str) -> Member | None:
        return MarkerIndex([replace(lease(), cgroup=cgroup)]).find_member(us)

    assert found_in("/agents/lease-7") == Member(proc=us, launch_key=7, proof=Proof.CGROUP)
    others = ("/agents/lease-70", "/lease-7", "/not/that", "/")
    assert [found_in(text) for text in others] == [None] * 4


def test_a_cgroup_that_an_agent_made_in_its_own_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = procfs.read
    monkeypatch.setattr(
        procfs,
        "read",
        lambda path, **more: b"0::/agents/7/a/b\n" if "cgroup" in path else real(path, **more),
    )
    us = procfs.read_proc(os.getpid())
    assert us is not None

    member = MarkerIndex([replace(lease(), cgroup="/agents/7")]).find_member(us)

    assert member is not None
    assert member.proof is Proof.CGROUP


def test_a_zombie_has_no_marker_but_its_identity(grow: Grow) -> None:
    tree = grow("zombie")
    lease = tree.lease

    assert kind(tree, "zombie", watermark=lease.watermark, cookie=lease.cookie) is None


def test_a_process_is_matched_to_the_right_one_of_several_launches(grow: Grow) -> None:
    trees = [grow("scrubbed") for _ in range(3)]
    index = MarkerIndex([tree.lease for tree in trees])

    for tree in trees:
        member = index.find_member(tree.procs["scrubbed"])
        assert member is not None
        assert member.launch_key == tree.lease.launch_key


# -- the decision ------------------------------------------------------------------------------


def judge(
    *procs: Proc, roots: tuple[int, ...] = (), protected: frozenset[int] = frozenset({1})
) -> Membership:
    snapshot = {one.pid: one for one in procs}
    proved = {
        pid: Member(proc=snapshot[pid], launch_key=7, proof=Proof.WATERMARK)
        for pid in roots
        if pid in snapshot
    }
    return find_members(snapshot, proved, protected=protected)


def kinds(found: Membership) -> dict[int, Proof]:
    return {pid: member.proof for pid, member in found.members.items()}


def test_a_descendant_of_a_proved_process_belongs_to_the_launch() -> None:
    found = judge(
        proc(10),
        proc(12, ppid=10, ticks=102),
        proc(13, ppid=12, ticks=103),
        proc(99),
        roots=(10,),
    )

    assert kinds(found) == {10: Proof.WATERMARK, 12: Proof.DESCENT, 13: Proof.DESCENT}
    assert {member.launch_key for member in found.members.values()} == {7}
    assert found.protected == ()


def test_neither_group_nor_session_proves_anything() -> None:
    found = judge(proc(10), proc(11, group=10), roots=(10,))

    assert kinds(found) == {10: Proof.WATERMARK}


def test_a_process_older_than_its_proved_parent_is_no_descendant() -> None:
    found = judge(proc(10), proc(12, ppid=10, ticks=99), proc(13, ppid=12), roots=(10,))

    assert kinds(found) == {10: Proof.WATERMARK}


def test_a_zombie_still_proves_its_children() -> None:
    found = judge(proc(10, state="Z"), proc(11, ppid=10), roots=(10,))

    assert kinds(found) == {10: Proof.WATERMARK, 11: Proof.DESCENT}


def test_a_proof_of_its_own_takes_precedence_over_descent() -> None:
    snapshot = {10: proc(10), 11: proc(11, ppid=10)}
    roots = {
        pid: Member(proc=snapshot[pid], launch_key=key, proof=Proof.COOKIE)
        for pid, key in ((10, 7), (11, 8))
    }

    found = find_members(snapshot, roots, protected=frozenset())

    assert {pid: member.launch_key for pid, member in found.members.items()} == {10: 7, 11: 8}


def test_descent_does_not_pass_through_a_shielded_process() -> None:
    # We were started by an agent: our own new agents are not its descendants.
    found = judge(
        proc(10), proc(40, ppid=10), proc(41, ppid=40), roots=(10,), protected=frozenset({40})
    )

    assert kinds(found) == {10: Proof.WATERMARK}


def test_a_shielded_process_with_a_marker_is_reported() -> None:
    found = judge(proc(40), roots=(40,), protected=frozenset({40}))

    assert found.members == {}
    assert [member.pid for member in found.protected] == [40]


def test_shields_pid_1_itself_its_ancestors_and_its_group() -> None:
    snapshot = {
        1: proc(1, ppid=0),
        5: proc(5),
        6: proc(6, ppid=5),
        7: proc(7, ppid=5, group=6),  # in our group
        8: proc(8, ppid=6),  # a shim of ours: its own session
    }

    assert protected_pids(snapshot, own_pid=6) == {1, 5, 6, 7}


PIDS = st.integers(2, 12)
TABLES = st.lists(
    st.builds(
        proc,
        PIDS,
        ppid=st.integers(0, 12),
        group=PIDS,
        ticks=st.integers(98, 102),
        state=st.sampled_from("SRZ"),
    ),
    max_size=12,
    unique_by=lambda one: one.pid,
)


@given(TABLES, st.sets(PIDS), st.sets(PIDS))
def test_members_are_exactly_the_processes_with_a_proved_ancestor(
    table: list[Proc], roots: set[int], protected: set[int]
) -> None:
    snapshot = {one.pid: one for one in table}

    def tied(one: Proc, seen: frozenset[int] = frozenset()) -> bool:
        if one.pid in protected or one.pid in seen:
            return False
        parent = snapshot.get(one.ppid)
        kin = parent is not None and one.start_ticks >= parent.start_ticks
        return one.pid in roots or (kin and parent is not None and tied(parent, seen | {one.pid}))

    found = judge(*table, roots=tuple(roots), protected=frozenset(protected)).members

    assert set(found) == {one.pid for one in table if tied(one)}


@given(TABLES)
def test_without_a_proof_there_is_no_member(table: list[Proc]) -> None:
    assert judge(*table) == Membership(members={}, protected=())


# -- reading /proc -----------------------------------------------------------------------------


@contextmanager
def sleeper(**options: object) -> Iterator[int]:
    """Yield a running process."""
    code = "import os, time; os.write(1, b'.'); time.sleep(60)"
    command = [sys.executable, "-I", "-S", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, **options) as popen:  # type: ignore[call-overload]
        try:
            popen.stdout.read(1)
            yield popen.pid
        finally:
            popen.kill()


def test_reads_a_name_made_of_parentheses_and_spaces(tmp_path: Path) -> None:
    nasty = tmp_path / "a) S 1 (b"
    nasty.symlink_to("/bin/cat")
    with subprocess.Popen([nasty], stdin=subprocess.PIPE, start_new_session=True) as popen:
        found = procfs.read_proc(popen.pid)
        name = procfs.read(f"/proc/{popen.pid}/comm")
        assert popen.stdin is not None
        popen.stdin.close()

    assert name == b"a) S 1 (b\n"
    assert found is not None
    assert (found.pid, found.ppid, found.session) == (popen.pid, os.getpid(), popen.pid)


NAMES = st.binary(min_size=1, max_size=15).filter(lambda name: b"\0" not in name)


@given(NAMES, st.integers(1, 2**22), st.integers(0, 2**63), st.sampled_from("RSDZTtXI"))
def test_a_name_never_changes_what_is_read(name: bytes, ppid: int, ticks: int, state: str) -> None:
    fields = [state, ppid, 3, 4, 0, -1, 0x400100, *["0"] * 10, 2, 0, ticks, *["0"] * 30]
    line = b"9 (" + name + b") " + " ".join(map(str, fields)).encode() + b"\n"

    found = procfs._parse(9, line)

    assert (found.pid, found.ppid, found.group, found.session) == (9, ppid, 3, 4)
    assert (found.state, found.threads, found.start_ticks) == (state, 2, ticks)


KTHREADD = b"2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 3 0 0 20 0 1 0 30 0 0 1844674407370955161"
BASH = b"2 (bash) S 1 2 2 34816 2 4194560 0 0 0 0 0 3 0 0 20 0 1 0 30 0 0 18446744073709551615"


@pytest.mark.parametrize(
    ("line", "markers_read"), [(KTHREADD, 0), (BASH, 2)], ids=["kernel", "bash"]
)
def test_no_marker_of_a_thread_of_the_kernel_is_read(
    monkeypatch: pytest.MonkeyPatch, line: bytes, markers_read: int
) -> None:
    read = []

    def note(path: str, **_: int) -> bytes:
        read.append(path)
        return b""

    monkeypatch.setattr(procfs, "read", note)
    index = MarkerIndex([replace(lease(), watermark=MARK)])

    assert index.find_member(procfs._parse(2, line)) is None
    assert len(read) == markers_read


def test_start_ticks_never_change() -> None:
    with sleeper() as pid:
        first, second = procfs.read_proc(pid), procfs.read_proc(pid)

    assert first is not None
    assert second is not None
    assert first.identity == second.identity


def token_of(pid: int) -> str | None:
    found = procfs.read_proc(pid)
    assert found is not None
    return markers.read_token(found)


def test_reads_the_token_of_a_process() -> None:
    token = f"1f.{secrets.token_hex(16)}"
    with sleeper(env={"A": "1", COOKIE_VARIABLE: token, "Z": "2"}) as pid:
        assert token_of(pid) == token


def test_takes_no_other_variable_for_the_token() -> None:
    with sleeper(env={f"X{COOKIE_VARIABLE}": "1.a", "B": f"{COOKIE_VARIABLE}=1.a"}) as pid:
        assert token_of(pid) is None


def test_unlimited_is_no_watermark() -> None:
    soft, hard = resource.getrlimit(RLIMIT_LOCKS)
    expected = soft if soft == hard != resource.RLIM_INFINITY else None

    assert procfs.watermark(os.getpid()) == expected


def test_soft_and_hard_must_both_be_the_number() -> None:
    with sleeper() as pid:
        resource.prlimit(pid, RLIMIT_LOCKS, (MARK, MARK))
        assert procfs.watermark(pid) == MARK
        resource.prlimit(pid, RLIMIT_LOCKS, (MARK - 1, MARK))
        assert procfs.watermark(pid) is None


def test_a_process_that_does_not_exist_has_no_data() -> None:
    beyond = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1

    assert procfs.read_proc(beyond) is None
    assert procfs.watermark(beyond) is None
    assert procfs.environment(beyond) == b""
    assert procfs.cgroup(beyond) == ""
    assert procfs.scan([beyond]) == {}


def test_an_unreadable_proc_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptor_left(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", no_descriptor_left)

    with pytest.raises(OSError, match="Too many"):
        procfs.scan([os.getpid()])


def test_a_scan_finds_its_own_process_and_a_child() -> None:
    with sleeper() as pid:
        found = procfs.scan()

    assert found[os.getpid()].ppid == os.getppid()
    assert found[pid].ppid == os.getpid()
    assert [one.pid for one in procfs.descendants(found, os.getpid())].count(pid) == 1


def test_the_host_is_the_same_when_read_twice() -> None:
    assert Host.here() == Host.here()
    assert len(Host.here().boot_id) == 36


def test_the_repr_of_launch_markers_shows_no_marker() -> None:
    shown = repr(replace(lease(), watermark=MARK))

    assert COOKIE not in shown
    assert str(MARK) not in shown
