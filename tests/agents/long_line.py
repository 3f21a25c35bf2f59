"""Prints a valid message of 2 MiB on one line, then waits (60 s at most)."""

from __future__ import annotations

import json
import signal
import sys
import time

signal.alarm(60)
sys.stdin.readline()
print(json.dumps({"type": "progress", "message": "x" * (2 << 20)}), flush=True)
time.sleep(60)
