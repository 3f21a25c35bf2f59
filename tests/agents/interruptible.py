"""Works until it is killed. A process that completes an interrupted turn tells what it was told."""

import json
import sys
import time
from pathlib import Path

message = json.loads(sys.stdin.readline())
told = message["input"]


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


if message.get("session"):
    handle = message["session"]["value"]
elif told.get("no_session"):
    handle = ""
else:
    handle = f"session-{message['run_id']}"
    Path(message["workspace"], f"{handle}.json").write_text("kept", "utf-8")
if handle:
    say(type="session", value=handle)
interrupted = message.get("interrupted")
if interrupted is not None or message["attempt"] > 1:
    say(type="result", output={"interrupted": interrupted, "attempt": message["attempt"]})
elif told.get("asks") and "reply" not in message:
    say(type="ask", kind="open_text", prompt="Which colour?")
else:
    time.sleep(600)
