"""A load generator that needs little CPU time: gRPC calls as bytes on one connection.

    python bench/load.py --address 127.0.0.1:8443 --method /runrecovery.v1.RunService/GetRun \
        --payloads FILE --callers 16 --seconds 3 --pid PID

It writes HTTP/2 frames that were made beforehand and reads no more of an answer than it must, so
that on a machine of two cores the server is what limits, not its client. A call counts once its
stream has ended with an answer on it; a call without one ends the measurement with an error.

`--payloads` names a file with a serialized request on each line, in hexadecimal; callers take
them in turns. With `--once` each request is sent once, and the measurement ends with the last.
`--ca` names the certificate that TLS trusts, `--token` is sent with each call.
Prints a `Load` as JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

WARM_UP_S: Final = 0.3
ANSWER_S: Final = 10.0
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4
ACK: Final = 0x1
LARGEST_WINDOW: Final = 2**31 - 1
FIRST_WINDOW: Final = 65_535


class Frame(IntEnum):
    """The types of HTTP/2 frames that matter here."""

    DATA = 0
    HEADERS = 1
    RST_STREAM = 3
    SETTINGS = 4
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The result of one measurement. `server_cpu_us`: processor time of the server, per call."""

    calls_per_s: float
    p50_ms: float
    p99_ms: float
    server_cpu_us: float


def frame(kind: Frame, flags: int, stream: int, payload: bytes) -> bytes:
    """Return one frame."""
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


def _text(text: str) -> bytes:
    if len(text) > 126:  # longer ones need a second byte for their length
        raise ValueError(text)
    return bytes([len(text)]) + text.encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The address, the method and the credentials of calls.

    Attributes:
        ca: the certificate that TLS trusts; None: plaintext.
        token: the bearer token of each call; empty: none.
    """

    address: str
    method: str
    ca: Path | None = None
    token: str = ""

    def connect(self) -> socket.socket:
        """Return a connection."""
        host, _, port = self.address.rpartition(":")
        plain = socket.create_connection((host, int(port)), timeout=ANSWER_S)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.ca is None:
            return plain
        context = ssl.create_default_context(cafile=str(self.ca))
        context.set_alpn_protocols(["h2"])
        return context.wrap_socket(plain, server_hostname=host)


def header_block(target: Target) -> bytes:
    """Return a call's headers: names by the numbers of HPACK's static table, nothing indexed."""
    token = b"" if not target.token else b"\x0f\x08" + _text(f"Bearer {target.token}")
    return b"".join(
        (
            b"\x83",  # :method POST
            b"\x86" if target.ca is None else b"\x87",  # :scheme http or https
            b"\x04" + _text(target.method),  # :path
            b"\x01" + _text(target.address),  # :authority
            b"\x00" + _text("te") + _text("trailers"),
            b"\x0f\x10" + _text("application/grpc"),  # content-type
            token,  # authorization
        )
    )


class Connection:
    """A connection with calls on it, each on a stream of its own."""

    def __init__(self, target: Target, payloads: list[bytes], *, once: bool = False) -> None:
        self._socket = target.connect()
        self._headers = header_block(target)
        messages = [struct.pack(">BI", 0, len(payload)) + payload for payload in payloads]
        self._messages = iter(messages) if once else itertools.cycle(messages)
        self._streams = itertools.count(1, 2)
        self._begun: dict[int, float] = {}
        self._answered: set[int] = set()
        self._unread = b""
        self._socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(Frame.SETTINGS, 0, 0, struct.pack(">HIHI", 2, 0, 4, LARGEST_WINDOW))
            + frame(Frame.WINDOW_UPDATE, 0, 0, struct.pack(">I", LARGEST_WINDOW - FIRST_WINDOW))
        )

    def run(self, callers: int, seconds: float) -> list[float]:
        """Keep `callers` calls in progress for this time; return the seconds that each took.

        Ends earlier if no request is left.
        """
        took: list[float] = []
        end = time.perf_counter() + seconds
        self._socket.sendall(b"".join(self._call() for _ in range(callers)))
        while self._begun:
            to_send = []
            for answer in self._receive():
                if isinstance(answer, bytes):
                    to_send.append(answer)
                    continue
                now = time.perf_counter()
                took.append(now - self._begun.pop(answer))
                if now < end:
                    to_send.append(self._call())
            if to_send:
                self._socket.sendall(b"".join(to_send))
        return took

    def _call(self) -> bytes:
        """Return the frames of the next call; nothing if no request is left."""
        message = next(self._messages, None)
        if message is None:
            return b""
        stream = next(self._streams)
        self._begun[stream] = time.perf_counter()
        headers = frame(Frame.HEADERS, END_HEADERS, stream, self._headers)
        return headers + frame(Frame.DATA, END_STREAM, stream, message)

    def _receive(self) -> Iterator[int | bytes]:
        """Read once; yield streams that have ended, and frames that are to be sent back."""
        received = self._socket.recv(1 << 20)
        if not received:
            raise ConnectionError("the server closed the connection")
        unread, at = self._unread + received, 0
        while len(unread) - at >= 9:
            head, flags, stream = struct.unpack_from(">IBI", unread, at)
            after = at + 9 + (head >> 8)
            if after > len(unread):
                break
            if (
                result := self._take(head & 0xFF, flags, stream, unread[at + 9 : after])
            ) is not None:
                yield result
            at = after
        self._unread = unread[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> int | bytes | None:
        if kind == Frame.DATA:
            self._answered.add(stream)
        elif kind == Frame.HEADERS and flags & END_STREAM:
            if stream not in self._answered:
                raise ConnectionError(f"a call failed: {payload!r}")
            self._answered.remove(stream)
            return stream
        elif kind in {Frame.RST_STREAM, Frame.GOAWAY}:
            raise ConnectionError(f"the server ended the calls: {payload!r}")
        elif kind in {Frame.PING, Frame.SETTINGS} and not flags & ACK:
            return frame(Frame(kind), ACK, 0, payload if kind == Frame.PING else b"")
        return None


def cpu_s(pid: int) -> float:
    """Return the processor time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def generate(
    target: Target, payloads: Path, *, callers: int, seconds: float, pid: int, once: bool = False
) -> Load:
    """Measure in a separate process. `pid` is the pid of the server."""
    options = [] if target.ca is None else ["--ca", str(target.ca)]
    options += ["--token", target.token] if target.token else []
    options += ["--once"] if once else []
    answer = subprocess.run(
        [
            sys.executable, __file__, "--address", target.address, "--method", target.method,
            "--payloads", payloads, "--callers", str(callers), "--seconds", str(seconds),
            "--pid", str(pid), *options,
        ],
        check=True,
        stdout=subprocess.PIPE,
    ).stdout  # fmt: skip
    return Load(**json.loads(answer))


def main() -> None:
    """Measure, and print the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--payloads", type=Path, required=True)
    parser.add_argument("--callers", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--ca", type=Path)
    parser.add_argument("--token", default="")
    parser.add_argument("--once", action="store_true")
    args = parser.parse_args()
    payloads = [bytes.fromhex(line) for line in args.payloads.read_text().splitlines()]
    target = Target(address=args.address, method=args.method, ca=args.ca, token=args.token)
    connection = Connection(target, payloads, once=args.once)
    connection.run(args.callers, 0.0 if args.once else WARM_UP_S)
    used_s, begun = cpu_s(args.pid), time.perf_counter()
    took = connection.run(args.callers, args.seconds)
    elapsed_s, used_s = time.perf_counter() - begun, cpu_s(args.pid) - used_s
    result = Load(
        calls_per_s=len(took) / elapsed_s,
        p50_ms=1e3 * statistics.median(took),
        p99_ms=1e3 * sorted(took)[int(0.99 * len(took))],
        server_cpu_us=1e6 * used_s / len(took),
    )
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
