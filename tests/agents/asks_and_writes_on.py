"""Asks in a session like Claude Code's, below the folder of its argument; a child writes on."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

SESSION = "a118d5f6-2157-480e-b6db-18676c86055f"
NOTE = b'{"type":"note"}\n'


def write_on(session: int, began: int) -> None:
    """Append notes until this process is killed, for 60 s at most."""
    signal.alarm(60)
    os.close(1)
    os.close(2)
    os.write(session, NOTE)
    os.close(began)
    while True:
        os.write(session, NOTE)


task = json.loads(sys.stdin.readline())
workspace = str(Path(task["workspace"]).resolve())
folder = Path(sys.argv[1], "projects", re.sub("[^a-zA-Z0-9]", "-", workspace))
folder.mkdir(parents=True)
session = os.open(folder / f"{SESSION}.jsonl", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
for kind in ("user", "assistant"):
    message = {"role": kind, "content": ""}
    line = {"type": kind, "message": message, "sessionId": SESSION, "cwd": workspace}
    os.write(session, json.dumps(line).encode() + b"\n")
ready, began = os.pipe()
if not os.fork():
    write_on(session, began)
os.close(began)
os.read(ready, 1)  # until it writes
print(json.dumps({"type": "session", "value": SESSION}))
print(json.dumps({"type": "ask", "kind": "open_text", "prompt": "What?"}), flush=True)
