"""Hostile connections: garbage on the port, half a protocol, floods, and streams nobody reads.

Everything is bounded, on loopback, and closed again. The seed alone decides which bytes are sent.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, Final

import grpc
from fuzz.calls import OPTIONS, PATIENCE_S
from fuzz.cases import METHODS
from fuzz.lexicon import run_id
from fuzz.oracle import Fault, Found, leaks
from google.protobuf.message_factory import GetMessageClass

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RESET, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS = 1, 4
CONNECTIONS: Final = 20
STREAMS: Final = 50
FLOOD: Final = 500
MOST_READ: Final = 1 << 20


# -- HTTP/2 by hand --------------------------------------------------------------------------------


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """Write a frame."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header(name: bytes, value: bytes) -> bytes:
    """Write a header as a literal that is not indexed."""
    return b"\0" + _text(name) + _text(value)


def _text(data: bytes) -> bytes:
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, written = len(data) - 127, bytearray([127])
    while rest > 127:
        written.append(rest & 127 | 128)
        rest >>= 7
    return bytes([*written, rest]) + data


def headers(path: bytes = b"/runrecovery.v1.RunService/GetRun", **other: bytes) -> bytes:
    """Write the headers of a call; `other` replaces some, empty ones are left out."""
    words = {
        b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x",
        b"content-type": b"application/grpc", b"te": b"trailers",
    }  # fmt: skip
    words |= {name.replace("_", "-").encode(): value for name, value in other.items()}
    for name in (b"method", b"scheme", b"authority"):
        if name in words:
            words[b":" + name] = words.pop(name)
    return b"".join(header(name, value) for name, value in words.items() if value)


def message(payload: bytes = b"", *, flag: int = 0, size: int | None = None) -> bytes:
    """Write a message of gRPC, with a length that may be wrong."""
    return struct.pack(">BI", flag, len(payload) if size is None else size) + payload


def call(head: bytes, body: bytes = b"", *, stream: int = 1) -> bytes:
    """Write a whole call."""
    return frame(HEADERS, head, flags=END_HEADERS, stream=stream) + frame(
        DATA, body, flags=END_STREAM, stream=stream
    )


OPENING: Final = PREFACE + frame(SETTINGS)


# -- what is sent at once --------------------------------------------------------------------------


def _http1(dice: random.Random) -> bytes:
    verb = dice.choice((b"GET", b"POST", b"PRI", b"CONNECT", b"OPTIONS"))
    return verb + b" /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello" * 3


def _tls(dice: random.Random) -> bytes:
    hello = b"\x01\x00\x01\xfc\x03\x03" + dice.randbytes(508)
    return b"\x16\x03\x01" + struct.pack(">H", len(hello)) + hello


def _noise(dice: random.Random) -> bytes:
    return dice.randbytes(dice.choice((1, 24, 1000, 100_000)))


def _noise_after_preface(dice: random.Random) -> bytes:
    return dice.choice((PREFACE, OPENING)) + _noise(dice)


def _odd_frames(dice: random.Random) -> bytes:
    frames = (
        frame(
            dice.randrange(12),
            dice.randbytes(dice.choice((0, 4, 5, 6, 8, 100))),
            flags=dice.randrange(256),
            stream=dice.choice((0, 1, 1, 2, 3, 2**31 - 1)),
        )
        for _ in range(40)
    )
    return OPENING + b"".join(frames)


def _odd_calls(_: random.Random) -> bytes:
    run = message(b"\x0a\x01a")
    odd = (
        (headers(content_type=b"application/json"), run),
        (headers(content_type=b"text/html"), b"<html>"),
        (headers(content_type=b""), run),
        (headers(te=b""), run),
        (headers(method=b"GET"), run),
        (headers(scheme=b"gopher"), run),
        (headers(b"x" * 9000), run),
        (headers(b"/../../etc/passwd"), run),
        (headers(b"/\xff\xfe/\x00"), run),
        (headers(grpc_timeout=b"never"), run),
        (headers(grpc_timeout=b"99999999999999H"), run),
        (headers(grpc_encoding=b"zip"), message(b"x", flag=1)),
        (headers(grpc_encoding=b"gzip"), message(b"no gzip", flag=1)),
        (headers(), message(b"x", flag=7)),
        (headers(), message(b"x", size=2**32 - 1)),
        (headers(), message(b"x", size=100)),
        (headers(), message(b"abc", size=1)),
        (headers(), run + run),
        (headers(), b"\0\0"),
        (headers(), b""),
    )
    return OPENING + b"".join(call(*each, stream=2 * at + 1) for at, each in enumerate(odd))


def _odd_headers(dice: random.Random) -> bytes:
    names = (b"Upper", b"spa ce", b"nul\0", b"x\r\n", b"", b":path", b"x" * 3000, b"\xff", b"-bin")
    values = (b"", b"\0", b"a\r\nb: c", b"\xff" * 50, b"v" * 5000, b"====")
    odd = header(dice.choice(names), dice.choice(values))
    return OPENING + call(headers() + odd, message()) + call(odd + headers(), message(), stream=3)


def _endless_headers(_: random.Random) -> bytes:
    begun = frame(HEADERS, headers(), stream=1)
    return OPENING + begun + frame(CONTINUATION, header(b"x", b"y" * 900), stream=1) * 300


def _resets(_: random.Random) -> bytes:
    return OPENING + b"".join(
        frame(HEADERS, headers(), flags=END_HEADERS, stream=2 * at + 1)
        + frame(RESET, b"\0\0\0\x08", stream=2 * at + 1)
        for at in range(FLOOD)
    )


def _pings(_: random.Random) -> bytes:
    return OPENING + frame(PING, bytes(8)) * FLOOD + frame(SETTINGS) * FLOOD


def _windows(_: random.Random) -> bytes:
    none = frame(SETTINGS, struct.pack(">HI", 4, 0))  # the server may not send a byte of an answer
    much = frame(WINDOW, struct.pack(">I", 2**31 - 1), stream=1)
    return PREFACE + none + call(headers(), message(b"\x0a\x01a")) + much * 3


BURSTS: Final[tuple[Callable[[random.Random], bytes], ...]] = (
    _http1, _tls, _noise, _noise_after_preface, _odd_frames, _odd_calls, _odd_headers,
    _endless_headers, _resets, _pings, _windows,
)  # fmt: skip


def _burst(port: int, data: bytes) -> Iterator[Found]:
    """Send the bytes and the end of the stream, and read until the server closes the connection."""
    try:
        told = _exchange(port, data)
    except TimeoutError:
        yield Fault.HEALTH, "a connection without a sender is kept"
        return
    for hit in leaks([told.decode("latin-1")], data):
        yield Fault.LEAK, hit


def _exchange(port: int, data: bytes) -> bytes:
    told = b""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while len(told) < MOST_READ and (piece := connection.recv(65_536)):
                told += piece
        except TimeoutError:
            raise
        except OSError:  # the server closed the connection before all was sent
            return told
    return told


# -- what stays open -------------------------------------------------------------------------------


def _half_open(port: int, serves: Callable[[], bool]) -> Iterator[Found]:
    """Begin many calls and connections that never continue, and check health meanwhile."""
    begun = b"".join(
        frame(HEADERS, headers(), flags=END_HEADERS, stream=2 * at + 1) for at in range(STREAMS)
    )
    with ExitStack() as stack:
        for number in range(CONNECTIONS):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(OPENING + begun if number % 2 else PREFACE[: number + 1])
        if not serves():
            yield Fault.HEALTH, "it does not serve beside half-open calls"


def _unread(address: str, serves: Callable[[], bool]) -> Iterator[Found]:
    """Open many streams of every streaming method, read none, and abandon them."""
    with grpc.insecure_channel(address, options=OPTIONS) as channel:
        calls = [stream for _ in range(STREAMS // 5) for stream in _streams(channel)]
        for left in calls[::2]:
            left.cancel()
        if not serves():
            yield Fault.HEALTH, "it does not serve beside streams that nobody reads"
        for left in calls:
            left.cancel()


def _streams(channel: grpc.Channel) -> Iterator[Any]:
    wanted = {"run_id": run_id("running"), "follow": True}
    for path, method in METHODS.items():
        if method.server_streaming and not method.client_streaming:
            known = {key: wanted[key] for key in wanted if key in method.input_type.fields_by_name}
            payload = GetMessageClass(method.input_type)(**known).SerializeToString()
            stream: Any = channel.unary_stream(path)
            yield stream(payload, timeout=PATIENCE_S)


# -- one after the other ---------------------------------------------------------------------------

KINDS: Final = len(BURSTS) + 2


def attack(number: int, seed: int, address: str, serves: Callable[[], bool]) -> list[Found]:
    """Make one attack. `KINDS` consecutive numbers make one of each kind."""
    port = int(address.rpartition(":")[2])
    kind = number % KINDS
    if kind < len(BURSTS):
        dice = random.Random(seed + number)  # noqa: S311 - choices, not secrets
        return list(_burst(port, BURSTS[kind](dice)))
    if kind == len(BURSTS):
        return list(_half_open(port, serves))
    return list(_unread(address, serves))


def name(number: int) -> str:
    """Return the name of an attack."""
    kinds = [burst.__name__ for burst in BURSTS] + ["_half_open", "_unread"]
    return kinds[number % KINDS].strip("_").replace("_", " ")
