"""Prints endlessly without a newline (60 s at most)."""

from __future__ import annotations

import signal
import sys

signal.alarm(60)
sys.stdin.readline()
while True:
    sys.stdout.write("x" * 65536)
