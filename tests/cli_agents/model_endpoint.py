"""A model endpoint on loopback that speaks three vendors' protocols and records every request.

It implements enough of the OpenAI Responses, Gemini and Anthropic Messages APIs for a conversation
with the CLIs of these vendors. It answers a conversation that breaks its vendor's rules for tool
calls with status 400, and records what was wrong in `violations`. A reply depends on the request,
so that retries, requests for a title of the conversation, and restarts change nothing.

The endpoint is also the proxy of the CLIs. It refuses every connection to another machine and
records the destination in `outside`.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

from cli_agents.vendor_rules import anthropic_violations, gemini_violations, openai_violations

Json: TypeAlias = dict[str, Any]

ASK: Final = "ASK"
HANG: Final = "HANG"
REFUSE: Final = "REFUSE"
SHELL: Final = "SHELL:"
"""Words in a prompt. ASK: the model asks a question. HANG: its answer does not end. REFUSE: it
answers with an error. SHELL: it has the CLI run the rest of the line as a shell command."""
TOOL_ANSWERS: Final = ("function_call_output", "functionResponse", "tool_result")
REFUSAL: Final = "the model is not for you"
QUESTION: Final = "Which port?"
OPTIONS: Final = ["Ostend", "Hull"]
HANG_S: Final = 120.0
NO_HEADERS: Final[Mapping[str, str]] = {}
BEAT_S: Final = 0.2
MOST_SHARES: Final = 8
"""How many answers have a share of their own. A CLI compacts a conversation with more tokens."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the model.

    Attributes:
        text: the text of the answer.
        hangs: the endpoint sends only the first half, and keeps the connection open.
        command: a shell command for the CLI, instead of a text.
        more: further commands in the same message, of Anthropic's model only.
        errand: the prompt of a subagent that the CLI starts, of Anthropic's model only.
        refusal: the message of an error, instead of an answer.
        status: the HTTP status of the refusal.
        retry_after_s: the refusal's header of that name; None: it has none.
        is_cut: the endpoint sends only the first half, and closes the connection.
        share: what its tokens are multiplied with; `Answer` says how.
    """

    text: str = ""
    hangs: bool = False
    command: str | None = None
    more: tuple[str, ...] = ()
    errand: str | None = None
    refusal: str | None = None
    status: int = 400
    retry_after_s: int | None = None
    is_cut: bool = False
    share: int = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that the endpoint has sent whole.

    Attributes:
        share: the answer has `10 * share` tokens of input, `4 * share` of them cached, and
            `5 * share` of output. It is another power of 3 for each answer, so the usage of a run
            shows which answers were counted, and how often.
        command: the command that it had the CLI run; None: none.
    """

    share: int
    command: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """One request to the model.

    Attributes:
        path: the path of the URL.
        texts: all texts of the conversation, in order.
        raw: the conversation as JSON, with tool calls and their results.
        offers_tools: the model may call tools. It may not in a request for a title.
    """

    path: str
    texts: tuple[str, ...]
    raw: str
    offers_tools: bool

    @property
    def has_tool_result(self) -> bool:
        """Whether the conversation contains the result of a tool call."""
        return any(f'"{word}"' in self.raw for word in TOOL_ANSWERS)

    def contains(self, words: str) -> bool:
        """Return whether a text of the conversation contains these words."""
        return any(words in text for text in self.texts)


Script: TypeAlias = Callable[[ModelRequest], Reply]


def question_then_result(request: ModelRequest) -> Reply:
    """Return a question for the first turn and a result for the next, or what the prompt wants."""
    if request.contains(REFUSE):
        return Reply(refusal=REFUSAL)
    if command := command_in(request):
        return Reply(command=command)
    if request.contains(HANG):
        return Reply('{"result": {"never": "said"}}', hangs=True)
    if request.contains(ASK) and not request.contains("The user answers:"):
        return Reply(json.dumps({"ask_user": {"prompt": QUESTION, "options": OPTIONS}}))
    return Reply(json.dumps({"result": {"answers": answers_in(request)}}))


def command_in(request: ModelRequest) -> str | None:
    """Return the command that the prompt wants, or None if there is none or it has a result."""
    wanted = [text.partition(SHELL)[2] for text in request.texts if SHELL in text]
    if not wanted or request.has_tool_result:
        return None
    return wanted[0].partition("\n")[0].strip()


def answers_in(request: ModelRequest) -> list[str]:
    """Return all answers of the user in the conversation."""
    marked = [text.partition("The user answers:\n\n") for text in request.texts]
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


@dataclass(frozen=True, slots=True)
class Vendor:
    """The protocol of a vendor.

    Attributes:
        conversation: the key of the conversation in a request.
        events: builds the events of an answer.
        violations: returns how a conversation breaks the vendor's rules.
        whole: builds an answer that is no stream, for a CLI that asks for such.
    """

    conversation: str
    events: Callable[[Reply], list[str]]
    violations: Callable[[Sequence[Json]], list[str]]
    whole: Callable[[Reply], Json] | None = None


class ModelEndpoint:
    """A server with a thread and a port of its own. Its exit ends every answer that hangs."""

    def __init__(self, script: Script = question_then_result) -> None:
        self.requests: list[ModelRequest] = []
        self.outside: list[str] = []
        self.unknown: list[str] = []
        self.violations: list[str] = []
        self.answered: list[Answer] = []
        self.ending = threading.Event()
        self._lock = threading.Lock()
        self._script = script
        self._shares = (3 ** min(number, MOST_SHARES) for number in itertools.count())
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        """The URL of the endpoint, without a path."""
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

    def answer(self, path: str, body: Json, vendor: Vendor) -> Reply:
        """Record a request, and return the reply of the script, or what breaks a rule."""
        conversation = body.get(vendor.conversation)
        request = ModelRequest(
            path=path,
            texts=tuple(texts_in(conversation)),
            raw=json.dumps(conversation),
            offers_tools=bool(body.get("tools")),
        )
        self.requests.append(request)
        messages = conversation if isinstance(conversation, list) else []
        if violations := vendor.violations(messages):
            self.violations += violations
            return Reply(refusal="; ".join(violations))
        reply = self._script(request)
        with self._lock:
            return replace(reply, share=next(self._shares))

    def got(self, *words: str) -> bool:
        """Return whether one request contained all of these words."""
        return any(all(request.contains(each) for each in words) for request in self.requests)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        return type("Handler", (_Handler,), {"endpoint": self})


class _Handler(BaseHTTPRequestHandler):
    endpoint: ModelEndpoint
    protocol_version = "HTTP/1.1"
    timeout = 30.0  # of an idle connection

    def do_POST(self) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        for ending, vendor in VENDORS.items():
            if path.endswith(ending):
                reply = self.endpoint.answer(path, body, vendor)
                if reply.refusal is not None:
                    self._refuse(reply)
                elif vendor.whole is not None and not body.get("stream"):
                    self._json(vendor.whole(reply))
                else:
                    self._stream(vendor.events(reply), reply)
                return
        self.endpoint.unknown.append(f"POST {path}")
        self._json({}, status=404)

    def do_GET(self) -> None:
        """Answer with an empty list of models."""
        self._json({"data": [], "models": []})

    def do_HEAD(self) -> None:
        """Answer a check whether the endpoint exists."""
        self.do_GET()

    def do_CONNECT(self) -> None:
        """Refuse, and record, a connection to another machine."""
        self.endpoint.outside.append(self.path)
        self._json({}, status=403)

    def _body(self) -> Json:
        data = self.rfile.read(int(self.headers["content-length"]))
        body: Json = json.loads(data)
        return body

    def _refuse(self, reply: Reply) -> None:
        error = {"message": reply.refusal, "code": reply.status}
        after = {} if reply.retry_after_s is None else {"retry-after": str(reply.retry_after_s)}
        self._json({"error": error}, status=reply.status, headers=after)

    def _json(
        self, value: object, *, status: int = 200, headers: Mapping[str, str] = NO_HEADERS
    ) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, value_of_header in headers.items():
            self.send_header(name, value_of_header)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _stream(self, events: list[str], reply: Reply) -> None:
        """Send server-sent events, or the first half of them if the reply hangs or is cut."""
        is_half = reply.hangs or reply.is_cut
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        try:
            for event in events[: len(events) // 2] if is_half else events:
                self._chunk(event)
            if reply.is_cut:
                self.close_connection = True
                return
            ends = time.monotonic() + HANG_S
            while reply.hangs and time.monotonic() < ends and not self.endpoint.ending.wait(BEAT_S):
                self._chunk(": still there\n\n")
            if not reply.hangs:
                self.endpoint.answered.append(Answer(reply.share, reply.command))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the CLI was killed
            self.close_connection = True

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base
        """Log nothing: `requests` has every request."""


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
    part = reply.share
    usage = {"input_tokens": 10 * part, "output_tokens": 5 * part, "total_tokens": 15 * part}
    details = {
        "input_tokens_details": {"cached_tokens": 4 * part},
        "output_tokens_details": {"reasoning_tokens": 2 * part},
    }
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
    usage = {
        "promptTokenCount": 10 * reply.share,
        "cachedContentTokenCount": 4 * reply.share,
        "candidatesTokenCount": 3 * reply.share,
        "thoughtsTokenCount": 2 * reply.share,
        "totalTokenCount": 15 * reply.share,
    }
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
    message = _anthropic_message(reply.share, [], None, output_tokens=1)
    commands = [] if reply.command is None else [reply.command, *reply.more]
    calls = [_anthropic_call(command) for command in commands]
    if reply.errand is not None:
        calls.append(_anthropic_errand(reply.errand))
    blocks = calls or [_anthropic_text(reply.text)]
    reason = "tool_use" if calls else "end_turn"
    ended = {"stop_reason": reason, "stop_sequence": None}
    return [
        _event({"type": "message_start", "message": message}),
        *(
            _event({**event, "index": index})
            for index, block in enumerate(blocks)
            for event in block
        ),
        _event(
            {"type": "message_delta", "delta": ended, "usage": {"output_tokens": 5 * reply.share}}
        ),
        _event({"type": "message_stop"}),
    ]


def anthropic_whole(reply: Reply) -> Json:
    """Return an answer of Anthropic's Messages API that is a text."""
    text = [{"type": "text", "text": reply.text}]
    return _anthropic_message(reply.share, text, "end_turn", output_tokens=5 * reply.share)


def _anthropic_message(
    share: int, content: list[Json], reason: str | None, *, output_tokens: int
) -> Json:
    read = {"input_tokens": 6 * share, "cache_read_input_tokens": 4 * share}
    used = {**read, "output_tokens": output_tokens}
    return {
        "id": _new_id("msg"),
        "type": "message",
        "role": "assistant",
        "model": "model",
        "content": content,
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": used,
    }


def _anthropic_text(text: str) -> list[Json]:
    deltas: list[Json] = [{"type": "text_delta", "text": half} for half in _halves(text)]
    return _anthropic_block({"type": "text", "text": ""}, deltas)


def _anthropic_call(command: str) -> list[Json]:
    return _anthropic_tool("Bash", {"command": command, "description": "as asked"})


def _anthropic_errand(prompt: str) -> list[Json]:
    given = {"description": "an errand", "prompt": prompt, "subagent_type": "general-purpose"}
    return _anthropic_tool("Agent", {**given, "run_in_background": False})


def _anthropic_tool(name: str, given: Json) -> list[Json]:
    block: Json = {"type": "tool_use", "id": _new_id("toolu"), "name": name, "input": {}}
    delta = {"type": "input_json_delta", "partial_json": json.dumps(given)}
    return _anthropic_block(block, [delta])


def _anthropic_block(block: Json, deltas: list[Json]) -> list[Json]:
    return [
        {"type": "content_block_start", "content_block": block},
        *({"type": "content_block_delta", "delta": delta} for delta in deltas),
        {"type": "content_block_stop"},
    ]


VENDORS: Final[Mapping[str, Vendor]] = {
    "/responses": Vendor("input", openai, openai_violations),
    ":streamGenerateContent": Vendor("contents", gemini, gemini_violations),
    "/messages": Vendor("messages", anthropic, anthropic_violations, anthropic_whole),
}
"""The vendor of a request, by the end of its path."""
