"""Makes agent CLIs trust the workspaces of living runs, and of no other runs.

A CLI keeps its trusted folders in a file. The lock of this file is always taken before the store is
used. No file is edited within a transaction. Under the lock, an entry is recorded before it is
added to the file. The row of an entry is changed after the entry is removed from the file. A crash
therefore leaves at most a row without an entry.
`trust_removal.py` decides what is removed from a file, and how the rows change.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, replace
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service.agents.blocking_store import BlockingStore, ConnectionStore
from runrecovery_service.agents.trust_removal import (
    FileRemoval,
    describe_error,
    parse_added,
    remove_entries,
)
from runrecovery_service.clock import Clock
from runrecovery_service.domain.reconciliation import TrustClearing, TrustRemoval
from runrecovery_service.domain.run import Run
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.safe_open import open_regular
from runrecovery_service.storage import trust
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.trust import After, TrustEntry
from runrecovery_service.trust import config_files, files
from runrecovery_service.trust.entry import Added, Edit, check_folder
from runrecovery_service.trust.errors import FolderUnusable, TrustError, TrustFileBusy

log = structlog.get_logger()

MOST_NAME_BYTES: Final = 2000
"""The most bytes of the paths of a file and a folder together. They are a key in the store, and
PostgreSQL limits the size of keys."""
ADD_LOCK_WAIT_S: Final = 5.0
"""How long a launch waits for the lock of a file before it logs the delay and waits again. Many
launches can begin at once, and the edit of a large file takes seconds."""
RESTART_LOCK_WAIT_S: Final = 5.0
"""How long a restart waits for the lock of a file."""
RUN_END_LOCK_WAIT_S: Final = 2.0
"""How long the end of a run waits for the lock of a file. A caller can be waiting meanwhile."""
FIRST_CHUNK, CHUNK = 100, 500
"""How many entries the first edit removes, and the most that any edit removes."""
QUICK_S: Final = 2.0
"""An edit that takes less time than this is followed by an edit with more entries. In some files
each entry takes long, in others only the reading of the file."""
LEFT: Final = "there was not enough time; the next sweep removes the other entries"

ReportRemovals = Callable[[Database, tuple[TrustRemoval, ...]], object]
"""Reports removed entries, within the transaction that records their removal."""


def _report_nothing(*_: object) -> None:
    pass


def _never() -> bool:
    return False


class TrustRefused(Exception):
    """A CLI cannot be made to trust a workspace. The CLI's file was not changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustKeeper:
    """Adds and removes trust entries. Every method blocks: call it in a thread.

    Attributes:
        host_id: the host of the files, because several hosts can share a store.
        report: called with removed entries, in the transaction that records their removal.
    """

    host_id: str
    owner: Owner
    store: BlockingStore
    clock: Clock
    report: ReportRemovals = _report_nothing

    # -- adding --------------------------------------------------------------------------------

    def add(
        self,
        run: Run,
        cli: str,
        workspace: Path,
        env: Mapping[str, str],
        *,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        """Make a CLI with this environment trust a run's workspace. A second call changes nothing.

        Args:
            pause: called with a number of seconds to wait while another program has the file
                locked. An exception that it raises is passed on, and the file is unchanged.

        Raises:
            TrustRefused: the CLI cannot be made to trust the workspace; see `docs/trust.md`.
            TrustFileBusy: another program has the file locked. A retry is safe.
            Fenced: a newer epoch owns the run.
            NotNow, Exhausted: the store did not record the entry. A retry is safe.
        """
        try:
            kind = config_files.AgentCli(cli)
            file = os.path.realpath(config_files.config_file(kind, env))
            folder = os.path.realpath(workspace)
            _demand_usable_names(file, folder)
        except TrustError as error:
            raise TrustRefused(f"{cli} cannot be made to trust the workspace: {error}") from error
        addition = _Addition(keeper=self, run=run, cli=kind, file=file, folder=folder)
        try:
            files.edit(
                Path(file),
                addition.decide,
                begin=addition.begin,
                record=addition.record,
                lock_wait_s=ADD_LOCK_WAIT_S,
                pause=pause,
            )
        except TrustFileBusy:
            raise
        except (TrustError, OSError) as error:
            reason = describe_error(file, error)
            raise TrustRefused(f"{cli} cannot be made to trust the workspace: {reason}") from error

    def recorded_entries(self, file: str, place: str) -> dict[str, Added]:
        """Return the recorded entries of this service in a file, by folder."""
        rows = self.store.read(lambda db: trust.recorded_entries(db, self.host_id, file, place))
        found = {folder: parse_added(text) for folder, text in rows.items()}
        return {folder: added for folder, added in found.items() if added is not None}

    def record(self, entry: TrustEntry) -> None:
        """Record an entry in the store."""
        self.store.write(
            lambda db: trust.record_entry(
                db, entry, host_id=self.host_id, owner=self.owner, now=self.clock.now()
            )
        )

    # -- removing ------------------------------------------------------------------------------

    def entries_of(self, run: Run) -> Callable[[Database], list[TrustEntry]]:
        """Return a function that reads a run's entries, or none if a newer epoch owns the run."""
        return lambda db: trust.entries_of_run(db, self.host_id, run.run_id, owner=self.owner)

    def remove_run(self, run: Run) -> TrustClearing:
        """Remove the entries of a run that is about to end."""
        find = self.entries_of(run)
        cleared = TrustClearing()
        for file in sorted({entry.file for entry in self.store.read(find)}):
            removal = _Removal(keeper=self, file=file, find=find, only_stale=False)
            cleared += removal.run(RUN_END_LOCK_WAIT_S)
        return cleared

    def stale_files(self, *, every: bool = False) -> list[str]:
        """Return the files of this host with entries that no run needs any more.

        Args:
            every: whether to include files whose next check is due later.
        """
        now = None if every else self.clock.now()
        places = self.store.read(lambda db: trust.stale_files(db, self.host_id, now=now))
        return sorted({file for file, place, ours in places if ours or _is_here(file, place)})

    def remove_stale(self, should_stop: Callable[[], bool] = _never) -> TrustClearing:
        """Remove from all files the entries that no run needs any more.

        Args:
            should_stop: called between edits; if it returns True, the remaining entries stay for
                now.
        """
        cleared = TrustClearing()
        for file in self.stale_files(every=True):
            if should_stop():
                return cleared + TrustClearing(kept=(LEFT,))
            cleared += self.remove_stale_in(
                file, lock_wait_s=RESTART_LOCK_WAIT_S, every=True, should_stop=should_stop
            )
        return cleared

    def remove_stale_on(
        self, db: Database, report: ReportRemovals, should_stop: Callable[[], bool]
    ) -> TrustClearing:
        """Do the same as `remove_stale`, on the connection `db` of a recovery."""
        keeper = replace(self, store=ConnectionStore(db), report=report)
        return keeper.remove_stale(should_stop)

    def remove_stale_in(
        self,
        file: str,
        *,
        lock_wait_s: float,
        every: bool = False,
        should_stop: Callable[[], bool] = _never,
    ) -> TrustClearing:
        """Remove from one file the entries that no run needs any more.

        A failure is returned, not raised. Entries that could not be removed stay recorded.
        """
        cleared, after = TrustClearing(), None
        now = None if every else self.clock.now()
        limit = min(FIRST_CHUNK, CHUNK)
        while True:
            find = partial(
                trust.stale_entries,
                host_id=self.host_id,
                file=file,
                now=now,
                after=after,
                limit=limit,
            )
            removal = _Removal(keeper=self, file=file, find=find, only_stale=True, limit=limit)
            started_s = time.monotonic()
            cleared += removal.run(lock_wait_s)
            if time.monotonic() - started_s < QUICK_S:
                limit = min(limit * 2, CHUNK)
            after = removal.last
            if after is None:
                return cleared
            if should_stop():
                return cleared + TrustClearing(kept=(LEFT,))


def _is_here(file: str, place: str) -> bool:
    return files.token_of(Path(file)) == place


@dataclass(slots=True, kw_only=True)
class _Addition:
    """The callbacks of `files.edit` that add one entry."""

    keeper: TrustKeeper
    run: Run
    cli: config_files.AgentCli
    file: str
    folder: str
    _place: str = field(default="", init=False)
    _recorded: Mapping[str, Added] = field(default_factory=dict, init=False)

    def begin(self, place: str | None) -> None:
        """Read once which entries of the file belong to this service.

        The entries are not read again after `record`. Otherwise an entry that a user has added
        meanwhile would count as the service's.
        """
        self._place = place or ""
        self._recorded = self.keeper.recorded_entries(self.file, self._place)

    def decide(self, text: bytes | None) -> Edit:
        """Return the edit that adds the entry to the file."""
        return config_files.editor_of(self.cli).add(text, self.folder, self._recorded)

    def record(self, edit: Edit) -> None:
        """Record the entry in the store."""
        self.keeper.record(
            TrustEntry(
                file=self.file,
                folder=self.folder,
                place=self._place,
                cli=self.cli.value,
                run_key=self.run.key,
                run_id=self.run.run_id,
                attempt=self.run.attempt,
                added=edit.added.to_json(),
            )
        )


@dataclass(slots=True, kw_only=True)
class _Removal:
    """The callbacks of `files.edit` that remove entries of one file.

    Attributes:
        find: reads the entries to remove.
        only_stale: whether the row of an entry that a run needs again stays unchanged.
        limit: the most entries that `find` reads; None: all.
        last: the position from which the next read continues; None: there are no more entries.
    """

    keeper: TrustKeeper
    file: str
    find: Callable[[Database], list[TrustEntry]]
    only_stale: bool
    limit: int | None = None
    last: After | None = field(default=None, init=False)
    _place: str | None = field(default=None, init=False)

    def run(self, lock_wait_s: float) -> TrustClearing:
        """Remove the entries, and return the removed entries and the failures.

        Entries that could not be removed stay recorded.
        """
        try:
            removed = files.edit(
                Path(self.file),
                self.decide,
                begin=self.begin,
                done=self.record,
                make=False,
                lock_wait_s=lock_wait_s,
            )
        except Exception as error:  # noqa: BLE001 - no failure may keep other files from their turn
            self.last = None
            return TrustClearing(failures=(describe_error(self.file, error),))
        _log(removed.removals)
        return TrustClearing(removals=removed.removals, kept=removed.kept)

    def begin(self, place: str | None) -> None:
        """Keep the identity of the file's lock (`TrustEntry.place`)."""
        self._place = place

    def decide(self, text: bytes | None) -> FileRemoval:
        """Return the edit that removes the entries from the file.

        Each call reads the entries again, under the file's lock, because the entry of a run that
        was reopened meanwhile must stay.
        """
        found = self.keeper.store.read(self.find)
        self.last = found[-1].after if len(found) == self.limit else None
        here = [entry for entry in found if entry.file == self.file]
        return remove_entries(text, here, place=self._place, now=self.keeper.clock.now())

    def record(self, removed: FileRemoval) -> None:
        """Record the outcome of the edit."""
        if not removed.removals and removed.changes_no_rows:
            return

        def settle(db: Database) -> None:
            trust.record_outcome(db, removed.settlement, only_stale=self.only_stale)
            if removed.removals:
                self.keeper.report(db, removed.removals)

        self.keeper.store.write(settle)


def _log(removals: Iterable[TrustRemoval]) -> None:
    for one in removals:
        log.info(
            "trust.entry_removed",
            run_id=one.run_id,
            file=one.file,
            folder=one.folder,
            outcome=one.outcome,
        )


def trust_problem(cli: str, env: Mapping[str, str]) -> str | None:
    """Return why a CLI with this environment cannot be made to trust a folder, or None if it can.

    This only checks, and changes nothing.
    """
    try:
        file = config_files.config_file(config_files.AgentCli(cli), env)
    except TrustError as error:
        return str(error)
    try:
        config_files.editor_of(config_files.AgentCli(cli)).add(_read(file), "/some/workspace")
    except (TrustError, OSError) as error:
        return describe_error(str(file), error)
    folders = Path(os.path.realpath(file)).parents
    nearest = next(folder for folder in folders if folder.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"{file}: {nearest} cannot be written to"
    return None


def _read(file: Path) -> bytes | None:
    try:
        with open(open_regular(file.resolve(), os.O_RDONLY), "rb") as opened:  # noqa: PTH123 - safely
            return opened.read(files.MAX_BYTES)  # a file of this size is refused
    except FileNotFoundError:
        return None


def _demand_usable_names(file: str, folder: str) -> None:
    """Raise FolderUnusable if one of the paths cannot be written into a CLI's file or the store."""
    check_folder(folder)
    check_folder(file)
    if len(os.fsencode(file)) + len(os.fsencode(folder)) > MOST_NAME_BYTES:
        raise FolderUnusable(folder, f"is too long, together with {file!r}")
