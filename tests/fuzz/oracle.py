"""What the service may answer, as its pages and contract say and not as its code does."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import grpc
from fuzz.agent import HANDLE
from fuzz.calls import AUTHORIZATION, Outcome
from fuzz.cases import MAX_REQUEST_BYTES, METHODS, OURS, ROLES, Case, Manner
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from runrecovery.v1 import errors_pb2
from support.callers import token_of

REPOSITORY: Final = Path(__file__).resolve().parents[2]
Code = grpc.StatusCode
DOMAIN: Final = "runrecovery"
STATUS_TRAILER: Final = "grpc-status-details-bin"
PUSHBACK: Final = "grpc-retry-pushback-ms"
MAX_TRAILER_BYTES: Final = 8192
METADATA_BYTES: Final = 4096
"""From so many bytes of headers on, gRPC may refuse a call by itself."""
EVERYWHERE: Final = frozenset({"INVALID_FIELD", "OVERLOADED"})
"""Beside what docs/api.md names with a call."""
NEVER: Final = frozenset(
    {"INTERNAL", "STORAGE_BUSY", "STORAGE_UNAVAILABLE", "STORAGE_FULL", "SAFE_MODE"}
    | {"RECONCILIATION_IN_PROGRESS", "SHUTTING_DOWN"}
)
"""Documented, but here the storage has no faults, nothing is recovered or shut down, and every
INTERNAL is a defect."""


class Fault(StrEnum):
    """The kinds of faults."""

    STATUS = "a status that is not documented for this"
    DETAILS = "details that are missing, wrong or too large"
    LEAK = "something internal is disclosed"
    ACCEPTED = "an invalid request is not refused as invalid"
    STATE = "a call without effect changed the state"
    EFFECT = "the effect is not what was asked for"
    HEALTH = "the service does not serve"
    MEMORY = "the service holds too much memory"
    LOG = "a defect in the log"
    LEFTOVER = "a process is left"


Found = tuple[Fault, str]


# -- what is documented ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Documented:
    """What the pages say.

    Attributes:
        codes, details: by reason (docs/errors.md).
        reasons: by method (docs/api.md).
        roles: the least role by the full name of the method (docs/security.md).
    """

    codes: dict[str, grpc.StatusCode]
    details: dict[str, str]
    reasons: dict[str, frozenset[str]]
    roles: dict[str, str]


def documented() -> Documented:
    """Read docs/api.md and docs/errors.md; demand that errors.proto has the same codes."""
    page = (REPOSITORY / "docs" / "api.md").read_text("utf-8")
    errors = (REPOSITORY / "docs" / "errors.md").read_text("utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|[^|]*\|([^|]*)\|$", errors, re.MULTILINE)
    codes = {reason: grpc.StatusCode[code] for reason, code, _ in rows}
    proto = (REPOSITORY / "proto" / "runrecovery" / "v1" / "errors.proto").read_text("utf-8")
    contract = re.findall(
        r"^  // ([A-Z_]+)\.(?:.*\n  //)*.*\n  ERROR_REASON_(\w+) =", proto, re.MULTILINE
    )
    said = {reason: grpc.StatusCode[code] for code, reason in contract}
    if differ := {reason for reason in said if codes.get(reason, said[reason]) is not said[reason]}:
        raise AssertionError(f"docs/errors.md and errors.proto name other codes for {differ}")
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", page, re.MULTILINE | re.DOTALL))
    return Documented(
        codes=said | codes,
        details={reason: more for reason, _, more in rows},
        reasons={name: _named(text, frozenset(said)) for name, text in sections.items()},
        roles=_least_roles((REPOSITORY / "docs" / "security.md").read_text("utf-8")),
    )


def _least_roles(page: str) -> dict[str, str]:
    rows = re.findall(r"^\| `([\w.]+)` \|([ yes|]*)\|$", page, re.MULTILINE)
    return {
        name: ROLES[[cell.strip() for cell in cells.split("|")].index("yes")]
        for name, cells in rows
    }


def _named(section: str, reasons: frozenset[str]) -> frozenset[str]:
    return frozenset(re.findall(r"`([A-Z_]+)`", section)) & reasons


# -- what cannot be meant --------------------------------------------------------------------------

_RUN_ID: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_FORMS: Final = {"run_id": _RUN_ID, "request_id": _UUID, "reconciliation_id": _UUID}
_NOT_NEGATIVE: Final = {"page_size", "attempt", "offset", "interaction_id", "after_sequence"}
_MAX_LABELS: Final = 32
_MAX_DEPTH: Final = 32
_SECONDS: Final = {
    "google.protobuf.Timestamp": (-62_135_596_800, 253_402_300_799),
    "google.protobuf.Duration": (0, 315_576_000_000),
}


def parsed(case: Case, payload: bytes) -> Message | None:
    """Return the request as a message of the contract; None if it is not one."""
    try:
        return GetMessageClass(METHODS[case.method].input_type).FromString(payload)
    except DecodeError:
        return None


def request_problems(message: Message) -> Iterator[str]:
    """Yield each part of a request that no method may accept, at any depth."""
    for field, value in message.ListFields():
        values = _values(field, value)
        if field.name == "labels" and len(value) > _MAX_LABELS:
            yield f"{len(value)} labels"
        for one in values:
            yield from _wrong(field, one)


def _values(field: FieldDescriptor, value: Any) -> list[Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        inner = field.message_type.fields_by_name["value"].message_type
        texts = [*value.keys(), *(value.values() if inner is None else ())]
        return [*texts, *(value.values() if inner is not None else ())]
    return list(value) if field.is_repeated else [value]


def _wrong(field: FieldDescriptor, value: Any) -> Iterator[str]:
    if isinstance(value, str):
        form = _FORMS.get(field.name)
        if "\0" in value or (form is not None and not form.fullmatch(value)):
            yield field.name
    elif isinstance(value, Message):
        name = value.DESCRIPTOR.full_name
        if name in _SECONDS:
            yield from _wrong_time(field, value)
        elif name in {"google.protobuf.Struct", "google.protobuf.Value"}:
            if not _is_json(value):
                yield field.name
        else:
            yield from request_problems(value)
    elif field.enum_type is not None:
        if value not in field.enum_type.values_by_number:
            yield field.name
    elif field.name in _NOT_NEGATIVE and value < 0:
        yield field.name


def _wrong_time(field: FieldDescriptor, value: Any) -> Iterator[str]:
    first, last = _SECONDS[value.DESCRIPTOR.full_name]
    if not first <= value.seconds <= last or not 0 <= value.nanos < 1_000_000_000:
        yield field.name


def _is_json(value: Any, depth: int = 1) -> bool:
    """True for JSON that can be stored: finite, no NUL, each value with a kind, up to 32 levels."""
    if value.DESCRIPTOR.name == "Value":
        kind = value.WhichOneof("kind")
        if kind == "string_value":
            return "\0" not in value.string_value
        if kind == "number_value":
            return math.isfinite(value.number_value)
        if kind not in {"struct_value", "list_value"}:
            return kind is not None
        value = getattr(value, kind)
    if depth > _MAX_DEPTH:
        return False
    if value.DESCRIPTOR.name == "ListValue":
        return all(_is_json(item, depth + 1) for item in value.values)
    return all("\0" not in key and _is_json(item, depth + 1) for key, item in value.fields.items())


# -- who calls -------------------------------------------------------------------------------------

UNKNOWN: Final = "CALLER_UNKNOWN"
_ROLE_OF: Final = {token_of(role): role for role in ROLES}


def role_of(case: Case) -> str | None:
    """Return the role of the caller; None if the metadata make nobody a caller."""
    given = [value for key, value in case.metadata if key == AUTHORIZATION]
    if not given:
        return "operator"  # see `calls.py`
    scheme, _, token = str(given[0]).partition(" ")
    return _ROLE_OF.get(token) if len(given) == 1 and scheme.lower() == "bearer" else None


# -- gRPC's own refusals ---------------------------------------------------------------------------


def own_refusal(case: Case, payload: bytes, outcome: Outcome, *, patient: bool) -> str | None:
    """Return the name of a refusal that gRPC itself may give here, without our code."""
    headers = sum(len(key) + len(value) + 32 for key, value in case.metadata)
    names = {key.lower() for key, _ in case.metadata}
    streams = case.method in METHODS and METHODS[case.method].server_streaming
    left = case.manner in {Manner.CANCELED, Manner.UNREAD} or streams
    hurried = case.manner is Manner.HURRIED or (streams and not patient) or "grpc-timeout" in names
    if outcome.code is Code.CANCELLED and left:
        return "hung up"  # by us, perhaps when the answer had just come
    if any(key == STATUS_TRAILER for key, _ in outcome.trailers):
        return None
    may_be = {
        "the client library does not send it": outcome.code is None
        or (outcome.code is Code.INTERNAL and outcome.message == "Invalid metadata"),
        "too large a message": outcome.code is Code.RESOURCE_EXHAUSTED
        and len(payload) > MAX_REQUEST_BYTES,
        "too large headers": outcome.code is Code.RESOURCE_EXHAUSTED and headers > METADATA_BYTES,
        "no such method": outcome.code is Code.UNIMPLEMENTED and case.method not in METHODS,
        "deadline": outcome.code is Code.DEADLINE_EXCEEDED and hurried,
    }
    return next((name for name, is_it in may_be.items() if is_it), None)


# -- the answer ------------------------------------------------------------------------------------

_LEAKS: Final = re.compile(
    r"Traceback|File \"|\.py\b|line \d+, in"
    r"|\b(?:SELECT|INSERT INTO|UPDATE|DELETE FROM|CREATE TABLE)\b|sqlite|psycopg|peewee"
    r"|runrecovery_service|site-packages|\basyncio\b|uvloop|_pb2"
    r"|<[\w.]+ object at|<class '|0x[0-9a-f]{8,}|\w(?:Error|Exception)\b|NoneType"
    r"|(?:/[\w.-]+){2,}"
)
_ALLOWED: Final = re.compile(r"type\.googleapis\.com/google\.rpc\.\w+")


_REASONS: Final = frozenset(errors_pb2.ErrorReason.keys())


def leaks(texts: list[str], request: bytes) -> Iterator[str]:
    """Yield text that looks internal and that the caller did not send."""
    for text in texts:
        for hit in _LEAKS.finditer(_ALLOWED.sub("", text)):
            if hit[0].encode("utf-8", "replace") not in request:
                yield hit[0]


class Oracle:
    """Judges answers."""

    def __init__(self) -> None:
        self._documented = documented()

    def judge(
        self, case: Case, payload: bytes, outcome: Outcome, *, bad: str | None
    ) -> Iterator[Found]:
        """Yield the faults of an answer by itself. `bad`: why the request is invalid."""
        yield from self._told(case, payload, outcome)
        if (refusal := self._refusal(case)) is not None:
            yield from self._refused(case, payload, outcome, refusal)
        else:
            yield from self._admitted(case, payload, outcome, bad)

    def _admitted(
        self, case: Case, payload: bytes, outcome: Outcome, bad: str | None
    ) -> Iterator[Found]:
        """Yield the faults of an answer to a caller who may make the call."""
        trailers = dict(outcome.trailers)
        if outcome.is_ok:
            if bad is not None:
                yield Fault.ACCEPTED, f"OK, in spite of {bad}"
            return
        if own_refusal(case, payload, outcome, patient=bad is not None) is not None:
            return
        if case.method not in OURS:
            if outcome.code not in {Code.NOT_FOUND, Code.INVALID_ARGUMENT}:
                yield Fault.STATUS, f"{outcome.code}: {outcome.message[:200]}"
            return
        status = status_pb2.Status()
        status.ParseFromString(trailers.get(STATUS_TRAILER, b""))
        reason, details = _details(status)
        yield from self._reason(case, outcome, reason, bad)
        if (status.code, status.message) != (
            outcome.code.value[0] if outcome.code else 0,
            outcome.message,
        ):
            yield Fault.DETAILS, f"the status says {status.code} {status.message!r}"
        wanted = self._documented.details.get(reason, "")
        for name in re.findall(r"ResourceInfo|BadRequest|PreconditionFailure|RetryInfo", wanted):
            if name not in details:
                yield Fault.DETAILS, f"{reason} without {name}"
        if "pushback" in wanted and PUSHBACK not in trailers:
            yield Fault.DETAILS, f"{reason} without pushback"

    def _refusal(self, case: Case) -> str | None:
        """Return the reason for which a caller must be refused, whatever is asked."""
        least = self._documented.roles.get(case.method.removeprefix("/").replace("/", "."))
        if least is None or case.method.startswith("/grpc.health."):
            return None
        role = role_of(case)
        if role is None:
            return UNKNOWN
        return "ROLE_NOT_SUFFICIENT" if ROLES.index(role) < ROLES.index(least) else None

    def _refused(
        self, case: Case, payload: bytes, outcome: Outcome, wanted: str
    ) -> Iterator[Found]:
        if outcome.is_ok:
            yield Fault.ACCEPTED, f"OK, where {wanted} is due"
        elif own_refusal(case, payload, outcome, patient=False) is None:
            status = status_pb2.Status()
            status.ParseFromString(dict(outcome.trailers).get(STATUS_TRAILER, b""))
            if (_details(status)[0], outcome.code) != (wanted, self._documented.codes[wanted]):
                yield Fault.STATUS, f"{outcome.code} where {wanted} is due: {outcome.message[:200]}"

    def _reason(
        self, case: Case, outcome: Outcome, reason: str, bad: str | None
    ) -> Iterator[Found]:
        name = OURS[case.method].name
        # tests/unit/test_docs.py fails for a call that the page does not name.
        named = self._documented.reasons.get(name, frozenset(self._documented.codes))
        allowed = (named | EVERYWHERE) - NEVER
        told = f"{outcome.code} {reason or 'without a reason'}: {outcome.message[:200]}"
        if self._documented.codes.get(reason) is not outcome.code or reason not in allowed:
            yield Fault.STATUS, told
        elif bad is not None and outcome.code is not Code.INVALID_ARGUMENT:
            yield Fault.ACCEPTED, f"{told}, in spite of {bad}"
        elif f"ERROR_REASON_{reason}" not in _REASONS:
            yield Fault.DETAILS, f"no such reason: {reason}"

    def _told(self, case: Case, payload: bytes, outcome: Outcome) -> Iterator[Found]:
        texts = [outcome.message] if outcome.code is not None else []
        size: float = len(outcome.message.encode("utf-8", "replace"))
        for key, value in outcome.trailers:
            data = value if isinstance(value, bytes) else value.encode()
            texts += [key, data.decode("utf-8", "replace")]
            size += len(key) + len(data) * (4 / 3 if key.endswith("-bin") else 1)
        if size > MAX_TRAILER_BYTES:
            yield Fault.DETAILS, f"{size:.0f} bytes of trailers"
        sent = payload + case.method.encode() + repr(case.metadata).encode()
        for hit in leaks(texts, sent):
            yield Fault.LEAK, hit
        if any(HANDLE.encode() in answer for answer in outcome.answers):
            yield Fault.LEAK, "a session handle"


def _details(status: Any) -> tuple[str, set[str]]:
    """Return the reason, empty without an ErrorInfo of ours, and the names of all details."""
    info = error_details_pb2.ErrorInfo()
    reason = ""
    for detail in status.details:
        if detail.Unpack(info) and info.domain == DOMAIN:
            reason = info.reason
    return reason, {detail.type_url.rpartition(".")[2] for detail in status.details}
