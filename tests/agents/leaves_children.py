"""Prints its result and exits, but leaves two processes, for 60 s at most.

One has cleared its environment, and stays in the process session. The other has left the session,
and keeps its environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

sys.stdin.readline()
nothing = subprocess.DEVNULL
command = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(60)"]
scrubbed = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, env={})
moved = subprocess.Popen(
    command, stdin=nothing, stdout=nothing, stderr=nothing, start_new_session=True
)
output = {"scrubbed": scrubbed.pid, "moved": moved.pid}
print(json.dumps({"type": "result", "output": output}), flush=True)
os._exit(0)  # without the interpreter's complaint about children that it leaves
