"""Signals that come while the command is still importing, reading or opening."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from support.service import Home, ServiceProcess
from support.waiting import patience_s, until

NewHome = Callable[..., Home]

HANGS = """
import pathlib, time
pathlib.Path("importing").touch()
while True:
    time.sleep(0.01)
"""
STOPS = [signal.SIGTERM, signal.SIGINT]
HARMLESS = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@contextmanager
def read_by(service: ServiceProcess, path: Path) -> Iterator[int]:
    """Wait until the service reads a FIFO, and yield the end to which the test writes."""

    def open_it() -> int | None:
        assert service.popen.poll() is None, service.text
        try:
            return os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # nobody reads yet
            return None

    descriptor = until(open_it, "the configuration is being read")
    assert descriptor is not None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def signal_until_it_ends(service: ServiceProcess, number: int) -> None:
    """Send the signal until the service has ended.

    Python handles a signal between two of its instructions. One that comes just before a read is
    handled after the read, which here does not return; the next signal interrupts it.
    """

    def signal_again() -> bool:
        service.popen.send_signal(number)
        try:
            service.exit_code(timeout_s=1.0)
        except subprocess.TimeoutExpired:
            return False
        return True

    until(signal_again, "it has ended")


def fifo(home: Home) -> Path:
    path = home.path / "fifo.toml"
    os.mkfifo(path)
    return path


def has_locked(service: ServiceProcess, path: Path) -> bool:
    """Return True once the service holds a lock on the file; its descriptors are hidden from us."""
    assert service.popen.poll() is None, service.text
    locks = [line.split() for line in Path("/proc/locks").read_text("ascii").splitlines()]
    inode = str(path.stat().st_ino)
    return any(
        fields[4] == str(service.pid) and fields[5].rpartition(":")[2] == inode
        for fields in locks
        if "->" not in fields
    )


@pytest.mark.parametrize("number", STOPS)
@pytest.mark.parametrize("module", ["click", "structlog"])
def test_a_service_that_only_imports_ends_with_0(
    new_home: NewHome, number: int, module: str
) -> None:
    home = new_home(may_fork=False)
    (home.path / f"{module}.py").write_text(HANGS)
    service = home.spawn()
    until((home.path / "importing").exists, "it imports")

    service.popen.send_signal(number)

    assert service.exit_code() == 0
    assert service.text == ""
    assert not home.data.exists()


@pytest.mark.parametrize("number", STOPS)
def test_a_service_that_reads_its_configuration_ends_with_0(new_home: NewHome, number: int) -> None:
    home = new_home(may_fork=False)
    path = fifo(home)
    service = home.spawn("--config", str(path))

    with read_by(service, path):
        signal_until_it_ends(service, number)

        assert service.exit_code() == 0
    assert service.text == ""
    assert not home.data.exists()


@pytest.mark.parametrize("number", HARMLESS)
def test_a_harmless_signal_before_the_configuration_is_read_is_logged_later(
    new_home: NewHome, number: int
) -> None:
    home = new_home(may_fork=False)
    path = fifo(home)
    service = home.spawn("--config", str(path))

    with read_by(service, path) as config:
        service.popen.send_signal(number)
        os.write(config, home.config.read_bytes())

    service.until_event("service.serving")
    if number == signal.SIGHUP:
        assert service.until_event("service.reload_refused")["problems"]
    else:
        told = service.events("service.signal_ignored")
        assert told[0]["signal"] == signal.Signals(number).name
    assert service.stop() == 0


@pytest.mark.parametrize("number", STOPS)
def test_a_service_that_opens_its_store_stops_in_order(new_home: NewHome, number: int) -> None:
    home = new_home(may_fork=False)
    service, _ = home.start()
    assert service.stop() == 0
    with home.store(writable=True) as other:
        other.execute("BEGIN EXCLUSIVE")
        service = home.spawn()
        until(lambda: has_locked(service, home.database), "it opens its store")

        service.popen.send_signal(number)
        other.rollback()

    assert service.exit_code() == 0
    assert [event["times"] for event in service.events("service.stop_asked")] == [1]
    assert service.events("service.stopped")
    assert not service.events("service.serving")


LAST_STEP: Final = "0024_model_usage"
"""Only the last step can be undone: it makes one table."""


def test_a_reload_that_is_asked_for_during_a_migration_follows_once_the_service_runs(
    new_home: NewHome,
) -> None:
    home = new_home(may_fork=False)
    service, _ = home.start()
    assert service.stop() == 0
    with home.store(writable=True) as other:
        other.execute("DROP TABLE model_usage")
        for table in ("schema_migration", "migration_checksum"):
            other.execute(f"DELETE FROM {table} WHERE name = '{LAST_STEP}'")  # noqa: S608
        other.commit()
        other.execute("BEGIN EXCLUSIVE")
        service = home.spawn()
        until(lambda: has_locked(service, home.database), "it opens its store")

        home.write_config(log_level="debug")
        service.popen.send_signal(signal.SIGHUP)
        other.rollback()

    assert service.until_event("storage.migrated")["step"] == LAST_STEP
    assert service.until_event("service.reloaded")["changed"] == ["log_level"]
    assert service.stop() == 0


@pytest.mark.parametrize("module", ["click", "grpc"])
@pytest.mark.parametrize("command", ["health", "runs list"])
def test_another_command_that_only_imports_ends_by_ctrl_c_with_130(
    tmp_path: Path, module: str, command: str
) -> None:
    (tmp_path / f"{module}.py").write_text(HANGS)
    process = subprocess.Popen(
        [sys.executable, "-m", "runrecovery_service", *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    with process:
        until((tmp_path / "importing").exists, "it imports")
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=patience_s())

    assert process.returncode == 130
    assert out == b""
    assert b"Traceback" not in error


TAKES_OVER = """
import asyncio, os, signal
from runrecovery_service import signal_handlers, early_signals
from runrecovery_service.stop_signal import StopSignal

early_signals.hold()
tell_loop = signal.set_wakeup_fd

def tell_loop_and_be_signalled(*given, **named):
    signal.set_wakeup_fd = tell_loop
    before = tell_loop(*given, **named)
    os.kill(os.getpid(), {number})
    return before

async def main():
    stop = StopSignal()
    signal.set_wakeup_fd = tell_loop_and_be_signalled
    signal_handlers.Signals(stop, lambda: True).handle()
    await asyncio.wait_for(stop.wait(), 20)
    await asyncio.sleep(0)  # a loop that reports the signal too does so by now
    await asyncio.sleep(0)

asyncio.run(main())
"""


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_while_the_loop_takes_over_the_handlers_counts_once(number: int) -> None:
    code = TAKES_OVER.replace("{number}", str(int(number)))

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, timeout=patience_s(), check=False
    )

    assert (done.returncode, done.stdout.count(b"service.stop_asked")) == (0, 1), done
