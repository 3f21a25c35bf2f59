"""Ignores SIGTERM, reports that, and waits (60 s at most)."""

from __future__ import annotations

import json
import signal
import sys
import time

signal.alarm(60)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.readline()
print(json.dumps({"type": "progress", "message": "SIGTERM is ignored"}), flush=True)
until = time.monotonic() + 60
while time.monotonic() < until:
    time.sleep(1)
