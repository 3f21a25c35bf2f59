"""Writes 8 MiB to stderr before its result: unless stderr is read, the agent hangs."""

from __future__ import annotations

import json
import signal
import sys

signal.alarm(60)
sys.stdin.readline()
for _ in range(8 * 16):
    sys.stderr.write("y" * 65535 + "\n")
sys.stderr.flush()
print(json.dumps({"type": "result", "output": {"done": True}}), flush=True)
