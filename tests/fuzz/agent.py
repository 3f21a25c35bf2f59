"""The agent of the fuzzed service: harmless, quick, and idle until a call acts on its run.

`input.act`: `hold` waits until it is ended, `ask` asks one question, `fail` exits with 3; anything
else, whatever a hostile caller put there, is a result at once.
"""

from __future__ import annotations

import json
import secrets
import signal
import sys
from pathlib import Path
from typing import Any

HANDLE = "fz-secret-handle-"
"""How every handle begins: no answer of the service may hold it."""


def say(**message: object) -> None:
    """Print a line of the protocol."""
    print(json.dumps(message), flush=True)


def main(profile: str) -> int:
    """Run one process of the agent."""
    message: dict[str, Any] = json.loads(sys.stdin.readline())
    given = message["input"]
    act = given.get("act") if message["type"] == "start" else None
    if act == "hold":
        signal.pause()
    if act == "fail":
        return 3
    if act == "ask":
        if profile == "resumable":
            handle = HANDLE + secrets.token_hex(8)
            Path(message["workspace"], handle).touch()
            say(type="session", value=handle)
        say(type="ask", kind="open_text", prompt="What next?")
        if profile == "resumable" or not sys.stdin.readline():
            return 0
    say(type="result", output={"done": True})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
