"""Prints a line that is not JSON, then waits (60 s at most)."""

from __future__ import annotations

import signal
import sys
import time

signal.alarm(60)
sys.stdin.readline()
print("Hello! I will now start working on your task.", flush=True)
time.sleep(60)
