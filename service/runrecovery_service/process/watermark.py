"""Computes the size of the watermark that this process can give to its launches."""

from __future__ import annotations

import resource
from typing import Final

from runrecovery_service.process import procfs

WATERMARK_BITS: Final = 62
"""The size of a watermark. It makes equal numbers of two launches practically impossible, and
setrlimit does not take the largest number for "unlimited"."""
LEAST_WATERMARK_BITS: Final = 40


def watermark_bits() -> int:
    """Return the number of random bits of a watermark; 0 if too few for a unique one.

    The watermark is a limit on file locks, which an unprivileged process cannot raise. An existing
    hard limit (`ulimit -x`, another service's watermark) therefore reduces the bits.
    """
    try:
        hard = resource.getrlimit(procfs.RLIMIT_LOCKS)[1]
    except (OSError, ValueError):  # not a Linux
        return 0
    bits = WATERMARK_BITS if hard == resource.RLIM_INFINITY else hard.bit_length() - 1
    return min(bits, WATERMARK_BITS) if bits >= LEAST_WATERMARK_BITS else 0
