"""Exits with 0, without a result and without a question."""

from __future__ import annotations

import sys

sys.stdin.readline()
