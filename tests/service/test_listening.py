"""The address of a service: which ones work, which are refused, and how the service keeps it."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import grpc
import pytest
from fuzz.attacks import OPENING, call, headers, message
from support.api import Api
from support.service import Home, ServiceProcess
from support.waiting import until

NewHome = Callable[..., Home]
HOLDS = {"hold": True}
RECOVERY = "runrecovery.v1.RecoveryService"


def health(address: str) -> str:
    """Return health by a new connection."""
    api = Api(address)
    with closing(api.channel):
        return api.health_of()


def refused_start(home: Home, listen: str) -> str:
    """Start a service that must exit with 5; return its log."""
    service = home.spawn("--listen", listen)
    assert service.exit_code() == 5, service.text
    return service.text


@contextmanager
def listener(family: int, address: object) -> Iterator[socket.socket]:
    with socket.socket(family) as other:
        other.bind(address)  # type: ignore[arg-type]
        other.listen()
        yield other


def start(home: Home, path: Path) -> tuple[ServiceProcess, Api]:
    return home.start("--listen", f"unix:{path}")


# -- the file of a Unix socket -----------------------------------------------------------------


def test_a_second_service_on_a_socket_file_exits_with_5_and_leaves_the_first_alone(
    new_home: NewHome,
) -> None:
    first, second = new_home(), new_home()
    path = first.path / "socket"
    service, _ = start(first, path)
    before = path.lstat().st_ino

    said = refused_start(second, f"unix:{path}")

    assert f"cannot listen on unix:{path}: another process listens there\n" in said
    assert path.lstat().st_ino == before
    assert health(service.address) == "SERVING"


def test_of_services_that_start_at_once_on_a_socket_file_one_serves(new_home: NewHome) -> None:
    homes = [new_home() for _ in range(3)]
    path = homes[0].path / "socket"
    services = [home.spawn("--listen", f"unix:{path}") for home in homes]

    def ended() -> list[ServiceProcess]:
        return [service for service in services if service.popen.poll() is not None]

    until(lambda: len(ended()) == 2, "two of them end")

    assert [service.exit_code() for service in ended()] == [5, 5]
    (alive,) = (service for service in services if service.popen.poll() is None)
    alive.address = f"unix:{path}"
    alive.until_serving()
    assert [entry.name for entry in path.parent.glob("socket*")] == ["socket"]


def test_the_socket_file_of_a_killed_service_is_taken_over(new_home: NewHome) -> None:
    home = new_home()
    path = home.path / "socket"
    service, _ = start(home, path)
    service.kill()
    assert path.is_socket()

    service, _ = start(home, path)

    assert health(service.address) == "SERVING"


def test_a_stop_removes_the_socket_file(new_home: NewHome) -> None:
    home = new_home()
    path = home.path / "socket"
    service, _ = start(home, path)

    assert service.stop() == 0
    assert list(home.path.glob("socket*")) == []


def test_a_file_that_is_no_socket_is_left_alone(new_home: NewHome) -> None:
    home = new_home()
    path = home.path / "socket"
    path.write_text("mine")

    said = refused_start(home, f"unix:{path}")

    assert "a file that is no socket is there\n" in said
    assert path.read_text() == "mine"
    assert [entry.name for entry in home.path.glob("socket*")] == ["socket"]


def test_a_socket_file_in_a_missing_folder_ends_the_start_with_5(new_home: NewHome) -> None:
    home = new_home()

    assert "No such file or directory" in refused_start(home, f"unix:{home.path}/no/socket")


@pytest.mark.parametrize("more", [0, 1])
def test_a_socket_path_of_100_bytes_works_and_a_longer_one_is_refused_with_the_reason(
    new_home: NewHome, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    home = new_home()
    monkeypatch.chdir(home.path)  # the tests' own folder may be longer than that
    path = Path("s" * (100 + more))

    if more:
        assert "the path has more than 100 bytes" in refused_start(home, f"unix:{path}")
    else:
        service, _ = start(home, path)
        assert health(service.address) == "SERVING"


def test_a_removed_socket_file_is_made_again(new_home: NewHome) -> None:
    home = new_home()
    path = home.path / "socket"
    service, _ = start(home, path)
    path.unlink()

    service.until_event("rpc.server_replaced")

    assert [event["holder"] for event in service.events("rpc.address_lost")] == ["nobody"]
    assert health(service.address) == "SERVING"


def test_a_taken_socket_file_is_not_serving_until_it_is_free_again(new_home: NewHome) -> None:
    home = new_home()
    path, aside = home.path / "socket", home.path / "aside"
    service, connected = start(home, path)
    with listener(socket.AF_UNIX, str(aside)):
        aside.rename(path)
        until(lambda: connected.health_of() == "NOT_SERVING", "it says so")
        assert connected.health_of(RECOVERY) == "NOT_SERVING"
        assert connected.health_of("liveness") == "SERVING"
        assert [event["holder"] for event in service.events("rpc.address_lost")] == [
            "another service"
        ]

    service.until_event("rpc.server_replaced")

    until(lambda: health(service.address) == "SERVING", "it serves again")


def test_a_stop_leaves_the_socket_file_of_another(new_home: NewHome) -> None:
    home = new_home()
    path, aside = home.path / "socket", home.path / "aside"
    service, connected = start(home, path)
    with listener(socket.AF_UNIX, str(aside)) as other:
        aside.rename(path)
        until(lambda: connected.health_of() == "NOT_SERVING", "it says so")

        assert service.stop() == 0

        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))
            other.accept()[0].close()


# -- abstract names ----------------------------------------------------------------------------


def test_a_taken_abstract_name_ends_the_start_with_5(new_home: NewHome) -> None:
    name = f"runrecovery-test-{uuid.uuid4()}"
    with listener(socket.AF_UNIX, f"\0{name}"):
        assert name in refused_start(new_home(), f"unix-abstract:{name}")


def test_an_abstract_name_is_kept_when_the_server_is_replaced(new_home: NewHome) -> None:
    name = f"runrecovery-test-{uuid.uuid4()}"
    service, _ = new_home().start("--listen", f"unix-abstract:{name}")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"\0{name}")
        connection.sendall(OPENING + call(headers(b"/\xff"), message()))
        service.until_event("rpc.server_replaced")

    assert health(service.address) == "SERVING"
    assert service.stop() == 0


# -- host names --------------------------------------------------------------------------------


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.parametrize(
    "taken",
    [
        "127.0.0.1",
        pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")),
    ],
)
def test_a_host_name_with_one_taken_address_ends_the_start_with_5(
    new_home: NewHome, taken: str
) -> None:
    family = socket.AF_INET6 if ":" in taken else socket.AF_INET
    with listener(family, (taken, 0)) as other:
        port = other.getsockname()[1]

        said = refused_start(new_home(), f"localhost:{port}")

    assert f"localhost:{port}" in said


def test_localhost_listens_on_all_of_its_addresses(new_home: NewHome) -> None:
    service, _ = new_home().start("--listen", "localhost:0")
    port = service.address.rpartition(":")[2]

    hosts = ["127.0.0.1", "[::1]"] if has_ipv6() else ["127.0.0.1"]

    assert [health(f"{host}:{port}") for host in hosts] == ["SERVING"] * len(hosts)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "[0:0::1]", "127.8.9.10", "[::ffff:127.0.0.1]"]
)
def test_every_form_of_an_address_works(new_home: NewHome, host: str) -> None:
    if host.startswith("[") and not has_ipv6():
        pytest.skip("no IPv6 here")
    service, _ = new_home().start("--listen", f"{host}:0")

    assert health(service.address) == "SERVING"
    assert service.stop() == 0


def test_a_port_stays_the_same_when_the_server_is_replaced(new_home: NewHome) -> None:
    service, api = new_home().start()
    port = int(service.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(OPENING + call(headers(b"/\xff"), message()))
        service.until_event("rpc.server_replaced")

    with pytest.raises(grpc.RpcError) as error:
        until(lambda: api.get("nothing"), "it answers")
    assert error.value.code() is not grpc.StatusCode.CANCELLED
    assert health(service.address) == "SERVING"


# -- before anything is claimed ----------------------------------------------------------------


def taken_port(_home: Home, stack: ExitStack) -> str:
    other = stack.enter_context(listener(socket.AF_INET, ("127.0.0.1", 0)))
    return f"127.0.0.1:{other.getsockname()[1]}"


def half_taken_name(_home: Home, stack: ExitStack) -> str:
    other = stack.enter_context(listener(socket.AF_INET, ("127.0.0.1", 0)))
    return f"localhost:{other.getsockname()[1]}"


def taken_socket_file(home: Home, stack: ExitStack) -> str:
    stack.enter_context(listener(socket.AF_UNIX, str(home.path / "socket")))
    return f"unix:{home.path}/socket"


def taken_abstract_name(_home: Home, stack: ExitStack) -> str:
    name = uuid.uuid4().hex
    stack.enter_context(listener(socket.AF_UNIX, f"\0{name}"))
    return f"unix-abstract:{name}"


@pytest.mark.parametrize(
    ("address", "why"),
    [
        (taken_port, "Address already in use"),
        (half_taken_name, "Address already in use"),
        (taken_socket_file, "another process listens there"),
        (taken_abstract_name, "Address already in use"),
        (lambda *_: "unix:/no/such/folder/socket", "No such file or directory"),
        (lambda *_: "192.0.2.7:0", "this machine has no such address"),
        (lambda *_: "no-such-host.invalid:0", "no-such-host.invalid"),
        (lambda *_: f"{'x' * 64}.invalid:0", "not a host name"),
    ],
    ids=["port", "name", "file", "abstract", "folder", "elsewhere", "unknown", "no-name"],
)
def test_a_start_that_cannot_listen_claims_no_epoch_and_ends_no_process(
    new_home: NewHome, address: Callable[[Home, ExitStack], str], why: str
) -> None:
    home = new_home(insecure_listen=True)
    service, api = home.start()
    run = api.create("resumable", HOLDS)
    until(lambda: home.agents_of(run.run_id), "its process is there")
    home.kill_with_shims(service)
    orphans = home.agents()
    epochs = home.rows("SELECT name, epoch FROM instance")

    with ExitStack() as stack:
        said = refused_start(home, address(home, stack))

    assert why in said
    assert orphans
    assert home.agents() == orphans
    assert home.rows("SELECT name, epoch FROM instance") == epochs
    assert "service.epoch_claimed" not in said
    assert [entry.name for entry in home.path.glob("socket.*")] == []
