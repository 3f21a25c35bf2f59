"""Appends the last output of agents to the stored output of their turns.

When a service is killed, some output can be read but not stored, and some not read yet. The shim
saves this *rest* as a file of raw bytes. This module redacts the rest like the output of a living
process, and appends it to the output file. If the service was killed while it appended, the output
file already has a part of the rest. The content of the output file after the recorded position must
therefore be a beginning of the redacted rest, and only the remainder is appended.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service.agents.output import OutputChannel, OutputFiles
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.domain.errors import UnknownEngine
from runrecovery_service.engines.catalog import Catalog
from runrecovery_service.engines.dialect import HandleUnusable, Listener, ProtocolError
from runrecovery_service.execution.found_ends import kept_turn
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.safe_open import open_regular
from runrecovery_service.process.shim_journal import RecordedRest, read_rest, record_kept
from runrecovery_service.storage.found_ends import OpenTurn
from runrecovery_service.storage.launch_records import LaunchRecord

log = structlog.get_logger()

MOST_BYTES: Final = 32 << 20
"""The most bytes that a shim saves as the rest of the output."""


class NotComplete(Exception):
    """The output cannot be completed. The text is the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputCompleter:
    """Completes the output of turns whose shims have ended. Blocking.

    Attributes:
        boot_id: the current boot of the machine. Rests of earlier boots are not used, because a
            crash of the machine can have lost output.
    """

    catalog: Catalog
    workspaces: Workspaces
    output: OutputFiles
    boot_id: str

    def has_rest(self, launch: LaunchRecord) -> bool:
        """Return whether the shim of a launch has saved a rest of the output."""
        if launch.pid is None or launch.start_ticks is None or launch.boot_id != self.boot_id:
            return False
        journal = self.workspaces.shim_journal(launch.run_key, launch.attempt, launch.turn)
        try:
            return read_rest(journal, (launch.pid, launch.start_ticks)) is not None
        except OSError:
            return False

    def complete(self, turn: OpenTurn) -> None:
        """Append the rest of a turn's output. A second call appends nothing again."""
        try:
            size = self._complete(turn)
        except (NotComplete, HandleUnusable, UnknownEngine, OSError) as error:
            reason = str(error) if isinstance(error, NotComplete) else type(error).__name__
            log.warning("recovery.output_not_completed", run_id=turn.run_id, reason=reason)
        except Exception as error:  # no output of an agent must prevent a start
            kind = type(error).__name__
            log.warning(
                "recovery.output_not_completed", run_id=turn.run_id, reason=kind, exc_info=True
            )
        else:
            if size:
                log.info("recovery.output_completed", run_id=turn.run_id, bytes=size)

    def _complete(self, turn: OpenTurn) -> int:
        """Complete the output, and return the number of appended bytes."""
        place = (turn.run_key, turn.attempt)
        journal = self.workspaces.shim_journal(*place, turn.turn)
        rest = read_rest(journal, turn.shim)
        if rest is None or rest.is_kept:
            return 0
        path = self.workspaces.output_rest(*place, turn.turn)
        text = self._redacted(turn, rest, path)
        end = self.output.size(*place, OutputChannel.STDOUT)
        if end < rest.kept:
            raise NotComplete("the output file is shorter than recorded")
        present = self._present(turn, rest.kept, len(text) + 1)
        if not text.startswith(present):
            raise NotComplete("the output file has other output")
        added, whole = text[len(present) :], True
        if added:
            whole = self.output.append(*place, OutputChannel.STDOUT, added) is not None
        if rest.at_end and rest.begin is not None and whole:
            record_kept(journal, turn.shim, begin=rest.begin, end=rest.kept + len(text))
        path.unlink(missing_ok=True)  # last, so that the next start repeats this after a crash
        return len(added)

    def _present(self, turn: OpenTurn, begin: int, most: int) -> bytes:
        """Return the content of the output file after a position."""
        try:
            return self.output.read(
                turn.run_key, turn.attempt, OutputChannel.STDOUT, begin, most
            ).data
        except FileNotFoundError:
            return b""

    def _redacted(self, turn: OpenTurn, rest: RecordedRest, path: Path) -> bytes:
        """Return the rest without secrets.

        An unfinished last line is returned only if the agent had ended by itself. If the agent was
        killed, the line can have half of a secret, which cannot be recognized.
        """
        with open(open_regular(path, os.O_RDONLY), "rb") as file:  # noqa: PTH123 - opened safely
            raw = file.read(min(rest.size, MOST_BYTES) + 1)
        if len(raw) != rest.size:
            raise NotComplete("the rest is not as it was saved")
        dialect = self.catalog.get(turn.engine).dialect
        listener = dialect.reread(kept_turn(self.workspaces, turn))
        *lines, last = raw.split(b"\n")
        shown = [_redact(listener, line) + b"\n" for line in lines]
        has_ended = rest.at_end and rest.exit_code is not None and rest.exit_code >= 0
        if last and has_ended:
            shown.append(_redact(listener, last))
        return b"".join(shown)


def _redact(listener: Listener, line: bytes) -> bytes:
    try:
        return listener.hear(line).redacted
    except ProtocolError:
        return listener.redact(line)
