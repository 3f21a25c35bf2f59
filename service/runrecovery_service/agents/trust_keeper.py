"""Lets agent CLIs trust the workspaces of runs while these are alive, and no longer.

The order is always the same: the lock of the CLI's file, then the store, and no file is edited
within a transaction. An entry is on record before it is in the file, and its row is marked after
it is out of the file, both under that lock: a crash leaves at most a row for what is not there.
How a look at a file settles its rows is the matter of `trust_removal`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

import structlog

from runrecovery_service.agents import trust_removal
from runrecovery_service.agents.blocking_store import BlockingStore, ConnectionStore
from runrecovery_service.agents.trust_removal import Taken
from runrecovery_service.clock import Clock
from runrecovery_service.domain.reconciliation import TrustClearing, TrustRemoval
from runrecovery_service.domain.run import Run
from runrecovery_service.process.safe_open import open_regular
from runrecovery_service.storage import trust
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.trust import After, TrustEntry
from runrecovery_service.trust import config_files, files
from runrecovery_service.trust.entry import Added, Edit, check_folder
from runrecovery_service.trust.errors import FolderUnusable, TrustError, TrustFileBusy

log = structlog.get_logger()

R = TypeVar("R")

MOST_NAME_BYTES: Final = 2000
"""Of a file's and a folder's path together: PostgreSQL has no keys that are much longer."""
ADD_LOCK_WAIT_S: Final = 5.0
"""For the lock of one file, at a launch, which then tells so and goes on waiting: many may begin
at once, and a large file takes seconds."""
CLEAR_LOCK_WAIT_S: Final = 5.0
"""For the lock of one file, at a restart."""
END_LOCK_WAIT_S: Final = 2.0
"""The same where a run ends, and somebody may wait to be told so."""
FIRST_CHUNK, CHUNK = 100, 500
"""Entries that are taken out by one edit, of which several may be needed: at first, and at most."""
QUICK_S: Final = 2.0
"""After an edit that took less, the next one takes out more: in some files each entry takes long,
in others the reading does."""
LEFT: Final = "there was no time for all; the next look takes out the rest"


def _nothing(*_: object) -> None:
    pass


def _never() -> bool:
    return False


class TrustRefused(Exception):
    """A CLI cannot be made to trust a workspace; its file was not touched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustKeeper:
    """Puts entries in and takes them out. Every method blocks: call it in a thread.

    Attributes:
        host_id: whose files these are, where several hosts share a store.
        told: called with what was taken out, in the transaction that puts it on record.
    """

    host_id: str
    owner: Owner
    store: BlockingStore
    clock: Clock
    told: Callable[[Database, tuple[TrustRemoval, ...]], object] = _nothing

    def add(
        self,
        run: Run,
        cli: str,
        workspace: Path,
        env: Mapping[str, str],
        *,
        pause: Callable[[float], object] = time.sleep,
    ) -> None:
        """Let a CLI with this environment trust a run's workspace. Again: changes nothing.

        Args:
            pause: waits for others; what it raises comes through, and the file was not touched.

        Raises:
            TrustRefused: it cannot be; see `docs/trust.md`.
            TrustFileBusy: others are at the file; trying again is safe.
            Fenced: a newer epoch owns the run.
            NotNow, Exhausted: the store did not take it; trying again is safe.
        """
        try:
            kind = config_files.AgentCli(cli)
            file = os.path.realpath(config_files.config_file(kind, env))
            folder = os.path.realpath(workspace)
            _demand_names(file, folder)
        except TrustError as error:
            raise TrustRefused(f"{cli} cannot be made to trust the workspace: {error}") from error
        try:
            putting = _Putting(keeper=self, run=run, cli=kind, file=file, folder=folder)
            files.edit(
                Path(file),
                putting.decide,
                begin=putting.begin,
                record=putting.record,
                lock_wait_s=ADD_LOCK_WAIT_S,
                pause=pause,
            )
        except TrustFileBusy:
            raise
        except (TrustError, OSError) as error:
            reason = (
                f"{cli} cannot be made to trust the workspace: {trust_removal.told(file, error)}"
            )
            raise TrustRefused(reason) from error

    def standing(self, file: str, place: str) -> dict[str, Added]:
        """Return our entries in a file, by folder."""
        rows = self.store.read(lambda db: trust.standing(db, self.host_id, file, place))
        found = {folder: trust_removal.added_of(text) for folder, text in rows.items()}
        return {folder: added for folder, added in found.items() if added is not None}

    def record(self, entry: TrustEntry) -> None:
        """Put an entry on record."""
        self.store.write(
            lambda db: trust.record(
                db, entry, host_id=self.host_id, owner=self.owner, now=self.clock.now()
            )
        )

    def entries_of(self, run: Run) -> Callable[[Database], list[TrustEntry]]:
        """Return the read of what stands for a run; of a run that is not ours any more, nothing."""
        return lambda db: trust.of_run(db, self.host_id, run.run_id, owner=self.owner)

    def end(self, run: Run) -> TrustClearing:
        """Take out what stands for a run that is about to end."""
        find = self.entries_of(run)
        done = TrustClearing()
        for file in sorted({entry.file for entry in self.store.read(find)}):
            taking = _Taking(keeper=self, file=file, find=find, only_stale=False)
            done += taking.take(END_LOCK_WAIT_S)
        return done

    def stale_files(self, *, every: bool = False) -> list[str]:
        """Return the files with entries that nobody needs any more, as far as they can be ours.

        Args:
            every: also those that are to be looked at later.
        """
        now = None if every else self.clock.now()
        places = self.store.read(lambda db: trust.stale_places(db, self.host_id, now=now))
        return sorted({file for file, place, ours in places if ours or _is_here(file, place)})

    def clear_on_connection(
        self,
        db: Database,
        report: Callable[[Database, tuple[TrustRemoval, ...]], object],
        enough: Callable[[], bool],
    ) -> TrustClearing:
        """Do as `clear`, on the connection of a recovery, which has one of its own.

        Args:
            report: called with the removed entries, in the transaction that records the removal.
        """
        return replace(self, store=ConnectionStore(db), told=report).clear(enough)

    def clear(self, enough: Callable[[], bool] = _never) -> TrustClearing:
        """Take out, of every file, what nobody needs any more.

        Args:
            enough: asked between edits; true: the rest is left.
        """
        done = TrustClearing()
        for file in self.stale_files(every=True):
            if enough():
                return done + TrustClearing(kept=(LEFT,))
            done += self.clear_file(file, lock_wait_s=CLEAR_LOCK_WAIT_S, every=True, enough=enough)
        return done

    def clear_file(
        self,
        file: str,
        *,
        lock_wait_s: float,
        every: bool = False,
        enough: Callable[[], bool] = _never,
    ) -> TrustClearing:
        """Take out of one file what nobody needs any more. What fails is told, and stays."""
        done, after = TrustClearing(), None
        now = None if every else self.clock.now()
        limit = min(FIRST_CHUNK, CHUNK)
        while True:
            find = partial(
                trust.stale, host_id=self.host_id, file=file, now=now, after=after, limit=limit
            )
            taking = _Taking(keeper=self, file=file, find=find, only_stale=True, limit=limit)
            begun = time.monotonic()
            done += taking.take(lock_wait_s)
            if time.monotonic() - begun < QUICK_S:
                limit = min(limit * 2, CHUNK)
            after = taking.last
            if after is None:
                return done
            if enough():
                return done + TrustClearing(kept=(LEFT,))


def _is_here(file: str, place: str) -> bool:
    return files.place_of(Path(file)) == place


@dataclass(slots=True, kw_only=True)
class _Putting:
    """One entry on its way into a file: what `files.edit` asks for."""

    keeper: TrustKeeper
    run: Run
    cli: config_files.AgentCli
    file: str
    folder: str
    _place: str = ""
    _standing: Mapping[str, Added] = field(default_factory=dict)

    def begin(self, place: str | None) -> None:
        """Read, once, what is ours in the file: not again after our own record, else an entry that
        a user makes in between would be taken for it."""
        self._place = place or ""
        self._standing = self.keeper.standing(self.file, self._place)

    def decide(self, text: bytes | None) -> Edit:
        """Return the file with the entry."""
        return config_files.EDITORS[self.cli].add(text, self.folder, self._standing)

    def record(self, edit: Edit) -> None:
        """Put the entry on record."""
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
class _Taking:
    """Entries on their way out of a file: what `files.edit` asks for.

    Attributes:
        find: reads the entries.
        only_stale: those that are needed again meanwhile stay on record.
        limit: how many `find` reads at most; None: all.
        last: where to go on, if there may be more.
    """

    keeper: TrustKeeper
    file: str
    find: Callable[[Database], list[TrustEntry]]
    only_stale: bool
    limit: int | None = None
    last: After | None = None
    _place: str | None = None

    def take(self, lock_wait_s: float) -> TrustClearing:
        """Take them out. What fails is told, and stays."""
        try:
            taken = files.edit(
                Path(self.file),
                self.decide,
                begin=self.begin,
                done=self.settle,
                make=False,
                lock_wait_s=lock_wait_s,
            )
        except Exception as error:  # noqa: BLE001 - whatever it was, other files must not wait for it
            self.last = None
            return TrustClearing(failures=(trust_removal.told(self.file, error),))
        _log(taken.removals)
        return TrustClearing(removals=taken.removals, kept=taken.kept)

    def begin(self, place: str | None) -> None:
        """Know where we are."""
        self._place = place

    def decide(self, text: bytes | None) -> Taken:
        """Return the file without the entries. They are found anew each time, under the lock: a run
        that was set back meanwhile keeps its own."""
        found = self.keeper.store.read(self.find)
        self.last = found[-1].after if len(found) == self.limit else None
        here = [entry for entry in found if entry.file == self.file]
        return trust_removal.taken(text, here, place=self._place, now=self.keeper.clock.now())

    def settle(self, taken: Taken) -> None:
        """Put on record what came about."""
        if not taken.removals and taken.settles_nothing:
            return

        def put(db: Database) -> None:
            trust.settle(db, taken.settlement, only_stale=self.only_stale)
            if taken.removals:
                self.keeper.told(db, taken.removals)

        self.keeper.store.write(put)


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
    """Return why a CLI with this environment could not be made to trust a folder, None if it
    could. Nothing is changed."""
    try:
        file = config_files.config_file(config_files.AgentCli(cli), env)
    except TrustError as error:
        return str(error)
    try:
        config_files.EDITORS[config_files.AgentCli(cli)].add(_text(file), "/some/workspace")
    except (TrustError, OSError) as error:
        return trust_removal.told(str(file), error)
    folders = Path(os.path.realpath(file)).parents
    nearest = next(folder for folder in folders if folder.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"{file}: {nearest} cannot be written to"
    return None


def _text(file: Path) -> bytes | None:
    try:
        with open(open_regular(file.resolve(), os.O_RDONLY), "rb") as opened:  # noqa: PTH123 - safely
            return opened.read(files.MOST_BYTES)  # so much is too much already
    except FileNotFoundError:
        return None


def _demand_names(file: str, folder: str) -> None:
    """Demand that both can be put into a file and on record.

    Raises:
        FolderUnusable: one cannot.
    """
    check_folder(folder)
    check_folder(file)
    if len(os.fsencode(file)) + len(os.fsencode(folder)) > MOST_NAME_BYTES:
        raise FolderUnusable(folder, f"is too long, together with {file!r}")
