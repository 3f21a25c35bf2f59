"""Page tokens: opaque to callers, bound to method and filter, refused when altered.

A token holds keys of rows, which show how many runs all engines have. So tokens are encrypted, and
the same keys give another text each time: a caller of some engines learns nothing about the others.
Only the cursor of a decision is always the same.

A token is urlsafe base64 without padding of: version (1 byte), tag (16), and encrypted: random
bytes (8), digest of method and filter (8), keys of the last row (8 each). The tag authenticates the
rest, and selects the key stream (the construction of SIV, with BLAKE2 as its function).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable
from dataclasses import field
from typing import Final

from google.protobuf.message import Message

from runrecovery_service.domain.errors import (
    PageTokenInvalid,
    PageTokenMismatch,
    WatchCursorInvalid,
)
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.decision_feed import FeedCursor
from runrecovery_service.storage.store_identity import store_key

DEFAULT_PAGE_SIZE: Final = 50
MAX_PAGE_SIZE: Final = 1000

_VERSION: Final = b"\x01"
_TAG_BYTES: Final = 16
_RANDOM_BYTES: Final = 8
_DIGEST_BYTES: Final = 8
_HEAD_BYTES: Final = _RANDOM_BYTES + _DIGEST_BYTES
_MAX_TOKEN_CHARS: Final = 100  # three keys take 76


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScope:
    """The method and filter that a token belongs to. Each key of its rows has `width` numbers."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTokens:
    """Writes and reads page tokens, and cursors of decisions.

    Attributes:
        key: the secret key, the same for all instances on one store.
        random: returns random bytes.
    """

    key: bytes = field(repr=False)
    random: Callable[[int], bytes] = field(default=secrets.token_bytes, repr=False)

    @classmethod
    def of_store(cls, db: Database) -> PageTokens:
        """Return the page tokens of every instance on a store."""
        return cls(key=store_key(db, "page tokens"))

    def encode(self, scope: TokenScope, after: tuple[int, ...] | None) -> str:
        """Return the token of the page after these keys; an empty one after the last page.

        Args:
            after: None after the last page.
        """
        if after is None:
            return ""
        if len(after) != scope.width:
            raise ValueError(f"{len(after)} keys for a scope of {scope.width}")
        return self._encrypted(self.random(_RANDOM_BYTES), scope, after)

    def decode(self, scope: TokenScope, token: str) -> tuple[int, ...] | None:
        """Return the keys after which the page begins; None for the first page.

        Raises:
            PageTokenInvalid: the token does not come from this store.
            PageTokenMismatch: the token belongs to another method or filter.
        """
        if not token:
            return None
        content = self._decrypted(token)
        if content[_RANDOM_BYTES:_HEAD_BYTES] != scope.digest:
            raise PageTokenMismatch
        if len(content) != _HEAD_BYTES + 8 * scope.width:
            raise PageTokenInvalid
        return struct.unpack(f">{scope.width}q", content[_HEAD_BYTES:])

    def encode_cursor(self, decision: FeedCursor) -> str:
        """Return the cursor of a decision, always the same text. It is not bound to a filter."""
        return self._encrypted(bytes(_RANDOM_BYTES), _CURSOR_SCOPE, _keys(decision))

    def encode_bookmark(self, place: FeedCursor) -> str:
        """Return a cursor of a place in the feed of decisions, as another text each time.

        The decision at this place can be about a run that the caller must not see. If the text
        changed only with the place, the caller could notice such decisions.
        """
        return self.encode(_CURSOR_SCOPE, _keys(place))

    def decode_cursor(self, cursor: str) -> FeedCursor | None:
        """Return the place that a cursor names; None for no cursor.

        Raises:
            WatchCursorInvalid: the cursor does not come from this store.
        """
        try:
            keys = self.decode(_CURSOR_SCOPE, cursor)
        except (PageTokenInvalid, PageTokenMismatch):
            raise WatchCursorInvalid from None
        return None if keys is None else FeedCursor(*keys)

    def _encrypted(self, random: bytes, scope: TokenScope, keys: tuple[int, ...]) -> str:
        content = random + scope.digest + struct.pack(f">{len(keys)}q", *keys)
        tag = self._tag(content)
        return _to_text(_VERSION + tag + self._crypt(tag, content))

    def _decrypted(self, token: str) -> bytes:
        if len(token) > _MAX_TOKEN_CHARS:
            raise PageTokenInvalid
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):  # ValueError: not ASCII
            raise PageTokenInvalid from None
        body = len(_VERSION) + _TAG_BYTES
        tag = raw[len(_VERSION) : body]
        content = self._crypt(tag, raw[body:])
        # The text is compared as well, because base64 can write the same bytes in several ways.
        if (
            raw[:1] != _VERSION
            or not hmac.compare_digest(tag, self._tag(content))
            or _to_text(raw) != token
        ):
            raise PageTokenInvalid
        return content

    def _tag(self, content: bytes) -> bytes:
        return hashlib.blake2b(
            content, key=self.key, digest_size=_TAG_BYTES, person=b"tag"
        ).digest()

    def _crypt(self, tag: bytes, content: bytes) -> bytes:
        """Encrypt or decrypt at most 64 bytes."""
        stream = hashlib.blake2b(tag, key=self.key, digest_size=64, person=b"stream").digest()
        return bytes(a ^ b for a, b in zip(content, stream, strict=False))


def _keys(place: FeedCursor) -> tuple[int, int, int]:
    return place.report, place.run, place.stamp


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:_DIGEST_BYTES]


def _to_text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


_CURSOR_SCOPE: Final = TokenScope(digest=_digest(b"runrecovery.v1.WatchRecovered"), width=3)
