"""Starts with and without HTTP: addresses, packages, imports, and what answers when."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runrecovery_service.config import reading
from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.start_errors import PackagesMissing
from runrecovery_service.extras import demand_packages
from runrecovery_service.offline import check
from support.http_api import RUNS, HttpApi, http_address
from support.service import Home
from support.waiting import until

NewHome = Callable[..., Home]


def test_a_taken_address_ends_the_start_with_5(new_home: NewHome) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        home = new_home(may_fork=False, http_listen=address)

        service = home.spawn()

        assert service.exit_code() == 5
        assert f"cannot listen on {address}" in service.text
        assert not home.database.exists()


def test_localhost_is_answered_on_both_addresses_and_released_at_a_stop(
    new_home: NewHome,
) -> None:
    home = new_home(http_listen="localhost:0")
    service, _ = home.start()
    port = int(http_address(service).rpartition(":")[2])

    seen = [HttpApi(f"{host}:{port}").request("GET", "/readyz").status for host in ("127.0.0.1",)]
    if socket.has_ipv6:
        with socket.create_connection(("::1", port)) as connection:
            connection.sendall(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            seen.append(int(connection.recv(100)[9:12]))

    assert seen == [200] * len(seen)
    assert service.stop() == 0
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))


def test_the_flag_switches_http_on(new_home: NewHome) -> None:
    home = new_home()

    service = home.listen("--http-listen", "127.0.0.1:0")

    assert HttpApi(http_address(service)).request("GET", "/healthz").status == 200


def test_while_the_service_recovers_it_lives_is_not_ready_and_refuses_calls(
    new_home: NewHome,
) -> None:
    home = new_home(
        http_listen="127.0.0.1:0", recovery_tries=1000, recovery_backoff_s=0.05, may_fork=False
    )
    home.seed(1)
    with home.store(writable=True) as store:
        store.execute(
            "CREATE TRIGGER refuse BEFORE INSERT ON reconciliation"
            " BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    home.expected_defects |= {"IntegrityError"}
    service = home.listen()
    http = HttpApi(http_address(service))

    refused = http.post(f"{RUNS}/GetRun", {"runId": "r"})

    assert http.request("GET", "/healthz").status == 200
    assert http.request("GET", "/readyz").status == 503
    assert (refused.status, refused.reason) == (503, "RECONCILIATION_IN_PROGRESS")
    assert refused.headers["retry-after"] == "1"
    with home.store(writable=True) as store:
        store.execute("DROP TRIGGER refuse")
    until(lambda: http.request("GET", "/readyz").status == 200, "the service is ready")


def test_a_draining_service_is_not_ready_and_refuses_changes(new_home: NewHome) -> None:
    home = new_home(http_listen="127.0.0.1:0", drain_delay_s=30.0)
    service, api = home.start()
    api.until_ended(api.create("resumable", {"result": {}}, run_id="done").run_id)
    http = HttpApi(http_address(service))

    service.terminate()

    until(lambda: http.request("GET", "/readyz").status == 503, "the service is not ready")
    changed = http.post(f"{RUNS}/CreateRun", {"engine": "resumable"})
    assert (changed.status, changed.reason) == (503, "SHUTTING_DOWN")
    assert http.post(f"{RUNS}/GetRun", {"runId": "done"}).status == 200


def test_without_the_packages_a_start_and_check_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = Settings(http_listen="127.0.0.1:0", data_dir=tmp_path / "data")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    sentence = "http_listen: needs `pip install runrecovery-service[http]`"

    with pytest.raises(PackagesMissing, match=r"\[http\]") as caught:
        demand_packages(settings)

    assert str(caught.value) == sentence
    assert sentence in check(settings)
    demand_packages(Settings())


def test_nothing_of_http_is_imported_without_http() -> None:
    code = (
        "import sys, runrecovery_service.app, runrecovery_service.offline;"
        " print([name for name in sys.modules if name.startswith("
        "('runrecovery_service.http', 'runrecovery_service.setup.http', 'uvicorn', 'starlette',"
        " 'h11', 'jinja2', 'runrecovery_service.console'))])"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )

    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('http_listen = "unix:/tmp/x"', "http_listen: must be empty, HOST:PORT or [IPV6]:PORT"),
        (
            'http_listen = "0.0.0.0:80"',
            "http_listen: 0.0.0.0:80 can be reached from other machines, and there is no [tls]",
        ),
        ('http_hosts = ["a"]', "http_hosts: has no effect without http_listen"),
        ('http_origins = ["http://a"]', "http_origins: has no effect without http_listen"),
        ('http_hosts = ["a:80"]', "http_hosts[0]: must be a host name in ASCII, without a port"),
        ('http_hosts = ["*"]', "http_hosts[0]: must be a host name"),
        ('http_origins = ["*"]', 'must be an origin like "https://app.example", not "*"'),
        ('http_origins = ["https://a/"]', 'must be an origin like "https://app.example"'),
        ('http_origins = ["https://a:0"]', "the port must be from 1 to 65535"),
        ('http_origins = ["ftp://a"]', "must be an origin"),
        ("http_origins = [1]", "http_origins[0]: must be a string, not 1"),
        ('console = "yes"', "console: must be true or false"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, lines: str, problem: str) -> None:
    file = tmp_path / "runrecovery.toml"
    file.write_text(f"{lines}\n", "utf-8")

    with pytest.raises(ConfigError, match=re.escape(problem)):
        reading.load(path=file, flags={}, environ={})


def test_origins_and_hosts_are_read_as_browsers_write_them() -> None:
    settings = reading.load(
        path=None,
        flags={"http_listen": "127.0.0.1:0"},
        environ={
            "RUNRECOVERY_HTTP_ORIGINS": "https://App.example:443, http://[::1]:3000",
            "RUNRECOVERY_HTTP_HOSTS": "Runs.example",
        },
    )

    assert settings.http_origins == ("https://app.example", "http://[::1]:3000")
    assert settings.http_hosts == ("runs.example",)
