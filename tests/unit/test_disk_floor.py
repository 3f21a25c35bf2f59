"""Below the floor no run is launched or created, until there is enough room again."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import structlog
from runrecovery_service import disk_floor
from runrecovery_service.disk_floor import DiskFloor
from runrecovery_service.domain.errors import StorageFull, error_facts
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.stop_signal import StopSignal

DATA, DATABASE = Path("/data"), Path("/database")


class FakeDispatcher:
    """Notes whether it is held."""

    held = False

    def hold(self, *, held: bool) -> None:
        """See `Dispatcher`."""
        self.held = held


class Disk:
    """A service of which a test says how much room it has."""

    def __init__(self) -> None:
        self.free: dict[Path, int | Exception] = {DATA: 1000, DATABASE: 1000}
        self.gate, self.dispatcher = Gate(), FakeDispatcher()
        self.gate.open()
        self.floor = DiskFloor(
            places=(DATA, DATABASE),
            min_free_bytes=100,
            gate=self.gate,
            dispatcher=self.dispatcher,  # type: ignore[arg-type]
            stop_signal=StopSignal(),
            free_bytes=self.free_bytes,
        )

    def free_bytes(self, place: Path) -> int:
        free = self.free[place]
        if isinstance(free, Exception):
            raise free
        return free

    async def starts_runs(self, *free: int, place: Path = DATA) -> list[bool]:
        """Return after each of these amounts whether runs may be created; launches agree."""
        found = []
        for self.free[place] in free:
            await self.floor.check()
            try:
                self.gate.check_launches_allowed()
                found.append(True)
            except StorageFull:
                found.append(False)
            assert self.dispatcher.held is not found[-1]
        return found


async def test_runs_stop_below_the_floor_and_come_back_a_quarter_above_it() -> None:
    disk = Disk()

    assert await disk.starts_runs(100, 99, 0, 100, 124, 125, 100, 99) == [
        True, False, False, False, False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("place", [DATA, DATABASE])
async def test_each_place_has_the_floor(place: Path) -> None:
    assert await Disk().starts_runs(99, 125, place=place) == [False, True]


async def test_each_change_is_logged_once() -> None:
    disk = Disk()

    with structlog.testing.capture_logs() as told:
        await disk.starts_runs(500, 99, 98, 97, 300, 300)

    assert told == [
        {
            "event": "service.disk_low", "log_level": "warning", "place": "/data",
            "free_bytes": 99, "min_free_bytes": 100,
        },
        {
            "event": "service.disk_has_room", "log_level": "info", "place": "/data",
            "free_bytes": 300,
        },
    ]  # fmt: skip


async def test_a_disk_that_gives_no_answer_changes_nothing() -> None:
    disk = Disk()
    await disk.starts_runs(99)
    disk.free[DATA] = OSError(5, "I/O error")

    with pytest.raises(OSError, match="I/O error"):
        await disk.floor.check()

    assert (disk.floor.is_low, disk.dispatcher.held) == (True, True)


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("the file system did not answer in time", "the file system did not answer in time"),
        ("", "the database did not answer in time"),
    ],
)
def test_the_log_of_a_timeout_names_what_did_not_answer(said: str, cause: str) -> None:
    assert error_facts(TimeoutError(said)) == {"error": "TimeoutError", "cause": cause}


async def test_a_disk_that_hangs_is_not_taken_for_the_database(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hangs, disk = threading.Event(), Disk()
    monkeypatch.setattr(disk_floor, "ANSWER_S", 0.01)
    disk.floor.free_bytes = lambda _: int(hangs.wait(60))

    try:
        with pytest.raises(TimeoutError, match=r"^the file system did not answer in time$"):
            await disk.floor.check()
    finally:
        hangs.set()


def test_the_refusal_says_why_and_when_to_retry() -> None:
    gate = Gate()
    gate.open()
    gate.set_disk_low(low=True)

    with pytest.raises(StorageFull, match="less room than min_free_bytes") as caught:
        gate.check_launches_allowed()
    assert caught.value.retry_after_s == 30.0
