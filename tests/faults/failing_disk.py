"""A disk that fails as ordered, below one folder: `disk.c`, preloaded into a service."""

from __future__ import annotations

import errno
import subprocess
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Final

COMPILER: Final = which("cc")
SOURCE: Final = Path(__file__).with_name("disk.c")


@dataclass(frozen=True, slots=True)
class FailingDisk:
    """The disk of the files below `folder`; its orders are in a file that the library reads."""

    library: Path
    folder: Path
    orders: Path

    @property
    def env(self) -> dict[str, str]:
        """The variables of a service that uses the disk."""
        return {
            "LD_PRELOAD": str(self.library),
            "DISK_FOLDER": str(self.folder),
            "DISK_ORDERS": str(self.orders),
        }

    def fail(self, code: int, *operations: str) -> None:
        """Fail each operation (`open` for writing, `write`, `sync`) from now on."""
        self._order("".join(f"{operation} {code} 0\n" for operation in operations))

    def delay(self, ms: int, *operations: str) -> None:
        """Delay each operation from now on."""
        self._order("".join(f"{operation} 0 {ms}\n" for operation in operations))

    def mend(self) -> None:
        """Do everything at once again."""
        self._order("")

    def _order(self, text: str) -> None:
        new = self.orders.with_suffix(".new")
        new.write_text(text)
        new.rename(self.orders)


def build(folder: Path, data: Path) -> FailingDisk:
    """Compile the library into a folder, for the disk of `data`."""
    library = folder / "disk.so"
    command = (str(COMPILER), "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl")
    subprocess.run(command, check=True)
    return FailingDisk(library, data, folder / "orders")


READ_ONLY: Final = errno.EROFS
BROKEN: Final = errno.EIO
FULL: Final = errno.ENOSPC
