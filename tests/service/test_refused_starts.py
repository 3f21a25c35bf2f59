"""Refused starts, each with its exit code; and similar starts that must not be refused."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from support.api import status_word
from support.engines import agent
from support.service import Home

NewHome = Callable[..., Home]
QUESTION: Final = {"kind": "open_text", "prompt": "What next?"}


def refused_start(home: Home, *arguments: str) -> tuple[int, str]:
    """Start a service that must exit by itself; return its exit code and its log."""
    service = home.spawn(*arguments)
    return service.exit_code(), service.text


def test_a_taken_port_ends_the_start_with_5(new_home: NewHome) -> None:
    home = new_home()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = "{}:{}".format(*taken.getsockname())
        code, said = refused_start(home, "--listen", address)

    assert code == 5
    assert address in said


@pytest.mark.parametrize("key", ["probe_listen", "metrics_listen"])
def test_a_taken_address_for_probes_or_metrics_ends_the_start_with_5(
    new_home: NewHome, key: str
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        home = new_home(may_fork=False, **{key: address})

        code, said = refused_start(home)

    assert code == 5
    assert f"cannot listen on {address}" in said
    assert not home.database.exists()


def test_a_second_service_on_a_data_directory_exits_with_3_and_names_the_first(
    new_home: NewHome,
) -> None:
    home = new_home()
    service, api = home.start()

    code, said = refused_start(home, "--instance", "other")

    assert code == 3
    assert f"pid {service.pid}" in said
    assert "default" in said
    assert api.health_of() == "SERVING"


# Becomes the service. A forced end, which comes after a long wait for threads that do not end, has
# an exit code of its own.
NEVER_FORCED: Final = """
import os, runpy, sys

_, _, _, module, *words = sys.argv
force_exit = os._exit
os._exit = lambda _: force_exit(99)
sys.argv[:] = [module, *words]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def test_a_start_whose_claim_is_refused_leaves_no_thread_that_its_exit_would_wait_for(
    new_home: NewHome, postgresql_url: str
) -> None:
    first = new_home(database=postgresql_url)
    first.start()
    second = new_home(database=postgresql_url, prefix=(sys.executable, "-c", NEVER_FORCED)).spawn()

    assert second.exit_code(timeout_s=60) == 3
    assert "instance 'default' is held by pid" in second.text


def use_by_url(first: Home, second: Home) -> None:
    second.write_config(database=f"sqlite:///{first.database}")


def use_by_symbolic_link(first: Home, second: Home) -> None:
    second.data.mkdir()
    second.database.symlink_to(first.database)


def use_by_linked_directory(first: Home, second: Home) -> None:
    (second.path / "linked").symlink_to(first.data)
    second.write_config(database=f"sqlite:///{second.path}/linked/runrecovery.db")


def use_by_hard_link(first: Home, second: Home) -> None:
    second.data.mkdir()
    second.database.hardlink_to(first.database)


@pytest.mark.parametrize(
    "use", [use_by_url, use_by_symbolic_link, use_by_linked_directory, use_by_hard_link]
)
def test_a_second_service_on_a_sqlite_file_exits_with_3_by_whatever_path_it_opens_the_file(
    new_home: NewHome, use: Callable[[Home, Home], None]
) -> None:
    first, second = new_home(), new_home()
    service, api = first.start()
    use(first, second)

    code, said = refused_start(second, "--instance", "other")

    assert code == 3
    assert f"pid {service.pid}" in said
    assert api.health_of() == "SERVING"
    assert status_word(api.until_ended(api.create("resumable", {}).run_id)) == "SUCCEEDED"


def test_a_database_by_symbolic_link_is_served_again_after_a_crash(new_home: NewHome) -> None:
    home = new_home()
    (home.path / "elsewhere").mkdir()
    home.data.mkdir()
    home.database.symlink_to(home.path / "elsewhere" / "real.db")
    service, api = home.start()
    run = api.until_ended(api.create("resumable", {}).run_id)
    service.kill()

    _, api = home.start()

    assert api.get(run.run_id) == run
    assert home.database.is_symlink()
    assert (home.path / "elsewhere" / "real.db").is_file()


@pytest.mark.parametrize("name", ["lock", "runrecovery.db.lock"])
def test_a_service_whose_lock_file_was_removed_exits_with_4_and_says_why(
    new_home: NewHome, name: str
) -> None:
    home = new_home()
    service, _ = home.start()

    (home.data / name).unlink()

    assert service.exit_code() == 4
    assert f"{home.data / name} was removed or replaced" in service.text.replace("\n", " ")


def test_a_file_in_place_of_the_data_directory_ends_the_start_with_4(new_home: NewHome) -> None:
    home = new_home()
    home.data.write_bytes(b"mine")

    code, said = refused_start(home)

    assert (code, home.data.read_bytes()) == (4, b"mine")
    assert str(home.data) in said


@pytest.mark.parametrize(
    "content",
    [b"", b"not a database, just a text " * 10, b"SQLite format 3\0" + b"\0" * 84],
    ids=["empty", "a text", "of another application"],
)
def test_a_foreign_database_file_ends_the_start_with_4_and_stays_unchanged(
    new_home: NewHome, content: bytes
) -> None:
    home = new_home()
    home.data.mkdir()
    home.database.write_bytes(content)

    code, said = refused_start(home)

    assert (code, home.database.read_bytes()) == (4, content)
    assert str(home.database) in said


def test_a_database_of_a_newer_version_ends_the_start_with_4_and_stays_unchanged(
    new_home: NewHome,
) -> None:
    home = new_home()
    service, _ = home.start()
    assert service.stop() == 0
    with home.store(writable=True) as store:
        store.execute(
            "INSERT INTO schema_migration (name, applied) SELECT '9999_later', applied"
            " FROM schema_migration LIMIT 1"
        )
        store.commit()
        store.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    before = home.database.read_bytes()

    code, said = refused_start(home)

    assert code == 4
    assert home.database.read_bytes() == before
    assert "newer" in said


def test_a_removed_database_ends_the_start_with_4_and_is_not_created_again(
    new_home: NewHome,
) -> None:
    home = new_home()
    service, _ = home.start()
    assert service.stop() == 0
    home.database.unlink()

    code, _ = refused_start(home)

    assert (code, home.database.exists()) == (4, False)


def test_another_database_for_the_data_directory_ends_the_start_with_4_and_changes_no_run(
    new_home: NewHome, tmp_path: Path
) -> None:
    home = new_home(retention={"ended_runs": "1m"})
    service, api = home.start()
    api.create("resumable", {"questions": [QUESTION]}, run_id="waits")
    api.until_status("waits", "WAITING_USER")
    assert service.stop() == 0
    before = sorted((home.data / "runs").rglob("*"))

    code, said = refused_start(home, "--database", f"sqlite:///{tmp_path}/other.db")

    assert (code, sorted((home.data / "runs").rglob("*"))) == (4, before)
    assert "`data_dir` and `database` do not belong together" in said
    _, api = home.start()
    api.reply("waits", 1, "done")
    api.until_ended("waits")


def test_all_mistakes_of_a_configuration_are_reported_at_once_and_nothing_is_created(
    new_home: NewHome,
) -> None:
    home = new_home(may_fork=False, max_concurent=3, colour="red", max_queued=0)

    code, said = refused_start(home)

    assert code == 2
    for word in ("max_concurent", "colour", "max_queued"):
        assert word in said
    assert not home.data.exists()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_an_address_beyond_loopback_needs_insecure_listen(new_home: NewHome, listen: str) -> None:
    home = new_home()

    code, said = refused_start(home, "--listen", listen)

    assert code == 2
    assert "insecure_listen" in said


def test_a_port_is_never_shared_with_a_running_service(new_home: NewHome) -> None:
    first, second = new_home(), new_home()
    service, api = first.start()

    code, _ = refused_start(second, "--listen", service.address)

    assert code == 5
    assert api.health_of() == "SERVING"


def test_an_engine_that_was_removed_from_the_configuration_fails_only_its_own_runs(
    new_home: NewHome,
) -> None:
    home = new_home()
    service, api = home.start()
    waits = api.create("resumable", {"questions": [QUESTION]})
    api.until_status(waits.run_id, "WAITING_USER")
    service.kill()
    home.engines = {"other": agent("unknown_types")}
    home.write_config()
    _, api = home.start()

    api.reply(waits.run_id, 1, "yes")

    assert api.until_ended(waits.run_id).error.code == "LAUNCH_FAILED"
    assert status_word(api.until_ended(api.create("other", {}).run_id)) == "SUCCEEDED"
