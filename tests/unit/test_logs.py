"""The format of a log line, and what a log line never contains."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import logging
import os
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import peewee
import psycopg
import pytest
import structlog
from fuzz.attacks import OPENING, call, headers, message
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service import logs
from runrecovery_service.background_stream import BackgroundStream
from runrecovery_service.config.settings import LogFormat, LogLevel
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.sql_dialects import DatabaseKind

CANARY = "canary-9f1c"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # Another test of this worker may have captured them, and pytest has undone only the half of it.
    logging.captureWarnings(capture=False)
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("peewee", "peewee.pool"):
        logging.getLogger(name).setLevel(logging.NOTSET)
    structlog.reset_defaults()


def configured(
    form: LogFormat = LogFormat.JSON, level: LogLevel = LogLevel.DEBUG
) -> tuple[io.StringIO, Any]:
    stream = io.StringIO()
    logs.configure(form, level, stream)
    return stream, structlog.get_logger()


def only(stream: io.StringIO) -> dict[str, Any]:
    (line,) = stream.getvalue().splitlines()
    event: dict[str, Any] = json.loads(line)
    return event


def test_an_event_is_one_line_of_json_with_the_event_first_and_the_time_in_utc() -> None:
    stream, log = configured()

    log.info("recovery.run_decided", run_id="r", path=Path("/x"))

    event = only(stream)
    assert list(event) == ["event", "level", "timestamp", "run_id", "path"]
    assert (event["event"], event["level"], event["path"]) == ("recovery.run_decided", "info", "/x")
    assert timedelta(0) == datetime.fromisoformat(event["timestamp"]).utcoffset()


def test_auto_is_json_unless_the_stream_is_a_terminal() -> None:
    file, terminal = io.StringIO(), Terminal()
    for stream in (file, terminal):
        logs.configure(LogFormat.AUTO, LogLevel.INFO, stream)
        structlog.get_logger().info("service.serving")

    assert file.getvalue().startswith("{")
    assert not terminal.getvalue().startswith("{")
    assert "service.serving" in terminal.getvalue()


@pytest.mark.parametrize("form", [LogFormat.JSON, LogFormat.CONSOLE])
def test_events_below_the_level_are_dropped_whatever_their_source(form: LogFormat) -> None:
    stream, log = configured(form, LogLevel.WARNING)

    log.info("a.b")
    logging.getLogger("grpc").info("c")

    assert stream.getvalue() == ""


def test_events_of_standard_library_loggers_have_the_same_format() -> None:
    stream, _ = configured()

    logging.getLogger("grpc._server").warning("no %s", "answer")

    event = only(stream)
    assert (
        event["event"],
        event["level"],
        event["logger"],
    ) == ("no answer", "warning", "grpc._server")


def test_python_warnings_have_the_same_format() -> None:
    stream, _ = configured()

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("old", stacklevel=1)

    assert only(stream)["logger"] == "py.warnings"


def test_an_exception_is_structured_and_shows_no_local_variable() -> None:
    stream, log = configured()

    _fail_with_a_secret(log)

    event = only(stream)
    assert [one["exc_type"] for one in event["exception"]] == ["ValueError", "ZeroDivisionError"]
    assert CANARY not in stream.getvalue()


@pytest.mark.parametrize("form", [LogFormat.JSON, LogFormat.CONSOLE])
def test_no_secret_is_logged_at_any_depth(form: LogFormat) -> None:
    stream, log = configured(form)
    for word in logs.SECRET_WORDS:
        secret = {word: CANARY, f"the_{word}": CANARY, word.upper(): [CANARY]}
        log.info("a.b", **secret, deep=[{"er": (secret,)}], pair=(1, {word: {"x": CANARY}}))
    url = f"postgresql://user:{CANARY}@host/db"
    event = f"cannot reach {url}"
    log.info(event, place=url, error=ValueError(url), info=f"password={CANARY} x=1")
    logging.getLogger("grpc").error("cannot reach %s", url)
    _fail_with_a_secret(log)

    assert CANARY not in stream.getvalue()
    assert "a.b" in stream.getvalue()


async def test_a_token_that_is_not_utf8_is_not_logged_and_writes_one_line() -> None:
    stream, _ = configured(level=LogLevel.WARNING)
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    for _ in range(2):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = headers(authorization=f"Bearer {CANARY}".encode() + b"\xff")
        writer.write(OPENING + call(head, message()))
        await reader.readuntil(b"grpc-status")
        writer.close()
    await server.stop(None)

    assert only(stream)["event"] == "Invalid encoding on metadata (1 values since the line before)"
    assert CANARY not in stream.getvalue()


def test_each_line_about_undecodable_metadata_counts_the_values_since_the_line_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times_s = [1000.0, 1001.0, 1059.9, 1060.0, 1120.0]
    left_s = iter(times_s)
    monkeypatch.setattr(logs, "monotonic", lambda: next(left_s))
    stream, _ = configured(level=LogLevel.WARNING)

    for _ in times_s:
        logging.getLogger("grpc._cython.cygrpc").error("Invalid encoding on %s", CANARY)

    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == [
        f"Invalid encoding on metadata ({count} values since the line before)"
        for count in (1, 3, 1)
    ]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(
    word=st.sampled_from(sorted(logs.SECRET_WORDS)),
    around=st.dictionaries(st.text(), JSON_VALUES),
    depth=st.integers(0, 4),
)
def test_redaction_finds_a_secret_wherever_it_is_nested(
    word: str, around: dict[str, Any], depth: int
) -> None:
    event: dict[str, Any] = {**around, word: CANARY}
    for _ in range(depth):
        event = {**around, "below": [event]}

    assert CANARY not in json.dumps(logs.redact(None, "info", event))


@pytest.mark.parametrize(
    "told",
    [
        f"host=h password={CANARY} dbname=d",
        f"host=h password='two {CANARY}' dbname=d",
        f"host=h password = '{CANARY}' dbname=d",
        rf"host=h password='it\'s {CANARY}' dbname=d",
        f"host=h password='cut off {CANARY}",
        f"host=h sslpassword={CANARY} dbname=d",
        f"PGPASSWORD={CANARY} psql",
        f"postgresql://host/db?sslpassword={CANARY}&dbname=d",
    ],
)
def test_a_password_among_parameters_is_redacted_in_every_notation(told: str) -> None:
    event = logs.redact(None, "info", {"event": told})

    assert CANARY not in str(event)
    assert "[redacted]" in str(event)


def test_facts_about_secrets_are_not_redacted() -> None:
    event = {"has_handle": True, "token": None, "input_bytes": 5, "run_id": "r"}

    assert event == logs.redact(None, "info", event)


def test_statements_with_their_values_are_not_logged_at_any_level() -> None:
    stream, _ = configured(level=LogLevel.DEBUG)

    logging.getLogger("peewee").debug(("SELECT ?", [CANARY]))

    assert stream.getvalue() == ""


def test_an_agent_cannot_steer_the_terminal() -> None:
    stream, log = configured(LogFormat.CONSOLE)

    log.info("a.b", error="\x1b[2J")

    assert "\x1b" not in stream.getvalue()


def test_logging_does_not_load_rich() -> None:
    code = "import sys, runrecovery_service.logs; sys.exit('rich' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _fail_with_a_secret(log: Any) -> None:
    kept = CANARY
    try:
        try:
            len(kept) / 0
        except ZeroDivisionError as error:
            url = f"postgresql://user:{kept}@host/db"
            raise ValueError(f"cannot reach {url}") from error
    except ValueError:
        log.exception("storage.failed")


class Full(io.StringIO):
    """A log on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_cannot_be_written_raises_nothing() -> None:
    logs.configure(LogFormat.JSON, LogLevel.INFO, Full())

    structlog.get_logger().warning("storage.failed")
    logging.getLogger("grpc").warning("also lost")


def test_the_detail_of_a_database_error_is_not_logged() -> None:
    stream = io.StringIO()
    logs.configure(LogFormat.JSON, LogLevel.INFO, stream)
    text = "null value\nDETAIL: Failing row contains (7, s3cr3t).\n"

    structlog.get_logger().error("rpc.internal_error", error=text)

    assert "s3cr3t" not in stream.getvalue()
    assert "null value" in stream.getvalue()


@pytest.mark.parametrize("form", [LogFormat.JSON, LogFormat.CONSOLE])
@pytest.mark.parametrize("field", ["DETAIL", "CONTEXT"])
def test_no_later_line_of_a_row_in_a_database_error_is_logged(form: LogFormat, field: str) -> None:
    stream, log = configured(form)
    text = f"null value\n{field}:  row (7, first-s3cr3t\nsecond-s3cr3t\n\nHINT:  third-s3cr3t)\n"

    log.error("rpc.internal_error", error=text, quoted=f"failed: {ValueError(text)!r}")
    logging.getLogger("peewee").error("failed: %s", text)
    log.error("storage.failed", exc_info=ValueError(text))

    assert "s3cr3t" not in stream.getvalue()
    assert "null value" in stream.getvalue()


def _database_errors() -> Iterator[Exception]:
    for label in ("DETAIL: ", "DÉTAIL : ", "ПОДРОБНОСТИ: ", "詳細: ", "a line of a value"):
        text = f"null value\n{label} row (7, first-s3cr3t\nsecond-s3cr3t)\nCONTEXTE : s3cr3t"
        driver = psycopg.errors.NotNullViolation(text)
        yield driver
        wrapped = peewee.IntegrityError(driver, text)
        wrapped.__cause__ = driver
        yield wrapped
        outer = RuntimeError("null value")
        outer.__context__ = wrapped
        yield outer
        yield ExceptionGroup("null value", [wrapped])
    yield sqlite3.OperationalError(
        "null value: Could not decode to UTF-8 column 'prompt' with text 's3cr3t\ns3cr3t'"
    )


@pytest.mark.parametrize("form", [LogFormat.JSON, LogFormat.CONSOLE])
def test_no_part_of_a_row_in_a_database_error_is_logged_in_any_language(form: LogFormat) -> None:
    def raised(error: Exception) -> None:
        try:
            raise error  # noqa: TRY301 - the way that errors mostly take
        except Exception:
            log.exception("a.b")

    ways: list[Callable[[Exception], object]] = [
        raised,
        lambda error: log.error("a.b", exc_info=error),
        lambda error: log.error("a.b", exc_info=(type(error), error, None)),
        lambda error: log.error("a.b", error=error, deep=[{"er": error}]),
        lambda error: logging.getLogger("x").error("a.b", exc_info=error),
    ]
    for way in ways:
        for error in _database_errors():
            stream, log = configured(form)
            way(error)

            assert "s3cr3t" not in stream.getvalue()
            assert "null value" in stream.getvalue()


def test_a_real_database_error_is_logged_without_the_values_of_the_row(database: Database) -> None:
    database.execute("CREATE TEMPORARY TABLE kept (prompt TEXT, number INTEGER NOT NULL)")
    stream, log = configured()

    # SQLite fails when it reads text that is not UTF-8; PostgreSQL takes no text for a number.
    about_a_value = {
        DatabaseKind.SQLITE: (f"SELECT CAST(x'{CANARY.encode().hex()}ff' AS TEXT)", ()),
        DatabaseKind.POSTGRESQL: ("SELECT CAST(? AS INTEGER)", (f"{CANARY}\n{CANARY}",)),
    }[database.dialect.kind]
    about_a_row = ("INSERT INTO kept (prompt) VALUES (?)", (f"{CANARY}\n{CANARY}",))
    for sql, values in (about_a_row, about_a_value):
        try:
            database.fetch_one(sql, values)
        except Exception as error:
            log.exception("a.b", error=error)

    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["event"] for event in events] == ["a.b", "a.b"]
    assert "number" in events[0]["error"]
    assert CANARY not in stream.getvalue()


@pytest.mark.parametrize("level", list(LogLevel))
def test_lost_lines_are_reported_at_every_level(level: LogLevel) -> None:
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a descriptor is all that it is for
        stream = BackgroundStream(nowhere.fileno())
        logs.configure(LogFormat.JSON, level, stream)  # type: ignore[arg-type] # as `serve` does

        told = json.loads(stream.report_loss(3))

    assert (told["event"], told["level"], told["lines"]) == ("service.log_lines_lost", "warning", 3)
