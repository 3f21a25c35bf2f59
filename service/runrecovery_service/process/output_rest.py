"""Saves the last standard output of an agent whose service is gone. A part of the shim.

It imports only light modules of the standard library.
"""

from __future__ import annotations

import os

from runrecovery_service.process import wire

_PIECE_BYTES = 1 << 20
_MOST_BYTES = 1 << 24
"""The most bytes that are saved. There is a limit, because a process outside of the tree can write
to the pipe without an end."""


def save(pipe: int, spool: int, path: str, *, is_stopped: bool) -> str:
    """Save what is in the spool and then in the pipe, and is not in the output file.

    No other process may read the pipe.

    Args:
        is_stopped: the service has stopped as planned. It may have asked the agent to end, so the
            end of the output does not prove that the turn was complete.

    Returns:
        The facts for the journal, as members of a JSON object.
    """
    try:
        position = wire.unpack_position(os.pread(spool, wire.POSITION_BYTES, 0))
        if position.kept == wire.UNKNOWN:  # the output file already lacks earlier output
            return f'"event": "{wire.REST}", "size": 0, "at_end": false'
        copy = _Copy(path)
        copy.take(spool, position.start)
        copy.take(pipe)
    except OSError as error:
        return f'"event": "{wire.REST}", "size": 0, "at_end": false, "errno": {error.errno or 0}'
    at_end = "true" if copy.at_end and not is_stopped else "false"
    return (
        f'"event": "{wire.REST}", "begin": {position.begin}, "kept": {position.kept},'
        f' "size": {copy.size}, "at_end": {at_end}, "errno": {copy.errno}'
    )


class _Copy:
    """A new file with the rest of the output.

    Attributes:
        at_end: the source that was read last has been copied to its end.
        errno: the error that kept bytes of a source out of the file; 0: there was no error.
    """

    def __init__(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._file = os.open(path, flags, 0o600)
        self.size, self.errno, self.at_end = 0, 0, False

    def take(self, source: int, begin: int | None = None) -> None:
        """Append a source: a file from offset `begin`, or all bytes that a pipe holds."""
        self.at_end = False
        try:
            while self.size < _MOST_BYTES and not self.errno:
                if begin is None:
                    data = os.read(source, _PIECE_BYTES)
                else:
                    data = os.pread(source, _PIECE_BYTES, begin)
                    begin += len(data)
                if not data:
                    self.at_end = True
                    return
                self._write(data)
        except BlockingIOError:  # a process outside of the tree can still write to the pipe
            return
        except OSError as error:  # a full disk
            self.errno = error.errno or 0

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            written = os.write(self._file, left)
            self.size += written
            left = left[written:]
