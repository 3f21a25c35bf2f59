"""The two prctl(2) calls that Python does not offer.

The shim imports this module too, so it imports only light modules of the standard library.
"""

from __future__ import annotations

import _ctypes  # the core of `ctypes`, whose own module takes a third of a Python start
import os

_PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 4, 36


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg] # noqa: SLF001 - as in `ctypes`
    _type_ = "i"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Int


def hide() -> None:
    """Keep other processes of the same user from tracing this one and opening its descriptors.

    Raises:
        OSError: the kernel refused.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def become_subreaper() -> None:
    """Become the parent of every descendant that loses its own parent.

    Raises:
        OSError: the kernel refused.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    libc = _ctypes.dlopen(None, 0)  # type: ignore[arg-type] # None: what this process has loaded
    prctl = _Function(_ctypes.dlsym(libc, "prctl"))
    if prctl(option, value, 0, 0, 0) != 0:
        raise OSError(_ctypes.get_errno(), f"prctl {option}: {os.strerror(_ctypes.get_errno())}")
