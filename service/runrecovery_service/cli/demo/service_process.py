"""The service as a process of the demo: start, kill, stop, and poll its health."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from runrecovery import RunRecoveryClient, ServingStatus
from runrecovery.errors import Unavailable

from runrecovery_service.cli.demo.scenario import DemoFailed
from runrecovery_service.lazy_dataclass import dataclass

READY_TIMEOUT_S: Final = 20.0
STOP_TIMEOUT_S: Final = 15.0
HEALTH_INTERVAL_S: Final = 0.002


@dataclass(slots=True)
class ServiceProcess:
    """One start of the service, as an operator would start it."""

    popen: subprocess.Popen[bytes]
    log: Path
    address: str

    @classmethod
    def start(cls, folder: Path, number: int) -> ServiceProcess:
        """Start the service and return once it listens."""
        log = folder / f"service-{number}.log"
        command = [sys.executable, "-m", "runrecovery_service", "serve"]
        options = ["--config", str(folder / "runrecovery.toml"), "--data-dir", str(folder / "data")]
        with log.open("wb") as output:
            popen = subprocess.Popen(  # noqa: S603 - our own program
                [*command, *options, "--listen", "127.0.0.1:0", "--log-format", "json"],
                stderr=output,
                stdout=output,
                cwd=folder,
                start_new_session=True,
            )
        service = cls(popen, log, "")
        try:
            service.address = str(service.wait_for_log("service.listening")["address"])
        except BaseException:  # also Ctrl-C, and the exit that a signal asks for
            service.crash()
            raise
        return service

    def wait_for_log(self, event: str) -> dict[str, object]:
        """Return the first log line of this event."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            for line in self.log.read_text("utf-8", "replace").splitlines():
                if f'"{event}"' in line:
                    found: dict[str, object] = json.loads(line)
                    return found
            if self.popen.poll() is not None:
                break
            time.sleep(0.005)
        raise DemoFailed(f"the service did not log {event}; its log is\n{self.log.read_text()}")

    def crash(self) -> None:
        """Kill the service with SIGKILL, as an out-of-memory killer would."""
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.popen.terminate()
        try:
            return self.popen.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.crash()
            return -signal.SIGKILL


def poll_health(client: RunRecoveryClient) -> list[tuple[float, str]]:
    """Poll health until SERVING; return each new status, and the ms from now until it was seen."""
    started = time.monotonic()
    changes: list[tuple[float, str]] = []
    while time.monotonic() - started < READY_TIMEOUT_S:
        try:
            status = client.health.check(timeout_s=1.0).name
        except Unavailable:
            status = "no answer"
        if not changes or changes[-1][1] != status:
            changes.append(((time.monotonic() - started) * 1000, status))
        if status == ServingStatus.SERVING.name:
            return changes
        time.sleep(HEALTH_INTERVAL_S)
    raise DemoFailed("the service did not become SERVING")
