"""A service with the console, for a person to play with. `python -m demo.console` runs it.

It has runs that wait, and one kill behind it. Whenever somebody kills it, it is started again. It
ends with Ctrl-C, and leaves nothing behind.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console
from runrecovery import RunRecoveryClient
from runrecovery_service.cli.demo.service_process import READY_TIMEOUT_S, ServiceProcess
from runrecovery_service.cli.demo.signals import exit_on_termination

from demo.console_scene import AFTER, BEFORE, CONFIG, create

PORT: Final = 8080
AWAY_S: Final = 3.0
"""How long a killed service stays away, so that a person can look at the open page meanwhile."""
POLL_S: Final = 0.1


@dataclass(slots=True)
class Scene:
    """A service with a history, and the address of its console."""

    folder: Path
    address: str
    service: ServiceProcess
    starts: int = 1

    @property
    def url(self) -> str:
        """The address of the console for a browser."""
        return f"http://{self.address}/"

    def start_again(self) -> None:
        """Start the service again, and wait until it is SERVING."""
        self.starts += 1
        self.service = ServiceProcess.start(self.folder, self.starts)
        with self.connect() as client:
            client.wait_until_ready(READY_TIMEOUT_S)

    def connect(self) -> RunRecoveryClient:
        """Return a client of the service."""
        return RunRecoveryClient(self.service.address)


@contextmanager
def playing_scene(port: int = PORT) -> Iterator[Scene]:
    """Play the runs of the scene over a kill, and yield the service that has come back."""
    folder = Path(tempfile.mkdtemp(prefix="runrecovery-console-"))
    address = f"127.0.0.1:{_free_port(port)}"
    config = CONFIG.format(http_listen=address, python=json.dumps(sys.executable))
    (folder / "runrecovery.toml").write_text(config, "utf-8")
    try:
        scene = Scene(folder, address, ServiceProcess.start(folder, 1))
        try:
            with scene.connect() as client:
                client.wait_until_ready(READY_TIMEOUT_S)
                for run in BEFORE:
                    create(client, run)
            scene.service.crash()
            scene.start_again()
            with scene.connect() as client:
                for run in AFTER:
                    create(client, run)
            yield scene
        finally:
            scene.service.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _free_port(wanted: int) -> int:
    """Return a port that is free: the wanted one if it is."""
    for port in (wanted, 0):
        try:
            with socket.create_server(("127.0.0.1", port)) as server:
                found: int = server.getsockname()[1]
                return found
        except OSError:
            continue
    raise OSError("no port of 127.0.0.1 is free")


def main() -> int:
    """Run the service until Ctrl-C."""
    exit_on_termination()
    out = Console(highlight=False)
    out.print("Some agents work and ask, the service is killed with -9, and starts again…")
    try:
        with playing_scene() as scene:
            _explain(out, scene)
            while True:
                if scene.service.popen.poll() is not None:
                    out.print(f"  killed; it starts again in {AWAY_S:g} s. Look at the open page.")
                    time.sleep(AWAY_S)
                    scene.start_again()
                    out.print(f"  it is back: pid {scene.service.popen.pid}")
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        out.print("\nStopped; nothing is left behind.")
    return 0


def _explain(out: Console, scene: Scene) -> None:
    agent_input = json.dumps({"questions": [{"prompt": "What next?"}]})
    out.print(f"\nThe console: [bold]{scene.url}[/]\n")
    out.print("  Answer a question. Look at a run, at the restart, and at what another would cost.")
    out.print("  Kill the service, and leave the page open: it comes back by itself.")
    out.print(f"    kill -9 {scene.service.popen.pid}")
    out.print("  Create a run, and see its question appear.")
    out.print(
        f"    .venv/bin/runrecovery runs create coder --server {scene.service.address}"
        f" --input '{agent_input}'",
        soft_wrap=True,
    )
    out.print("\nCtrl-C stops it.")


if __name__ == "__main__":
    sys.exit(main())
