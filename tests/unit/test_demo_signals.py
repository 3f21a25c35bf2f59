"""Signals that reach `runrecovery demo`."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from runrecovery_service.cli import local
from runrecovery_service.cli.demo import steps
from runrecovery_service.cli.demo.scenario import DemoFailed
from runrecovery_service.cli.demo.service_process import ServiceProcess


@pytest.fixture
def _signals_as_they_were() -> Iterator[None]:
    before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("why", [KeyboardInterrupt, SystemExit, DemoFailed])
def test_a_demo_that_is_interrupted_while_its_service_starts_kills_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: type[BaseException]
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupted(service: ServiceProcess, _: str) -> dict[str, object]:
        started.append(service.popen)
        raise why

    monkeypatch.setattr(ServiceProcess, "wait_for_log", interrupted)
    try:
        with pytest.raises(why):
            ServiceProcess.start(tmp_path, 1)

        assert [popen.returncode for popen in started] == [-signal.SIGKILL]
    finally:
        for popen in started:
            popen.kill()
            popen.wait()


@pytest.mark.usefixtures("_signals_as_they_were")
def test_a_demo_under_nohup_ignores_sighup(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []

    def run_demo() -> int:
        seen.extend(signal.getsignal(one) for one in (signal.SIGHUP, signal.SIGTERM))
        return 0

    monkeypatch.setattr(steps, "run_demo", run_demo)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    local.demo.main([], standalone_mode=False)

    assert seen[0] is signal.SIG_IGN
    assert callable(seen[1])
