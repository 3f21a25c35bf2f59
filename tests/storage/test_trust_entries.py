"""A CLI's file has the trust entry of a run while the run needs it, and keeps the user's text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from runrecovery_service.agents.trust_keeper import TrustRefused
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.reconciliation import TrustClearing
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.storage import instances, trust
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import boot
from storage.trust_host import ORIGINAL, CliHost, mount_another, outcomes, token_of, unmount


def test_the_entry_of_an_ended_run_is_removed_and_that_of_a_live_run_stays(host: CliHost) -> None:
    before = host.trusted_run()
    text = host.file.read_bytes()
    dead = host.trusted_run()
    host.fail(dead)

    done = host.keeper().remove_stale()

    assert outcomes(done) == [(dead.run_id, "removed")]
    assert (done.removals[0].file, done.removals[0].folder) == (
        str(host.file), str(host.workspace(dead))
    )  # fmt: skip
    assert host.file.read_bytes() == text
    assert host.recorded() == [(before.key, str(host.workspace(before)))]
    assert host.keeper().remove_stale() == TrustClearing()


@pytest.mark.parametrize(
    "gone",
    [
        {"status": "SUCCEEDED"},
        {"status": "CANCELED"},
        {"recovery_state": "QUARANTINED"},
        {"attempt": 2},
        {"id": 999_999},
    ],
    ids=["succeeded", "canceled", "quarantined", "superseded", "no such run"],
)
def test_the_entry_of_a_run_that_needs_none_is_removed(host: CliHost, gone: dict[str, Any]) -> None:
    host.store.set(host.trusted_run(), **gone)

    done = host.keeper().remove_stale()

    assert [one.outcome for one in done.removals] == ["removed"]
    assert host.file.read_bytes() == ORIGINAL
    assert host.recorded() == []


@pytest.mark.parametrize("status", ["QUEUED", "RUNNING", "WAITING_USER"])
def test_a_run_that_has_not_ended_keeps_its_entry(host: CliHost, status: str) -> None:
    run = host.trusted_run()
    host.store.set(run, status=status)

    assert host.keeper().remove_stale() == TrustClearing()
    assert host.trusts(run)


def test_stale_entries_of_another_instance_are_removed_too(host: CliHost) -> None:
    dead = host.trusted_run()
    host.fail(dead)
    host.store.owner = instances.claim(host.store.db, boot("other"), now=host.store.now)

    host.keeper().remove_stale()

    assert host.file.read_bytes() == ORIGINAL


def test_a_host_that_was_renamed_removes_stale_entries_from_its_file(host: CliHost) -> None:
    host.fail(host.trusted_run())
    host.host_id = "another host"

    done = host.keeper().remove_stale()

    assert (host.file.read_bytes(), host.recorded(), len(done.removals)) == (ORIGINAL, [], 1)


def test_entries_of_other_hosts_in_a_shared_store_stay_recorded(host: CliHost) -> None:
    host.fail(host.trusted_run())
    host.host_id = "another host"
    unmount(host)
    host.path.mkdir()
    mount_another(host)
    text = host.file.read_bytes()
    host.fail(host.trusted_run())

    done = host.keeper().remove_stale()

    assert (host.file.read_bytes(), len(host.recorded()), len(done.removals)) == (text, 1, 1)
    # A SQLite store belongs to one service, whatever the former name of its host.
    alone = host.store.db.dialect.kind is DatabaseKind.SQLITE
    assert len(done.warnings) == alone
    ((away,),) = host.store.rows("SELECT away FROM trust_entry WHERE removed_at IS NULL")
    assert (away is not None) == alone
    assert host.keeper().remove_stale().warnings == ()


def test_a_waiting_run_of_another_service_in_a_shared_store_keeps_its_entry(
    host: CliHost,
) -> None:
    run = host.trusted_waiting_run()
    text = host.file.read_bytes()
    host.store.owner = instances.claim(host.store.db, boot("other"), now=host.store.now)

    assert host.keeper().remove_stale() == TrustClearing()
    assert (host.file.read_bytes(), [key for key, _ in host.recorded()]) == (text, [run.key])


def test_a_superseded_attempt_adds_no_entry(host: CliHost) -> None:
    run = host.store.running().run
    late = host.store.get(run)
    host.store.set(run, attempt=2)

    with pytest.raises(Fenced):
        host.keeper().add(late, "codex", host.workspace(late), host.env)

    assert (host.file.read_bytes(), host.recorded()) == (ORIGINAL, [])


def test_the_end_of_a_run_removes_its_own_entry_only(host: CliHost) -> None:
    other = host.trusted_run()
    text = host.file.read_bytes()
    turn = host.store.running()
    host.add_entry(turn.run)

    done = host.keeper().remove_run(turn.run)

    assert outcomes(done) == [(turn.run.run_id, "removed")]
    assert host.file.read_bytes() == text
    assert [key for key, _ in host.recorded()] == [other.key]
    assert host.store.end(turn, Succeeded({})).status is RunStatus.SUCCEEDED


def test_a_superseded_epoch_neither_removes_nor_adds_an_entry(host: CliHost) -> None:
    run = host.trusted_run()
    late, text = host.keeper(), host.file.read_bytes()
    host.store.set(run, owner_epoch=host.store.restart().epoch)

    assert late.remove_run(run) == TrustClearing()
    with pytest.raises(Fenced):
        late.add(run, "codex", host.workspace(run).with_name("other"), host.env)

    assert host.file.read_bytes() == text
    assert host.trusts(run)


def test_entries_of_the_user_are_restored_or_left_as_they_are(host: CliHost) -> None:
    dead = [host.store.running().run for _ in range(4)]
    untrusted, trusted, changed, gone = dead
    host.file.write_text(
        f'[projects."{host.workspace(untrusted)}"]\ntrust_level = "untrusted" # mine\n'
        f'[projects."{host.workspace(trusted)}"]\ntrust_level = "trusted"\n'
    )
    text = host.file.read_bytes()
    host.add_entry(untrusted)
    host.add_entry(trusted)
    with_both = host.file.read_bytes()
    host.add_entry(changed)
    users = host.file.read_bytes().replace(with_both, b"").replace(b'"trusted"', b'"untrusted"')
    host.file.write_bytes(with_both)
    host.add_entry(gone)
    host.file.write_bytes(with_both + users)
    for run in dead:
        host.fail(run)

    done = host.keeper().remove_stale()

    assert dict(outcomes(done)) == {
        untrusted.run_id: "restored", trusted.run_id: "not_ours", changed.run_id: "changed",
        gone.run_id: "gone",
    }  # fmt: skip
    assert host.file.read_bytes() == text + users
    assert host.recorded() == []


def test_a_second_launch_in_a_workspace_adds_no_second_entry(host: CliHost) -> None:
    run = host.trusted_run()
    text, rows = host.file.read_bytes(), host.recorded()

    host.add_entry(run)

    assert (host.file.read_bytes(), host.recorded()) == (text, rows)
    host.fail(run)
    host.keeper().remove_stale()
    assert host.file.read_bytes() == ORIGINAL


@pytest.mark.parametrize(
    ("env", "name", "says"),
    [
        ({}, "w", "HOME is not an absolute path"),
        ({"CODEX_HOME": "here"}, "w", "CODEX_HOME is not an absolute path"),
        ({"CODEX_HOME": "/nowhere/\udcff"}, "w", "is not UTF-8 text"),
        (None, "\udcff", "is not UTF-8 text"),
        (None, "/".join(["w" * 200] * 10), "is too long"),
    ],
    ids=["no home", "relative home", "odd home", "odd workspace", "long workspace"],
)
def test_a_path_that_cannot_be_recorded_is_refused_before_the_file_is_touched(
    host: CliHost, env: dict[str, str] | None, name: str, says: str
) -> None:
    run = host.store.running().run

    with pytest.raises(TrustRefused, match=says):
        host.keeper().add(run, "codex", host.path / name, host.env if env is None else env)

    assert (host.file.read_bytes(), host.recorded()) == (ORIGINAL, [])


def test_a_file_behind_a_symlink_is_recorded_by_its_own_path(host: CliHost) -> None:
    link = replace(host, path=host.path.with_name("link"))
    link.path.mkdir()
    link.file.symlink_to(host.file)
    run = host.store.running().run
    host.keeper().add(run, "codex", host.workspace(run), link.env)

    assert host.store.rows("SELECT file FROM trust_entry") == [(str(host.file),)]
    host.fail(run)
    host.keeper().remove_stale()
    assert link.file.is_symlink()
    assert host.file.read_bytes() == ORIGINAL


def test_a_host_that_was_renamed_restores_what_the_user_had_first(
    host: CliHost,
) -> None:
    run = host.trusted_run()
    users = host.file.read_bytes().replace(b'level = "trusted"', b'level = "untrusted"')
    host.file.write_bytes(users)
    host.host_id = "renamed"
    host.add_entry(run)
    host.fail(run)

    host.keeper().remove_stale()

    assert host.file.read_bytes() == users


def test_the_store_returns_what_an_edit_has_added_as_it_was_recorded(host: CliHost) -> None:
    run = host.trusted_run()

    ((kept,),) = host.store.rows("SELECT added FROM trust_entry")

    standing = trust.recorded_entries(host.store.db, "host", str(host.file), token_of(host))
    assert standing == {str(host.workspace(run)): kept}
    assert json.loads(kept)[0] is True


def test_of_two_records_of_a_folder_the_one_of_this_place_counts_else_the_newest(
    host: CliHost,
) -> None:
    folder = str(host.workspace(host.trusted_run()))
    here, ((kept,),) = token_of(host), host.store.rows("SELECT added FROM trust_entry")
    for token, later in (("0" * 32, 1), ("1" * 32, 2)):
        host.store.db.execute(
            "INSERT INTO trust_entry (file, folder, place, host_id, cli, run, attempt, instance,"
            " added, created_at) SELECT file, folder, ?, host_id, cli, run, attempt, instance,"
            " ?, created_at + ? FROM trust_entry WHERE place = ?",
            (token, f"of {token[0]}", later, here),
        )

    def standing(token: str) -> dict[str, str]:
        return trust.recorded_entries(host.store.db, "host", str(host.file), token)

    assert standing(here) == {folder: kept}
    assert standing("0" * 32) == {folder: "of 0"}
    assert standing("f" * 32) == {folder: "of 1"}
