"""A version works on a store that a newer version has migrated, if each new step allows it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage import instances, migrate, takeover
from runrecovery_service.storage.dead_instances import TakeoverRules
from runrecovery_service.storage.migrate import describe_misfit
from runrecovery_service.storage.newer_words import demand_known_words, has_newer_words
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import ServiceStore, boot

KNOWN = {"0001_a": "a", "0002_b": "b"}
STEP = """
from typing import Final

{declared}


def up(migrator: object, db: object) -> None:
    db.execute_sql("ALTER TABLE run ADD COLUMN mood TEXT")
"""


@pytest.mark.parametrize(
    ("recorded", "problem"),
    [
        ("c 0002_b", None),
        ("c 0001_a", None),
        ("c 0003_c", "was made by a newer version (step 0004_d)"),
        ("c", "was made by a newer version (step 0004_d)"),
        ("", "was made by a newer version (step 0004_d)"),
    ],
)
def test_an_unknown_step_is_accepted_if_it_allows_versions_with_the_last_known_one(
    recorded: str, problem: str | None
) -> None:
    applied = {**KNOWN, "0004_d": recorded}

    assert describe_misfit(applied, KNOWN, has_runs=True) == problem


def test_a_lost_record_of_a_known_step_is_refused_beside_an_accepted_one() -> None:
    applied = {"0002_b": "b", "0003_c": "c 0001_a"}

    assert "no record of the migration step 0001_a" in str(
        describe_misfit(applied, KNOWN, has_runs=True)
    )


def migrated_by_newer(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, declared: str = ""
) -> None:
    """Migrate a store as a version with one more step does."""
    steps = folder / "newer"
    shutil.copytree(migrate.MIGRATIONS, steps)
    (steps / "9999_newer.py").write_text(STEP.format(declared=declared))
    with monkeypatch.context() as patch:
        patch.setattr(migrate, "MIGRATIONS", steps)
        open_database(url, folder).close()


def declaration() -> str:
    return f'COMPATIBLE_SINCE: Final = "{max(migrate.known_migrations())}"'


def test_a_store_with_a_compatible_newer_step_is_opened_and_a_later_start_keeps_it(
    empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrated_by_newer(empty_database_url, tmp_path, monkeypatch, declaration())

    db = open_database(empty_database_url, tmp_path)

    assert migrate.is_newer(db)
    assert migrate.applied_migrations(db)[-1] == "9999_newer"
    db.close()


def test_a_store_with_a_newer_step_that_declares_nothing_is_refused(
    empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrated_by_newer(empty_database_url, tmp_path, monkeypatch)

    with pytest.raises(DatabaseRefused, match=r"was made by a newer version \(step 9999_newer\)"):
        open_database(empty_database_url, tmp_path)


def become_older(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this version forget its last step, so that it is older than the store."""
    *older, _ = sorted(migrate.MIGRATIONS.glob("[0-9]*.py"))
    for step in older:
        shutil.copy(step, folder)
    monkeypatch.setattr(migrate, "MIGRATIONS", folder)


def test_every_later_step_declares_a_version_at_least_as_old() -> None:
    declared = {
        step.stem: since[1].decode() if since else None
        for step in sorted(migrate.MIGRATIONS.glob("[0-9]*.py"))
        for since in [migrate.COMPATIBLE_SINCE.search(step.read_bytes())]
    }

    for since in filter(None, declared.values()):
        assert since in declared
        later = {step: known for step, known in declared.items() if step > since}
        assert not [step for step, known in later.items() if known is None or known > since]


@pytest.mark.parametrize(
    "words", ["status = 'PAUSED'", "restart_policy = 'LATER'"], ids=["status", "policy"]
)
def test_a_start_leaves_runs_with_values_of_a_newer_version_alone(
    store: ServiceStore, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.create()
    store.db.execute(f"UPDATE run SET {words}")  # noqa: S608
    assert not has_newer_words(store.db, store.owner.instance)  # then it is damage
    before = store.dump("run")
    become_older(tmp_path, monkeypatch)

    assert has_newer_words(store.db, store.owner.instance)
    assert not has_newer_words(store.db, "another")
    with pytest.raises(DatabaseRefused) as refusal:
        demand_known_words(store.db, store.owner.instance)
    assert str(refusal.value).endswith(
        "has runs of instance 'default' of a newer version; start that version"
    )
    assert before == store.dump("run")


def test_an_instance_whose_runs_a_newer_version_has_written_is_not_taken_over(
    store: ServiceStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("takeovers need PostgreSQL")
    dead = instances.claim(store.db, boot("dead"), now=store.now)
    store.create(owner=dead)
    store.db.execute("UPDATE run SET status = 'PAUSED'")
    store.db.execute("UPDATE instance SET lease_until = 1 WHERE name = 'dead'")
    rules = TakeoverRules(
        owner=store.owner, shares_workspaces=False, lease_ttl_s=15.0, host_return_s=60.0
    )
    before = store.dump("run", "instance", "instance_epoch")
    with monkeypatch.context() as patch:
        become_older(tmp_path, patch)

        assert takeover.begin(store.db, rules, "dead") is None
        assert before == store.dump("run", "instance", "instance_epoch")
    assert takeover.begin(store.db, rules, "dead") is not None
