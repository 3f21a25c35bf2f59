"""What an agent printed in full before its service was killed is in its kept output.

CAMPAIGN_ROUNDS=200 pytest tests/crash/test_last_output.py for more random kills.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf.json_format import MessageToDict
from support.api import Api, status_word
from support.engines import script
from support.service import Home
from support.waiting import until

NewHome = Callable[..., Home]

ROUNDS: Final = int(os.environ.get("CAMPAIGN_ROUNDS", "3"))
RESULT: Final = b'{"type": "result", "output": {"done": true}}'
SESSION: Final = b'{"type":"session","value":"[secret]"}\n'

SPEAKS: Final = script(
    """
import json, os, sys, time
task = json.loads(sys.stdin.readline())
def say(**message):
    print(json.dumps(message), flush=True)
say(type="session", value="a-secret-handle")
while not os.path.exists(task["input"]["go"]):
    time.sleep(0.01)
for number in range(300):
    say(type="progress", message=f"{number} " + "x" * (100_000 if number == 7 else 100))
if "waits" in task["input"]:
    open(task["input"]["go"] + ".printed", "w").close()
    time.sleep(60)
sys.stdout.write(json.dumps({"type": "result", "output": {"done": True}}))
"""
)
PROGRESS: Final = b"".join(
    b'{"type": "progress", "message": "%d %s"}\n'
    % (number, b"x" * (100_000 if number == 7 else 100))
    for number in range(300)
)


def kept_output(api: Api, run_id: str) -> bytes:
    return b"".join(piece.data for piece in api.output(run_id))


def exits(home: Home) -> int:
    journals = (home.data / "runs").glob("*/1/shim-1.log")
    return sum("agent.exited" in journal.read_text() for journal in journals)


def rests(home: Home) -> list[Path]:
    return list((home.data / "runs").rglob("*.rest"))


def test_output_that_the_service_could_not_read_is_kept_and_its_result_counts(
    new_home: NewHome, tmp_path: Path
) -> None:
    home, go = new_home(engines={"speaks": SPEAKS}), tmp_path / "go"
    service, api = home.start()
    for run_id, more in {"ended": {}, "killed": {"waits": 1}, "canceled": {}}.items():
        api.create("speaks", {"go": str(go), **more}, run_id=run_id)
    until(
        lambda: all(api.get(each).session.has_handle for each in ("ended", "killed", "canceled")),
        "each session is on record",
    )
    service.suspend()
    with home.store(writable=True) as store:
        store.execute("UPDATE run SET cancel_requested_at = 1 WHERE run_id = 'canceled'")
    go.touch()
    until(lambda: exits(home) == 2 and go.with_suffix(".printed").exists(), "all is printed")
    service.kill()

    _, api = home.start()

    runs = {each: api.get(each) for each in ("ended", "killed", "canceled")}
    assert {each: run.recovery.recovery_reason for each, run in runs.items()} == {
        "ended": "result_found_in_output",
        "killed": "running_interrupted",
        "canceled": "cancel_completed",
    }
    assert status_word(runs["ended"]) == "SUCCEEDED"
    assert MessageToDict(runs["ended"].output) == {"done": True}
    assert kept_output(api, "ended") == SESSION + PROGRESS + RESULT
    assert kept_output(api, "killed") == SESSION + PROGRESS
    assert kept_output(api, "canceled") == SESSION + PROGRESS + RESULT
    assert rests(home) == []


def test_a_second_turn_keeps_its_last_output_after_that_of_the_first(
    new_home: NewHome, tmp_path: Path
) -> None:
    asks = script(
        """
import json, os, sys, time
task = json.loads(sys.stdin.readline())
if task["type"] == "start":
    print(json.dumps({"type": "session", "value": "s"}))
    print(json.dumps({"type": "ask", "kind": "open_text", "prompt": "?"}))
    sys.exit()
print("{}", file=sys.stderr, flush=True)
while not os.path.exists(task["input"]["go"]):
    time.sleep(0.01)
print(json.dumps({"type": "result", "output": task["input"]}))
"""
    )
    home, go = new_home(engines={"asks": asks}), tmp_path / "go"
    service, api = home.start()
    api.create("asks", {"go": str(go)}, run_id="run")
    api.until_status("run", "WAITING_USER")
    first = kept_output(api, "run")
    api.reply("run", 1, "yes")
    until(lambda: list((home.data / "runs").glob("*/1/stderr.log")), "the second turn runs")
    service.suspend()
    go.touch()
    until(
        lambda: "agent.exited" in next((home.data / "runs").glob("*/1/shim-2.log")).read_text(),
        "the second turn has ended",
    )
    service.kill()

    _, api = home.start()

    assert status_word(api.get("run")) == "SUCCEEDED"
    last = b'{"type": "result", "output": {"go": "%s"}}\n' % os.fsencode(go)
    assert first
    assert kept_output(api, "run") == first + last


def test_the_last_output_of_agents_that_a_planned_stop_ends_is_kept(new_home: NewHome) -> None:
    farewell = script(
        """
import json, signal, sys, time
def leave(*_):
    print("good", flush=True)
    print(json.dumps({"type": "result", "output": {}}), flush=True)
    sys.exit()
signal.signal(signal.SIGTERM, leave)
print(json.dumps({"type": "session", "value": "s"}), flush=True)
time.sleep(60)
"""
    )
    home = new_home(engines={"farewell": farewell})
    service, api = home.start()
    api.create("farewell", run_id="run")
    until(lambda: api.get("run").session.has_handle, "the session is on record")

    assert service.stop() == 0
    _, api = home.start()

    run = api.get("run")
    assert (status_word(run), run.recovery.recovery_reason) == ("FAILED", "running_interrupted")
    result = b'{"type": "result", "output": {}}\n'
    assert kept_output(api, "run") == SESSION + b"good\n" + result
    assert rests(home) == []


# -- kills at random moments ---------------------------------------------------------------------

LINES: Final = """
import random
def lines(seed, size):
    dice, left = random.Random(seed), size
    while left > 0:
        text = "x" * dice.choice((0, 3, 50, 500, 70_000 if seed % 2 else 9))
        line = '{"type": "progress", "message": "%d %s"}\\n' % (left, text)
        left -= len(line)
        yield line.encode()
"""
MOST_BYTES: Final = 8 << 20
NOISY: Final = script(
    f"""{LINES}
import json, os, sys, time
given = json.loads(sys.stdin.readline())["input"]
note = os.open(given["note"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
dice, printed = random.Random(), 0
for line in lines(int(given["seed"]), {MOST_BYTES}):
    left = line
    while left:
        left = left[os.write(1, left):]
    printed += len(line)
    os.write(note, b"%d\\n" % printed)
    if dice.random() < given["pauses"]:
        time.sleep(0.001)
time.sleep(60)
"""
)


def printed_bytes(note: Path) -> int:
    """Return how many bytes an agent had printed in whole lines, by its own notes."""
    *_, last, _ = ["0", *note.read_text().split("\n")] if note.exists() else ["0", ""]
    return int(last)


@pytest.mark.parametrize("round_number", range(ROUNDS))
def test_every_line_that_was_printed_before_a_kill_at_a_random_moment_is_kept_once(
    new_home: NewHome, tmp_path: Path, round_number: int
) -> None:
    space: dict[str, Any] = {}
    exec(LINES, space)  # noqa: S102 - the agent's own words
    home = new_home(engines={"noisy": NOISY})
    service, api = home.start()
    notes = {f"run-{seed}": tmp_path / f"note-{seed}" for seed in range(4)}
    for seed, (run_id, note) in enumerate(notes.items()):
        # Two print as fast as they can, two with pauses.
        given = {"seed": seed, "note": str(note), "pauses": 0.2 if seed > 1 else 0.0}
        api.create("noisy", given, run_id=run_id)
    until(lambda: any(map(printed_bytes, notes.values())), "an agent prints")
    time.sleep(random.uniform(0, 1.0))  # noqa: S311 - the moment is the test
    service.kill()
    _, api = home.start()

    for seed, (run_id, note) in enumerate(notes.items()):
        kept = kept_output(api, run_id)
        whole = b"".join(space["lines"](seed, MOST_BYTES))
        assert len(kept) >= printed_bytes(note)
        assert whole.startswith(kept)
        assert kept.endswith(b"\n") or not kept
    assert rests(home) == []
