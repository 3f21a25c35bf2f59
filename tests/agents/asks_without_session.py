"""Asks and exits 0, but never reports a session by which it could be resumed."""

from __future__ import annotations

import json
import sys

sys.stdin.readline()
print(json.dumps({"type": "ask", "kind": "open_text", "prompt": "Which file?"}), flush=True)
