"""Lines of Python before an agent's own: what it leaves in a folder for the judges."""

from __future__ import annotations

from pathlib import Path
from typing import Final

OVERLAPS: Final = "overlaps"
"""The file with the runs of agents that found another agent of their run alive."""
STARTS: Final = "starts"
"""The file with a line for each agent that got its first message."""
_LOCK: Final = f"""
import fcntl, os
mine, folder = os.environ["RUNRECOVERY_RUN_ID"], {{folder!r}}
held = open(os.path.join(folder, mine), "w")
try:
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    with open(os.path.join(folder, {OVERLAPS!r}), "a") as file:
        file.write(mine + "\\n")
launch = int(os.environ["RUNRECOVERY_LEASE"].partition(".")[0], 16)
"""
_NOTE: Final = f"""
import json, sys
class FirstLineAgain:
    def __init__(self, real):
        self.real, self.line = real, real.readline()
    def readline(self):
        line, self.line = self.line, None
        return self.real.readline() if line is None else line
sys.stdin = FirstLineAgain(sys.stdin)
if sys.stdin.line.endswith("\\n"):
    kind, attempt = json.loads(sys.stdin.line)["type"], os.environ["RUNRECOVERY_ATTEMPT"]
    with open(os.path.join(folder, {STARTS!r}), "a") as file:
        print(launch, mine, attempt, kind, file=file)
"""


def lock_run(folder: Path) -> str:
    """Return lines that lock the run while the agent lives, and set `folder` and `launch`."""
    return _LOCK.format(folder=str(folder))


def lock_run_and_note_start(folder: Path) -> str:
    """Return lines that also note the launch, and the kind of the first message."""
    return lock_run(folder) + _NOTE
