"""Stands in for an agent CLI: `pretend_cli.py codex|gemini|claude`, then the real one's arguments.

It takes the arguments of codex-cli 0.171.0, gemini-cli 0.61.0 and claude-code 2.1.197, and prints,
stores sessions and refuses as they do. Its model asks a question in the first turn. In a resumed
turn, its result contains the answer and the prompt of the first turn.

Each call of its model reads 100 tokens (60 from its cache) and writes 10 (4 of them reasoning,
where the CLI reports that). Codex reports the total of its thread; Claude Code (2.1.332) does so by
modelUsage and the cost, and reports its process beside; Gemini CLI reports its process. None
reports the calls of a process that was killed.
Claude Code calls Bash as the lines `CALLS: a | b` of the first prompt say, in one message for each
line, and runs the hooks of `--settings`. Its quirks with deferred calls are those of 2.1.197.

Words in a prompt: HANG never ends (60 s at most), HANG_UNNAMED neither, and does not report its
session; HANG_ONCE ends in the turn that is told of the interruption. FAIL fails. REFUSED calls a
model that refuses its credentials, for ever. Gemini with TOOL calls a tool. Codex with FAR_FUTURE
reports a session id with a time beyond all clocks.

`STEPS FOLDER` has the CLI run three commands, one for each step whose result it does not find in
its session; `steps` says what they leave in the folder, and where a turn stops. A kill leaves in
the session what it leaves with the real CLIs: as the id is printed, nothing, and with Gemini a
session that it does not resume; in a tool, no trace of the call, and with Codex the call as
aborted; after the result of a tool, the call and its result, and with Gemini the result twice.
Gemini does not resume a session with two responses to a call.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

ASK = '{"ask_user": {"prompt": "Where to?", "options": ["Köln", "Ulm"]}}'
BEYOND = "ffffffff-ffff-7fff-8fff-ffffffffffff"
HOME = Path(os.environ["HOME"])
CWD = str(Path.cwd())


def print_event(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def write_handle_to_stderr(handle: str) -> None:
    """Write the handle to standard error, in two pieces."""
    for piece in (f"in {handle[:18]}", f"{handle[18:]}\n"):
        print(piece, end="", file=sys.stderr, flush=True)
        time.sleep(0.02)


def refuse(code: int, why: str) -> NoReturn:
    print(why, file=sys.stderr, flush=True)
    sys.exit(code)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def append_lines(path: Path, *lines: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def refused_attempts(prompt: str) -> Iterator[int]:
    if "REFUSED" in prompt:
        for attempt in count(1):
            yield attempt
            time.sleep(0.05)


def stop_if_wanted(prompt: str, moment: str) -> None:
    """Wait for a kill, if the test wants one at this moment. See `steps`."""
    wanted = re.search(r"STEPS (\S+)", prompt)
    if wanted and (Path(wanted[1]) / f"stop-{moment}").exists():
        (Path(wanted[1]) / "stopped").touch()
        time.sleep(60)


def steps(
    task: str,
    prompt: str,
    seen: list[str],
    store: Callable[[str, str, str], None],
    begin: Callable[[str], None] = lambda call: None,
) -> str | None:
    """Run the commands of the steps that are not `seen`; return the last text of the model.

    Each call has an id of its own, which its command appends to the file `begun`, and to `ended`
    when it ends. The turn stops at a moment if the folder has a file of that name: `stop-id`,
    `stop-tool` (in step 2), `stop-result` (after step 1).

    Args:
        seen: the results in the session.
        store: takes the id, the command and the result of a call.
        begin: takes the id of a call before its command runs.
    """
    wanted = re.search(r"STEPS (\S+)", task)
    if wanted is None:
        return None
    folder = wanted[1]
    for step in "123":
        if f"finished {step}" in seen:
            continue
        call = f"{step}-{secrets.token_hex(8)}"
        stop = f"test -e {folder}/stop-tool && touch {folder}/stopped && exec sleep 60;"
        command = (
            f"echo {call} >> {folder}/begun; {stop if step == '2' else ''}"
            f" echo {call} >> {folder}/ended; printf 'finished {step}'"
        )
        begin(call)
        ran = subprocess.run(["/bin/sh", "-c", command], stdout=subprocess.PIPE, check=False)
        if ran.returncode:  # a kill ends the command first, and this process next
            time.sleep(60)
        store(call, command, ran.stdout.decode())
        if step == "1":
            stop_if_wanted(task, "result")
    return json.dumps({"result": {"steps": 3, "notified": "your process was found" in prompt}})


def answer_of_model(prompt: str, earlier: str | None) -> str:
    if "HANG" in prompt and not ("HANG_ONCE" in prompt and "your process was found" in prompt):
        time.sleep(60)
    if earlier is None:
        return ASK
    return json.dumps({"result": {"first": earlier, "answer": prompt}})


def uuid7() -> str:
    stamp = int(time.time() * 1000).to_bytes(6, "big")
    raw = bytearray(stamp + secrets.token_bytes(10))
    raw[6], raw[8] = raw[6] & 0x0F | 0x70, raw[8] & 0x3F | 0x80
    return str(uuid.UUID(bytes=bytes(raw)))


def option(arguments: list[str], name: str) -> str | None:
    return arguments[arguments.index(name) + 1] if name in arguments else None


def codex(arguments: list[str], prompt: str) -> None:
    home = Path(os.environ.get("CODEX_HOME") or HOME / ".codex")
    if "--skip-git-repo-check" not in arguments:
        refuse(1, "Not inside a trusted directory and --skip-git-repo-check was not specified.")
    earlier, handle = None, uuid7()
    if arguments[:2] == ["exec", "resume"]:
        handle = arguments[2]
        found = list(home.glob(f"sessions/*/*/*/rollout-*-{handle}.jsonl"))
        if not found:
            refuse(
                1, f"Error: thread/resume failed: no rollout found for thread id {handle} (code 1)"
            )
        path = found[0]
        earlier = lines_of(path)[2]["payload"]["content"][0]["text"]
    else:
        handle = BEYOND if "FAR_FUTURE" in prompt else handle
        day, now = time.strftime("%Y/%m/%d"), time.strftime("%Y-%m-%dT%H-%M-%S")
        path = home / "sessions" / day / f"rollout-{now}-{handle}.jsonl"
    write_handle_to_stderr(handle)
    print_event({"type": "thread.started", "thread_id": handle})
    if earlier is None:
        stop_if_wanted(prompt, "id")
        append_lines(
            path,
            {"ordinal": 0, "type": "session_meta",
             "payload": {"session_id": handle, "id": handle, "cwd": CWD}},
        )  # fmt: skip
    print_event({"type": "turn.started"})
    append_lines(
        path,
        {"type": "event_msg", "payload": {"type": "task_started"}},
        {"type": "response_item",
         "payload": {"type": "message", "role": "user", "content": [{"text": prompt}]}},
    )  # fmt: skip
    if "FAIL" in prompt:
        print_event(
            {"type": "turn.failed", "error": {"message": "unexpected status 400 Bad Request"}}
        )
        sys.exit(1)
    for attempt in refused_attempts(prompt):
        print_event({"type": "error", "message": f"Reconnecting... {attempt}/5 (401 Unauthorized)"})
    text = codex_steps(path, earlier or prompt, prompt) or answer_of_model(prompt, earlier)
    store_codex_usage(path)
    append_lines(
        path,
        {"type": "response_item",
         "payload": {"type": "message", "role": "assistant", "content": [{"text": text}]}},
        {"type": "event_msg", "payload": {"type": "task_complete", "last_agent_message": text}},
    )  # fmt: skip
    item = {"id": "item_1", "type": "agent_message", "text": text}
    print_event({"type": "item.completed", "item": item})
    print_event({"type": "turn.completed", "usage": codex_usage(codex_calls(path))})


def codex_usage(calls: int) -> dict[str, int]:
    used = {"input_tokens": 100, "cached_input_tokens": 60, "cache_write_input_tokens": 0,
            "output_tokens": 10, "reasoning_output_tokens": 4}  # fmt: skip
    return {name: calls * tokens for name, tokens in used.items()}


def codex_calls(path: Path) -> int:
    """Return how many calls of the model are in the session."""
    return sum(line["type"] == "token_usage_record" for line in lines_of(path))


def store_codex_usage(path: Path) -> None:
    """Add a call of the model to both totals of the session."""
    total = codex_usage(codex_calls(path) + 1)
    told = {"type": "token_count", "info": {"total_token_usage": total}}
    append_lines(
        path,
        {"type": "token_usage_record", "payload": {"thread_token_usage": total}},
        {"type": "event_msg", "payload": told},
    )


def codex_steps(path: Path, task: str, prompt: str) -> str | None:
    """Run the steps of a task. A call is in the session before it runs, its output afterwards."""
    payloads = [line["payload"] for line in lines_of(path)]
    called = {each["call_id"] for each in payloads if each.get("type") == "function_call"}
    outputs = [each for each in payloads if each.get("type") == "function_call_output"]
    for key in called - {each["call_id"] for each in outputs}:
        aborted = {"type": "function_call_output", "call_id": key, "output": "aborted"}
        append_lines(path, {"type": "response_item", "payload": aborted})

    def store(call: str, command: str, result: str) -> None:
        asked = {"type": "function_call", "call_id": call, "arguments": command}
        told = {"type": "function_call_output", "call_id": call, "output": result}
        append_lines(path, *({"type": "response_item", "payload": one} for one in (asked, told)))
        store_codex_usage(path)

    return steps(task, prompt, [each["output"] for each in outputs], store)


GEMINI_TOKENS = {"input": 100, "output": 6, "cached": 60, "thoughts": 4, "tool": 0, "total": 110}


def gemini_calls(path: Path) -> int:
    """Return how many calls of the model are in the session."""
    return sum("tokens" in each for each in gemini_messages(path).values())


def gemini_messages(path: Path) -> dict[str, dict[str, Any]]:
    """Return the messages of a session. A later line with the same id replaces the one before."""
    return {line["id"]: line for line in lines_of(path) if "id" in line}


def gemini_steps(path: Path, task: str, prompt: str) -> str | None:
    """Run the steps of a task. The session gets each response twice."""
    messages = gemini_messages(path).values()
    told = [part for each in messages if each["type"] == "user" for part in each["content"]]
    found = [each["functionResponse"] for each in told if "functionResponse" in each]

    outputs = [each["response"]["output"] for each in found]
    return steps(task, prompt, outputs, partial(store_gemini_call, path))


def store_gemini_call(path: Path, call: str, command: str, result: str) -> None:
    response = {"id": call, "name": "run_shell_command", "response": {"output": result}}
    content = [{"functionResponse": response}]
    asked = {"id": call, "name": "run_shell_command", "args": {"command": command}}
    append_lines(
        path,
        {"id": f"g-{call}", "type": "gemini", "content": "", "tokens": GEMINI_TOKENS,
         "toolCalls": [{**asked, "result": content}]},
        {"id": f"u-{call}", "type": "user", "content": content},
    )  # fmt: skip


def gemini_has_two_responses(path: Path) -> bool:
    """Return whether a call in the session has more than one response."""
    messages = gemini_messages(path)
    calls = [call for each in messages.values() for call in each.get("toolCalls", [])]
    by_user = {call["id"]: messages.get(f"u-{call['id']}", {}) for call in calls}
    return any(
        len(call.get("result", [])) + len(by_user[call["id"]].get("content", [])) > 1
        for call in calls
    )


def gemini(arguments: list[str], prompt: str) -> None:
    root = Path(os.environ.get("GEMINI_CLI_HOME") or HOME) / ".gemini"
    trusted = root / "trustedFolders.json"
    if not trusted.exists() or json.loads(trusted.read_text()).get(CWD) != "TRUST_FOLDER":
        refuse(55, "Gemini CLI is not running in a trusted directory.")
    slug = hashlib.sha256(CWD.encode()).hexdigest()[:8]  # the real one counts; a hash has no race
    (root / "tmp" / slug).mkdir(parents=True, exist_ok=True)
    (root / "tmp" / slug / ".project_root").write_text(CWD)
    chats = root / "tmp" / slug / "chats"
    earlier, handle = None, option(arguments, "--resume")
    if handle is not None:
        found = sorted(chats.glob(f"session-*-{handle[:8]}.jsonl"))
        if not found or len(found[0].read_text().splitlines()) < 2:
            refuse(42, "Error resuming session: No previous sessions found for this project.")
        path = found[0]
        earlier = lines_of(path)[1]["content"][0]["text"]
        if gemini_has_two_responses(path):
            refuse(144, "function response parts must equal function call parts")
    else:
        handle = str(uuid.uuid4())
        path = chats / f"session-{time.strftime('%Y-%m-%dT%H-%M')}-{handle[:8]}.jsonl"
        digest = hashlib.sha256(CWD.encode()).hexdigest()
        append_lines(path, {"sessionId": handle, "projectHash": digest, "kind": "main"})
    write_handle_to_stderr(handle)
    print_event({"type": "init", "session_id": handle, "model": "m"})
    if earlier is None:
        stop_if_wanted(prompt, "id")
    print_event({"type": "message", "role": "user", "content": prompt})
    append_lines(path, {"id": "u", "type": "user", "content": [{"text": prompt}]})
    if "FAIL" in prompt:
        error = {"type": "unknown", "message": "unexpected status 400"}
        print_event({"type": "result", "status": "error", "error": error})
        sys.exit(144)
    for attempt in refused_attempts(prompt):
        print(f"Attempt {attempt} failed with status 401. Retrying", file=sys.stderr, flush=True)
    if "TOOL" in prompt:
        store_gemini_call(path, "tool", "true", "done")
    calls_before = gemini_calls(path)
    text = gemini_steps(path, earlier or prompt, prompt) or answer_of_model(prompt, earlier)
    answer = {"id": f"g-{secrets.token_hex(8)}", "type": "gemini", "content": text}
    append_lines(path, {**answer, "tokens": GEMINI_TOKENS}, {"$set": {"lastUpdated": "now"}})
    for piece in (text[:9], text[9:]):
        print_event({"type": "message", "role": "assistant", "content": piece, "delta": True})
    one = {"total_tokens": 110, "input_tokens": 100, "output_tokens": 6, "cached": 60, "input": 40}
    used = {name: (gemini_calls(path) - calls_before) * tokens for name, tokens in one.items()}
    stats = {**used, "duration_ms": 1, "tool_calls": 0, "models": {"m": used}}
    print_event({"type": "result", "status": "success", "stats": stats})


class ClaudeTools:
    """The calls of Bash in one session of Claude Code."""

    def __init__(self, arguments: list[str], path: Path, seen: dict[str, Any]) -> None:
        settings = json.loads(option(arguments, "--settings") or "{}")
        entries = settings.get("hooks", {}).get("PreToolUse", [])
        self.hooks = [hook["command"] for entry in entries for hook in entry["hooks"]]
        self.path, self.seen = path, seen

    def make_calls(self, wanted: list[list[str]], prompt: str) -> bool:
        """Make the calls that the model still wants; return False when one was deferred."""
        again = prompt.partition("with exactly this input:\n\n")[2]
        if again and not self.make({"command": json.loads(again)["command"]}, is_wanted=False):
            return False
        made = sum(bool(line.get("wanted")) for line in lines_of(self.path))
        return all(
            self.make(*({"command": each.strip()} for each in commands), is_wanted=True)
            for commands in wanted[made:]
        )

    def make(self, *inputs: dict[str, Any], is_wanted: bool) -> bool:
        ids = [f"toolu_{secrets.token_hex(8)}" for _ in inputs]
        calls = [
            {"type": "tool_use", "id": key, "name": "Bash", "input": each}
            for key, each in zip(ids, inputs, strict=True)
        ]
        message = {"role": "assistant", "content": calls, "stop_reason": "tool_use"}
        append_lines(
            self.path, {"type": "assistant", "message": message, "wanted": is_wanted, **self.seen}
        )
        for call in calls:
            print_event({"type": "assistant", "message": {"content": [call]}})
        return self.run(calls)

    def return_to_deferred_call(self) -> bool:
        """Run the call that was deferred last; return False when it is deferred again.

        Without a prompt there must be one. With one, the prompt comes next in any case.
        """
        lines = lines_of(self.path)
        markers = [line["attachment"] for line in lines if line["type"] == "attachment"]
        answered = [each["tool_use_id"] for each in self._results()]
        if not markers or markers[-1]["toolUseID"] in answered:
            if not PROMPT:
                refuse(1, "Error: No deferred tool marker found in the resumed session.")
            return True
        messages = [line["message"]["content"] for line in lines if line.get("wanted") is not None]
        (call,) = (each for each in messages[-1] if each["id"] == markers[-1]["toolUseID"])
        return self.run([call], is_lost=call is not messages[-1][-1])

    def run(self, calls: list[dict[str, Any]], *, is_lost: bool = False) -> bool:
        """Run calls as their hooks say; return False when one was deferred. All hooks at once."""
        decided = [[self._start(hook, call) for hook in self.hooks] for call in calls]
        deferred = None
        for call, started in zip(calls, decided, strict=True):
            decisions = [self._decision(process) for process in started]
            kinds = {each.get("permissionDecision"): each for each in decisions}
            if "deny" in kinds:
                self._answer(call, kinds["deny"]["permissionDecisionReason"], is_lost=is_lost)
            elif "defer" in kinds:
                deferred = call
                marker = {"type": "hook_deferred_tool", "toolUseID": call["id"]}
                append_lines(self.path, {"type": "attachment", "attachment": marker, **self.seen})
            else:
                given = kinds.get("allow", {}).get("updatedInput", call["input"])
                ran = subprocess.run(
                    ["/bin/sh", "-c", given["command"]], capture_output=True, text=True, check=False
                )
                self._answer(call, ran.stdout, is_lost=is_lost)
        if deferred is not None:
            self._defer(deferred)
        return deferred is None

    def _start(self, hook: str, call: dict[str, Any]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["/bin/sh", "-c", hook],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        asked = {
            "session_id": self.seen["sessionId"],
            "hook_event_name": "PreToolUse",
            "tool_name": call["name"],
            "tool_input": call["input"],
            "tool_use_id": call["id"],
        }
        assert process.stdin is not None
        process.stdin.write(json.dumps(asked))
        process.stdin.close()
        process.stdin = None
        return process

    def _decision(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        out, errors = process.communicate()
        if process.returncode == 2:
            return {"permissionDecision": "deny", "permissionDecisionReason": errors}
        if process.returncode or not out:
            return {}  # another failure of a hook does not stop the real one either
        decision: dict[str, Any] = json.loads(out)["hookSpecificOutput"]
        return decision

    def _answer(self, call: dict[str, Any], content: str, *, is_lost: bool) -> None:
        result = {"type": "tool_result", "tool_use_id": call["id"], "content": content}
        message = {"role": "user", "content": [result]}
        append_lines(self.path, {"type": "user", "message": message, "lost": is_lost, **self.seen})
        print_event({"type": "user", "message": message})

    def _defer(self, call: dict[str, Any]) -> None:
        append_lines(self.path, {"type": "last-prompt", "sessionId": self.seen["sessionId"]})
        held = {name: call[name] for name in ("id", "name", "input")}
        print_event(
            {"type": "result", "subtype": "success", "is_error": False, "result": "",
             "stop_reason": "tool_deferred", "session_id": self.seen["sessionId"],
             "deferred_tool_use": held}
        )  # fmt: skip

    def _results(self) -> list[dict[str, Any]]:
        found = [line for line in lines_of(self.path) if "lost" in line]
        lost = {"content": "[Tool result missing due to internal error]"}
        return [each["message"]["content"][0] | (lost if each["lost"] else {}) for each in found]

    def steps(self, task: str, prompt: str) -> str | None:
        """Run the steps of a task. The session gets call and result together, the output before."""

        def begin(call: str) -> None:
            content = [{"type": "tool_use", "id": call, "name": "Bash", "input": {}}]
            message = {**claude_answer(call, output_tokens=1), "content": content}
            print_event({"type": "assistant", "message": message, **self.printed})

        def store(call: str, command: str, result: str) -> None:
            used = {"type": "tool_use", "id": call, "name": "Bash", "input": {"command": command}}
            message = {**claude_answer(call), "content": [used]}
            append_lines(self.path, {"type": "assistant", "message": message, **self.seen})
            self._answer(used, result, is_lost=False)

        return steps(task, prompt, self.results(), store, begin)

    @property
    def printed(self) -> dict[str, str]:
        """Return what each printed event has."""
        return {"session_id": self.seen["sessionId"]}

    def results(self) -> list[str]:
        """Return the results that the model sees."""
        return [each["content"] for each in self._results()]


def claude_calls(path: Path) -> int:
    """Return how many answers of the model are in the session."""
    return sum(line["type"] == "assistant" for line in lines_of(path)) if path.exists() else 0


def claude_answer(call: str, output_tokens: int = 10) -> dict[str, Any]:
    """Return a message of the model, which has the same id wherever it stands."""
    used = {"input_tokens": 40, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 60,
            "output_tokens": output_tokens}  # fmt: skip
    return {"id": f"msg_{call}", "role": "assistant", "model": "m", "usage": used}


def claude(arguments: list[str], prompt: str) -> None:
    if "--version" in arguments:
        print(f"{option(arguments, '--pretend-version') or '2.1.197'} (Claude Code)")
        return
    variable = os.environ.get("CLAUDE_CONFIG_DIR")
    settings = Path(variable or HOME) / ".claude.json"
    home = Path(variable) if variable else HOME / ".claude"
    kept = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
    kept["numStartups"] = kept.get("numStartups", 0) + 1
    fresh = settings.with_name(f".claude.json.{os.getpid()}")
    fresh.write_text(json.dumps(kept, indent=2), "utf-8")
    fresh.replace(settings)
    earlier, handle = None, option(arguments, "--session-id")
    resumed = option(arguments, "--resume")
    folder = home / "projects" / re.sub("[^A-Za-z0-9]", "-", CWD)
    path = folder / f"{resumed or handle}.jsonl"
    if resumed is not None:
        if not path.exists() or not path.stat().st_size:
            errors = [f"No conversation found with session ID: {resumed}"]
            print_event(
                {"type": "result", "subtype": "error_during_execution", "is_error": True,
                 "session_id": resumed, "errors": errors}
            )  # fmt: skip
            refuse(1, errors[0])
        handle, earlier = resumed, lines_of(path)[0]["message"]["content"]
    if "HANG_UNNAMED" in prompt:
        time.sleep(60)
    write_handle_to_stderr(handle or "")
    seen = {"cwd": CWD, "sessionId": handle}
    tools = ClaudeTools(arguments, path, seen)
    before = claude_calls(path)
    if resumed is not None and not tools.return_to_deferred_call() and not prompt:
        return
    prompt = prompt or "Continue from where you left off."
    print_event({"type": "system", "subtype": "init", "cwd": CWD, "session_id": handle})
    stop_if_wanted(prompt if resumed is None else "", "id")
    append_lines(path, {"type": "user", "message": {"role": "user", "content": prompt}, **seen})
    if "FAIL" in prompt:
        print_event({"type": "result", "subtype": "success", "is_error": True, "session_id": handle,
             "result": "API Error: unexpected status 400"})  # fmt: skip
        sys.exit(1)
    for attempt in refused_attempts(prompt):
        print_event({"type": "system", "subtype": "api_retry", "attempt": attempt,
             "error_status": 401, "error": "authentication_failed"})  # fmt: skip
    task = (earlier or prompt).splitlines()
    wanted = [line.partition("CALLS: ")[2].split(" | ") for line in task if "CALLS: " in line]
    if wanted and not tools.make_calls(wanted, prompt):
        return
    if wanted:
        text = json.dumps({"result": {"results": tools.results()}})
    else:
        text = tools.steps(earlier or prompt, prompt) or answer_of_model(prompt, earlier)
    answer = secrets.token_hex(8)
    message = {**claude_answer(answer), "content": [{"type": "text", "text": text}]}
    append_lines(
        path,
        {"type": "assistant", "message": message, **seen},
        {"type": "last-prompt", "lastPrompt": prompt, "sessionId": handle},
    )
    usage = claude_answer(answer, output_tokens=1)["usage"]
    print_event({"type": "assistant", "message": {**message, "usage": usage}, **tools.printed})
    calls = claude_calls(path)
    own = calls - before
    used = {"input_tokens": 40 * own, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 60 * own, "output_tokens": 10 * own}  # fmt: skip
    total = {"inputTokens": 40 * calls, "cacheReadInputTokens": 60 * calls,
             "cacheCreationInputTokens": 0, "outputTokens": 10 * calls}  # fmt: skip
    print_event({"type": "result", "subtype": "success", "is_error": False, "result": text,
         "session_id": handle, "usage": used, "modelUsage": {"m": total},
         "total_cost_usd": 0.25 * calls})  # fmt: skip


signal.alarm(300)
PROMPT = sys.stdin.buffer.read().decode()
{"codex": codex, "gemini": gemini, "claude": claude}[sys.argv[1]](sys.argv[2:], PROMPT)
