"""If a trust entry cannot be removed, all others still are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from runrecovery_service.agents import trust_keeper
from runrecovery_service.domain.reconciliation import TrustClearing
from runrecovery_service.storage import trust
from runrecovery_service.storage.trust import TrustEntry
from runrecovery_service.trust import codex, toml_text
from runrecovery_service.trust.entry import Added, Made, Removals
from storage.trust_host import ORIGINAL, CliHost, outcomes, token_of


def test_a_file_that_cannot_be_parsed_does_not_keep_other_files_from_being_cleared(
    host: CliHost,
) -> None:
    bad = replace(host, path=host.path / "bad")
    bad.path.mkdir()
    for one in (bad, host):
        host.fail(one.trusted_run())
    broken = bad.file.read_bytes() + b'[projects\n"secret" ='
    bad.file.write_bytes(broken)

    done = host.keeper().remove_stale()

    assert [one.file for one in done.removals] == [str(host.file)]
    assert len(done.failures) == 1
    assert done.failures[0].startswith(f"{bad.file}: not_parsable")
    assert "secret" not in done.failures[0]
    assert (host.file.read_bytes(), bad.file.read_bytes()) == (ORIGINAL, broken)
    assert [folder for _, folder in host.recorded()] == [str(bad.path / "runs/1/workspace-1")]


def test_a_damaged_record_does_not_keep_other_entries_from_being_removed(host: CliHost) -> None:
    runs = [host.trusted_run() for _ in range(3)]
    for run in runs:
        host.fail(run)
    with host.store.db.transaction():
        sql = "UPDATE trust_entry SET added = '{' WHERE run = ?"
        host.store.db.execute(sql, (runs[0].key,))
        host.store.db.execute("UPDATE trust_entry SET cli = 'x' WHERE run = ?", (runs[1].key,))

    done = host.keeper().remove_stale()

    assert outcomes(done) == [(runs[2].run_id, "removed")]
    assert sorted(done.kept) == sorted(
        f"{host.file}: the record of {host.workspace(run)} is damaged" for run in runs[:2]
    )
    assert [host.trusts(run) for run in runs] == [True, True, False]
    assert host.keeper().remove_stale() == TrustClearing()  # reported only once


@pytest.mark.parametrize(
    "added",
    [
        '[true, "{", [], "", ""]', '[true, 1, [], "", ""]', '[1, null, [], "", ""]',
        '[true, null, "file", "", ""]', '[true, null, [], "x", ""]', '[true, null, []]',
        "[" * 100_000,
    ],
    ids=["previous", "no text", "no flag", "no list", "no blank", "short", "deep"],
)  # fmt: skip
def test_no_kind_of_damage_to_a_record_keeps_other_entries_from_being_removed(
    host: CliHost, added: str
) -> None:
    runs = [host.trusted_run() for _ in range(3)]
    for run in runs:
        host.fail(run)
    with host.store.db.transaction():
        sql = "UPDATE trust_entry SET added = ? WHERE run = ?"
        host.store.db.execute(sql, (added, runs[1].key))

    done = host.keeper().remove_stale()

    assert [host.trusts(run) for run in runs] == [False, True, False]
    assert len(done.kept) == 1
    assert [key for key, _ in host.recorded()] == [runs[1].key]


def test_an_entry_that_causes_a_defect_does_not_keep_others_from_being_removed(
    host: CliHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [host.trusted_run() for _ in range(5)]
    for run in runs:
        host.fail(run)
    spoilt = str(host.workspace(runs[2]))
    remove_all = codex.CodexEditor.remove_all

    def fail(self: Any, text: bytes | None, entries: Mapping[str, Added]) -> Removals:
        if spoilt in entries:
            raise LookupError
        return remove_all(self, text, entries)

    monkeypatch.setattr(codex.CodexEditor, "remove_all", fail)

    done = host.keeper().remove_stale()

    assert [host.trusts(run) for run in runs] == [False, False, True, False, False]
    assert len(done.removals) == 4
    assert done.kept == (f"{host.file}: {spoilt}: LookupError",)


def test_damaged_records_do_not_keep_later_entries_from_being_removed(
    host: CliHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust_keeper, "CHUNK", 2)
    runs = [host.trusted_run() for _ in range(6)]
    for run in runs:
        host.fail(run)
    with host.store.db.transaction():
        sql = "UPDATE trust_entry SET added = '{' WHERE run IN (?, ?, ?)"
        host.store.db.execute(sql, tuple(run.key for run in runs[3:]))

    assert len(host.keeper().remove_stale().removals) == 3


def test_entries_for_which_no_time_is_left_are_removed_next_time(
    host: CliHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust_keeper, "CHUNK", 2)
    for _ in range(5):
        host.fail(host.trusted_run())
    asked = iter([False, False, True])  # before the file, and after each of two edits

    first = host.keeper().remove_stale(lambda: next(asked))

    assert (len(first.removals), first.failures, first.kept) == (4, (), (trust_keeper.LEFT,))
    assert len(host.recorded()) == 1
    rest = host.keeper().remove_stale()
    assert (len(rest.removals), rest.warnings) == (1, ())
    assert (host.file.read_bytes(), host.recorded()) == (ORIGINAL, [])


def test_no_file_is_edited_when_no_time_is_left(host: CliHost) -> None:
    host.fail(host.trusted_run())

    assert host.keeper().remove_stale(lambda: True) == TrustClearing(kept=(trust_keeper.LEFT,))
    assert len(host.recorded()) == 1


def test_1500_entries_are_removed_with_at_most_32_parses_of_the_file(
    host: CliHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, many = host.store, 1500
    parses: list[int] = []
    run = store.running().run
    added = Added(owned=True, made=frozenset({Made.FOLDER}), lead="\n", trail="\n")
    here = token_of(host)
    with store.db.transaction():
        for at in range(many):
            entry = TrustEntry(
                file=str(host.file), folder=f"/w/{at}", place=here, cli="codex",
                run_key=run.key, run_id=run.run_id, attempt=1, added=added.to_json(),
            )  # fmt: skip
            trust.record_entry(store.db, entry, host_id="host", owner=store.owner, now=store.now)
    text = "".join(f'\n[projects."/w/{at}"]\ntrust_level = "trusted"\n' for at in range(many))
    host.file.write_bytes(ORIGINAL + b"\n" + text.encode())
    host.fail(run)
    parse = toml_text.parse

    def counted(body: str) -> toml_text.Document:
        parses.append(len(body))
        return parse(body)

    monkeypatch.setattr(toml_text, "parse", counted)

    done = host.keeper().remove_stale()

    assert (len(done.removals), done.failures) == (many, ())
    assert host.file.read_bytes() == ORIGINAL + b"\n"
    assert host.recorded() == []
    # Two for each edit. On a slow machine an edit takes 100 entries, on a fast one up to 500.
    assert len(parses) <= 32
