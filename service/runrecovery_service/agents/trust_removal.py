"""What a look at a file of an agent CLI comes to: which of our entries go out of it, and what is to
be on record of each.

That an entry is gone must be proved. It is, in a file that can be read, at the place where it was
put in. A file system may not be mounted, an editor may have moved the file away: what cannot be
found then stays on record, and is told of once. And what was taken out is looked at again: a CLI
that had read the file before writes it back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

import structlog

from runrecovery_service.domain.reconciliation import TrustRemoval
from runrecovery_service.storage.trust import Away, Mark, Settlement, TrustEntry
from runrecovery_service.trust import config_files
from runrecovery_service.trust.entry import Added, Made, Outcome
from runrecovery_service.trust.errors import TrustError, TrustFileUnusable, UnusableReason

log = structlog.get_logger()

FIRST_LOOK: Final = timedelta(seconds=5)
LAST_LOOK: Final = timedelta(seconds=60)
"""After a removal: whether somebody has written back what he had read before."""
AWAY_LOOK: Final = timedelta(seconds=10)
"""Between two looks for what is not there."""
RECORD_LOOK: Final = timedelta(seconds=60)
"""Between two tries with what failed by itself."""
FILE_GONE: Final = timedelta(seconds=60)
"""After so long, a file that is not there is not just being written anew."""
PLACE_GONE: Final = timedelta(days=7)
"""After so long, nobody will mount a file system again."""
_BOM: Final = b"\xef\xbb\xbf"
_WHY: Final = {
    Away.PLACE: "its folder, or the lock that was beside it, is not there",
    Away.FILE: "it is not there, or empty",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """A file's text without some entries (a `files.Change`), and what that comes to.

    Attributes:
        kept: sentences on what could not be taken out, where that is new.
    """

    text: bytes | None
    settlement: Settlement = field(default_factory=Settlement)
    removals: tuple[TrustRemoval, ...] = ()
    kept: tuple[str, ...] = ()

    @property
    def settles_nothing(self) -> bool:
        """True when there is nothing to put on record."""
        return not self.settlement.forget and not self.settlement.marks


def taken(
    text: bytes | None, entries: Sequence[TrustEntry], *, place: str | None, now: datetime
) -> Taken:
    """Take entries of one file out of its text, as far as they are known to be of this file.

    Args:
        place: the token of the place that the file is in.

    Raises:
        TrustFileUnusable: the text cannot be edited safely.
    """
    look = _Look(text=text, now=now)
    there: dict[config_files.AgentCli, dict[TrustEntry, Added]] = {}
    for entry in entries:
        if entry.place != place and not entry.ours:
            continue  # another host's, whose file this is not
        cli, added = _readable(entry)
        if cli is None or added is None:
            look.keep(entry, Away.RECORD, f"the record of {entry.folder} is damaged")
        elif not added.owned:
            look.disown(entry)
        elif (away := _away(entry, added, text, place)) is not None:
            look.miss(entry, away)
        else:
            there.setdefault(cli, {})[entry] = added
    for cli, some in there.items():
        look.take_out(cli, some)
    return look.result()


def _readable(entry: TrustEntry) -> tuple[config_files.AgentCli | None, Added | None]:
    try:
        cli = config_files.AgentCli(entry.cli)
    except ValueError:
        return None, None
    added = added_of(entry.added)
    return cli, added if added is not None and config_files.EDITORS[cli].accepts(added) else None


def added_of(text: str) -> Added | None:
    """Return what a row says; None when it is damaged."""
    try:
        return Added.from_json(text)
    except (ValueError, TypeError, RecursionError):
        return None


def _away(entry: TrustEntry, added: Added, text: bytes | None, place: str | None) -> Away | None:
    """Return why an entry that is not in the file may still be somewhere; None: it cannot be."""
    if entry.place != place:
        return Away.PLACE
    if text is not None and text.removeprefix(_BOM).strip():
        return None
    as_before = Made.FILE in added.made or (text is not None and Made.DOCUMENT in added.made)
    return None if as_before else Away.FILE


@dataclass(slots=True, kw_only=True)
class _Look:
    """Collects what a look comes to."""

    text: bytes | None
    now: datetime
    _forget: list[TrustEntry] = field(default_factory=list)
    _marks: dict[Mark, list[TrustEntry]] = field(default_factory=dict)
    _removals: list[TrustRemoval] = field(default_factory=list)
    _kept: dict[str, None] = field(default_factory=dict)

    def result(self) -> Taken:
        """Return it."""
        return Taken(
            text=self.text,
            settlement=Settlement(forget=tuple(self._forget), marks=self._marks),
            removals=tuple(self._removals),
            kept=tuple(self._kept),
        )

    def disown(self, entry: TrustEntry) -> None:
        """Forget what was never ours, wherever it is."""
        self._tell(entry, Outcome.NOT_OURS)
        self._forget.append(entry)

    # -- what is not there ---------------------------------------------------------------------

    def miss(self, entry: TrustEntry, away: Away) -> None:
        """Wait for a file that is not there; not for ever, and not for what was taken out."""
        if entry.removed_at is not None:
            self._look_again(entry, entry.removed_at)
            return
        patience = PLACE_GONE if away is Away.PLACE else FILE_GONE
        if self.now - self._since(entry, away) >= patience:
            self._tell(entry, Outcome.GONE)
            self._forget.append(entry)
            return
        self.keep(entry, away, f"entries stay on record: {_WHY[away]}")

    def keep(self, entry: TrustEntry, away: Away, why: str) -> None:
        """Leave an entry on record, and say why if that is new."""
        pause = RECORD_LOOK if away is Away.RECORD else AWAY_LOOK
        mark = Mark(
            look_at=self.now + pause,
            removed_at=entry.removed_at,
            away=away,
            away_since=self._since(entry, away),
        )
        self._marks.setdefault(mark, []).append(entry)
        if entry.away is not away:
            self._kept[f"{entry.file}: {why}"] = None

    def _since(self, entry: TrustEntry, away: Away) -> datetime:
        if entry.away is not away or entry.away_since is None:
            return self.now
        return min(entry.away_since, self.now)

    # -- what is there -------------------------------------------------------------------------

    def take_out(self, cli: config_files.AgentCli, entries: Mapping[TrustEntry, Added]) -> None:
        """Take entries of one CLI out. One that leads to a failure keeps no other from going.

        Raises:
            TrustFileUnusable: the text cannot be edited safely.
        """
        by_folder = {entry.folder: added for entry, added in entries.items()}
        try:
            removals = config_files.EDITORS[cli].remove_all(self.text, by_folder)
        except Exception as error:
            of_the_file = isinstance(error, TrustError) and not _is_a_defect(error)
            if of_the_file:
                raise
            self._halve(cli, entries, error)
            return
        self.text = removals.text
        for entry in entries:
            self._found(entry, removals.outcomes[entry.folder])

    def _halve(
        self, cli: config_files.AgentCli, entries: Mapping[TrustEntry, Added], error: Exception
    ) -> None:
        if len(entries) == 1:
            (entry,) = entries
            if entry.removed_at is not None:
                self._look_again(entry, entry.removed_at)
                return
            if entry.away is not Away.RECORD:
                log.warning("trust.entry_failed", file=entry.file, exc_info=error)
            self.keep(entry, Away.RECORD, told(entry.folder, error))
            return
        pairs = list(entries.items())
        middle = len(pairs) // 2
        for half in (pairs[:middle], pairs[middle:]):
            self.take_out(cli, dict(half))

    def _found(self, entry: TrustEntry, outcome: Outcome) -> None:
        is_out = outcome in {Outcome.REMOVED, Outcome.RESTORED}
        if entry.removed_at is None or is_out:
            self._tell(entry, outcome)
        if is_out or outcome is Outcome.GONE:
            self._look_again(entry, entry.removed_at or self.now)
        else:  # it is somebody else's
            self._forget.append(entry)

    def _look_again(self, entry: TrustEntry, removed_at: datetime) -> None:
        """After the removal, and once more; then it is forgotten."""
        if entry.removed_at is None:
            mark = Mark(removed_at=removed_at, look_at=self.now + FIRST_LOOK)
        elif timedelta() <= self.now - removed_at < LAST_LOOK:
            mark = Mark(removed_at=removed_at, look_at=removed_at + LAST_LOOK)
        else:  # the clock may have been set back
            self._forget.append(entry)
            return
        self._marks.setdefault(mark, []).append(entry)

    def _tell(self, entry: TrustEntry, outcome: Outcome) -> None:
        self._removals.append(
            TrustRemoval(
                run_id=entry.run_id,
                file=entry.file,
                folder=entry.folder,
                outcome=outcome.value,
            )
        )


def _is_a_defect(error: TrustError) -> bool:
    return isinstance(error, TrustFileUnusable) and error.reason is UnusableReason.NOT_PROVED


def told(file: str, error: Exception) -> str:
    """Return what went wrong with a file, as a sentence that names it. Of what is not about the
    file, as a driver's words, only the kind is told."""
    text = str(error) if isinstance(error, TrustError | OSError) else type(error).__name__
    return text if file in text else f"{file}: {text}"
