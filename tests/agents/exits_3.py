"""Writes its error to stderr and exits with 3."""

from __future__ import annotations

import sys

sys.stdin.readline()
print("the model refused to answer", file=sys.stderr)
sys.exit(3)
