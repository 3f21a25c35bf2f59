"""Metrics of a whole service, after calls, errors of the store and restarts."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import grpc
import pytest
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.start_errors import PackagesMissing
from runrecovery_service.extras import demand_packages
from runrecovery_service.offline import check, check_notes
from support.api import refused
from support.scraping import Samples, get, scrape, value
from support.service import Home, ServiceProcess
from support.waiting import until
from support.webhook_receiver import SECRET

NewHome = Callable[..., Home]
GET: Final = "runrecovery.v1.RunService.GetRun"


def until_shown(service: ServiceProcess, name: str, expected: float, **labels: str) -> Samples:
    """Scrape until a metric has the expected value; return the samples."""
    found: Samples = {}

    def look() -> bool:
        nonlocal found
        found = scrape(service)
        return value(found, name, **labels) == expected

    until(look, f"{name} {labels} is {expected}")
    return found


@pytest.fixture
def refusing_webhook(tmp_path: Path) -> Iterator[Mapping[str, object]]:
    """Yield a webhook whose receiver refuses every connection."""
    secret_file = tmp_path / "secret"
    secret_file.write_text(SECRET)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        yield {
            "name": "nobody",
            "url": f"http://127.0.0.1:{silent.getsockname()[1]}/",
            "secret_file": str(secret_file),
            "allow_private": ["127.0.0.1"],
        }


def test_metrics_count_what_happened_and_are_correct_after_a_kill(
    new_home: NewHome, refusing_webhook: Mapping[str, object]
) -> None:
    home = new_home(metrics_listen="127.0.0.1:0", webhooks=[refusing_webhook])
    service, api = home.start()
    secret = "words-of-a-caller"  # noqa: S105 - no secret
    api.create("resumable", {"questions": [{"prompt": secret}]}, run_id=secret)
    api.until_status(secret, "WAITING_USER")
    api.until_ended(api.create("resumable", {"result": {}}, run_id="ended").run_id)
    for _ in range(3):
        api.get("ended")
    assert refused(lambda: api.get("nobody")).code is grpc.StatusCode.NOT_FOUND
    unknown: Any = api.channel.unary_unary(f"/runrecovery.v1.RunService/{secret}")
    assert refused(lambda: unknown(b"")).code is grpc.StatusCode.UNIMPLEMENTED

    running = until_shown(service, "runrecovery_runs", 1, engine="resumable", status="WAITING_USER")
    service.kill()
    service, api = home.start()
    recovered = until_shown(
        service, "runrecovery_runs", 1, engine="resumable", status="WAITING_USER"
    )

    assert value(running, "runrecovery_calls_total", method=GET, code="NOT_FOUND") == 1
    ended = {"engine": "resumable", "status": "SUCCEEDED"}
    assert value(running, "runrecovery_turn_duration_seconds_count", **ended) == 1
    asked = {"engine": "resumable", "status": "WAITING_USER"}
    assert value(running, "runrecovery_turn_duration_seconds_count", **asked) == 1
    assert value(running, "runrecovery_launch_duration_seconds_count", engine="resumable") == 2
    assert value(running, "runrecovery_webhook_due", webhook="nobody") == 2
    assert (value(running, "runrecovery_webhook_oldest_seconds", webhook="nobody") or 0) > 0
    delivered = {"webhook": "nobody", "outcome": "delivered"}
    assert value(running, "runrecovery_webhook_tries_total", **delivered) == 0
    disabled = {"event": "webhook.disabled", "level": "error"}
    assert value(running, "runrecovery_log_events_total", **disabled) == 0
    assert value(running, "runrecovery_slots") == 4
    assert value(running, "runrecovery_retention_removed_total", kind="runs") == 0
    assert (value(running, "runrecovery_wait_oldest_seconds", engine="resumable") or 0) > 0
    assert (value(running, "runrecovery_commit_size_writes_sum") or 0) >= 10
    assert (value(running, "runrecovery_lease_left_seconds") or 0) > 5
    assert secret not in repr(running)
    assert value(recovered, "runrecovery_epoch") == 2
    assert value(recovered, "runrecovery_calls_total", method=GET, code="NOT_FOUND") is None
    assert value(recovered, "runrecovery_calls_total", method=GET, code="OK") == 0
    rule = "resumable_waiting_preserved"
    assert value(recovered, "runrecovery_recovery_decisions", rule=rule) == 1
    assert service.stop() == 0


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """Run Prometheus with the rules of deploy/, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    jobs = [{"job_name": "runrecovery", "static_configs": [{"targets": [target]}]}]
    rules = Path(__file__).parents[2] / "deploy" / "alerts.yaml"
    config = {
        "global": {"scrape_interval": "1s"}, "scrape_configs": jobs, "rule_files": [str(rules)]
    }  # fmt: skip
    (folder / "prometheus.yml").write_text(json.dumps(config), "utf-8")
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/tsdb", f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=log,
            cwd=folder,
            env={"GOMAXPROCS": "1", "PATH": _path()},
        )  # fmt: skip
        try:
            yield address
        finally:
            process.terminate()
            process.wait(30)


def _path() -> str:
    return str(Path(shutil.which("prometheus") or "/usr/bin/prometheus").parent)


def query(address: str, expression: str) -> list[Mapping[str, Any]]:
    try:
        status, body = get(address, f"/api/v1/query?query={quote(expression)}")
    except OSError:
        return []  # it starts
    result: list[Mapping[str, Any]] = json.loads(body)["data"]["result"] if status == 200 else []
    return result


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is missing (Debian package prometheus)"
)
def test_a_real_prometheus_scrapes_the_service_and_answers_a_query(
    new_home: NewHome, tmp_path: Path
) -> None:
    home = new_home(metrics_listen="127.0.0.1:0")
    service, _ = home.start()
    target = service.until_event("service.listening")["metrics_address"]

    with prometheus(tmp_path, target) as address:
        (found,) = until(
            lambda: query(address, 'runrecovery_state{state="SERVING"} == 1'),
            "Prometheus has scraped the service",
        )
        (up,) = query(address, "up")

    assert (up["value"][1], up["metric"]["job"]) == ("1", "runrecovery")
    assert found["metric"]["instance"] == target


def test_fifty_scrapes_at_once_and_clients_that_say_nothing_delay_no_call(
    new_home: NewHome,
) -> None:
    home = new_home(metrics_listen="127.0.0.1:0")
    service, api = home.start()
    address = service.until_event("service.listening")["metrics_address"]
    host, _, port = address.partition(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(20)]
    scraping = [HTTPConnection(address, timeout=30) for _ in range(10)]

    for _ in range(5):
        for connection in scraping:
            connection.request("GET", "/metrics")
        assert refused(lambda: api.get("nobody")).code is grpc.StatusCode.NOT_FOUND
        assert {connection.getresponse().read()[:7] for connection in scraping} == {b"# HELP "}

    for client in silent:
        client.close()
    for connection in scraping:
        connection.close()
    reads = {"operation": "read"}
    assert value(scrape(service), "runrecovery_storage_duration_seconds_count", **reads) == 1


def test_without_the_package_a_start_and_check_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = Settings(metrics_listen="127.0.0.1:0", data_dir=tmp_path / "data")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    sentence = "metrics_listen: needs `pip install runrecovery-service[metrics]`"

    with pytest.raises(PackagesMissing, match=r"\[metrics\]") as caught:
        demand_packages(settings)

    assert str(caught.value) == sentence
    assert sentence in check(settings)
    demand_packages(Settings())


def test_check_names_an_address_that_other_machines_reach(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"

    (note,) = check_notes(Settings(metrics_listen="0.0.0.0:9464", data_dir=data_dir))

    assert note.startswith("metrics_listen = 0.0.0.0:9464: anyone who connects")
    assert check_notes(Settings(metrics_listen="127.0.0.1:9464", data_dir=data_dir)) == []


def test_nothing_of_metrics_is_imported_without_metrics() -> None:
    code = (
        "import sys, runrecovery_service.app, runrecovery_service.offline;"
        " print([name for name in sys.modules"
        " if name.startswith(('runrecovery_service.metrics', 'prometheus_client'))])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )

    assert done.stdout == "[]\n"
