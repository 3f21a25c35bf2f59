"""Prints messages of unknown types around a good result."""

from __future__ import annotations

import json
import sys

sys.stdin.readline()
print(json.dumps({"type": "thought", "text": "hm"}))
print(json.dumps({"type": "telemetry", "tokens": 12}))
print(json.dumps({"type": "result", "output": {"done": True}}), flush=True)
