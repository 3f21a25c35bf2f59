"""The answers to callers from the bind of the port until the service is SERVING."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from grpc_health.v1 import health_pb2
from runrecovery.v1 import recovery_pb2
from runrecovery.v1 import recovery_service_pb2 as recovery_rpc
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused, status_word
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
    """Wait until a unix socket accepts connections."""

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


@contextmanager
def held_recovery(home: Home) -> Iterator[ServiceProcess]:
    """Yield a service whose recovery waits for an orphan that ignores SIGTERM."""
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


def release_recovery(home: Home) -> None:
    """Kill the orphan that the recovery waits for."""
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


def test_only_recovery_calls_are_answered_until_the_report_is_committed(
    new_home: NewHome,
) -> None:
    home = new_home(retry_hint_s=0.25)
    with held_recovery(home) as service:
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
        release_recovery(home)
        api = service.until_serving()
        assert api.status().reconciliation.state == COMPLETED
        assert status_word(api.get("waits")) == "WAITING_USER"
        assert status_word(api.get("orphan")) == "FAILED"


def test_a_health_watch_sees_recovery_serving_and_drain_in_order(new_home: NewHome) -> None:
    home = new_home()
    with held_recovery(home) as service:
        request = health_pb2.HealthCheckRequest(service=RUNS)
        watch = service.api().health.Watch(request, timeout=LONG_S)
        first = next(watch).status
        release_recovery(home)
        second = next(watch).status
        service.terminate()
        rest = [answer.status for answer in watch]

        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, 2
        assert [first, second, *rest] == [not_serving, serving, not_serving]
        assert service.exit_code() == 0


def test_a_stop_in_the_middle_of_a_recovery_leaves_the_rest_to_the_next_start(
    new_home: NewHome,
) -> None:
    home = new_home(recovery_batch_rows=100, drain_delay_s=3600.0)  # outlasts the test
    home.seed(5000)
    service = home.listen()
    service.until_event("recovery.progress")
    service.terminate()

    assert service.exit_code() == 0
    home.write_config(drain_delay_s=0.0)
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
