"""A scriptable agent of the JSON-lines protocol, for `runrecovery demo`, tests and first steps.

`python -m runrecovery_service.engines.demo_agent --profile resumable|sticky` obeys its input:

- `questions`: the questions to ask, one after the other, each `{"kind", "prompt", "options"}`.
- `work_s`: seconds of work before each question and before the result, with progress every 0.1 s.
- `children`: how many sleeping processes to leave behind. The last one is not a child of the agent
  and has its own session.
- `result`: further fields of the output, beside `answers`.
- `fail`: `"exit<N>"`: exit with that code after the work, instead of a question or the result.
- `hold`: true: work until a signal ends the agent.
- `ignore_sigterm`: true: ignore SIGTERM.

A resumable agent keeps its session in `<workspace>/session-<id>.json`. Like a real agent, the
demo agent does not notice the death of its service while it works. Each process ends after 600 s.
The agent imports only light modules of the standard library, so that it starts fast: argparse,
pathlib, subprocess and typing alone would double the CPU time of a start.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final

    Json = dict[str, Any]  # whatever the caller put into the run's input

LIFETIME_S: Final = 600
PROGRESS_S: Final = 0.1
CHILD_MARK: Final = "runrecovery-demo-child"
"""An argument of every process that the agent leaves behind."""

USAGE: Final = "usage: demo_agent --profile resumable|sticky"
EXIT_USAGE: Final = 2
EXIT_NO_SESSION: Final = 4
EXIT_NO_REPLY: Final = 5
EXIT_BAD_INPUT: Final = 6


class Stop(Exception):
    """Ends the agent with an exit code and a sentence on stderr."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def main() -> int:
    """Run one turn (sticky: the whole run) for the message on stdin; return the exit code."""
    signal.alarm(LIFETIME_S)  # SIGALRM ends the process, even if the agent hangs
    try:
        (_resumable if _profile() == "resumable" else _sticky)(_read_first())
    except Stop as stop:
        print(stop, file=sys.stderr)  # noqa: T201
        return stop.code
    return 0


def _profile() -> str:
    match sys.argv[1:]:
        case ["--profile", "resumable" | "sticky" as profile]:
            return profile
        case _:
            raise Stop(EXIT_USAGE, USAGE)


def _read_first() -> Json:
    message = _read()
    if message is None:
        raise Stop(EXIT_BAD_INPUT, "stdin ended before the first message")
    return message


def _read() -> Json | None:
    """Return the next message; None at the end of stdin."""
    line = sys.stdin.readline()
    if not line:
        return None
    try:
        message = json.loads(line)
    except ValueError:
        message = None
    if not isinstance(message, dict):
        raise Stop(EXIT_BAD_INPUT, "stdin is not JSON lines")
    return message


def _emit(kind: str, /, **fields: object) -> None:
    try:
        sys.stdout.write(json.dumps({**fields, "type": kind}) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # The service is dead. A real agent continues its work, so discard all further output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _resumable(message: Json) -> None:
    if message.get("type") == "resume":
        session, state = _load(message)
        interrupted = message.get("interrupted")
        if interrupted is not None:
            _emit("progress", message=f"interrupted {interrupted['times']} times")
        if reply := (interrupted or message).get("reply"):
            # By id: a reply that is delivered twice because of a crash counts once.
            state["answers"][str(reply["interaction_id"])] = reply["response"]
    else:
        session, state = os.urandom(16).hex(), {"answers": {}}
    _save(_session_file(message["workspace"], session), state)
    _emit("session", value=session)
    answers = list(state["answers"].values())
    _work(message)
    _ask_or_finish(message["input"], answers)


def _sticky(message: Json) -> None:
    answers: list[Any] = []
    _work(message)
    while _ask_or_finish(message["input"], answers):
        reply = _read()
        if reply is None:
            raise Stop(EXIT_NO_REPLY, "stdin ended while waiting for a reply")
        answers.append(reply.get("response"))
        _work_for_a_while(message["input"])


def _ask_or_finish(given: Json, answers: list[Any]) -> bool:
    """Ask the next question and return True, or print the result and return False."""
    questions = given.get("questions", [])
    if len(answers) >= len(questions):
        _emit("result", output={**given.get("result", {}), "answers": answers})
        return False
    _emit("ask", **{"kind": "open_text", "prompt": "What next?", **questions[len(answers)]})
    return True


def _work(message: Json) -> None:
    given = message["input"]
    if given.get("ignore_sigterm"):
        signal.signal(signal.SIGTERM, lambda *_: None)
    count = int(given.get("children", 0))
    for number in range(1, count + 1):
        (_leave_detached_child if number == count else _leave_child)(message["run_id"])
    _work_for_a_while(given)


def _work_for_a_while(given: Json) -> None:
    hold = given.get("hold")
    until = time.monotonic() + (LIFETIME_S if hold else float(given.get("work_s", 0)))
    began = time.monotonic()
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(PROGRESS_S, left))
        _emit("progress", message=f"worked {time.monotonic() - began:.1f} s")
    fail = re.fullmatch(r"exit(\d{1,3})", str(given.get("fail", "")))
    if fail:
        raise Stop(int(fail[1]), f"the demo agent was told to fail: {fail[0]}")


def _child_command(run_id: str) -> list[str]:
    code = f"import time; time.sleep({LIFETIME_S})"
    return [sys.executable, "-I", "-S", "-c", code, CHILD_MARK, run_id]


def _leave_child(run_id: str) -> None:
    command = _child_command(run_id)
    nothing = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    pid = os.posix_spawn(command[0], command, os.environ, file_actions=nothing)
    _emit("progress", message=f"child {pid}")


def _leave_detached_child(run_id: str) -> None:
    """Leave behind a process that is neither a child of this process nor in its session."""
    first = os.fork()
    if first:
        os.waitpid(first, 0)
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    _emit("progress", message=f"detached child {os.getpid()}")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    command = _child_command(run_id)
    os.execv(command[0], command)  # noqa: S606 - its own interpreter, its own words


def _session_file(workspace: str, session: str) -> str:
    return f"{workspace}/session-{session}.json"


def _load(message: Json) -> tuple[str, Json]:
    session = str(message["session"]["value"])
    if not re.fullmatch(r"[0-9a-f]{32}", session):
        raise Stop(EXIT_NO_SESSION, "the handle is not of a session of the demo agent")
    try:
        with open(_session_file(message["workspace"], session), encoding="utf-8") as file:  # noqa: PTH123 - pathlib is heavy
            return session, json.load(file)
    except (OSError, ValueError):
        raise Stop(EXIT_NO_SESSION, "the session cannot be resumed: its file is lost") from None


def _save(path: str, state: Json) -> None:
    fresh = f"{path}.new"
    with open(fresh, "w", encoding="utf-8") as file:  # noqa: PTH123 - pathlib is heavy
        json.dump(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)  # noqa: PTH105 - pathlib is heavy


if __name__ == "__main__":
    sys.exit(main())
