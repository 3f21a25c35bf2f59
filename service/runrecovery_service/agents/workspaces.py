"""Locates the files of each attempt.

<runs_dir>/<run key>/<attempt>/workspace/      the working directory of the agent, 0700
<runs_dir>/<run key>/<attempt>/stdout.log      and stderr.log, 0600 (`output.py`)
<runs_dir>/<run key>/<attempt>/permissions/    the files of the permission hook, 0700
<runs_dir>/<run key>/<attempt>/shim-<turn>.log the journal of a launch, 0600
<runs_dir>/<run key>/<attempt>/stdout-<turn>.rest  output that a killed service did not store, 0600
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

REST_SUFFIX: Final = ".rest"


class Workspaces:
    """The folders of all attempts below `runs`."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs

    def attempt(self, run_key: int, attempt: int) -> Path:
        """Return the folder with all files of an attempt, which can be missing."""
        return self.runs / str(run_key) / str(attempt)

    def workspace(self, run_key: int, attempt: int) -> Path:
        """Return the working directory of the agent, which can be missing."""
        return self.attempt(run_key, attempt) / "workspace"

    def output(self, run_key: int, attempt: int, channel: str = "stdout") -> Path:
        """Return the file with the output that an attempt has printed on a channel."""
        return self.attempt(run_key, attempt) / f"{channel}.log"

    def shim_journal(self, run_key: int, attempt: int, turn: int) -> Path:
        """Return the journal of a turn's launch (`process/shim_journal.py`)."""
        return self.attempt(run_key, attempt) / f"shim-{turn}.log"

    def output_rest(self, run_key: int, attempt: int, turn: int) -> Path:
        """Return the file in which a shim saves output that its service has not stored."""
        return self.attempt(run_key, attempt) / f"stdout-{turn}{REST_SUFFIX}"

    def permissions(self, run_key: int, attempt: int) -> Path:
        """Return the folder for the files of the permission hook, which can be missing."""
        return self.attempt(run_key, attempt) / "permissions"

    def prepare(self, run_key: int, attempt: int, *, fresh: bool) -> Path:
        """Create the working directory of the agent, and return it. Blocks briefly.

        Args:
            fresh: whether the attempt begins now. A folder that exists then is renamed: it belongs
                to a run that is missing in the database since an older copy was restored.
        """
        folder = self.attempt(run_key, attempt)
        if fresh and folder.exists():
            folder.rename(folder.with_name(f"{attempt}.found-{time.time_ns()}"))
        workspace = self.workspace(run_key, attempt)
        for parent in (*reversed(workspace.parents[:3]), workspace):
            parent.mkdir(mode=0o700, exist_ok=True)
        return workspace
