"""Many watchers that need little CPU time: streams as bytes, in one thread.

    python bench/watchers.py --address 127.0.0.1:8443 --method /runrecovery.v1.RunService/WatchRun \
        --payloads FILE --streams 1000 --connections 50

It opens the streams, each with the next line of `--payloads` (a serialized request in hexadecimal),
and says on stdout, a line each: how many are open once every stream has sent something, and, as
CLOCK_MONOTONIC, when the last of them had sent an event. It stays until its stdin is closed.

`--unread`: it reads nothing, not even what the connection itself needs, and grants no more than the
window that every stream begins with. It says that the streams are open when they were asked for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.load import (
    ACK,
    ANSWER_S,
    END_HEADERS,
    END_STREAM,
    FIRST_WINDOW,
    LARGEST_WINDOW,
    Frame,
    Target,
    frame,
    header_block,
)

EVENT_BYTES: Final = 100
"""An event, which contains its run, is longer than this; a bookmark is shorter."""
UNREAD_BUFFER_BYTES: Final = 4096


class Watcher:
    """A connection with streams.

    Attributes:
        opened: the streams that have sent a message of any kind.
        with_event: the streams that have sent an event.
    """

    def __init__(self, address: str, *, unread: bool) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.socket()
        if unread:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD_BUFFER_BYTES)
        self.socket.settimeout(ANSWER_S)
        self.socket.connect((host, int(port)))
        self._address = address
        self._streams = itertools.count(1, 2)
        self._unread = b""
        self.opened: set[int] = set()
        self.with_event: set[int] = set()
        settings = b"" if unread else struct.pack(">HIHI", 2, 0, 4, LARGEST_WINDOW)
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(Frame.SETTINGS, 0, 0, settings)
        if not unread:
            preface += frame(
                Frame.WINDOW_UPDATE, 0, 0, struct.pack(">I", LARGEST_WINDOW - FIRST_WINDOW)
            )
        self.socket.sendall(preface)

    def open(self, method: str, payloads: Sequence[bytes]) -> None:
        """Open a stream for each of these requests."""
        headers = header_block(Target(address=self._address, method=method))
        to_send = []
        for payload in payloads:
            stream = next(self._streams)
            message = struct.pack(">BI", 0, len(payload)) + payload
            to_send.append(frame(Frame.HEADERS, END_HEADERS, stream, headers))
            to_send.append(frame(Frame.DATA, END_STREAM, stream, message))
        self.socket.sendall(b"".join(to_send))

    def receive(self) -> None:
        """Read once, and note which streams have sent something."""
        received = self.socket.recv(1 << 20)
        if not received:
            raise ConnectionError("the server closed the connection")
        unread, at = self._unread + received, 0
        while len(unread) - at >= 9:
            head, flags, stream = struct.unpack_from(">IBI", unread, at)
            after = at + 9 + (head >> 8)
            if after > len(unread):
                break
            self._take(head & 0xFF, flags, stream, unread[at + 9 : after])
            at = after
        self._unread = unread[at:]

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == Frame.DATA:
            if stream in self.opened and len(payload) > EVENT_BYTES:
                self.with_event.add(stream)
            self.opened.add(stream)
        elif kind == Frame.HEADERS and flags & END_STREAM and stream not in self.with_event:
            raise ConnectionError(f"a watch failed: {payload!r}")
        elif kind in {Frame.RST_STREAM, Frame.GOAWAY}:
            raise ConnectionError(f"the server ended the watches: {payload!r}")
        elif kind in {Frame.PING, Frame.SETTINGS} and not flags & ACK:
            ack = payload if kind == Frame.PING else b""
            self.socket.sendall(frame(Frame(kind), ACK, 0, ack))


def follow(watchers: Sequence[Watcher], streams: int) -> None:
    """Read from all streams until stdin is closed, and print the lines that `main` describes."""
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    for watcher in watchers:
        selector.register(watcher.socket, selectors.EVENT_READ, watcher)
    opened = seen = 0
    while True:
        for key, _ in selector.select():
            if key.data is None:
                return
            key.data.receive()
        if opened < streams and (opened := sum(len(one.opened) for one in watchers)) == streams:
            print(json.dumps(opened), flush=True)
        if seen < streams and (seen := sum(len(one.with_event) for one in watchers)) == streams:
            print(json.dumps(time.monotonic()), flush=True)


class Watching:
    """Watchers in a separate process."""

    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen

    def said(self) -> float:
        """Wait for the next line that the process prints."""
        line = self._popen.stdout.readline() if self._popen.stdout else b""
        if not line:
            raise ChildProcessError("the watchers ended")
        return float(json.loads(line))


@contextmanager
def watching(
    address: str, method: str, payloads: Path, *, streams: int, connections: int,
    unread: bool = False,
) -> Iterator[Watching]:  # fmt: skip
    """Keep this many watchers open; each has received something, unless it reads nothing."""
    command = [
        sys.executable, __file__, "--address", address, "--method", method,
        "--payloads", str(payloads), "--streams", str(streams),
        "--connections", str(connections), *(["--unread"] if unread else []),
    ]  # fmt: skip
    popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        found = Watching(popen)
        found.said()
        yield found
    finally:
        popen.communicate()  # closes its stdin: it ends


def main() -> None:
    """Open the streams, and keep them open."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--address", required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--payloads", type=Path, required=True)
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--unread", action="store_true")
    args = parser.parse_args()
    lines = itertools.cycle(args.payloads.read_text().splitlines())
    payloads = [bytes.fromhex(next(lines)) for _ in range(args.streams)]
    watchers = [Watcher(args.address, unread=args.unread) for _ in range(args.connections)]
    for number, watcher in enumerate(watchers):
        watcher.open(args.method, payloads[number :: args.connections])
    if args.unread:
        print(json.dumps(args.streams), flush=True)
        sys.stdin.read()
    else:
        follow(watchers, args.streams)


if __name__ == "__main__":
    main()
