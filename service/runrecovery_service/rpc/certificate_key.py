"""Says why gRPC cannot use the public key of a certificate.

Python's OpenSSL accepts more kinds of keys than the TLS of gRPC, and does not expose the key of a
certificate. So this module reads the key from the certificate's DER (RFC 5280), which OpenSSL has
accepted before.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator
from typing import Final

MIN_RSA_BITS: Final = 2048
USABLE: Final = (
    f"needs a key of RSA with at least {MIN_RSA_BITS} bits, or of the curve P-256 or P-384"
)

_FIRST: Final = re.compile(
    rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.*?)-----END", re.DOTALL
)
_VERSION_TAG: Final = 0xA0
_RSA: Final = bytes.fromhex("2a864886f70d010101")
_EC: Final = bytes.fromhex("2a8648ce3d0201")
_CURVES: Final = frozenset({bytes.fromhex("2a8648ce3d030107"), bytes.fromhex("2b81040022")})
"""The curves that gRPC can use: P-256 and P-384. With P-521 or Ed25519 every handshake of gRPC
fails."""


def key_problem(chain: bytes) -> str | None:
    """Return why gRPC cannot use the key of the first certificate of a PEM file, or None."""
    found = _FIRST.search(chain)
    if found is None:  # OpenSSL reports it
        return None
    try:
        return None if _is_usable(b64decode(found[1])) else USABLE
    except (IndexError, ValueError):
        return "holds a key that cannot be read"


def _is_usable(certificate: bytes) -> bool:
    (_, signed), *_ = _children(certificate)
    fields = _children(_children(signed)[0][1])
    # serial number, signature, issuer, validity, subject, key; the version may be left out
    key = fields[6 if fields[0][0] == _VERSION_TAG else 5][1]
    (_, algorithm), (_, bits) = _children(key)
    (_, kind), *parameters = _children(algorithm)
    if kind == _RSA:
        (_, numbers), *_ = _children(bits[1:])
        (_, modulus), *_ = _children(numbers)
        return int.from_bytes(modulus).bit_length() >= MIN_RSA_BITS
    return kind == _EC and parameters[0][1] in _CURVES


def _children(data: bytes) -> list[tuple[int, bytes]]:
    """Return tag and content of each element of a DER sequence."""
    return list(_elements(data))


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 0x80:
            end = at + (length & 0x7F)
            length, at = int.from_bytes(data[at:end]), end
        yield tag, data[at : at + length]
        at += length
