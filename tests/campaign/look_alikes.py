"""Innocent processes that look like the processes of a launch, and must not be signalled."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from campaign import scan
from campaign.home import CampaignHome, RecordedMarkers
from campaign.plans import leaf
from campaign.scan import Identity, Process
from support.api import Api
from support.waiting import until

FAMILY: Final = 3
"""Processes of one look-alike."""
NOBODY: Final = 65534
_PROGRAM: Final = str(Path(__file__).with_name("look_alike.py"))


def start_family(
    mark: str, *limit_and_user: int, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start the three processes of a look-alike, without waiting for them."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", _PROGRAM, mark, *map(str, limit_and_user)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=dict(environment or {}),
        cwd="/",
        start_new_session=True,
    )


def announced(family: subprocess.Popen[bytes]) -> Process:
    """Wait until all three processes of a family run; return the first."""
    assert family.stdout is not None
    assert family.stdout.readline() == b"ready\n"
    seen = scan.read_process(family.pid)
    assert seen is not None
    return seen


@contextmanager
def unkillable_family(limit: int) -> Iterator[str]:
    """Run a family of another user with the real watermark of a launch; yield its mark."""
    mark = secrets.token_hex(8)
    family = start_family(mark, limit, NOBODY)
    try:
        announced(family)
        yield mark
    finally:
        scan.kill_all_with(mark)
        family.communicate()


@dataclass(slots=True, eq=False)
class LookAlikes:
    """Innocent families that look like the tree of one launch."""

    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    families: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    everybody: dict[Identity, Process] = field(default_factory=dict)

    def start(self, launch: RecordedMarkers) -> None:
        """Start one family of each kind, and wait until all run."""
        half, rest = launch.token[:-16], launch.token[-16:]
        wrong = half + "".join(f"{15 - int(digit, 16):x}" for digit in rest)
        self._start("same shape")
        self._start("recorded pid")
        self._start("half a cookie", RUNRECOVERY_LEASE=wrong)
        self._start("cut cookie", RUNRECOVERY_LEASE=half, X_RUNRECOVERY_LEASE=launch.token)
        self._start("neighbouring watermark", launch.watermark - 1)
        for family in self.families.values():
            announced(family)
        self.everybody = scan.processes_with(self.mark)
        assert len(self.everybody) == FAMILY * len(self.families), "a look-alike is missing"

    def _start(self, kind: str, *limit: int, **variables: str) -> None:
        self.families[kind] = start_family(self.mark, *limit, environment=variables)

    def recorded(self) -> Identity:
        """Return the group leader whose pid a forged launch record names."""
        pid = self.families["recorded pid"].pid
        return next(identity for identity in self.everybody if identity[0] == pid)

    def missing(self) -> list[str]:
        """Return the families with a dead or stopped process, by kind."""
        kinds = {family.pid: kind for kind, family in self.families.items()}
        return [
            f"{kinds.get(seen.pid) or kinds.get(seen.ppid)} (pid {seen.pid})"
            for seen in missing(self.everybody, self.mark)
        ]

    def end(self) -> None:
        """Kill all look-alikes."""
        scan.kill_all_with(self.mark)
        for family in self.families.values():
            family.communicate()


def missing(everybody: Mapping[Identity, Process], mark: str) -> list[Process]:
    """Return the dead and stopped processes among these."""
    now = scan.processes_with(mark)
    return [
        seen
        for identity, seen in everybody.items()
        if identity not in now or now[identity].state == "T"
    ]


class Neighbour:
    """A second service that runs beside all trials, with the tree of an agent."""

    def __init__(self, place: Path) -> None:
        self.home = CampaignHome(place / "neighbour")
        try:
            self.service, api = self.home.start()
            self.everybody = self._grow(api)
        except BaseException:
            self.home.clear_all()
            raise

    def _grow(self, api: Api) -> dict[Identity, Process]:
        mark = secrets.token_hex(8)
        ways = ("child", "session", "daemon")
        below = [leaf(mark, how=how, executes="scrubbed", end="stay") for how in ways]
        api.create("resumable", {"asks": False, "node": leaf(mark, end="stay") | {"below": below}})

        def has_grown() -> bool:
            # Until a child has executed its program, its arguments are those of the leader.
            commands = [seen.command for seen in scan.processes_with(mark).values()]
            done = sum(b"scrubbed" not in command for command in commands)
            return (done, len(commands)) == (len(ways), 1 + len(ways))

        until(has_grown, "the neighbour's tree has grown")
        return scan.processes_with(self.home.mark)

    def missing(self) -> list[str]:
        """Return the dead and stopped processes of the tree, and the service if it is dead."""
        gone = [
            f"the neighbour's agent (pid {seen.pid})"
            for seen in missing(self.everybody, self.home.mark)
        ]
        return gone + ["the neighbour's service"] * (self.service.popen.poll() is not None)
