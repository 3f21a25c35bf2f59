"""How the service finds out whether it has a terminal."""

from __future__ import annotations

import errno
import os

import pytest
from runrecovery_service import early_signals


@pytest.mark.parametrize(
    ("number", "has"),
    [
        (errno.ENXIO, False),
        (errno.EIO, False),
        (errno.ENOENT, False),
        (errno.EMFILE, True),
        (errno.ENFILE, True),
        (errno.ENOMEM, True),
    ],
)
def test_only_an_error_of_the_terminal_itself_means_that_there_is_none(
    monkeypatch: pytest.MonkeyPatch, number: int, *, has: bool
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)

    assert early_signals.has_terminal() is has
