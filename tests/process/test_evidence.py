"""Which processes belong to which lease: the decision, without any process."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.process import evidence
from runrecovery_service.process.evidence import (
    COOKIE_VARIABLE,
    Evidence,
    Host,
    LeaseEvidence,
    Membership,
    Proc,
    members,
    shielded,
)

COOKIE = "0123456789abcdef" * 2


def proc(
    pid: int, *, ppid: int = 1, session: int | None = None, ticks: int = 100, state: str = "S"
) -> Proc:
    session = pid if session is None else session
    return Proc(
        pid=pid,
        ppid=ppid,
        group=session,
        session=session,
        start_ticks=ticks,
        state=state,
        threads=1,
    )


def lease(key: int = 7, pid: int | None = 10, ticks: int | None = 100) -> LeaseEvidence:
    return LeaseEvidence(
        lease_key=key,
        run_key=key,
        cookie=COOKIE,
        pid=pid,
        start_ticks=ticks,
        boot_id="b",
        pid_namespace=1,
        host_id="h",
    )


def judge(
    *procs: Proc, bearers: tuple[int, ...] = (), of: LeaseEvidence | None = None
) -> Membership:
    of = lease() if of is None else of
    return members(
        {one.pid: one for one in procs},
        [of],
        dict.fromkeys(bearers, of.token),
        held={},
        shield=frozenset({1}),
    )


def kinds(found: Membership) -> dict[int, Evidence]:
    return {pid: hit.kind for pid, hit in found.hits.items()}


def test_the_recorded_leader_brings_its_session_and_descendants() -> None:
    found = judge(
        proc(10),
        proc(11, session=10, ticks=101),
        proc(12, ppid=10, ticks=102),
        proc(13, ppid=12, ticks=103),
        proc(99),
    )

    assert kinds(found) == {
        10: Evidence.LEADER,
        11: Evidence.SESSION,
        12: Evidence.DESCENT,
        13: Evidence.DESCENT,
    }
    assert found.doubts == ()


def test_a_bearer_in_the_leaders_session_vouches_for_it() -> None:
    found = judge(proc(11, session=10), proc(12, session=10), bearers=(11,))

    assert kinds(found) == {11: Evidence.COOKIE, 12: Evidence.SESSION}


def test_a_bearer_that_made_its_session_brings_it() -> None:
    found = judge(proc(20), proc(21, session=20), bearers=(20,))

    assert kinds(found) == {20: Evidence.COOKIE, 21: Evidence.SESSION}


def test_a_bearer_in_a_strangers_session_vouches_for_nobody() -> None:
    # An operator who copied our environment into a program under his own login shell.
    found = judge(proc(50), proc(51, ppid=50, session=50), proc(52, session=50), bearers=(51,))

    assert kinds(found) == {51: Evidence.COOKIE}


def test_a_session_whose_maker_is_gone_is_in_doubt() -> None:
    found = judge(proc(11, session=10))

    assert found.hits == {}
    assert [doubt.pid for doubt in found.doubts] == [11]


@pytest.mark.parametrize(
    "mate",
    [
        proc(11, session=10, ticks=99),  # older than the session's maker
        proc(11, session=10, state="Z"),
    ],
)
def test_who_cannot_be_meant_is_not_in_doubt(mate: Proc) -> None:
    assert judge(mate) == Membership(hits={}, doubts=())


def test_a_reused_leader_pid_clears_its_session_of_doubt() -> None:
    found = judge(proc(10, ticks=500), proc(11, session=10, ticks=501))

    assert found == Membership(hits={}, doubts=())


def test_a_bearer_does_not_vouch_for_a_reused_session() -> None:
    found = judge(proc(10, ticks=500), proc(11, session=10, ticks=501), bearers=(11,))

    assert kinds(found) == {11: Evidence.COOKIE}


def test_kin_is_never_older_than_its_proof() -> None:
    found = judge(proc(10), proc(12, ppid=10, session=3, ticks=99))

    assert kinds(found) == {10: Evidence.LEADER}


def test_zombies_prove_but_bear_no_cookie_of_their_own() -> None:
    found = judge(proc(10, state="Z"), proc(11, session=10))

    assert kinds(found) == {10: Evidence.LEADER, 11: Evidence.SESSION}


@pytest.mark.parametrize("cookie", ["", "0123", COOKIE.upper(), COOKIE + "0"])
def test_a_damaged_cookie_proves_nothing(cookie: str) -> None:
    damaged = replace(lease(), cookie=cookie)

    assert judge(proc(20), bearers=(20,), of=damaged).hits == {}


def test_what_was_held_before_still_proves_its_children() -> None:
    snapshot = {20: proc(20, session=3), 21: proc(21, ppid=20, session=3)}

    found = members(snapshot, [lease()], {}, held={(20, 100): 7}, shield=frozenset())

    assert kinds(found) == {20: Evidence.HELD, 21: Evidence.DESCENT}


def test_kinship_does_not_pass_through_the_shield() -> None:
    # We were started by an agent: our own new agents are not its descendants.
    snapshot = {10: proc(10), 40: proc(40, ppid=10), 41: proc(41, ppid=40)}

    found = members(snapshot, [lease()], {}, held={}, shield=frozenset({40}))

    assert kinds(found) == {10: Evidence.LEADER}


def test_who_bears_a_lease_and_is_shielded_is_reported() -> None:
    snapshot = {40: proc(40)}

    found = members(snapshot, [lease()], {40: lease().token}, held={}, shield=frozenset({40}))

    assert found.hits == {}
    assert [doubt.pid for doubt in found.doubts] == [40]


def test_shields_pid_1_us_our_ancestors_and_our_group() -> None:
    snapshot = {
        1: proc(1, ppid=0),
        5: proc(5),
        6: proc(6, ppid=5),
        7: proc(7, ppid=5, session=6),  # in our group
        8: proc(8, ppid=6),  # an agent of ours: its own session
    }

    assert shielded(snapshot, own_pid=6) == {1, 5, 6, 7}


PIDS = st.integers(2, 12)
TABLES = st.lists(
    st.builds(
        proc,
        PIDS,
        ppid=st.integers(0, 12),
        session=PIDS,
        ticks=st.integers(98, 102),
        state=st.sampled_from("SRZ"),
    ),
    max_size=12,
    unique_by=lambda one: one.pid,
)


@given(TABLES, st.sets(PIDS), st.sets(PIDS))
def test_every_member_is_linked_to_a_proof(
    table: list[Proc], bearers: set[int], shield: set[int]
) -> None:
    snapshot = {one.pid: one for one in table}
    tokens = {pid: lease().token for pid in bearers if pid in snapshot}
    hits = members(snapshot, [lease()], tokens, held={}, shield=frozenset(shield)).hits

    assert not shield & set(hits)
    for hit in hits.values():
        parent = hits.get(hit.proc.ppid)
        mates = [
            other
            for other in hits.values()
            if other.proc.session == hit.proc.session and other is not hit
        ]
        linked = {
            Evidence.LEADER: hit.proc.identity == (10, 100),
            Evidence.COOKIE: hit.proc.pid in bearers,
            Evidence.DESCENT: parent is not None,
            Evidence.SESSION: bool(mates),
            Evidence.HELD: False,
        }
        assert linked[hit.kind]


@given(TABLES)
def test_without_a_leader_or_a_bearer_nobody_is_a_member(table: list[Proc]) -> None:
    snapshot = {one.pid: one for one in table if one.identity != (10, 100)}

    assert members(snapshot, [lease()], {}, held={}, shield=frozenset()).hits == {}


@contextmanager
def sleeper(**options: object) -> Iterator[int]:
    """A process of ours that has said that it runs."""
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
        found = evidence.read_proc(popen.pid)
        assert popen.stdin is not None
        popen.stdin.close()

    assert found is not None
    assert (found.pid, found.ppid, found.session) == (popen.pid, os.getpid(), popen.pid)


def test_start_ticks_never_change() -> None:
    with sleeper() as pid:
        first, second = evidence.read_proc(pid), evidence.read_proc(pid)

    assert first is not None
    assert second is not None
    assert first.identity == second.identity


def test_reads_the_token_of_a_process() -> None:
    token = f"1f.{secrets.token_hex(16)}"
    with sleeper(env={"A": "1", COOKIE_VARIABLE: token, "Z": "2"}) as pid:
        assert evidence.cookie_of(pid) == token


def test_takes_no_other_variable_for_the_token() -> None:
    with sleeper(env={f"X{COOKIE_VARIABLE}": "1.a", "B": f"{COOKIE_VARIABLE}=1.a"}) as pid:
        assert evidence.cookie_of(pid) is None


def test_says_nothing_of_who_does_not_exist() -> None:
    beyond = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1

    assert evidence.read_proc(beyond) is None
    assert evidence.cookie_of(beyond) is None
    assert evidence.scan([beyond]) == {}


def test_a_scan_finds_us_and_our_child() -> None:
    with sleeper() as pid:
        found = evidence.scan()

    assert found[os.getpid()].ppid == os.getppid()
    assert found[pid].ppid == os.getpid()


def test_here_is_the_same_place_twice() -> None:
    assert Host.here() == Host.here()
    assert len(Host.here().boot_id) == 36


def test_a_lease_does_not_show_its_cookie() -> None:
    assert COOKIE not in repr(lease())
