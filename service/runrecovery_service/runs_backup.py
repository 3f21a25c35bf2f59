"""Copies the folders of runs next to a backup of their database, even while agents run in them."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable
from dataclasses import field
from pathlib import Path

from runrecovery_service.data_dir_store import STORE_FILE
from runrecovery_service.domain.start_errors import BackupRefused, DataDirRefused
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.safe_open import open_regular


def runs_copy_of(destination: Path) -> Path:
    """Return the folder for the copied folders of runs: next to the copy of the database."""
    return destination.with_name(f"{destination.name}.runs")


@dataclass(slots=True, eq=False)
class RunsCopy:
    """A copy of the folders of runs.

    Attributes:
        changed: the keys of runs whose folder lost a file while it was being copied.
        folders: how many run folders the copy has.
        size: the total bytes of the copied files.
    """

    source: Path
    destination: Path
    changed: set[int] = field(default_factory=set)
    folders: int = 0
    size: int = 0

    def begin(self) -> None:
        """Create the empty folder of the copy.

        Raises:
            BackupRefused: the destination exists, or lies in the folder that is to be copied.
            DataDirRefused: the folder cannot be created.
        """
        inside = self.destination.resolve().is_relative_to(self.source.resolve())
        if inside:
            raise BackupRefused(str(self.destination), "is in the folder of the runs")
        try:
            self.destination.mkdir(mode=0o700)
        except FileExistsError as error:
            reason = "exists; a backup overwrites nothing"
            raise BackupRefused(str(self.destination), reason) from error
        except OSError as error:
            reason = error.strerror or "cannot be created"
            raise DataDirRefused(str(self.destination), reason) from error

    def copy(self, keys: Iterable[int]) -> None:
        """Copy the folders of these runs, and the file with the id of their database.

        Raises:
            DataDirRefused: a file cannot be read, or its copy cannot be written.
        """
        try:
            if os.path.lexists(place := self.source / STORE_FILE):
                self._copy_file(place, self.destination / STORE_FILE)
            for key in keys:
                if (self.source / str(key)).is_dir():
                    self.folders += 1
                    self._copy_run(key)
            os.sync()  # once, instead of after each file
        except OSError as error:
            place = Path(error.filename or self.source)
            raise DataDirRefused(str(place), f"could not be copied: {error.strerror}") from error

    def undo(self) -> None:
        """Remove the copy."""
        shutil.rmtree(self.destination, ignore_errors=True)

    def _copy_run(self, key: int) -> None:
        made: list[tuple[Path, os.stat_result]] = []
        waiting = [(self.source / str(key), self.destination / str(key))]
        while waiting:
            source, target = waiting.pop()
            try:
                made.append((target, source.lstat()))
                entries = list(os.scandir(source))
            except (FileNotFoundError, NotADirectoryError):  # an agent has removed or replaced it
                self.changed.add(key)
                continue
            target.mkdir(mode=0o700)
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((Path(entry), target / entry.name))
                    else:
                        self._copy_file(Path(entry), target / entry.name)
                except FileNotFoundError:
                    self.changed.add(key)
        for target, facts in reversed(made):  # set last, because a folder may be read-only
            if target.exists():
                _copy_times_and_mode(target, facts)

    def _copy_file(self, source: Path, target: Path) -> None:
        """Copy a file or a link. Skip pipes and sockets: they are useless without their process."""
        facts = source.lstat()
        if stat.S_ISLNK(facts.st_mode):
            target.symlink_to(source.readlink())
        elif stat.S_ISREG(facts.st_mode):
            with (
                open(open_regular(source, os.O_RDONLY), "rb") as read,  # noqa: PTH123 - it is open
                target.open("xb") as written,
            ):
                shutil.copyfileobj(read, written)
                self.size += written.tell()
            _copy_times_and_mode(target, facts)


def _copy_times_and_mode(target: Path, facts: os.stat_result) -> None:
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    target.chmod(stat.S_IMODE(facts.st_mode))
