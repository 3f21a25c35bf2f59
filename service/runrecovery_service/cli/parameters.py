"""Kinds of values on the command line that click does not know."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click


class JsonText(click.ParamType[dict[str, Any]]):
    """A JSON object: as it is, `@FILE`, or `-` for standard input."""

    name = "json"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, Any]:
        """Return the object; a usage error for anything else."""
        try:
            found = json.loads(_text(value))
        except (OSError, UnicodeDecodeError) as error:
            self.fail(f"{value}: {getattr(error, 'strerror', None) or 'not UTF-8'}", param, ctx)
        except ValueError as error:
            self.fail(f"not JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail('must be a JSON object, for example {"task": "hello"}', param, ctx)
        return found


def _text(value: str) -> str:
    if value == "-":
        return click.get_text_stream("stdin").read()
    return Path(value[1:]).read_text(encoding="utf-8") if value.startswith("@") else value


class Time(click.ParamType[datetime]):
    """An ISO 8601 time; UTC unless it says otherwise."""

    name = "time"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> datetime:
        """Return the aware time; a usage error for anything else."""
        try:
            at = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is not a time such as 2026-11-24T10:00:00Z", param, ctx)
        return at if at.tzinfo else at.replace(tzinfo=UTC)


class Label(click.ParamType[tuple[str, str]]):
    """KEY=VALUE."""

    name = "label"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        """Return key and value; a usage error when there is no `=`."""
        key, equals, text = value if isinstance(value, tuple) else value.partition("=")
        if not equals or not key:
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        return key, text


def choices(names: Iterable[str], prefix: str) -> list[str]:
    """Return the words of an enum of the contract as they are typed: short, in small letters."""
    words = (name.removeprefix(prefix).lower() for name in names)
    return [found for found in words if found not in {"unspecified", "none"}]
