"""From the bind on: what callers see while a service recovers, serves, drains and ends."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import grpc
import pytest
from grpc_health.v1 import health_pb2
from runrecovery.v1 import recovery_pb2
from runrecovery.v1 import recovery_service_pb2 as recovery_rpc
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refusal_of, refused, status_word
from support.engines import agent
from support.processes import kill_below
from support.service import Home, ServiceProcess
from support.waiting import until

NewHome = Callable[..., Home]

QUESTION: Final = {"kind": "open_text", "prompt": "What next?"}
HOLDS: Final = {"hold": True, "ignore_sigterm": True}
LONG_S: Final = 60.0
SEEDED: Final = 20_000
RUNS, RECOVERY = "runrecovery.v1.RunService", "runrecovery.v1.RecoveryService"
COMPLETED: Final = recovery_pb2.RECONCILIATION_STATE_COMPLETED


def until_bound(path: Path, service: ServiceProcess) -> None:
    """Return as soon as a unix socket takes connections."""

    def connects() -> bool:
        assert service.popen.poll() is None, service.text
        with socket.socket(socket.AF_UNIX) as trial:
            return trial.connect_ex(str(path)) == 0

    until(connects, "the socket is bound")


def test_health_never_says_serving_before_the_report_is_committed(new_home: NewHome) -> None:
    home = new_home(recovery_batch_rows=500)
    home.seed(SEEDED)
    address = home.path / "s"
    service = home.spawn("--listen", f"unix:{address}")
    until_bound(address, service)
    service.address = f"unix:{address}"
    api = service.api()
    seen: list[tuple[str, str | None]] = []
    scanned: list[int] = []
    began = time.monotonic()
    with home.store() as store:
        while not seen or seen[-1][0] != "SERVING":
            health = api.health_of()
            # After the answer: what has not committed by now had not committed before it.
            (row,) = store.execute(
                "SELECT (SELECT state FROM reconciliation ORDER BY id DESC LIMIT 1)"
            ).fetchall()
            seen.append((health, row[0]))
            if len(seen) % 16 == 1:
                scanned.append(api.status().reconciliation.runs_scanned)
                assert api.health_of("liveness") == api.health_of(RECOVERY) == "SERVING"
            assert time.monotonic() - began < LONG_S

    assert [health for health, _ in seen] == ["NOT_SERVING"] * (len(seen) - 1) + ["SERVING"]
    assert seen[-1][1] == "COMPLETED"
    assert len(seen) > 20
    assert scanned == sorted(scanned)
    assert len(set(scanned)) > 2
    assert api.status().reconciliation.runs_scanned == SEEDED


# -- held in the middle of a recovery ----------------------------------------------------------


@contextmanager
def recovering(home: Home) -> Iterator[ServiceProcess]:
    """A service that recovers and cannot go on: an orphan of it does not end by SIGTERM."""
    home.write_config(orphan_grace_s=LONG_S, orphan_deadline_s=2 * LONG_S)
    service, api = home.start()
    run = api.create("resumable", HOLDS, run_id="orphan")
    api.create("resumable", {"questions": [QUESTION]}, run_id="waits")
    api.until_status("waits", "WAITING_USER")
    until(lambda: b"worked" in b"".join(p.data for p in api.output(run.run_id)), "it is at work")
    home.kill_with_shims(service)
    assert len(home.agents()) == 1
    service = home.listen()
    service.until_event("recovery.started")
    yield service


def end_orphans(home: Home) -> None:
    """Let the recovery go on."""
    assert kill_below(home.data / "runs")


def gated_calls(api: Api) -> list[Callable[[], object]]:
    listing = recovery_rpc.ListRecoveredRequest()
    return [
        lambda: api.create("resumable", {}),
        lambda: api.get("waits"),
        lambda: api.runs.ListRuns(pb.ListRunsRequest(), timeout=LONG_S),
        lambda: api.reply("waits", 1, "yes"),
        lambda: api.cancel("waits"),
        lambda: api.interactions("waits"),
        lambda: api.output("waits"),
        lambda: api.recovery_info("waits"),
        lambda: api.recovery.ListRecovered(listing, timeout=LONG_S),
    ]


def test_until_the_report_is_committed_only_the_recovery_can_be_asked_about(
    new_home: NewHome,
) -> None:
    home = new_home(retry_hint_s=0.25)
    with recovering(home) as service:
        api = service.api()

        for call in gated_calls(api):
            refusal = refused(call)
            assert (refusal.code.name, refusal.reason) == (
                "UNAVAILABLE",
                "RECONCILIATION_IN_PROGRESS",
            )
            assert (refusal.retry_after_s, refusal.pushback_ms) == (0.25, "250")
        status = api.status()
        (report, earlier) = api.recovery.ListReconciliations(
            recovery_rpc.ListReconciliationsRequest(), timeout=LONG_S
        ).reconciliations
        words = {name: api.health_of(name) for name in ("", RUNS, RECOVERY, "liveness")}

        assert status.state == recovery_pb2.SERVICE_STATE_RECOVERING
        assert report.state == recovery_pb2.RECONCILIATION_STATE_RUNNING
        assert report == status.reconciliation
        assert not report.HasField("finished_at")
        assert earlier.state == COMPLETED
        assert words == {
            "": "NOT_SERVING",
            RUNS: "NOT_SERVING",
            RECOVERY: "SERVING",
            "liveness": "SERVING",
        }
        end_orphans(home)
        api = service.until_serving()
        assert api.status().reconciliation.state == COMPLETED
        assert status_word(api.get("waits")) == "WAITING_USER"
        assert status_word(api.get("orphan")) == "FAILED"


def test_a_watcher_of_health_sees_both_states_in_order(new_home: NewHome) -> None:
    home = new_home()
    with recovering(home) as service:
        request = health_pb2.HealthCheckRequest(service=RUNS)
        watch = service.api().health.Watch(request, timeout=LONG_S)
        first = next(watch).status
        end_orphans(home)
        second = next(watch).status
        service.terminate()
        rest = [answer.status for answer in watch]

        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, 2
        assert [first, second, *rest] == [not_serving, serving, not_serving]
        assert service.exit_code() == 0


def test_a_stop_in_the_middle_of_a_recovery_leaves_the_rest_to_the_next_start(
    new_home: NewHome,
) -> None:
    home = new_home(recovery_batch_rows=100)
    home.seed(5000)
    service = home.listen()
    service.until_event("recovery.progress")
    service.terminate()

    assert service.exit_code() == 0
    (decided,) = home.rows("SELECT count(*) FROM run WHERE recovery_count = 1")[0]
    _, api = home.start()
    assert 0 < decided < 5000
    assert home.rows("SELECT count(*), min(recovery_count), max(recovery_count) FROM run") == [
        (5000, 1, 1)
    ]
    reports = api.recovery.ListReconciliations(
        recovery_rpc.ListReconciliationsRequest(), timeout=LONG_S
    ).reconciliations
    assert reports[0].state == COMPLETED
    assert reports[1].state == recovery_pb2.RECONCILIATION_STATE_FAILED


# -- stopping ----------------------------------------------------------------------------------


def test_a_draining_service_answers_reads_and_refuses_changes(new_home: NewHome) -> None:
    home = new_home(drain_delay_s=2.0, cancel_grace_s=0.3)
    service, api = home.start()
    waits = api.create("resumable", {"questions": [QUESTION]})
    waits = api.until_status(waits.run_id, "WAITING_USER")
    holds = api.create("resumable", HOLDS)
    api.until_status(holds.run_id, "RUNNING")
    tree = api.create("resumable", {"hold": True, "children": 2})
    until(lambda: len(home.agents_of(tree.run_id)) == 3, "the tree stands")
    followed = api.runs.StreamOutput(
        pb.StreamOutputRequest(run_id=holds.run_id, follow=True), timeout=LONG_S
    )
    next(followed)
    service.terminate()
    until(lambda: api.health_of() == "NOT_SERVING", "health says so")

    for call in (
        lambda: api.create("resumable", {}),
        lambda: api.reply(waits.run_id, 1, "yes"),
        lambda: api.cancel(waits.run_id),
    ):
        refusal = refused(call)
        assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
        assert refusal.retry_after_s == 1.0
        assert refusal.pushback_ms == "1000"
    assert api.get(waits.run_id) == waits
    assert api.status().state == recovery_pb2.SERVICE_STATE_DRAINING
    assert api.health_of("liveness") == "SERVING"
    with pytest.raises(grpc.RpcError) as ended:
        list(followed)
    assert refusal_of(ended.value).reason == "SHUTTING_DOWN"
    assert service.exit_code() == 0
    assert home.agents() == []


Seen = set[tuple[str, str]]


def call_until(stopped: threading.Event, address: str, seen: Seen, *, changes: bool) -> None:
    """Call without a pause; record the code and the reason of every refusal."""
    api = Api(address)
    while not stopped.is_set():
        refusal = refused(lambda: api.cancel("nothing") if changes else api.get("nothing"))
        seen.add((refusal.code.name, refusal.reason))
    api.channel.close()


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix:{home}/s"])
def test_a_planned_stop_answers_no_call_with_cancelled(new_home: NewHome, listen: str) -> None:
    home = new_home(drain_delay_s=0.1)
    seen: list[Seen] = []
    for _ in range(3):
        service, _ = home.start("--listen", listen.format(home=home.path))
        stopped, here = threading.Event(), [Seen() for _ in range(6)]
        with ThreadPoolExecutor(6) as threads:
            calls = [
                threads.submit(call_until, stopped, service.address, one, changes=bool(number % 2))
                for number, one in enumerate(here)
            ]
            try:
                until(lambda: all(here), "every caller is answered")  # noqa: B023 - used at once
                assert service.stop() == 0
            finally:
                stopped.set()
        for call in calls:
            call.result()
        seen += here

    assert {code for one in seen for code, _ in one} == {"NOT_FOUND", "UNAVAILABLE"}
    assert any(("UNAVAILABLE", "SHUTTING_DOWN") in one for one in seen)


def test_a_second_signal_ends_it_at_once(new_home: NewHome) -> None:
    home = new_home(drain_delay_s=LONG_S)
    service, _ = home.start()
    service.terminate()
    service.until_event("service.stop_asked")
    began = time.monotonic()
    service.terminate()

    assert service.exit_code() == 128 + signal.SIGTERM
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_service_ends_well_and_leaves_nothing(new_home: NewHome, number: int) -> None:
    home = new_home()
    service, _ = home.start()
    service.popen.send_signal(number)

    assert service.exit_code() == 0
    assert service.events("service.stopped")
    assert not home.database.with_name("runrecovery.db-wal").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE])
def test_signals_that_are_sent_to_services_as_a_matter_of_course_end_nothing(
    new_home: NewHome, number: int
) -> None:
    service, api = new_home().start()
    run = api.create("resumable", {"questions": [QUESTION]})
    api.until_status(run.run_id, "WAITING_USER")

    service.popen.send_signal(number)
    if number != signal.SIGPIPE:  # which Python itself ignores
        told = service.until_event("service.signal_ignored")
        assert told["signal"] == signal.Signals(number).name
    api.reply(run.run_id, 1, "yes")

    assert status_word(api.until_ended(run.run_id)) == "SUCCEEDED"
    assert service.stop() == 0


@contextmanager
def terminal() -> Iterator[tuple[Callable[[], None], str]]:
    """A terminal: what hangs it up, and its name."""
    ours, theirs = os.openpty()
    name = os.ttyname(theirs)
    os.close(theirs)
    open_ends = [ours]

    def hang_up() -> None:
        os.close(open_ends.pop())

    yield hang_up, name
    if open_ends:
        hang_up()


def test_a_service_whose_terminal_is_closed_stops_in_order(new_home: NewHome) -> None:
    with terminal() as (hang_up, name):
        # The leader of a session that opens a terminal has it as its own.
        home = new_home(prefix=("/bin/sh", "-c", f'exec "$@" <{name}', "sh"))
        service, api = home.start()
        run = api.create("resumable", HOLDS, run_id="holds")
        api.until_status(run.run_id, "RUNNING")
        service.popen.send_signal(signal.SIGHUP)
        service.until_event("service.signal_ignored")

        hang_up()

        assert service.exit_code() == 0
    assert service.until_event("service.stop_asked")["signal"] == "SIGHUP"
    assert home.rows("SELECT count(*) FROM run WHERE recovery_count = 1") == [(1,)]


def test_a_closed_terminal_does_not_count_as_a_signal_to_stop(new_home: NewHome) -> None:
    with terminal() as (hang_up, name):
        home = new_home(prefix=("/bin/sh", "-c", f'exec "$@" <{name}', "sh"), drain_delay_s=LONG_S)
        service, _ = home.start()

        def asked() -> list[tuple[object, object]]:
            return [(one["signal"], one["times"]) for one in service.events("service.stop_asked")]

        hang_up()
        until(lambda: len(asked()) == 1, "the service was asked by the terminal")
        service.terminate()
        until(lambda: len(asked()) == 2, "the service was asked by SIGTERM")
        service.terminate()

        assert service.exit_code() == 128 + signal.SIGTERM
    assert asked() == [("SIGHUP", 0), ("SIGTERM", 1), ("SIGTERM", 2)]


def test_a_service_that_was_started_to_outlive_its_terminal_does(new_home: NewHome) -> None:
    with terminal() as (hang_up, name):
        home = new_home(prefix=("/bin/sh", "-c", f'trap "" HUP; exec "$@" <{name}', "sh"))
        service, api = home.start()

        hang_up()
        until(lambda: _terminal_of(service) == "0", "the terminal is gone")

        assert status_word(api.until_ended(api.create("resumable", {}).run_id)) == "SUCCEEDED"
        assert not service.events("service.stop_asked")
        assert service.stop() == 0


def _terminal_of(service: ServiceProcess) -> str:
    stat = Path(f"/proc/{service.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[4]


def test_what_a_stop_interrupts_the_next_start_explains(new_home: NewHome) -> None:
    home = new_home(cancel_grace_s=0.2)
    service, api = home.start()
    holds = api.create("resumable", HOLDS)
    api.until_status(holds.run_id, "RUNNING")
    assert service.stop() == 0
    assert home.agents() == []

    _, api = home.start()

    run = api.get(holds.run_id)
    assert run.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
    assert run.recovery.recovery_reason == "running_interrupted"


# -- starts that are refused -------------------------------------------------------------------


def refused_start(home: Home, *arguments: str) -> tuple[int, str]:
    """Start a service that must end by itself; return its exit code and what it said."""
    service = home.spawn(*arguments)
    return service.exit_code(), service.text


def test_a_taken_port_is_exit_5(new_home: NewHome) -> None:
    home = new_home()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = "{}:{}".format(*taken.getsockname())
        code, said = refused_start(home, "--listen", address)

    assert code == 5
    assert address in said


def test_a_second_service_on_a_data_directory_is_exit_3_and_names_the_first(
    new_home: NewHome,
) -> None:
    home = new_home()
    service, api = home.start()

    code, said = refused_start(home, "--instance", "other")

    assert code == 3
    assert f"pid {service.pid}" in said
    assert "default" in said
    assert api.health_of() == "SERVING"


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
def test_a_second_service_on_a_sqlite_file_is_exit_3_however_it_gets_there(
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
def test_a_service_whose_lock_was_removed_ends_with_4_and_says_why(
    new_home: NewHome, name: str
) -> None:
    home = new_home()
    service, _ = home.start()

    (home.data / name).unlink()

    assert service.exit_code() == 4
    assert f"{home.data / name} was removed or replaced" in service.text.replace("\n", " ")


def test_a_file_in_place_of_the_data_directory_is_exit_4(new_home: NewHome) -> None:
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
def test_a_database_file_that_is_not_ours_is_exit_4_and_stays(
    new_home: NewHome, content: bytes
) -> None:
    home = new_home()
    home.data.mkdir()
    home.database.write_bytes(content)

    code, said = refused_start(home)

    assert (code, home.database.read_bytes()) == (4, content)
    assert str(home.database) in said


def test_a_database_of_a_newer_version_is_exit_4_and_stays(new_home: NewHome) -> None:
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


def test_a_database_that_vanished_is_exit_4_and_no_empty_one_takes_its_place(
    new_home: NewHome,
) -> None:
    home = new_home()
    service, _ = home.start()
    assert service.stop() == 0
    home.database.unlink()

    code, _ = refused_start(home)

    assert (code, home.database.exists()) == (4, False)


def test_every_mistake_of_a_configuration_comes_in_one_answer_and_nothing_is_made(
    new_home: NewHome,
) -> None:
    home = new_home(max_concurent=3, colour="red", max_queued=0)

    code, said = refused_start(home)

    assert code == 2
    for word in ("max_concurent", "colour", "max_queued"):
        assert word in said
    assert not home.data.exists()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
def test_an_address_for_others_needs_a_word(new_home: NewHome, listen: str) -> None:
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


def test_an_engine_that_is_gone_from_the_configuration_fails_its_runs_only(
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
