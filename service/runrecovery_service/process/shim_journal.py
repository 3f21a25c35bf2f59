"""The journal of one launch, which also records what happens while the service is dead.

The shim records the signals that it sends by itself, how the agent ended, and the rest of the
output that it has saved. The service records that it has kept the whole output. A crash of the
machine can lose any of these entries.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process import signals, wire
from runrecovery_service.process.markers import Identity
from runrecovery_service.process.safe_open import open_regular, read_start


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedEnd:
    """The end of an agent whose whole standard output is in the output file.

    Attributes:
        exit_code: negative for the signal that killed it.
        begin, end: the part of the attempt's output file that this agent has printed, in bytes.
    """

    exit_code: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedRest:
    """The standard output that a shim has saved after the death of its service.

    Attributes:
        kept: the size of the output file, which does not include the saved rest.
        size: the size of the saved rest.
        begin: the size of the output file before the agent's first output. None: the file lacks
            some of the agent's output.
        at_end: the rest reaches to the end of the output, and no planned stop has asked the agent
            to end.
        exit_code: how the agent ended; negative for a signal. None: not recorded.
        is_kept: the service has recorded that all output is in the output file.
    """

    kept: int
    size: int
    begin: int | None
    at_end: bool
    exit_code: int | None
    is_kept: bool


def record_kept(journal: Path, shim: Identity, *, begin: int, end: int) -> None:
    """Record that the output file has the standard output of an agent, up to its end.

    Raises:
        OSError: it could not be recorded.
    """
    pid, start_ticks = shim
    fact = {
        "event": wire.KEPT,
        "begin": begin,
        "end": end,
        "by": pid,
        "by_start_ticks": start_ticks,
    }
    descriptor = open_regular(journal, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(
            descriptor, json.dumps(fact).encode() + b"\n"
        )  # in one piece: the shim appends too
    finally:
        os.close(descriptor)


def read_end(journal: Path, shim: Identity) -> RecordedEnd | None:
    """Return how an agent ended; None unless both shim and service have recorded the end.

    Raises:
        OSError: the journal cannot be read.
    """
    entries = _entries(journal, shim)
    exits, kept = entries[wire.AGENT_EXITED], entries[wire.KEPT]
    if len(exits) != 1 or len(kept) != 1:
        return None
    code, begin, end = _int(exits[0], "code"), _int(kept[0], "begin"), _int(kept[0], "end")
    if code is None or begin is None or end is None or not 0 <= begin <= end:
        return None
    return RecordedEnd(exit_code=code, begin=begin, end=end)


def read_rest(journal: Path, shim: Identity) -> RecordedRest | None:
    """Return the rest of the output that a shim has saved; None if it has saved none.

    Raises:
        OSError: the journal cannot be read.
    """
    entries = _entries(journal, shim)
    exits, rests = entries[wire.AGENT_EXITED], entries[wire.REST]
    if len(rests) != 1:
        return None
    kept, size, begin = (_int(rests[0], name) for name in ("kept", "size", "begin"))
    if kept is None or size is None or begin is None or kept < 0 or size < 0:
        return None
    return RecordedRest(
        kept=kept,
        size=size,
        begin=None if begin == wire.UNKNOWN else begin,
        at_end=rests[0].get("at_end") is True,
        exit_code=_int(exits[0], "code") if len(exits) == 1 else None,
        is_kept=bool(entries[wire.KEPT]),
    )


def _entries(journal: Path, shim: Identity) -> dict[str, list[Mapping[str, object]]]:
    """Return the entries about a shim, by their events."""
    entries: dict[str, list[Mapping[str, object]]] = defaultdict(list)
    for line in _lines(journal):
        if (entry := _entry(line, shim)) is not None:
            entries[str(entry.get("event"))].append(entry)
    return entries


def _int(entry: Mapping[str, object], name: str) -> int | None:
    number = entry.get(name)
    return number if type(number) is int else None


def _entry(line: str, shim: Identity) -> Mapping[str, object] | None:
    """Return the entry in a line; None if it is about another shim.

    A journal can have such entries after an older database was restored."""
    try:
        entry = json.loads(line)
        return entry if (entry["by"], entry["by_start_ticks"]) == shim else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _lines(journal: Path) -> list[str]:
    return read_start(journal).decode("utf-8", "replace").split("\n")


def killed_by_shim(journal: Path) -> frozenset[Identity]:
    """Return the processes that a shim killed by itself; empty without a journal."""
    try:
        lines = _lines(journal)
    except OSError:
        return frozenset()
    return frozenset(identity for line in lines if (identity := _killed(line)) is not None)


def _killed(line: str) -> Identity | None:
    try:
        entry = json.loads(line)
        if (entry["signal"], entry["outcome"]) == ("SIGKILL", signals.SENT):
            return int(entry["pid"]), int(entry["start_ticks"])
    except (ValueError, KeyError, TypeError):  # cut off by a crash, or an error text of the shim
        pass
    return None
