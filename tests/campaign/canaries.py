"""Strangers who look as much like a lease's processes as strangers can, and must be spared."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from campaign import watch
from campaign.house import House, Marks
from campaign.plans import leaf
from campaign.watch import Identity, Seen
from support.api import Api
from support.waiting import until

FAMILY: Final = 3
"""Processes of one canary."""
NOBODY: Final = 65534
_PROGRAM: Final = str(Path(__file__).with_name("canary.py"))


def start_family(
    mark: str, *limit_and_user: int, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a canary's three processes; `announced` waits for them."""
    return subprocess.Popen(
        [sys.executable, "-I", "-S", _PROGRAM, mark, *map(str, limit_and_user)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=dict(environment or {}),
        cwd="/",
        start_new_session=True,
    )


def announced(family: subprocess.Popen[bytes]) -> Seen:
    """Return the first process of a family once all three are there."""
    assert family.stdout is not None
    assert family.stdout.readline() == b"ready\n"
    seen = watch.look_at(family.pid)
    assert seen is not None
    return seen


@contextmanager
def planted(limit: int) -> Iterator[str]:
    """Let a family of another user bear a lease's real watermark; yield its mark."""
    mark = secrets.token_hex(8)
    family = start_family(mark, limit, NOBODY)
    try:
        announced(family)
        yield mark
    finally:
        watch.end_bearing(mark)
        family.communicate()


@dataclass(slots=True, eq=False)
class Canaries:
    """Families that look like those of one lease and are nobody's."""

    mark: str = field(default_factory=lambda: secrets.token_hex(8))
    families: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    everybody: dict[Identity, Seen] = field(default_factory=dict)

    def release(self, lease: Marks) -> None:
        """Start one of each kind, and return once all are there."""
        half, rest = lease.token[:-16], lease.token[-16:]
        wrong = half + "".join(f"{15 - int(digit, 16):x}" for digit in rest)
        self._start("same shape")
        self._start("recorded pid")
        self._start("half a cookie", RUNRECOVERY_LEASE=wrong)
        self._start("cut cookie", RUNRECOVERY_LEASE=half, X_RUNRECOVERY_LEASE=lease.token)
        self._start("neighbouring watermark", lease.watermark - 1)
        for family in self.families.values():
            announced(family)
        self.everybody = watch.bearing(self.mark)
        assert len(self.everybody) == FAMILY * len(self.families), "the canaries are not complete"

    def _start(self, kind: str, *limit: int, **variables: str) -> None:
        self.families[kind] = start_family(self.mark, *limit, environment=variables)

    def recorded(self) -> Identity:
        """Return whose pid a forged lease is to name: he leads a group."""
        pid = self.families["recorded pid"].pid
        return next(identity for identity in self.everybody if identity[0] == pid)

    def missing(self) -> list[str]:
        """Return who is dead or stopped, by kind."""
        kinds = {family.pid: kind for kind, family in self.families.items()}
        return [
            f"{kinds.get(seen.pid) or kinds.get(seen.ppid)} (pid {seen.pid})"
            for seen in missing(self.everybody, self.mark)
        ]

    def end(self) -> None:
        """End all of them."""
        watch.end_bearing(self.mark)
        for family in self.families.values():
            family.communicate()


def missing(everybody: Mapping[Identity, Seen], mark: str) -> list[Seen]:
    """Return who of these is dead or stopped."""
    now = watch.bearing(mark)
    return [
        seen
        for identity, seen in everybody.items()
        if identity not in now or now[identity].state == "T"
    ]


class Neighbour:
    """A second service, which lives beside all trials, and the tree of its agent."""

    def __init__(self, place: Path) -> None:
        self.house = House(place / "neighbour")
        try:
            self.service, api = self.house.start()
            self.everybody = self._grow(api)
        except BaseException:
            self.house.leave()
            raise

    def _grow(self, api: Api) -> dict[Identity, Seen]:
        mark = secrets.token_hex(8)
        ways = ("child", "session", "daemon")
        below = [leaf(mark, how=how, executes="scrubbed", end="stay") for how in ways]
        api.create("resumable", {"asks": False, "node": leaf(mark, end="stay") | {"below": below}})

        def has_grown() -> bool:
            # Until a child has executed its program, its arguments are those of the leader.
            commands = [seen.command for seen in watch.bearing(mark).values()]
            done = sum(b"scrubbed" not in command for command in commands)
            return (done, len(commands)) == (len(ways), 1 + len(ways))

        until(has_grown, "the neighbour's tree has grown")
        return watch.bearing(self.house.mark)

    def missing(self) -> list[str]:
        """Return who of the tree is dead or stopped; and the service, if it is."""
        gone = [
            f"the neighbour's agent (pid {seen.pid})"
            for seen in missing(self.everybody, self.house.mark)
        ]
        return gone + ["the neighbour's service"] * (self.service.popen.poll() is not None)
