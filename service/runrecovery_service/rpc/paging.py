"""Page tokens: opaque to callers, bound to method and filter, refused when altered.

A token is urlsafe base64 without padding of: version (1 byte), digest of method and filter (8),
keys of the last row (8 each), checksum of all that (8). The checksum is against accidents, not
attackers: a forged token returns nothing that the same caller could not list anyway.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass
from typing import Final

from google.protobuf.message import Message

from runrecovery_service.domain.errors import (
    PageTokenInvalid,
    PageTokenMismatch,
    WatchCursorInvalid,
)
from runrecovery_service.storage.decision_feed import FeedCursor

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 1000

_VERSION: Final = b"\x01"
_DIGEST_BYTES: Final = 8
_MAX_TOKEN_CHARS: Final = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScope:
    """The method and filter that a token belongs to. The keys of its rows are `width` numbers."""

    digest: bytes
    width: int


def token_scope(request: Message, *, width: int) -> TokenScope:
    """Return the scope of a request: its type, and its fields without page size and token."""
    wanted = type(request)()
    wanted.CopyFrom(request)
    wanted.ClearField("page_size")
    wanted.ClearField("page_token")
    named = request.DESCRIPTOR.full_name.encode() + b"\0"
    return TokenScope(
        digest=_digest(named + wanted.SerializeToString(deterministic=True)), width=width
    )


def page_size(requested: int) -> int:
    """Return the number of rows per page: 0 means 50, more than 1000 means 1000."""
    return min(requested or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)


def encode(scope: TokenScope, after: tuple[int, ...] | None) -> str:
    """Return the token of the page after these keys; an empty one for None, after the last page."""
    if after is None:
        return ""
    if len(after) != scope.width:
        raise ValueError(f"{len(after)} keys for a scope of {scope.width}")
    payload = _VERSION + scope.digest + struct.pack(f">{len(after)}q", *after)
    return _to_text(payload + _digest(payload))


def decode(scope: TokenScope, token: str) -> tuple[int, ...] | None:
    """Return the keys after which the page begins; None for the first page.

    Raises:
        PageTokenInvalid: the token does not come from this service.
        PageTokenMismatch: the token belongs to another method or filter.
    """
    if not token:
        return None
    payload = _checked_payload(token)
    body = 1 + _DIGEST_BYTES
    if payload[1:body] != scope.digest:
        raise PageTokenMismatch
    if len(payload) != body + 8 * scope.width:
        raise PageTokenInvalid
    return struct.unpack(f">{scope.width}q", payload[body:])


_CURSOR: Final = "runrecovery.v1.WatchRecovered"


def encode_cursor(place: FeedCursor) -> str:
    """Return the cursor of a place among the decisions. It is bound to no filter."""
    return encode(_cursor_scope(), (place.report, place.run, place.stamp))


def decode_cursor(cursor: str) -> FeedCursor | None:
    """Return the place that a cursor names; None for no cursor.

    Raises:
        WatchCursorInvalid: the cursor does not come from this service.
    """
    try:
        keys = decode(_cursor_scope(), cursor)
    except (PageTokenInvalid, PageTokenMismatch):
        raise WatchCursorInvalid from None
    return None if keys is None else FeedCursor(*keys)


def _cursor_scope() -> TokenScope:
    return TokenScope(digest=_digest(_CURSOR.encode()), width=3)


def _checked_payload(token: str) -> bytes:
    if len(token) > _MAX_TOKEN_CHARS:
        raise PageTokenInvalid
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):  # ValueError: not ASCII
        raise PageTokenInvalid from None
    payload, checksum = raw[:-_DIGEST_BYTES], raw[-_DIGEST_BYTES:]
    # The text is compared as well, because base64 can write the same bytes in several ways.
    if payload[:1] != _VERSION or checksum != _digest(payload) or _to_text(raw) != token:
        raise PageTokenInvalid
    return payload


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]


def _to_text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
