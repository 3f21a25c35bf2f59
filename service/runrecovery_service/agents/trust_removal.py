"""Decides which trust entries are removed from a file, and how their rows change.

An entry counts as gone only if the file can be read and is the file to which the entry was added.
Otherwise the file system could be unmounted, or an editor could have moved the file away. The entry
then stays recorded, and is reported once, until the file has been missing for so long that it
counts as gone. After a removal the file is checked again, because a CLI that had read the file
before the removal can write the entry back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from datetime import datetime, timedelta
from typing import Final

import structlog

from runrecovery_service.domain.reconciliation import TrustRemoval
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.trust import EntryOutcome, EntryUpdate, NotRemoved, TrustEntry
from runrecovery_service.trust import config_files
from runrecovery_service.trust.entry import Added, Made, Outcome
from runrecovery_service.trust.errors import TrustError, TrustFileUnusable, UnusableReason

log = structlog.get_logger()

FIRST_CHECK: Final = timedelta(seconds=5)
LAST_CHECK: Final = timedelta(seconds=60)
"""The two times after a removal at which the file is checked for an entry that was written back."""
AWAY_CHECK: Final = timedelta(seconds=10)
"""Time between two checks for a missing file or file system."""
RECORD_CHECK: Final = timedelta(seconds=60)
"""Time between two tries to remove an entry whose record is damaged, or whose removal has failed.
"""
FILE_GONE: Final = timedelta(seconds=60)
"""How long a file must be missing before it counts as gone. A replaced file is missing briefly."""
PLACE_GONE: Final = timedelta(days=7)
"""How long a file system must be missing before it counts as gone, and as never mounted again."""
_BOM: Final = b"\xef\xbb\xbf"
_AWAY_TEXTS: Final = {
    NotRemoved.PLACE: "its folder, or the lock next to it, does not exist",
    NotRemoved.FILE: "it does not exist, or is empty",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRemoval:
    """The removal of entries from one file (a `files.Change`): the new text, and changes of rows.

    Attributes:
        kept: one sentence for each newly found reason why entries could not be removed.
        settlement: the changes of rows.
    """

    text: bytes | None
    settlement: EntryOutcome = field(default_factory=EntryOutcome)
    removals: tuple[TrustRemoval, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def changes_no_rows(self) -> bool:
        """Whether no row needs a change."""
        return not self.settlement.forget and not self.settlement.marks


def remove_entries(
    text: bytes | None, entries: Sequence[TrustEntry], *, place: str | None, now: datetime
) -> FileRemoval:
    """Remove from the text of one file those entries that were certainly added to this file.

    Args:
        place: the identity of the file's lock, as in `TrustEntry.place`.

    Raises:
        TrustFileUnusable: the text cannot be edited safely.
    """
    builder = _FileRemovalBuilder(text=text, now=now)
    removable: dict[config_files.AgentCli, dict[TrustEntry, Added]] = {}
    for entry in entries:
        if entry.place != place and not entry.ours:
            continue  # of another host, and not of this file
        cli, added = _parse(entry)
        if cli is None or added is None:
            builder.keep(entry, NotRemoved.RECORD, f"the record of {entry.folder} is damaged")
        elif not added.owned:
            builder.forget(entry, Outcome.NOT_OURS)
        elif (away := _away(entry, added, text, place)) is not None:
            builder.add_missing(entry, away)
        else:
            removable.setdefault(cli, {})[entry] = added
    for cli, some in removable.items():
        builder.remove(cli, some)
    return builder.build()


def _parse(entry: TrustEntry) -> tuple[config_files.AgentCli | None, Added | None]:
    try:
        cli = config_files.AgentCli(entry.cli)
    except ValueError:
        return None, None
    added = parse_added(entry.added)
    return cli, added if added is not None and config_files.editor_of(cli).accepts(added) else None


def parse_added(text: str) -> Added | None:
    """Parse `TrustEntry.added`; return None for a damaged text."""
    try:
        return Added.from_json(text)
    except (ValueError, TypeError, RecursionError):
        return None


def _away(
    entry: TrustEntry, added: Added, text: bytes | None, place: str | None
) -> NotRemoved | None:
    """Return why this could be another file than that of the entry; None if it is that file."""
    if entry.place != place:
        return NotRemoved.PLACE
    if text is not None and text.removeprefix(_BOM).strip():
        return None
    as_before = Made.FILE in added.made or (text is not None and Made.DOCUMENT in added.made)
    return None if as_before else NotRemoved.FILE


@dataclass(slots=True, kw_only=True)
class _FileRemovalBuilder:
    """Collects the changes of one file and of the rows of its entries."""

    text: bytes | None
    now: datetime
    _forget: list[TrustEntry] = field(default_factory=list, init=False)
    _marks: dict[EntryUpdate, list[TrustEntry]] = field(default_factory=dict, init=False)
    _removals: list[TrustRemoval] = field(default_factory=list, init=False)
    _kept: dict[str, None] = field(default_factory=dict, init=False)

    def build(self) -> FileRemoval:
        """Return the changes."""
        return FileRemoval(
            text=self.text,
            settlement=EntryOutcome(forget=tuple(self._forget), marks=self._marks),
            removals=tuple(self._removals),
            kept=tuple(self._kept),
        )

    def forget(self, entry: TrustEntry, outcome: Outcome) -> None:
        """Report the outcome for an entry, and delete its row."""
        self._report(entry, outcome)
        self._forget.append(entry)

    # -- entries that are not there ------------------------------------------------------------

    def add_missing(self, entry: TrustEntry, away: NotRemoved) -> None:
        """Keep the row of an entry whose file is missing, until the file counts as gone.

        If the entry was already removed, its row stays only for the checks after a removal.
        """
        if entry.removed_at is not None:
            self._check_again(entry, entry.removed_at)
            return
        limit = PLACE_GONE if away is NotRemoved.PLACE else FILE_GONE
        if self.now - self._away_since(entry, away) >= limit:
            self.forget(entry, Outcome.GONE)
            return
        self.keep(entry, away, f"entries stay recorded: {_AWAY_TEXTS[away]}")

    def keep(self, entry: TrustEntry, away: NotRemoved, why: str) -> None:
        """Keep the row of an entry, and report the reason if it is new."""
        pause = RECORD_CHECK if away is NotRemoved.RECORD else AWAY_CHECK
        mark = EntryUpdate(
            look_at=self.now + pause,
            removed_at=entry.removed_at,
            away=away,
            away_since=self._away_since(entry, away),
        )
        self._marks.setdefault(mark, []).append(entry)
        if entry.away is not away:
            self._kept[f"{entry.file}: {why}"] = None

    def _away_since(self, entry: TrustEntry, away: NotRemoved) -> datetime:
        if entry.away is not away or entry.away_since is None:
            return self.now
        return min(entry.away_since, self.now)

    # -- entries that may be there -------------------------------------------------------------

    def remove(self, cli: config_files.AgentCli, entries: Mapping[TrustEntry, Added]) -> None:
        """Remove entries of one CLI. An entry that fails does not prevent the removal of others.

        Raises:
            TrustFileUnusable: the text cannot be edited safely.
        """
        by_folder = {entry.folder: added for entry, added in entries.items()}
        try:
            removals = config_files.editor_of(cli).remove_all(self.text, by_folder)
        except Exception as error:
            is_about_file = isinstance(error, TrustError) and not _is_defect(error)
            if is_about_file:
                raise
            self._remove_halves(cli, entries, error)
            return
        self.text = removals.text
        for entry in entries:
            self._add_outcome(entry, removals.outcomes[entry.folder])

    def _remove_halves(
        self, cli: config_files.AgentCli, entries: Mapping[TrustEntry, Added], error: Exception
    ) -> None:
        """Remove the entries in two halves, to find the entry that causes the failure."""
        if len(entries) == 1:
            (entry,) = entries
            if entry.removed_at is not None:
                self._check_again(entry, entry.removed_at)
                return
            if entry.away is not NotRemoved.RECORD:
                log.warning("trust.entry_failed", file=entry.file, exc_info=error)
            self.keep(entry, NotRemoved.RECORD, describe_error(entry.folder, error))
            return
        pairs = list(entries.items())
        middle = len(pairs) // 2
        for half in (pairs[:middle], pairs[middle:]):
            self.remove(cli, dict(half))

    def _add_outcome(self, entry: TrustEntry, outcome: Outcome) -> None:
        is_removed = outcome in {Outcome.REMOVED, Outcome.RESTORED}
        if entry.removed_at is None or is_removed:
            self._report(entry, outcome)
        if is_removed or outcome is Outcome.GONE:
            self._check_again(entry, entry.removed_at or self.now)
        else:  # the entry in the file belongs to another program
            self._forget.append(entry)

    def _check_again(self, entry: TrustEntry, removed_at: datetime) -> None:
        """Keep the row for two checks after the removal, then delete it."""
        if entry.removed_at is None:
            mark = EntryUpdate(removed_at=removed_at, look_at=self.now + FIRST_CHECK)
        elif timedelta() <= self.now - removed_at < LAST_CHECK:
            mark = EntryUpdate(removed_at=removed_at, look_at=removed_at + LAST_CHECK)
        else:  # both checks are done, or the clock was set back
            self._forget.append(entry)
            return
        self._marks.setdefault(mark, []).append(entry)

    def _report(self, entry: TrustEntry, outcome: Outcome) -> None:
        self._removals.append(
            TrustRemoval(
                run_id=entry.run_id,
                file=entry.file,
                folder=entry.folder,
                outcome=outcome.value,
            )
        )


def _is_defect(error: TrustError) -> bool:
    return isinstance(error, TrustFileUnusable) and error.reason is UnusableReason.NOT_PROVED


def describe_error(file: str, error: Exception) -> str:
    """Return a sentence about the failure that names the file.

    For an error that is not about the file, such as an error of a database driver, the sentence has
    only the name of the error's class.
    """
    text = str(error) if isinstance(error, TrustError | OSError) else type(error).__name__
    return text if file in text else f"{file}: {text}"
