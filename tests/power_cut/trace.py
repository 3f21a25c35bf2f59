"""Reads system calls that change files from what strace has recorded."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

CALLS: Final = (
    "open,openat,creat,write,pwrite64,writev,pwritev,ftruncate,truncate,rename,renameat,renameat2,"
    "unlink,unlinkat,mkdir,mkdirat,rmdir,fsync,fdatasync,link,linkat,symlink,symlinkat,fallocate,"
    "copy_file_range,sendfile,chdir,fchdir"
)
STRACE: Final = (
    "strace", "-D", "-f", "--seccomp-bpf", "-y", "-ttt", "-T", "-xx", "-s", "1000000",
    "-e", "signal=none", "-e", f"trace={CALLS}", "-o",
)  # fmt: skip
"""The command before a program, without the file into which it writes. `-D`: the program keeps its
pid and its parent."""

_LINE: Final = re.compile(r"(\d+) +(\d+\.\d+) (.*)")
_CALL: Final = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+|\?)(.*?)(?: <(\d+\.\d+)>)?")
_NO_CALL: Final = ("+++", "---")
_RESUMED: Final = re.compile(r"<\.\.\. (\w+) resumed>(.*)")
_UNFINISHED: Final = " <unfinished ...>"
_ADDRESS: Final = re.compile(r"[(,] ?0x[0-9a-f]{6,}")
"""What strace prints instead of a text that it cannot read."""
_OPEN: Final = re.compile(r"open(at)?\(")
_CHANGES: Final = re.compile(r"\bO_(CREAT|TRUNC)\b")
_STRING: Final = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_DESCRIPTOR: Final = re.compile(r"<((?:\\x[0-9a-f]{2})*)>(\(deleted\))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A system call that has succeeded.

    Attributes:
        begun_s: the wall time at which it began.
        begun_after: how many of the recorded calls had ended when it began.
        arguments: its arguments as strace prints them.
        result: the number that it returned, and the file if that is a descriptor.
    """

    name: str
    begun_s: float
    begun_after: int
    arguments: str
    result: int
    opened: str

    def strings(self) -> list[bytes]:
        """Return the arguments that are texts or data."""
        found = list(_STRING.finditer(self.arguments))
        if any(part[2] for part in found):
            raise ValueError(f"strace has cut off the data of a {self.name}")
        return [_bytes(part[1]) for part in found]

    def numbers(self) -> list[int]:
        """Return the arguments that are plain numbers, from the last string on."""
        rest = self.arguments[self.arguments.rfind('"') + 1 :]
        rest = _DESCRIPTOR.sub("", rest)
        return [int(word) for word in re.findall(r"(?<![\w|])-?\d+(?![\w|])", rest)]

    def files(self) -> list[str | None]:
        """Return the files of the descriptors among the arguments; None for a deleted one."""
        text = _STRING.sub('""', self.arguments)
        return [None if found[2] else _bytes(found[1]).decode() for found in _descriptors(text)]


def read_calls(traces: Iterable[Path], *, below: Path) -> list[Call]:
    """Return the successful calls about files in a directory, in the order in which they ended."""
    part = "".join(f"\\x{byte:02x}" for byte in bytes(below))
    ended = sorted(
        (each for trace in traces for each in _ended(trace, part)), key=lambda each: each[0]
    )
    ends = [end_s for end_s, _ in ended]
    return [replace(call, begun_after=bisect_right(ends, call.begun_s)) for _, call in ended]


def _ended(trace: Path, part: str) -> Iterator[tuple[float, Call]]:
    """Yield the end of each successful call, in seconds of the wall clock, and the call.

    Args:
        part: calls without this text are left out, and those that only open a file.
    """
    unfinished: dict[str, tuple[float, str]] = {}
    for pid, at_s, line in _lines(trace):
        if line.endswith(_UNFINISHED):
            unfinished[pid] = (at_s, line.removesuffix(_UNFINISHED))
            continue
        begun_s, text = at_s, line
        if resumed := _RESUMED.match(line):
            begun_s, beginning = unfinished.pop(pid)
            text = beginning + resumed[2]
        if _ADDRESS.search(text):
            raise PermissionError("strace cannot read the memory of the service: run it as root")
        if part not in text or (_OPEN.match(text) and not _CHANGES.search(text)):
            continue
        found = _CALL.fullmatch(text)
        if found is None:
            raise ValueError(f"not a call: {text[:200]}")
        if not found[3].isdigit():
            continue  # it has failed, or its process has ended meanwhile
        opened = next(iter(_descriptors(found[4])), None)
        call = Call(
            name=found[1],
            begun_s=begun_s,
            begun_after=0,
            arguments=found[2],
            result=int(found[3]),
            opened="" if opened is None else _bytes(opened[1]).decode(),
        )
        yield (at_s if resumed else begun_s + float(found[5])), call


def _lines(trace: Path) -> Iterator[tuple[str, float, str]]:
    with trace.open(encoding="ascii") as lines:
        for line in lines:
            found = _LINE.match(line.rstrip("\n"))
            if found is None:
                raise ValueError(f"not a line of strace: {line[:200]}")
            if not found[3].startswith(_NO_CALL):
                yield found[1], float(found[2]), found[3]


def _descriptors(text: str) -> Iterable[re.Match[str]]:
    return _DESCRIPTOR.finditer(text)


def _bytes(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))
