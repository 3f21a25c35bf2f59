"""Keeps a note on disk of the latest lease renewal that the database acknowledged.

From the note, the next start notices if the database has lost that renewal. If PostgreSQL loses
acknowledged commits in a failover while the service is down, the service has no other record of
them. The note is compared with columns that only the instance itself writes. So writes of other
instances after the failover do not hide the loss.
"""

from __future__ import annotations

import contextlib
import json
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service import daemon_threads
from runrecovery_service.domain.errors import CommitsLost
from runrecovery_service.lost_commits import note_loss, noted_loss
from runrecovery_service.process.safe_open import read_start
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Renewal, latest_renewal
from runrecovery_service.storage.refusals import refusing
from runrecovery_service.storage.rows import from_us

NOTE_FILE: Final = ".last-renewal"
WHILE_DOWN: Final = "while this instance was down"

log = structlog.get_logger()


class RenewalNote:
    """The note of this start in its data directory.

    The file is not synced. After a power cut the file can have an older renewal. The next start can
    then overlook a loss, but it never reports a loss that did not happen.
    """

    def __init__(self, data_dir: Path, start: Renewal) -> None:
        """Create the note without writing a file.

        Args:
            start: identifies this start.
        """
        self._place = data_dir / NOTE_FILE
        self._start = start
        self._writing: Future[None] | None = None

    def keep(self, lease_until_us: int) -> None:
        """Note an acknowledged renewal, in a thread.

        A disk that hangs must not delay the next renewal.

        While the write of an earlier renewal hangs, later renewals are not noted.
        """
        if self._writing is not None and not self._writing.done():
            return
        with contextlib.suppress(RuntimeError):  # the system refuses a thread now
            self._writing = daemon_threads.start(
                lambda: self._write(replace(self._start, lease_until_us=lease_until_us))
            )

    async def keep_stop(self, stopped_us: int) -> None:
        """Note that the lease was released by a planned stop."""
        stop = replace(self._start, stopped_us=stopped_us)
        await daemon_threads.run(lambda: self._write(stop))

    def _write(self, renewal: Renewal) -> None:
        beside = self._place.with_suffix(".new")
        try:
            beside.write_text(f"{json.dumps(asdict(renewal))}\n")
            beside.replace(self._place)
        except OSError as error:  # the next renewal is noted again
            log.debug("storage.renewal_not_noted", error=error.strerror)


def note_loss_while_down(
    db: Database, data_dir: Path, instance: str, *, lease_ttl_s: float
) -> None:
    """Note that the database has lost the latest renewal of the start before this one.

    Call this before the claim of the epoch, which replaces the compared columns.

    Raises:
        DatabaseRefused, DatabaseOutOfReach: the database cannot be used; see `refusing`.
    """
    place = data_dir / NOTE_FILE
    noted = _read(place)
    if noted is None or noted.instance != instance:
        return
    with refusing(db.name):
        found = latest_renewal(db, instance)
    if noted.is_kept_by(found):
        return
    if noted_loss(data_dir) is None:  # otherwise the start before this one has noticed the loss
        since = None if found is None else from_us(found.at_us(lease_ttl_s))
        lost = CommitsLost(since=since, until=from_us(noted.at_us(lease_ttl_s)))
        note_loss(data_dir, f"{WHILE_DOWN}, {lost}")
    with contextlib.suppress(OSError):  # the first renewal replaces the note
        place.unlink()


def _read(place: Path) -> Renewal | None:
    try:
        return Renewal(**json.loads(read_start(place)))
    except (OSError, ValueError, TypeError):  # no note, or a crash of the machine has cut it off
        return None
