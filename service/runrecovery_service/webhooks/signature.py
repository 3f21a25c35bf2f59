"""Signs deliveries by the rules of Standard Webhooks (https://www.standardwebhooks.com).

No library is used, because a signature is a single HMAC. The tests verify it with the library
`standardwebhooks`.
"""

from __future__ import annotations

import binascii
import hmac
from base64 import b64decode, b64encode
from collections.abc import Iterable
from typing import Final

PREFIX: Final = "whsec_"
LEAST_BYTES: Final = 24
MOST_BYTES: Final = 64


def read_secret(text: str) -> bytes:
    """Return the key that a secret encodes.

    Raises:
        ValueError: the text is not a valid secret. The message never quotes the text.
    """
    try:
        key = b64decode(text.removeprefix(PREFIX).encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        key = b""
    if not text.startswith(PREFIX) or not key:
        raise ValueError(f"must be {PREFIX} and base64")
    if not LEAST_BYTES <= len(key) <= MOST_BYTES:
        raise ValueError(f"must have {LEAST_BYTES} to {MOST_BYTES} bytes, not {len(key)}")
    return key


def sign(keys: Iterable[bytes], message_id: str, timestamp: int, body: bytes) -> str:
    """Return the value of the header `webhook-signature`, with one signature for each key."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    macs = (hmac.digest(key, signed, "sha256") for key in keys)
    return " ".join(f"v1,{b64encode(mac).decode()}" for mac in macs)
