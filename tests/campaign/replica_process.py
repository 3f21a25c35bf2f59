"""One replica of the campaign, which is started again and again, and its agents."""

from __future__ import annotations

import signal
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Final

from campaign.witness import lock_run
from support.api import Api
from support.defects import defect_in
from support.engines import EngineSpec, demo_command, script
from support.pg_proxy import Proxy
from support.service import Home, ServiceProcess

EXITS: Final = frozenset({0, 10, 6, -signal.SIGKILL})
"""A stop, a lost lease, a start without the database, a kill."""
STOPPED_EXITS: Final = (EXITS, EXITS | {-signal.SIGTERM}, EXITS | {-signal.SIGTERM, 143})
"""The same after none, one and several SIGTERM: before the first lines of a start, and after the
last ones, nothing handles the signal; a second one ends the service at once."""
ALIVE: Final = "alive-"
"""A file of this prefix and the key of a launch has the last time at which its agent lived."""
LIVES: Final = f"""
import threading, time
alive = os.open(os.path.join(folder, {ALIVE!r} + str(launch)), os.O_WRONLY | os.O_CREAT)
def live():
    while True:
        os.pwrite(alive, b"%.3f" % time.time(), 0)
        time.sleep(0.02)
threading.Thread(target=live, daemon=True).start()
"""
UNMOVED: Final = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
"""
WORKS: Final = """
import json, sys
sys.stdin.readline()
time.sleep({seconds})
print(json.dumps({{"type": "result", "output": {{"done": True}}}}), flush=True)
"""


def engines(folder: Path, *, long_s: float) -> dict[str, EngineSpec]:
    """Return engines whose agents lock their run in a folder, and record there that they live.

    Args:
        long_s: how long a turn of the engine `long` takes.
    """
    watched = lock_run(folder) + LIVES
    *python, text, _, _ = demo_command("resumable")
    session = {"session_file": "{workspace}/session-{value}.json"}
    return {
        "quick": script(watched + WORKS.format(seconds=0)),
        "works": script(watched + WORKS.format(seconds=1.5)),
        # The sweep of a takeover has to wait for it, which shows that it was alive.
        "long": script(watched + UNMOVED + WORKS.format(seconds=long_s)),
        "resumable": EngineSpec(
            command=(*python, watched + text, "--profile", "resumable"), more=session
        ),
        "sticky": EngineSpec(
            command=(*python, watched + text, "--profile", "sticky"), profile="sticky_process"
        ),
    }


class Replica:
    """One instance, which is started again and again, and its ways to the database."""

    def __init__(self, name: str, home: Home, ways: tuple[Proxy, ...]) -> None:
        self.name, self.home, self.ways = name, home, ways
        self.service: ServiceProcess | None = None
        self.api: Api | None = None
        self.exits: Counter[int] = Counter()
        self.problems: list[str] = []
        self._starts = self._stops = 0

    def spawn(self) -> None:
        """Start, under an application_name of this start."""
        self._starts, self._stops = self._starts + 1, 0
        name = f"?application_name={self.name}-{self._starts}"
        database, *direct = [way.url + name for way in self.ways]
        self.home.write_config(database=database, database_direct=direct[0] if direct else "")
        self.service = self.home.spawn()

    def look(self) -> None:
        """Note an address or an end, and start again after an end."""
        service = self.service
        if service is None or (code := service.popen.poll()) is not None:
            if service is not None:
                self._end(service, code or 0)
            self.spawn()
        elif not service.address and (listening := service.events("service.listening")):
            service.address = listening[0]["address"]
            self.api = Api(service.address, timeout_s=4.0)

    def _end(self, service: ServiceProcess, code: int) -> None:
        self.exits[code] += 1
        if self.api is not None:
            self.api.channel.close()
        self.api = None
        service.close()
        text = service.text
        if code not in STOPPED_EXITS[min(self._stops, 2)]:
            self.problems.append(f"{self.name} exited with {code}:\n{text[-3000:]}")
        self.problems += [
            f"{self.name} logged {name} in {event}"
            for event in service.events()
            if (name := defect_in(event))
        ]
        self.service = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the service, if it lives."""
        self._stops += number is signal.SIGTERM
        if self.service is not None and self.service.popen.poll() is None:
            with suppress(ProcessLookupError):
                self.service.popen.send_signal(number)

    @property
    def is_serving(self) -> bool:
        """Whether health says SERVING."""
        with suppress(Exception):
            return self.api is not None and self.api.health_of() == "SERVING"
        return False
