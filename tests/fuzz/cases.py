"""What is sent: hypothesis strategies over every request message, from its descriptor.

A case holds placeholders for what each target has of its own: ids and etags of runs, page tokens,
cursors (`lexicon.py`). A seed therefore gives the same cases everywhere.
"""

from __future__ import annotations

import hashlib
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeAlias

from fuzz import wire
from fuzz.lexicon import ENGINES, REQUEST_IDS, Lexicon
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from runrecovery.v1 import recovery_service_pb2, run_service_pb2
from support.callers import token_of

MAX_REQUEST_BYTES: Final = 1 << 20
"""The service's own default."""

Pair: TypeAlias = tuple[str, str | bytes]


class Manner(StrEnum):
    """How a call is made."""

    PLAIN = "plain"
    GZIP = "gzip"
    """Compressed: a small frame may be a large request."""
    CANCELED = "canceled"
    """And hung up at once."""
    HURRIED = "hurried"
    """With a deadline of a millisecond."""
    UNREAD = "unread"
    """A stream that nobody reads, then hung up."""


SHOWN: Final = 1000
"""Bytes of a payload that are printed; a larger one is put into a file."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Case:
    """One call."""

    method: str
    payload: bytes
    manner: Manner = Manner.PLAIN
    metadata: tuple[Pair, ...] = ()

    def __repr__(self) -> str:
        return f"<{self.method} {len(self.payload)} bytes>"

    def _repr_pretty_(self, printer: Any, _: bool) -> None:  # noqa: FBT001 - hypothesis calls it so
        printer.text(repr(self))

    def command(self) -> str:
        """Return the arguments of hostile.py that repeat the call."""
        told = [f"--replay {self.method.removeprefix('/')} {self._told_payload()}"]
        if self.manner is not Manner.PLAIN:
            told.append(f"--manner {self.manner}")
        for key, value in self.metadata:
            word = value.hex() if isinstance(value, bytes) else value
            told.append(f"--metadata {key} {word!r}")
        return " ".join(told)

    def _told_payload(self) -> str:
        if len(self.payload) <= SHOWN:
            return self.payload.hex() or "''"
        digest = hashlib.sha256(self.payload).hexdigest()[:12]
        file = Path(tempfile.gettempdir()) / f"runrecovery-fuzz-{digest}.hex"
        file.write_text(self.payload.hex(), "ascii")
        return f"@{file}"

    @property
    def size(self) -> int:
        """The size of the case, by which the smallest failing one is found."""
        return len(self.payload) + sum(len(key) + len(value) for key, value in self.metadata)


# -- methods ---------------------------------------------------------------------------------------

OURS: Final[dict[str, MethodDescriptor]] = {
    f"/{service.full_name}/{method.name}": method
    for file in (run_service_pb2, recovery_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Every method of the contract, by its path."""
OTHERS: Final[dict[str, MethodDescriptor]] = {
    f"/{service.full_name}/{method.name}": method
    for service in (
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    )
    for method in service.methods
}
"""Health and reflection, which answer beside it."""
STRANGE: Final = (
    "/runrecovery.v1.RunService/DropTables",
    "/runrecovery.v1.RunService/getrun",
    "/runrecovery.v1.RunService/GetRun/",
    "/runrecovery.v2.RunService/GetRun",
    "/runrecovery.v1.RunService/",
    "/RunService/GetRun",
    "/../../etc/passwd",
    "//",
    "/",
    "/grpc.health.v1.Health/Kill",
    "/" + "x" * 2000,
)
"""Paths that there are not."""
METHODS: Final = {**OURS, **OTHERS}


def changes(method: MethodDescriptor) -> bool:
    """True for a method that may change something."""
    return method.GetOptions().idempotency_level != MethodOptions.NO_SIDE_EFFECTS


# -- values ----------------------------------------------------------------------------------------

LONG: Final = (63, 64, 65, 199, 200, 201, 255, 256, 257, 4096, 5001, 70_000)
TEXTS: Final = (
    b"", b"a", b"0", b" ", b"\0", b"a\0b", b"\xed\xa0\x80", b"\xff\xfe", b"\xc0\x80",
    b"\xf4\x90\x80\x80", "é".encode(), "e\u0301\u202e\u200b".encode(), "\U0001f4a9".encode(),
    "\uffff\ufffe".encode(),
    b"'; DROP TABLE run; --", b"%s%n{0}${x}", b"../../../etc/passwd", b"\r\ngrpc-status: 0\r\n",
    b"\x1b[2J\x07\x08\x7f", b"null", b"-1", b"@@@@", b"<script>", b"\\u0000", b'"', b"UPPER",
)  # fmt: skip
INTEGERS: Final = (
    0, 1, 2, 3, -1, 49, 50, 999, 1000, 1001, 65_535, 65_536, 2**31 - 1, 2**31, -(2**31),
    -(2**31) - 1, 2**32, 2**53, 2**63 - 1, -(2**63), 2**64 - 1,
)  # fmt: skip
NUMBERS: Final = (
    0.0, -0.0, 1.0, -1.5, 0.1, 5e-324, 1.7976931348623157e308, 2.0**53, 2.0**53 + 2, 1e300,
    float("nan"), float("inf"), float("-inf"),
)  # fmt: skip
SECONDS: Final = (
    0, 1, -1, 1_700_000_000, 4_000_000_000, -62_135_596_800, -62_135_596_801, 253_402_300_799,
    253_402_300_800, 315_576_000_000, 315_576_000_001, 2**63 - 1, -(2**63),
)  # fmt: skip
NANOS: Final = (0, 1, 999, 999_999_999, 1_000_000_000, -1, 2**31 - 1, -(2**31))
DEPTHS: Final = (1, 2, 30, 31, 32, 33, 34, 63, 90, 99, 100, 101, 1000, 10_000)
LABELS: Final = (0, 1, 8, 9, 31, 32, 33, 500, 500, 500, 20_000)
SIZES: Final = (
    MAX_REQUEST_BYTES - 1, MAX_REQUEST_BYTES, MAX_REQUEST_BYTES + 1, 4 * MAX_REQUEST_BYTES + 1,
)  # fmt: skip
"""Of whole requests."""
RULES: Final = (b"resumable_waiting_preserved", b"sticky_process_lost", b"no_such_rule")
GOOD_TEXTS: Final = (b"a", b"team", b"x-1", "grüße".encode())

json_leaf: Final[SearchStrategy[object]] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -7, 2.5, 2**53, -0.0, 1e300]),
    st.sampled_from(["", "text", "é", "x" * 300, "line\nline", "\u2028"]),
)
json_object: Final[SearchStrategy[dict[str, object]]] = st.dictionaries(
    st.sampled_from(["a", "b", "", "é", "questions", "result"]),
    st.recursive(
        json_leaf,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from(["x", "y"]), inner, max_size=2),
        ),
        max_leaves=4,
    ),
    max_size=3,
)


@cache
def _bad_values() -> tuple[bytes, ...]:
    return (
        *(wire.double(wire.NUMBER, number) for number in NUMBERS),
        *(wire.sized(wire.TEXT, text) for text in TEXTS),
        b"",  # a Value without a kind
        wire.number(wire.NULL, 7),
        wire.number(wire.NULL, -1),
        wire.number(wire.BOOL, 2**63),
        wire.double(wire.NUMBER, 1.0) + wire.sized(wire.TEXT, b"both"),
        wire.sized(wire.OBJECT, b"") + wire.sized(wire.LIST, b""),
        wire.sized(wire.OBJECT, wire.entry(1, b"k", b"") * 2),
        wire.sized(wire.OBJECT, wire.entry(1, b"\0", wire.json_value(1))),
        wire.sized(wire.OBJECT, wire.entry(1, b"\xff", wire.json_value(1))),
        wire.sized(wire.LIST, wire.sized(1, wire.json_value(None)) * 20_000),
        wire.sized(wire.LIST, wire.sized(1, b"")),
        wire.sized(wire.TEXT, b"x" * 200_000),
    )


deep: Final = st.builds(
    lambda depth, lists: wire.deep_value(depth, lists=lists),
    st.sampled_from(DEPTHS),
    st.booleans(),
)
bad_value: Final[SearchStrategy[bytes]] = st.one_of(
    st.deferred(lambda: st.sampled_from(_bad_values())), deep
)
good_value: Final = st.one_of(json_leaf, json_object).map(wire.json_value)


@st.composite
def struct_body(draw: DrawFn, *, hostile: bool) -> bytes:
    """A Struct."""
    body = wire.json_struct(draw(json_object).items())
    if hostile:
        body += wire.entry(1, draw(st.sampled_from(TEXTS)), draw(bad_value))
    return body


@st.composite
def labels(draw: DrawFn, field: int, *, hostile: bool) -> bytes:
    """A map of texts to texts."""
    if not hostile:
        keys = draw(st.lists(st.sampled_from(["a", "team", "x.y_z-1", "0"]), max_size=3))
        return b"".join(wire.entry(field, key.encode(), b"v" * len(key)) for key in keys)
    count = draw(st.sampled_from(LABELS))
    key, value = draw(st.sampled_from(TEXTS)), draw(st.sampled_from(TEXTS))
    form = draw(st.sampled_from([b"l%d", b"BAD%d"]))
    many = b"".join(wire.entry(field, form % number, b"") for number in range(count))
    twice = wire.entry(field, key, value) + wire.entry(field, key, b"again")
    bare = wire.sized(field, draw(st.sampled_from([b"", wire.sized(2, b"v"), wire.sized(1, b"k")])))
    return many + draw(st.sampled_from([b"", b"", twice, bare]))


# -- messages --------------------------------------------------------------------------------------

_SCALARS: Final = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}
_TIMES: Final = {"google.protobuf.Timestamp", "google.protobuf.Duration"}
_SPECIAL: Final[dict[str, Callable[[bool], SearchStrategy[bytes]]]] = {
    "google.protobuf.Struct": lambda hostile: struct_body(hostile=hostile),
    "google.protobuf.Value": lambda hostile: bad_value if hostile else good_value,
}


@st.composite
def _joined(draw: DrawFn, parts: Sequence[SearchStrategy[bytes]]) -> bytes:
    return b"".join(draw(part) for part in parts)


@st.composite
def _spoiled(
    draw: DrawFn, good: Sequence[SearchStrategy[bytes]], bad: Sequence[SearchStrategy[bytes]]
) -> bytes:
    any_one = st.integers(0, len(bad) - 1)
    spoiled = draw(st.one_of(any_one.map(lambda at: {at}), st.sets(any_one, min_size=1)))
    parts = []
    for at, (well, ill) in enumerate(zip(good, bad, strict=True)):
        part = draw(ill if at in spoiled else st.one_of(well, well, st.just(b"")))
        parts.append(part)
    if draw(st.booleans()):
        parts.append(
            draw(bad[draw(st.sampled_from(sorted(spoiled)))])
        )  # the same field again, at another place
    return b"".join(parts)


class Requests:
    """Strategies for the payloads of one target."""

    def __init__(self, lexicon: Lexicon) -> None:
        self._lexicon = lexicon

    def message(self, of: Descriptor, *, hostile: bool) -> SearchStrategy[bytes]:
        """A message; a hostile one has at least one field that may be anything."""
        if of.full_name in _SPECIAL:
            return _SPECIAL[of.full_name](hostile)
        if of.full_name in _TIMES:
            return _time(hostile=hostile)
        fields = list(of.fields)
        good = [self._field(field, hostile=False) for field in fields]
        if not hostile or not fields:
            return _joined([st.one_of(part, part, part, st.just(b"")) for part in good])
        bad = [self._field(field, hostile=True) for field in fields]
        return _spoiled(good, bad)

    def _field(self, field: FieldDescriptor, *, hostile: bool) -> SearchStrategy[bytes]:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            return labels(field.number, hostile=hostile)
        one = self._one(field, hostile=hostile)
        if field.is_repeated:
            most = 12 if hostile else 2
            return st.lists(one, max_size=most).map(b"".join)
        return one

    def _one(self, field: FieldDescriptor, *, hostile: bool) -> SearchStrategy[bytes]:
        if field.message_type is not None:
            body = self.message(field.message_type, hostile=hostile)
            return body.map(lambda data: wire.sized(field.number, data))
        if field.enum_type is not None:
            known = [value.number for value in field.enum_type.values]
            numbers = [*known, -1, 8, 99, 2**31 - 1, -(2**31), 2**40] if hostile else known
            return st.sampled_from(numbers).map(lambda value: wire.number(field.number, value))
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return st.sampled_from([0, 1, 2, 2**63] if hostile else [0, 1]).map(
                lambda value: wire.number(field.number, value)
            )
        if field.cpp_type in _SCALARS:
            numbers = list(INTEGERS) if hostile else [0, 1, 1, 1, 2, 50]
            return st.sampled_from(numbers).map(lambda value: wire.number(field.number, value))
        if field.cpp_type == FieldDescriptor.CPPTYPE_DOUBLE:
            return st.sampled_from(NUMBERS).map(lambda value: wire.double(field.number, value))
        return self._text(field, hostile=hostile).map(lambda data: wire.sized(field.number, data))

    def _text(self, field: FieldDescriptor, *, hostile: bool) -> SearchStrategy[bytes]:
        good = self._good_texts(field.name)
        if not hostile:
            return st.sampled_from(good)
        long = st.builds(
            lambda unit, size: unit * size,
            st.sampled_from([b"x", "é".encode()]),
            st.sampled_from(LONG),
        )
        return st.one_of(
            st.sampled_from(TEXTS),
            st.sampled_from(self._lexicon.all_words()),
            st.builds(bytes.__add__, st.sampled_from(good), st.sampled_from(TEXTS)),
            long,
            st.text(max_size=8).map(lambda text: text.encode("utf-8", "surrogatepass")),
        )

    def _good_texts(self, name: str) -> Sequence[bytes]:
        words = self._lexicon
        known: dict[str, Sequence[bytes]] = {
            "run_id": [*words.run_ids, *words.run_ids, b"fz-nobody", b"fz-new-1", b"fz-new-2"],
            "engine": ENGINES,
            "request_id": REQUEST_IDS,
            "etag": [*words.etags, b"", b""],
            "reconciliation_id": words.report_ids,
            "recovery_reason": RULES,
        }
        if name in known:
            return known[name]
        if "token" in name or "cursor" in name:
            return [b"", *words.tokens]
        return GOOD_TEXTS


@st.composite
def _time(draw: DrawFn, *, hostile: bool) -> bytes:
    seconds = draw(st.sampled_from(SECONDS if hostile else (1, 60, 1_700_000_000, 4_000_000_000)))
    nanos = draw(st.sampled_from(NANOS if hostile else (0, 1000)))
    return wire.number(1, seconds) + wire.number(2, nanos)


# -- raw bytes -------------------------------------------------------------------------------------

_BOMBS: Final = (
    wire.tag(1, wire.Wire.SIZED) + wire.varint(2**31 - 1),
    wire.tag(4, wire.Wire.SIZED) + wire.varint(2**63),
    wire.tag(1, wire.Wire.SIZED) + b"\xff" * 10 + b"\x01",
    wire.tag(3, wire.Wire.SIZED) + wire.varint(1 << 20) + b"x",
    wire.tag(1, wire.Wire.OPEN) * 5000,
    wire.tag(1, wire.Wire.OPEN) + wire.tag(1, wire.Wire.CLOSE),
    wire.tag(1, wire.Wire.CLOSE),
    b"\x00\x00",
    b"\x07",
    b"\x80" * 20,
)
_UNKNOWN: Final = (
    wire.number(1000, 1),
    wire.sized(2**29 - 1, b"unknown"),
    wire.double(19_000, 1.0),
    wire.tag(500, wire.Wire.FIXED32) + b"\0\0\0\0",
    wire.tag(77, wire.Wire.OPEN) + wire.number(1, 1) + wire.tag(77, wire.Wire.CLOSE),
    wire.number(1, 5),  # wrong type, if 1 is a text
    wire.sized(2, b"\x08\x01"),
)


def _flipped(payload: bytes, seed: int) -> bytes:
    dice = random.Random(seed)  # noqa: S311 - choices, not secrets
    altered = bytearray(payload)
    for _ in range(dice.choice((1, 1, 2, 8))):
        if altered:
            altered[dice.randrange(len(altered))] ^= 1 << dice.randrange(8)
    return bytes(altered)


def _cut(payload: bytes, seed: int) -> bytes:
    return payload[: random.Random(seed).randrange(len(payload) + 1)]  # noqa: S311


def _inflated(payload: bytes, size: int) -> bytes:
    """Fill up to a size with an unknown field."""
    head = wire.tag(1000, wire.Wire.SIZED)
    room = max(0, size - len(payload) - len(head) - 3)  # 3: a length from 2**14 to 2**21
    return payload + head + wire.varint(room) + bytes(room)


_seeds: Final = st.integers(0, 2**16)


def _mauled(payload: bytes) -> SearchStrategy[bytes]:
    return st.one_of(
        _seeds.map(lambda seed: _flipped(payload, seed)),
        _seeds.map(lambda seed: _cut(payload, seed)),
        st.sampled_from(_UNKNOWN).map(lambda more: payload + more),
        st.sampled_from(_UNKNOWN).map(lambda more: more + payload),
        st.sampled_from(_BOMBS).map(lambda bomb: payload + bomb),
        st.just(payload + payload),
        st.binary(max_size=40),
    )


@st.composite
def _payload(draw: DrawFn, *, calm: SearchStrategy[bytes], wild: SearchStrategy[bytes]) -> bytes:
    way = draw(st.sampled_from(("calm", "calm", "calm", "wild", "wild", "wild", "wild", "mauled")))
    payload = draw(wild if way == "wild" else calm)
    if way == "mauled":
        payload = draw(_mauled(payload))
        if draw(st.integers(0, 19)) == 19:
            payload = _inflated(payload, draw(st.sampled_from(SIZES)))
    return payload


# -- metadata --------------------------------------------------------------------------------------

_KEYS: Final = (
    "x", "x-trace", "authorization", "a" * 500, "grpc-timeout", "grpc-encoding", "te",
    "content-type", "grpc-previous-rpc-attempts", "user-agent", "host", "x.y_z-0",
    "grpc-accept-encoding", "connection", "grpc-tags-bin",
)  # fmt: skip
_WORDS: Final = ("", "1", "x" * 1000, "x" * 7000, "1n", "99999999H", "identity", "application/json")
_BLOBS: Final = (b"", b"\0", b"\xff" * 10, bytes(3000), b"\r\n")

_pair: Final[SearchStrategy[Pair]] = st.one_of(
    st.tuples(st.sampled_from(_KEYS), st.sampled_from(_WORDS)),
    st.tuples(
        st.sampled_from(("x-bin", "grpc-status-details-bin", "y-bin")), st.sampled_from(_BLOBS)
    ),
)


ROLES: Final = ("viewer", "replier", "creator", "operator")
_TOKENS: Final = (*map(token_of, ROLES), token_of("nobody"), "", "x" * 64)
_credential: Final = st.tuples(
    st.just("authorization"),
    st.builds(
        "{}{}".format,
        st.sampled_from((*["Bearer "] * 6, "bEARER ", "Bearer  ", "Basic ", "")),
        st.sampled_from(_TOKENS),
    ),
)


@st.composite
def _metadata(draw: DrawFn) -> tuple[Pair, ...]:
    """Return metadata. Without `authorization` the call is one of an operator."""
    kind = draw(st.integers(0, 19))
    if kind < 14:
        return ()
    if kind < 18:
        most = draw(st.sampled_from((1, 1, 2)))
        return tuple(draw(st.lists(_credential, min_size=1, max_size=most)))
    pairs = draw(st.lists(_pair, min_size=1, max_size=6))
    return tuple(pairs) * draw(st.sampled_from((1, 1, 1, 20)))


# -- cases -----------------------------------------------------------------------------------------

_MANNERS: Final = (*[Manner.PLAIN] * 26, *Manner)


def cases(lexicon: Lexicon) -> SearchStrategy[Case]:
    """Every call that the campaign may make."""
    requests = Requests(lexicon)
    payloads: dict[str, SearchStrategy[bytes]] = {
        path: _payload(
            calm=st.one_of(
                requests.message(method.input_type, hostile=False), *canned(lexicon, path)
            ),
            wild=requests.message(method.input_type, hostile=True),
        )
        for path, method in METHODS.items()
    }
    paths = [path for path, method in OURS.items() for _ in range(9 if changes(method) else 6)]
    paths += [*OTHERS, "?"]
    return _case(paths, payloads)


def canned(lexicon: Lexicon, path: str) -> list[SearchStrategy[bytes]]:
    """Whole requests that have an effect, or had one before."""
    known = lexicon.canned.get(path, ())
    return [st.sampled_from(known)] if known else []


@st.composite
def _case(draw: DrawFn, paths: Sequence[str], payloads: dict[str, SearchStrategy[bytes]]) -> Case:
    path = draw(st.sampled_from(paths))
    if path == "?":
        return Case(method=draw(st.sampled_from(STRANGE)), payload=draw(st.binary(max_size=9)))
    return Case(
        method=path,
        payload=draw(payloads[path]),
        manner=draw(st.sampled_from(_MANNERS)),
        metadata=draw(_metadata()),
    )
