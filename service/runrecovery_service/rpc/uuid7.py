"""UUIDs of version 7, the ids of runs that have no id of the caller's own.

Written here, because the library uuid-utils would replace only five lines. It would cost each start
1.5 ms of CPU time, is a compiled dependency, and takes no random bytes from its caller. Python has
`uuid.uuid7` from 3.14 on.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND: Final = timedelta(milliseconds=1)
RANDOM_BYTES: Final = 10


def uuid7(now: datetime, random: bytes) -> UUID:
    """Return a UUID of version 7 (RFC 9562): milliseconds since 1970, followed by random bits.

    Args:
        now: the time, aware.
        random: 10 random bytes, of which 74 bits are used.
    """
    ms = (now - _EPOCH) // _MILLISECOND
    bits = int.from_bytes(random[:RANDOM_BYTES], "big")
    rand_a, rand_b = bits >> 68, bits & ((1 << 62) - 1)
    return UUID(int=(ms & (1 << 48) - 1) << 80 | 7 << 76 | rand_a << 64 | 2 << 62 | rand_b)
