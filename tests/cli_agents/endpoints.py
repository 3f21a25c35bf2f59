"""A model endpoint on loopback, in three vendors' dialects, that writes down what it is asked.

It speaks just enough of the OpenAI Responses, Gemini and Anthropic Messages protocols for their
CLIs to have a conversation with it. What it answers is decided from the request alone, so that
retries, side questions (a title for the conversation) and restarts change nothing.

Its address also serves as the proxy for everything else: a CLI that wants to leave the machine is
refused, and `outside` says where it wanted to go.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

Json: TypeAlias = dict[str, Any]

ASK: Final = "ASK"
HANG: Final = "HANG"
REFUSE: Final = "REFUSE"
SHELL: Final = "SHELL:"
"""Words in a prompt that ask for a question, for an answer that does not end, for an error, or for
the rest of their line as a command in the CLI's shell."""
TOOL_ANSWERS: Final = ("function_call_output", "functionResponse", "tool_result")
REFUSAL: Final = "the model is not for you"
QUESTION: Final = "Which port?"
OPTIONS: Final = ["Ostend", "Hull"]
HANG_S: Final = 120.0
BEAT_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model says; `hangs` stops in the middle of it. Or a command that it wants to be
    carried out, or why it says nothing."""

    text: str = ""
    hangs: bool = False
    command: str | None = None
    refusal: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request to the model. `texts` are all texts of its conversation, in order;
    `carried_out` tells that a tool's answer is among it."""

    path: str
    texts: tuple[str, ...]
    carried_out: bool
    at: float

    def saw(self, words: str) -> bool:
        """True when the conversation holds these words."""
        return any(words in text for text in self.texts)


Script: TypeAlias = Callable[[Asked], Reply]


def question_then_result(asked: Asked) -> Reply:
    """Ask on the first turn and end with a result on the next; hang or refuse on demand."""
    if asked.saw(REFUSE):
        return Reply(refusal=REFUSAL)
    if command := command_in(asked):
        return Reply(command=command)
    if asked.saw(HANG):
        return Reply('{"result": {"never": "said"}}', hangs=True)
    if asked.saw(ASK) and not asked.saw("The user answers:"):
        return Reply(json.dumps({"ask_user": {"prompt": QUESTION, "options": OPTIONS}}))
    return Reply(json.dumps({"result": {"answers": answers_in(asked)}}))


def command_in(asked: Asked) -> str | None:
    """Return the command that a text asks for, unless that was carried out, or refused."""
    wanted = [text.partition(SHELL)[2] for text in asked.texts if SHELL in text]
    if not wanted or asked.carried_out:
        return None
    return wanted[0].partition("\n")[0].strip()


def answers_in(asked: Asked) -> list[str]:
    """Return what the user had answered, of all that the model was told."""
    marked = [text.partition("The user answers:\n\n") for text in asked.texts]
    return [answer.strip() for _, found, answer in marked if found]


def texts_in(value: object) -> Iterator[str]:
    """Yield every `text` and every plain `content` of a conversation, in order."""
    if isinstance(value, list):
        for each in value:
            yield from texts_in(each)
    elif isinstance(value, dict):
        for name, each in value.items():
            if name in {"text", "content"} and isinstance(each, str):
                yield each
            else:
                yield from texts_in(each)


class ModelEndpoint:
    """A server of its own thread and port; leaving it ends every answer that hangs."""

    def __init__(self, script: Script = question_then_result) -> None:
        self.asked: list[Asked] = []
        self.outside: list[str] = []
        self.unknown: list[str] = []
        self.ending = threading.Event()
        self._script = script
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """Where it is, without a path."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ending.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()  # waits for the threads of the answers

    def answer(self, path: str, conversation: object) -> Reply:
        """Write a request down and decide what the model says to it."""
        raw = json.dumps(conversation)
        asked = Asked(
            path=path,
            texts=tuple(texts_in(conversation)),
            carried_out=any(f'"{word}"' in raw for word in TOOL_ANSWERS),
            at=time.monotonic(),
        )
        self.asked.append(asked)
        return self._script(asked)

    def saw(self, *words: str) -> bool:
        """True when one request held all of these words."""
        return any(all(asked.saw(each) for each in words) for asked in self.asked)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        return type("Handler", (_Handler,), {"endpoint": self})


class _Handler(BaseHTTPRequestHandler):
    endpoint: ModelEndpoint
    protocol_version = "HTTP/1.1"
    timeout = 30.0  # of a connection that says nothing

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        for ending, (conversation, speak) in DIALECTS.items():
            if path.endswith(ending):
                reply = self.endpoint.answer(path, body.get(conversation))
                if reply.refusal is None:
                    self._stream(speak(reply), hangs=reply.hangs)
                else:
                    self._json({"error": {"message": reply.refusal, "code": 400}}, status=400)
                return
        self.endpoint.unknown.append(f"POST {path}")
        self._json({}, status=404)

    def do_GET(self) -> None:
        """Tell of no models."""
        self._json({"data": [], "models": []})

    def do_HEAD(self) -> None:
        """Answer what asks whether anybody is there."""
        self.do_GET()

    def do_CONNECT(self) -> None:
        """Refuse to be the way out."""
        self.endpoint.outside.append(self.path)
        self._json({}, status=403)

    def _body(self) -> Json:
        data = self.rfile.read(int(self.headers["content-length"]))
        body: Json = json.loads(data)
        return body

    def _json(self, value: object, *, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _stream(self, events: list[str], *, hangs: bool) -> None:
        """Send server-sent events; one that hangs sends the first ones, and then only beats."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for event in events[: len(events) // 2] if hangs else events:
                self._chunk(event)
            ends = time.monotonic() + HANG_S
            while hangs and time.monotonic() < ends and not self.endpoint.ending.wait(BEAT_S):
                self._chunk(": still there\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the CLI was killed
            self.close_connection = True

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base
        """Say nothing: `asked` has it."""


# -- what a reply looks like on the wire ---------------------------------------------------------


def _event(value: Json) -> str:
    return f"event: {value['type']}\ndata: {json.dumps(value)}\n\n"


def _halves(text: str) -> tuple[str, str]:
    return text[: len(text) // 2], text[len(text) // 2 :]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{time.time_ns():x}"


def openai(reply: Reply) -> list[str]:
    """Return the events of an answer of OpenAI's Responses API."""
    response, message = _new_id("resp"), _new_id("msg")
    usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15}
    details = {"input_tokens_details": None, "output_tokens_details": None}
    ended = {"id": response, "usage": {**usage, **details}}
    if reply.command is None:
        said = _openai_text(message, reply.text)
    else:
        arguments = json.dumps({"cmd": reply.command, "yield_time_ms": 30_000})
        call = {"type": "function_call", "name": "exec_command", "arguments": arguments}
        item = {**call, "id": message, "call_id": _new_id("call")}
        said = [_event({"type": "response.output_item.done", "item": item})]
    return [
        _event({"type": "response.created", "response": {"id": response}}),
        *said,
        _event({"type": "response.completed", "response": ended}),
    ]


def _openai_text(message: str, text: str) -> list[str]:
    item: Json = {"type": "message", "role": "assistant", "id": message, "content": []}
    whole = {**item, "content": [{"type": "output_text", "text": text}]}
    deltas = [{"delta": half, "item_id": message} for half in _halves(text)]
    return [
        _event({"type": "response.output_item.added", "item": item}),
        *(_event({"type": "response.output_text.delta", **delta}) for delta in deltas),
        _event({"type": "response.output_item.done", "item": whole}),
    ]


def gemini(reply: Reply) -> list[str]:
    """Return the events of an answer of the Gemini API."""
    usage = {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 15}
    parts: list[Json] = [{"text": half} for half in _halves(reply.text)]
    if reply.command is not None:
        call = {"name": "run_shell_command", "args": {"command": reply.command}}
        parts = [{"functionCall": call}]

    def event(part: Json, **more: str) -> str:
        candidate = {"content": {"role": "model", "parts": [part]}, "index": 0, **more}
        told = {"candidates": [candidate], "usageMetadata": usage, "modelVersion": "model"}
        return f"data: {json.dumps(told)}\r\n\r\n"

    return [*(event(part) for part in parts[:-1]), event(parts[-1], finishReason="STOP")]


def anthropic(reply: Reply) -> list[str]:
    """Return the events of an answer of Anthropic's Messages API."""
    message: Json = {
        "id": _new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": "model",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": 10, "output_tokens": 1},
    }
    block: Json = {"type": "text", "text": ""}
    deltas = [{"type": "text_delta", "text": half} for half in _halves(reply.text)]
    reason = "end_turn"
    if reply.command is not None:
        block = {"type": "tool_use", "id": _new_id("toolu"), "name": "Bash", "input": {}}
        given = json.dumps({"command": reply.command, "description": "as asked"})
        deltas = [{"type": "input_json_delta", "partial_json": given}]
        reason = "tool_use"
    ended = {"stop_reason": reason, "stop_sequence": None}
    return [
        _event({"type": "message_start", "message": message}),
        _event({"type": "content_block_start", "index": 0, "content_block": block}),
        *(_event({"type": "content_block_delta", "index": 0, "delta": delta}) for delta in deltas),
        _event({"type": "content_block_stop", "index": 0}),
        _event({"type": "message_delta", "delta": ended, "usage": {"output_tokens": 5}}),
        _event({"type": "message_stop"}),
    ]


DIALECTS: Final[Mapping[str, tuple[str, Callable[[Reply], list[str]]]]] = {
    "/responses": ("input", openai),
    ":streamGenerateContent": ("contents", gemini),
    "/messages": ("messages", anthropic),
}
"""By the end of a path: where the conversation is in a request, and how an answer is put."""
