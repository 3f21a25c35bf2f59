"""Asks a question without a prompt, then waits (60 s at most)."""

from __future__ import annotations

import json
import signal
import sys
import time

signal.alarm(60)
sys.stdin.readline()
print(json.dumps({"type": "ask", "kind": "open_text"}), flush=True)
time.sleep(60)
