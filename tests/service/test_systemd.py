"""The messages of the service to systemd, read from a socket in the place of systemd's."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.systemd import SystemdNotifier
from structlog.testing import capture_logs
from support.engines import GOOD_ENGINES, agent
from support.service import Home
from support.waiting import until, until_async

NewHome = Callable[..., Home]
MORE_TIME: Final = "EXTEND_TIMEOUT_USEC=30000000"
WATCHDOG: Final = {"WATCHDOG_USEC": "200000"}


class Systemd:
    """A socket like systemd's, and the messages that came."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.settimeout(0)
        self.messages: list[list[str]] = []
        self._path = Path(address)

    def read(self) -> list[list[str]]:
        """Return all messages so far, each as its lines."""
        while True:
            try:
                self.messages.append(self.socket.recv(4096).decode().split("\n"))
            except BlockingIOError:
                return self.messages

    def hide(self) -> None:
        """Take the name of the socket away."""
        self._path.rename(self._path.with_name("hidden"))

    def show(self) -> None:
        """Give the socket its name again."""
        self._path.with_name("hidden").rename(self._path)

    def got(self, line: str) -> bool:
        """Return whether a message has this line."""
        return any(line in message for message in self.read())


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of the socket."""
    if request.param == "path":
        return str(tmp_path / "notify")
    return f"@runrecovery-test-{time.time_ns()}"


@pytest.fixture
def systemd(address: str) -> Iterator[Systemd]:
    """The socket."""
    stand_in = Systemd(address)
    yield stand_in
    stand_in.socket.close()


def test_a_start_is_ready_when_it_serves_and_a_stop_says_so(
    new_home: NewHome, systemd: Systemd, address: str
) -> None:
    home = new_home(env={"NOTIFY_SOCKET": address, **WATCHDOG})
    service, _ = home.start()
    until(lambda: systemd.got("READY=1"), "it is ready")
    seen = len(systemd.read())
    until(lambda: len(systemd.read()) > seen + 3, "the watchdog is told again and again")
    assert service.stop() == 0

    messages = systemd.read()
    ready = [message for message in messages if "READY=1" in message]
    before = messages[: messages.index(ready[0])]
    assert ready == [["STATUS=serving", "READY=1", "WATCHDOG=1"]]
    assert before[0] == ["STATUS=recovering the runs of earlier starts", MORE_TIME, "WATCHDOG=1"]
    assert messages[seen + 1] == ["STATUS=serving", "WATCHDOG=1"]
    assert messages[-1] == ["STATUS=stopping", "STOPPING=1", MORE_TIME, "WATCHDOG=1"]


@pytest.mark.parametrize("address", ["path"], indirect=True)
def test_a_stop_that_lets_turns_end_asks_for_more_time(
    new_home: NewHome, systemd: Systemd, address: str
) -> None:
    engines = {**GOOD_ENGINES, "working": agent("interruptible")}
    home = new_home(
        engines=engines, finish_s=600, env={"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "none"}
    )
    service, api = home.start()
    run_id = api.create("working").run_id
    until(lambda: home.agents_of(run_id), "it works")
    service.terminate()
    waiting = "STATUS=stopping; turns under way may end by themselves"
    until(lambda: systemd.got(waiting), "systemd is told")
    api.cancel(run_id)
    until(lambda: systemd.got("STATUS=stopping"), "the turn has ended")
    assert service.exit_code() == 0

    assert [waiting, "STOPPING=1", MORE_TIME] in systemd.read()


def test_a_watchdog_of_another_process_gets_no_message() -> None:
    environ = {"NOTIFY_SOCKET": "/n", "WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}

    assert SystemdNotifier.from_environment(Gate(), environ).watchdog_s is None


def test_the_status_says_what_keeps_a_service_from_serving_calls() -> None:
    gate = Gate()
    notifier = SystemdNotifier(gate=gate, address="", watchdog_s=None)
    gate.set_recovery_failed()
    failed = notifier.message()
    gate.open()
    gate.set_storage_answers(answers=False)
    no_database = notifier.message()
    gate.set_storage_answers(answers=True)
    gate.set_listens(listens=False)

    assert failed == ["STATUS=the recovery failed, and will be tried again", MORE_TIME]
    assert no_database == ["STATUS=serving; the database does not answer", "READY=1"]
    assert notifier.message() == ["STATUS=serving; another process has the listen address"]


@pytest.mark.parametrize("address", ["path"], indirect=True)
def test_a_reload_says_when_it_begins_and_ends_and_whether_it_was_refused(
    new_home: NewHome, systemd: Systemd, address: str
) -> None:
    home = new_home(env={"NOTIFY_SOCKET": address})
    service, _ = home.start()
    until(lambda: systemd.got("READY=1"), "it is ready")
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    home.config.write_text("bad")
    service.popen.send_signal(signal.SIGHUP)
    refused = "STATUS=serving; the last reload was refused, and the log says why"
    until(lambda: systemd.got(refused), "the reload was refused")
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    home.write_config()
    seen = len(systemd.read())
    service.popen.send_signal(signal.SIGHUP)
    until(lambda: ["STATUS=serving", "READY=1"] in systemd.read()[seen:], "the file is good")
    assert service.stop() == 0

    (begun, *_) = [each for each in systemd.messages if "RELOADING=1" in each]
    assert begun[0] == "RELOADING=1"
    assert before <= int(begun[1].removeprefix("MONOTONIC_USEC=")) <= after
    assert systemd.messages[systemd.messages.index(begun) + 1] == [refused, "READY=1"]


@pytest.mark.parametrize("address", ["path"], indirect=True)
def test_a_socket_that_is_gone_is_logged_once(
    new_home: NewHome, systemd: Systemd, address: str
) -> None:
    home = new_home(env={"NOTIFY_SOCKET": address, **WATCHDOG})
    service, api = home.start()
    until(lambda: systemd.got("READY=1"), "it is ready")
    Path(address).unlink()
    service.until_event("service.systemd_not_notified")

    assert api.health_of() == "SERVING"
    assert service.stop() == 0
    (logged,) = service.events("service.systemd_not_notified")
    assert logged["error"] == "No such file or directory"


@pytest.mark.parametrize("address", ["path"], indirect=True)
async def test_each_outage_of_the_socket_is_logged(systemd: Systemd, address: str) -> None:
    gate = Gate()
    notifier = SystemdNotifier(gate=gate, address=address, watchdog_s=None)

    def messages() -> int:
        return len(systemd.read())

    async def send_one() -> None:
        sent = messages()
        gate.set_storage_answers(answers=not gate.storage_answers)
        await until_async(lambda: _is(messages() > sent), "a message arrives")

    with capture_logs() as logged:
        notifier.start()
        for outages in (1, 2):
            await send_one()
            systemd.hide()
            for _ in range(2):
                gate.set_storage_answers(answers=not gate.storage_answers)
                await until_async(lambda: _is(len(logged) == outages), "it is logged")  # noqa: B023
            systemd.show()
        await notifier.stop()

    assert [one["event"] for one in logged] == ["service.systemd_not_notified"] * 2


async def _is(fact: bool) -> bool:  # noqa: FBT001 - the only argument
    return fact
