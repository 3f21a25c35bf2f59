"""A migrated SQLite store without a row, made once in each process of tests and then copied.

To apply all migrations costs more CPU time than the rest of a service's start.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from runrecovery_service.storage.opening import open_database


def copy_migrated_store(data_dir: Path) -> None:
    """Make a data directory, unless it exists, and in it the store that a first start creates."""
    data_dir.mkdir(mode=0o700, exist_ok=True)
    for name, mode, content in _template():
        file = data_dir / name
        file.write_bytes(content)
        file.chmod(mode)


@cache
def _template() -> list[tuple[str, int, bytes]]:
    """Return the name, mode and content of each file."""
    with tempfile.TemporaryDirectory(prefix="runrecovery-store-") as folder:
        open_database("", Path(folder)).close()
        return [
            (file.name, file.stat().st_mode, file.read_bytes()) for file in Path(folder).iterdir()
        ]
