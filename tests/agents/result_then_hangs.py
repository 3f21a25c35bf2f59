"""Prints its result and does not exit (60 s at most)."""

from __future__ import annotations

import json
import signal
import sys
import time

signal.alarm(60)
sys.stdin.readline()
print(json.dumps({"type": "result", "output": {"done": True}}), flush=True)
time.sleep(60)
