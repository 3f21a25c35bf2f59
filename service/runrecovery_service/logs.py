"""Writes log events: their stream, their form, and the redaction of secrets.

Every event is one line on standard error: a JSON object, or a coloured line if standard error is a
terminal. Events of the standard library's loggers (grpc, asyncio) are written in the same way.

The service passes no secret to a log call. gRPC itself logs metadata that are not UTF-8;
`_UndecodableMetadata` removes their values. As a last defence, the values of keys that end in one
of `SECRET_WORDS`, and passwords inside URLs, are redacted here, also inside exceptions.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from io import TextIOBase
from time import monotonic
from typing import Any, Final, TextIO, cast

from runrecovery_service.background_stream import BackgroundStream
from runrecovery_service.config.settings import LogFormat, LogLevel
from runrecovery_service.metric_counters import SharedCounter


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Make `import module` fail inside this context, unless the module was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment] # documented: makes the import fail
    try:
        yield
    finally:
        del sys.modules[module]


# structlog imports rich if rich is installed, for tracebacks that show local variables. The service
# does not use them, and the import costs a third of structlog's import time.
with _without("rich"):
    import structlog

SECRET_WORDS: Final = frozenset(
    {
        "handle",
        "session_value",
        "token",
        "password",
        "secret",
        "cookie",
        "authorization",
        "response",
        "prompt",
        "input",
    }
)
REDACTED: Final = "[redacted]"

_SECRET_KEY: Final = re.compile(rf"(?:^|_)(?:{'|'.join(sorted(SECRET_WORDS))})$", re.IGNORECASE)
# PostgreSQL quotes whole rows in the detail of an error. A value in a row can have many lines, and
# any of them can look like the next field of the error: everything up to the end is removed.
_DETAIL: Final = re.compile(r"(DETAIL|CONTEXT):.*", re.DOTALL)
_URL_PASSWORD: Final = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s/:@\"']*):[^\s\"']*@", re.IGNORECASE)
# Also matches `sslpassword` and PGPASSWORD. Inside quotes a backslash escapes. The closing quote
# may be missing, because a text can be cut off.
_PARAMETER: Final = re.compile(
    r"(password\s*=\s*)('(?:[^'\\]|\\.)*'?|[^\s&\"']+)", re.IGNORECASE | re.DOTALL
)

# The message of a database error can quote a row. PostgreSQL does so after the first line, under
# headings in the server's language; SQLite after "with text".
_DATABASES: Final = frozenset({"peewee", "psycopg", "sqlite3"})
_QUOTED: Final = re.compile(r"\n.*| with text .*", re.DOTALL)
_QUOTED_VALUE: Final = re.compile(r"[\n\"'«„“「].*", re.DOTALL)

# At DEBUG peewee logs every statement with its values: prompts, replies and session handles.
_NEVER_DEBUG: Final = ("peewee", "peewee.pool")
_WARNINGS_ONLY: Final = ("peewee.migrations",)  # `storage.migrated` reports migrations

_GRPC: Final = "grpc._cython.cygrpc"
_UNDECODABLE: Final = "Invalid encoding on"
UNDECODABLE_INTERVAL_S: Final = 60.0

LOGGED_EVENTS: Final = SharedCounter(
    "runrecovery_log_events_total", "Warnings and errors that were logged.", "event", "level"
)
"""Counts logged events by name and level, for the whole process. Events of other libraries are free
texts, and not counted."""
LOGGED_LINES: Final = SharedCounter(
    "runrecovery_log_lines_total", "All of them, by level.", "level"
)


class _UndecodableMetadata(logging.Filter):
    """Removes the value and the traceback from gRPC's line about metadata that are not UTF-8.

    The value can be a token. Anyone who connects can cause these lines, so only one in
    `UNDECODABLE_INTERVAL_S` is kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self._next_s = 0.0
        self._lines = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if not str(record.msg).startswith(_UNDECODABLE):
            return True
        now_s = monotonic()
        self._lines += 1
        if now_s < self._next_s:
            return False
        self._next_s = now_s + UNDECODABLE_INTERVAL_S
        record.msg = f"{_UNDECODABLE} metadata ({self._lines} values since the line before)"
        record.args, record.exc_info = (), None
        self._lines = 0
        return True


class Unfailing(TextIOBase):
    """A stream that drops text instead of raising an error.

    A log that cannot be written (a full disk, a pipe without a reader) must not end the thread that
    writes to the store.

    Attributes:
        lost: how many writes were dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost = 0

    def write(self, text: str) -> int:
        """Write the text, or count it as lost."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError):  # full disk, reader gone, closed
            self.lost += 1
            return len(text)

    def flush(self) -> None:
        """Flush the stream, if that is possible."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()


Event = MutableMapping[str, Any]  # structlog's own type for an event


def configure(
    format: LogFormat,  # noqa: A002 - the configuration's word
    level: LogLevel,
    stream: TextIO | None = None,
) -> None:
    """Write every event of the process to one stream.

    Args:
        format: the form of a line; AUTO is CONSOLE if the stream is a terminal, else JSON.
        level: events below this level are dropped.
        stream: None: standard error.
    """
    out = _never_failing(stream or sys.stderr)
    people = out.isatty() if format is LogFormat.AUTO else format is LogFormat.CONSOLE
    common = _common()
    form = _for_people(colors=out.isatty()) if people else _for_programs()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, *common, _count, *form],
        logger_factory=structlog.WriteLoggerFactory(file=cast("TextIO", out)),
        cache_logger_on_first_use=False,  # or a second configure would not reach old loggers
    )
    handler = logging.StreamHandler(out)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *common],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *form],
        )
    )
    if isinstance(out, BackgroundStream):
        out.report_loss = _loss_report([*common, *form])
    logging.basicConfig(handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    logging.getLogger(_GRPC).filters = [_UndecodableMetadata()]
    set_level(level)


def set_level(level: LogLevel) -> None:
    """Drop events below this level from now on."""
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(number))
    logging.getLogger().setLevel(number)
    for name in _NEVER_DEBUG:
        logging.getLogger(name).setLevel(max(number, logging.INFO))
    for name in _WARNINGS_ONLY:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))


def _never_failing(stream: TextIO | BackgroundStream) -> BackgroundStream | Unfailing:
    return stream if isinstance(stream, BackgroundStream) else Unfailing(stream)


def _loss_report(processors: list[structlog.typing.Processor]) -> Callable[[int], str]:
    """Return a function that renders the event for lost lines without writing to the full queue."""
    rendered = structlog.wrap_logger(
        structlog.ReturnLogger(),
        processors=processors,
        wrapper_class=structlog.BoundLogger,  # the configured class drops warnings at level ERROR
    )
    return lambda lines: f"{rendered.warning('service.log_lines_lost', lines=lines)}\n"


def _common() -> list[structlog.typing.Processor]:
    return [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]


def _count(_logger: object, _method: str, event: Event) -> Event:
    """Count a warning or an error (a structlog processor)."""
    if event["level"] in {"warning", "error"}:
        LOGGED_EVENTS.add(event["event"], event["level"])
        LOGGED_LINES.add(event["level"])
    return event


def _for_programs() -> list[structlog.typing.Processor]:
    frames = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, use_rich=False)
    return [
        _shorten_exception,
        structlog.processors.ExceptionRenderer(frames),
        redact,
        _event_first,
        structlog.processors.JSONRenderer(default=repr),
    ]


def _for_people(*, colors: bool) -> list[structlog.typing.Processor]:
    return [
        _shorten_exception,
        structlog.processors.format_exc_info,
        redact,
        structlog.dev.ConsoleRenderer(
            colors=colors,
            repr_native_str=True,  # an escape sequence in a value must not reach the terminal
            exception_formatter=structlog.dev.plain_traceback,
        ),
    ]


def _event_first(_logger: object, _method: str, event: Event) -> Event:
    first = {key: event.pop(key) for key in ("event", "level", "timestamp") if key in event}
    return {**first, **event}


def _shorten_exception(_logger: object, _method: str, event: Event) -> Event:
    """Remove quoted rows from the exception of an event (a structlog processor)."""
    match event.get("exc_info"):
        case BaseException() as error:
            _shorten(error)
        case (_, BaseException() as error, _):
            _shorten(error)
        case True:
            _shorten(sys.exc_info()[1])
    return event


def _shorten(error: BaseException | None) -> None:
    """Cut the rows that a driver quotes off the messages of an exception and of all its causes."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        link = waiting.pop()
        if not isinstance(link, BaseException) or id(link) in seen:
            continue
        seen.add(id(link))
        waiting += [link.__context__, link.__cause__, *link.args]
        if isinstance(link, BaseExceptionGroup):
            waiting += link.exceptions
        elif type(link).__module__.partition(".")[0] in _DATABASES:
            # A DataError is about one value, and quotes it in the first line.
            is_of_value = any(kind.__name__ == "DataError" for kind in type(link).__mro__)
            quoted = _QUOTED_VALUE if is_of_value else _QUOTED
            link.args = tuple(quoted.sub("", str(arg)) for arg in link.args)


def redact(_logger: object, _method: str, event: Event) -> Event:
    """Redact secrets in an event (a structlog processor)."""
    return {key: _redacted(key, value) for key, value in event.items()}


def _redacted(key: str, value: object) -> object:
    if _SECRET_KEY.search(key) and value is not None and not isinstance(value, bool):
        return REDACTED
    match value:
        case str():
            return _without_passwords(value)
        case Mapping():
            return {str(name): _redacted(str(name), inner) for name, inner in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_redacted("", inner) for inner in value]
        case None | bool() | int() | float():
            return value
        case BaseException():
            _shorten(value)
            return _without_passwords(str(value))
        case _:
            return _without_passwords(str(value))


def _without_passwords(text: str) -> str:
    if "://" in text:
        text = _URL_PASSWORD.sub(rf"\1:{REDACTED}@", text)
    if "DETAIL:" in text or "CONTEXT:" in text:
        text = _DETAIL.sub(rf"\1: {REDACTED}", text)
    return _PARAMETER.sub(rf"\1{REDACTED}", text) if "password" in text.lower() else text
