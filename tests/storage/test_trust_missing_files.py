"""Entries of a missing trust file stay recorded until the file is back or certainly gone."""

from __future__ import annotations

from datetime import timedelta

import pytest
from runrecovery_service.agents import trust_removal
from runrecovery_service.domain.reconciliation import TrustClearing
from runrecovery_service.trust import files
from storage.trust_host import ORIGINAL, CliHost, mount, mount_another, unmount


def make_unreachable(host: CliHost, how: str) -> None:
    """Make a file with the entry of an ended run, and make the file unreachable."""
    host.fail(host.trusted_run())
    if how == "lock":
        files.lock_file(host.file).unlink()
        return
    unmount(host)
    if how != "folder":
        host.path.mkdir()
    if how == "other":
        mount_another(host)


def make_reachable(host: CliHost, how: str) -> None:
    """Make the file reachable again."""
    if how != "lock":
        mount(host)


UNMOUNTED = ["folder", "empty folder", "other"]

GONE_S = trust_removal.PLACE_GONE.total_seconds()


@pytest.mark.parametrize("how", UNMOUNTED)
def test_entries_of_an_unmounted_folder_stay_recorded_until_it_is_mounted_again(
    host: CliHost, how: str
) -> None:
    make_unreachable(host, how)
    left = sorted(host.path.iterdir()) if host.path.exists() else None

    first, *more = [host.keeper().remove_stale() for _ in range(3)]

    assert (first.removals, first.failures, len(first.kept)) == ((), (), 1)
    assert first.kept[0].startswith(f"{host.file}: entries stay recorded: its folder, or")
    assert more == [TrustClearing()] * 2  # reported only once
    assert len(host.recorded()) == 1
    assert (sorted(host.path.iterdir()) if host.path.exists() else None) == left
    make_reachable(host, how)
    assert [one.outcome for one in host.keeper().remove_stale().removals] == ["removed"]
    assert (host.file.read_bytes(), host.recorded()) == (ORIGINAL, [])


@pytest.mark.parametrize("how", [*UNMOUNTED, "lock"])
def test_entries_of_a_folder_that_is_unmounted_for_a_week_are_forgotten(
    host: CliHost, how: str
) -> None:
    make_unreachable(host, how)
    host.keeper().remove_stale()

    host.store.advance(GONE_S - 60)
    assert host.keeper().remove_stale() == TrustClearing()
    host.store.advance(61)

    assert [one.outcome for one in host.keeper().remove_stale().removals] == ["gone"]
    assert host.store.rows("SELECT * FROM trust_entry") == []


def test_the_week_of_an_unmounted_folder_begins_anew_when_the_wall_clock_is_set_back(
    host: CliHost,
) -> None:
    make_unreachable(host, "folder")
    host.keeper().remove_stale()
    host.store.step_wall_clock(timedelta(days=-30))
    host.keeper().remove_stale()

    host.store.advance(GONE_S + 1)

    assert [one.outcome for one in host.keeper().remove_stale().removals] == ["gone"]


def test_a_removed_lock_file_does_not_keep_an_entry_from_being_removed(host: CliHost) -> None:
    run = host.trusted_waiting_run()
    files.lock_file(host.file).unlink()
    host.add_entry(run)  # its next turn
    host.fail(run)

    host.keeper().remove_stale()

    assert host.file.read_bytes() == ORIGINAL


@pytest.mark.parametrize("text", [None, b"", b" \n\n"], ids=["absent", "empty", "blank"])
def test_a_file_that_is_absent_or_empty_for_a_moment_is_checked_again(
    host: CliHost, text: bytes | None
) -> None:
    host.fail(host.trusted_run())
    written = b"# edited\n" + host.file.read_bytes()
    host.file.unlink() if text is None else host.file.write_bytes(text)

    done = host.keeper().remove_stale()

    assert (done.removals, done.kept) == (
        (), (f"{host.file}: entries stay recorded: it does not exist, or is empty",)
    )  # fmt: skip
    assert host.keeper().remove_stale() == TrustClearing()
    host.file.write_bytes(written)
    host.keeper().remove_stale()
    assert (host.file.read_bytes(), host.recorded()) == (b"# edited\n" + ORIGINAL, [])


def test_entries_of_a_file_that_is_absent_for_a_minute_are_gone(host: CliHost) -> None:
    host.fail(host.trusted_run())
    host.file.unlink()

    outs = []
    for _ in range(4):
        outs += [one.outcome for one in host.keeper().remove_stale().removals]
        host.store.advance(15)
    assert outs == []
    host.store.advance(15)

    assert [one.outcome for one in host.keeper().remove_stale().removals] == ["gone"]
    assert host.store.rows("SELECT * FROM trust_entry") == []


def test_time_without_the_folder_does_not_count_as_time_without_the_file(host: CliHost) -> None:
    host.fail(host.trusted_run())
    text = host.file.read_bytes()
    unmount(host)
    host.keeper().remove_stale()
    host.store.advance(3600)
    mount(host)
    host.file.unlink()

    assert host.keeper().remove_stale().removals == ()

    host.file.write_bytes(text)
    host.keeper().remove_stale()
    assert host.file.read_bytes() == ORIGINAL


def test_entries_of_a_file_that_the_service_made_and_a_user_deleted_are_gone_at_once(
    host: CliHost,
) -> None:
    host.file.unlink()
    host.fail(host.trusted_run())
    host.file.unlink()

    assert [one.outcome for one in host.keeper().remove_stale().removals] == ["gone"]
    assert not host.file.exists()


def test_a_missing_folder_is_checked_for_at_intervals_only(host: CliHost) -> None:
    make_unreachable(host, "folder")
    assert host.keeper().stale_files() == [str(host.file)]
    host.keeper().remove_stale()

    assert host.keeper().stale_files() == []
    host.store.advance(trust_removal.AWAY_CHECK.total_seconds())
    assert host.keeper().stale_files() == [str(host.file)]
