"""Parameter types and callbacks for click: JSON, secrets, times, labels."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from math import isnan
from pathlib import Path
from typing import Any, Final

import click

_URL: Final = re.compile(r"(?:https?|grpcs?)://", re.IGNORECASE)


def json_object(
    _ctx: click.Context, _param: click.Parameter, value: str | None
) -> dict[str, Any] | None:
    """Return a JSON object, given as text, as `@FILE`, or as `-` for standard input."""
    if value is None:
        return None
    try:
        found = json.loads(_text(value))
    except OSError as error:
        raise click.BadParameter(f"{_source(value)}: {error.strerror}") from error
    except UnicodeError as error:
        raise click.BadParameter(f"{_source(value)}: is not UTF-8 text") from error
    except RecursionError as error:
        raise click.BadParameter("is nested too deeply") from error
    except ValueError as error:
        raise click.BadParameter(f"not JSON: {error}") from error
    if not isinstance(found, dict):
        raise click.BadParameter('must be a JSON object, for example {"task": "hello"}')
    return found


def _text(value: str) -> str:
    if value == "-":
        return _standard_input()
    return _file(value[1:]) if value.startswith("@") else value


def _source(value: str) -> str:
    return "standard input" if value == "-" else value.removeprefix("@")


def _file(path: str) -> str:
    return Path(path).read_text(encoding="utf-8-sig")  # Windows editors add a byte-order mark


def _standard_input() -> str:
    return sys.stdin.buffer.read().decode("utf-8-sig")


def secret(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Return the only line of the named file, or of standard input if the name is `-`."""
    if value is None:
        return None
    try:
        text = _standard_input() if value == "-" else _file(value)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise click.BadParameter(f"{_source(value)}: {reason}") from error
    lines = text.splitlines()
    if len(lines) != 1 or not lines[0]:
        raise click.BadParameter(f"{value}: must contain exactly one line, which is not empty")
    return lines[0]


def time(_ctx: click.Context, _param: click.Parameter, value: str | None) -> datetime | None:
    """Return an ISO 8601 time as an aware time; UTC if it has no offset."""
    if value is None:
        return None
    try:
        at = datetime.fromisoformat(value)
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is not like 2026-11-24T10:00:00Z") from error
    try:
        return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
    except OverflowError as error:
        raise click.BadParameter(f"{value!r} is outside the years 1 to 9999 in UTC") from error


def labels(_ctx: click.Context, _param: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Return labels given as KEY=VALUE. Refuse a repeated key."""
    found: dict[str, str] = {}
    for text in values:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE")
        if key in found:
            raise click.BadParameter(f"{key!r} is given twice")
        found[key] = value
    return found


def choices(names: Iterable[str], prefix: str) -> list[str]:
    """Return the names of an enum as the user types them: lower case, without prefix."""
    words = (name.removeprefix(prefix).lower() for name in names)
    return [found for found in words if found not in {"unspecified", "none"}]


only_labels: Final = click.option(
    "--label",
    "labels",
    multiple=True,
    callback=labels,
    metavar="KEY=VALUE",
    help="Only runs with this label. Can be repeated.",
)
"""The `--label` option of commands that filter runs."""


limit_rows: Final = click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=50,
    show_default=True,
    help="At most this many rows; 0 means all.",
)
"""The `--limit` option of commands that list."""


class Seconds(click.FloatRange):
    """A number of seconds that is valid for a deadline."""

    def __init__(self, *, min_open: bool = False) -> None:
        super().__init__(min=0, min_open=min_open, max=1e9)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Convert the value; refuse nan, which passes every range check."""
        seconds: float = super().convert(value, param, ctx)
        return (
            self.fail("nan is not a number of seconds", param, ctx) if isnan(seconds) else seconds
        )


def require_utf8(values: Mapping[str, object]) -> None:
    """Refuse arguments that are not UTF-8 and so cannot be sent."""
    for name, value in values.items():
        try:
            "".join(_texts(value)).encode()
        except UnicodeEncodeError as error:
            raise click.BadParameter("is not UTF-8 text", param_hint=name) from error


def _texts(value: object) -> Iterable[str]:
    match value:
        case str():
            return (value,)
        case Mapping():
            return (str(text) for pair in value.items() for text in pair)
        case tuple():
            return map(str, value)
        case _:
            return ()


def require_not_empty(
    _context: click.Context, parameter: click.Parameter, text: str | None
) -> str | None:
    """Refuse an empty text: most likely a shell variable was not set."""
    if text == "":
        raise click.BadParameter("must not be empty", param=parameter)
    return text


def target(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    """Refuse an empty text and a URL: gRPC would take a whole URL for a host name."""
    if text and (found := _URL.match(text)):
        raise click.BadParameter(f'must be HOST:PORT without "{found[0]}"', param=parameter)
    return require_not_empty(context, parameter, text)
