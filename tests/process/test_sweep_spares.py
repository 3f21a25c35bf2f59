"""A sweep spares every process that is not proven to be of the launch."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from process.sweeping import ROOT, NewLease, end, only_root, unrecorded
from process.trees import PATIENCE_S, Grow, Signals, alive, send_signal
from runrecovery_service.process import procfs
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.process.markers import COOKIE_VARIABLE, LaunchMarkers


def launched_on(lease: LaunchMarkers, **host: Any) -> LaunchMarkers:
    """Return the markers as if they were of a launch on another host, boot or pid namespace."""
    return replace(lease, host=replace(lease.host, **host))


def test_spares_another_launch(grow: Grow, signals: Signals) -> None:
    ours, sibling = grow("child", "escapee"), grow("child", "escapee")

    end(ours.lease)

    assert all(sibling.alive(role) for role in sibling.procs)
    assert alive(sibling.shim)
    assert signals.pids() == {proc.pid for proc in ours.procs.values()}


def test_spares_a_process_that_looks_the_same(grow: Grow, signals: Signals, tmp_path: Path) -> None:
    """The same program, arguments, folder and shape of tree, but no marker."""
    ours = grow("child")
    command = Path(f"/proc/{ours.procs['leader'].pid}/cmdline").read_text().split("\0")[:-1]
    with subprocess.Popen(
        command, cwd=tmp_path, env={}, stdout=subprocess.PIPE, start_new_session=True
    ) as popen:
        assert popen.stdout is not None
        said = [popen.stdout.readline().split() for _ in range(2)]
        twins = [procfs.read_proc(int(pid)) for _, pid in said]
        try:
            end(ours.lease)

            assert [twin is not None and alive(twin) for twin in twins] == [True, True]
            assert signals.pids() == {proc.pid for proc in ours.procs.values()}
        finally:
            for twin in twins:
                assert twin is not None
                send_signal(twin, signal.SIGKILL)


@pytest.mark.parametrize("off_by", [-1, 1])
def test_spares_the_process_of_a_reused_pid(
    grow: Grow, new_lease: NewLease, signals: Signals, off_by: int
) -> None:
    stranger = grow("child")
    leader = stranger.procs["leader"]

    ending = end(replace(new_lease(), pid=leader.pid, start_ticks=leader.start_ticks + off_by))

    assert ending == Ending(gone=True)
    assert stranger.alive("leader")
    assert stranger.alive("child")
    assert signals.lines == []


def forge_prefix(lease: LaunchMarkers) -> LaunchMarkers:
    return replace(lease, cookie=lease.cookie[:16] + secrets.token_hex(8))


def forge_key(lease: LaunchMarkers) -> LaunchMarkers:
    return replace(lease, launch_key=lease.launch_key + 1_000_000)


def forge_short(lease: LaunchMarkers) -> LaunchMarkers:
    return replace(lease, cookie=lease.cookie[:16])


def forge_empty(lease: LaunchMarkers) -> LaunchMarkers:
    return replace(lease, cookie="")


@pytest.mark.parametrize("forge", [forge_prefix, forge_key, forge_short, forge_empty])
@pytest.mark.parametrize("watermark", [None, 1])
def test_half_a_cookie_proves_nothing(
    grow: Grow,
    signals: Signals,
    forge: Callable[[LaunchMarkers], LaunchMarkers],
    watermark: int | None,
) -> None:
    tree = grow("daemon")
    off = None if watermark is None else (tree.lease.watermark or 0) + watermark

    ending = end(forge(replace(unrecorded(tree.lease), watermark=off)))

    assert ending == Ending(gone=True)
    assert tree.alive("daemon")
    assert signals.lines == []


def test_a_launch_of_another_boot_is_gone_without_a_scan(
    grow: Grow, signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow("child")

    def look() -> list[int]:
        raise AssertionError("looked")

    monkeypatch.setattr(procfs, "pids", look)
    ending = end(launched_on(tree.lease, boot_id="another"))

    assert ending == Ending(gone=True)
    assert tree.alive("leader")
    assert signals.lines == []


def test_a_recorded_pid_of_another_namespace_is_ignored(
    grow: Grow, new_lease: NewLease, signals: Signals
) -> None:
    stranger = grow("child")
    pid, start_ticks = stranger.shim.identity

    ending = end(
        replace(launched_on(new_lease(), pid_namespace=1), pid=pid, start_ticks=start_ticks)
    )

    assert ending == Ending(gone=True)
    assert stranger.alive("leader")
    assert alive(stranger.shim)
    assert signals.lines == []


def test_markers_of_another_namespace_are_valid(grow: Grow) -> None:
    # A service in a container shares the host's boot id; what it launched can be seen from here.
    tree = grow("daemon", "escapee")
    tree.kill_shim()

    ending = end(launched_on(tree.lease, pid_namespace=1))

    assert ending == Ending(found=3, ended=3, gone=True)
    assert tree.nobody_alive()


def test_reports_that_another_host_cannot_be_scanned(grow: Grow, signals: Signals) -> None:
    tree = grow()

    ending = end(launched_on(tree.lease, host_id="elsewhere", boot_id="another"))

    assert ending.gone
    assert "another host (elsewhere)" in ending.refused[0]
    assert tree.alive("leader")
    assert signals.lines == []


def test_a_renamed_host_is_the_same_while_its_kernel_runs(grow: Grow) -> None:
    tree = grow()

    ending = end(launched_on(tree.lease, host_id="renamed"))

    assert ending == Ending(found=1, ended=1, gone=True)


def sweep_once(lease: LaunchMarkers, *words: str, **options: Any) -> dict[str, Any]:
    script = Path(__file__).with_name("sweep_once.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(asdict(lease)), *words],
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
        **options,
    )
    told: dict[str, Any] = json.loads(done.stderr)
    return told


@pytest.mark.parametrize("start", ["with-grace", "at-once"])
@pytest.mark.parametrize("mark", ["cookie", "watermark"])
def test_never_signals_itself_even_with_the_marker(
    new_lease: NewLease, mark: str, start: str
) -> None:
    lease = new_lease()
    cookie = {COOKIE_VARIABLE: lease.token} if mark == "cookie" else {}
    words = ["marked"] if mark == "watermark" else []

    ending = sweep_once(lease, *words, start, env={**os.environ, **cookie})

    assert (ending["found"], ending["gone"]) == (0, False)
    assert f"({mark}) but is this service" in ending["refused"][0]


@only_root
def test_reports_a_process_of_another_user_and_spares_it(grow: Grow) -> None:
    tree = grow("escapee")
    tree.kill_shim()

    ending = sweep_once(tree.lease, "65534")

    assert (ending["found"], ending["ended"], ending["gone"]) == (2, 0, False)
    assert sorted(ending["refused"]) == sorted(
        f"pid {proc.pid} (watermark) may not be signalled by this user"
        for proc in tree.procs.values()
    )
    assert tree.alive("leader")
    assert tree.alive("escapee")


def _namespaces() -> bool:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    writable = ["test", "-w", "/proc/sys/kernel/ns_last_pid"]
    try:
        done = subprocess.run([*command, *writable], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


in_a_namespace = pytest.mark.skipif(
    not (ROOT and _namespaces()), reason="a pid namespace of our own takes root and unshare(1)"
)


def race(*words: str) -> dict[str, Any]:
    """Let pid_reuse.py replace a process of the launch by an innocent one with its pid."""
    script = Path(__file__).with_name("pid_reuse.py")
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, script,
         *words],
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
    )  # fmt: skip
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["swapped"], told["innocent"]) == (1, True)
    return told


@in_a_namespace
@pytest.mark.parametrize("grace_s", ["0", "0.2"])
@pytest.mark.parametrize("moment", ["before", "opening", "opened"])
def test_spares_an_innocent_that_takes_the_pid_of_a_process_of_the_launch(
    moment: str, grace_s: str
) -> None:
    told = race(moment, grace_s)

    assert told["state"] not in {"T", "Z"}
    assert told["gone"]
    assert "sent" not in str(told["lines"])


@in_a_namespace
def test_the_shim_spares_an_innocent_that_takes_the_pid_of_a_descendant() -> None:
    assert race("shim", "0")["state"] not in {"T", "Z"}


@in_a_namespace
@pytest.mark.parametrize("left_out", ["prove", "send"])
def test_one_of_two_checks_is_enough_to_spare_an_innocent(left_out: str) -> None:
    assert race("opening", "0.2", left_out)["state"] not in {"T", "Z"}


@in_a_namespace
@pytest.mark.parametrize(
    "words",
    [("opening", "0.2", "prove", "send"), ("opening", "0", "send"), ("shim", "0", "send")],
    ids=["asked", "frozen", "shim"],
)
def test_without_both_checks_an_innocent_dies(words: tuple[str, ...]) -> None:
    """Otherwise the tests above could not fail."""
    assert race(*words)["state"] == "Z"
