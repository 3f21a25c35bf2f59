"""Prints messages of the contract: as a line of JSON, as a table, or as names and values.

`cli/run_text.py` and `cli/recovery.py` choose the columns and the values.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC
from itertools import chain
from typing import TypeAlias, TypeVar

import click
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from runrecovery.v1 import run_pb2

from runrecovery_service.cli.plain_text import safe

MessageT = TypeVar("MessageT", bound=Message)

Columns: TypeAlias = Sequence[tuple[str, Callable[[MessageT], str]]]
"""The heading of each column, and the function that returns its text for a row."""


def json_line(message: Message) -> str:
    """Return a message as one line of JSON, with field names of the contract and default values."""
    return json_format.MessageToJson(
        message,
        indent=None,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )


def word(message: Message, field: str) -> str:
    """Return the name of an enum field's value without the prefix that all values share."""
    kind = message.DESCRIPTOR.fields_by_name[field].enum_type
    if kind is None:
        raise TypeError(f"{field} is not an enum field")
    number = getattr(message, field)
    value = kind.values_by_number.get(number)
    if value is None:
        return str(number)  # the value is from a newer service
    name: str = value.name
    return name.removeprefix(kind.values_by_number[0].name.removesuffix("UNSPECIFIED"))


def time(at: Timestamp) -> str:
    """Return a time in UTC to the second, or a dash if the time is unset."""
    if not (at.seconds or at.nanos):
        return "-"
    return at.ToDatetime(tzinfo=UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def seconds(duration: Duration) -> str:
    """Return a duration in seconds."""
    return f"{duration.ToTimedelta().total_seconds():g} s"


def usage_text(usage: run_pb2.Usage) -> str:
    """Return tokens and cost in one phrase; parts that are 0 or not reported are left out."""
    read = [
        f"{tokens} {what}"
        for tokens, what in (
            (usage.cached_input_tokens, "cached"),
            (usage.cache_write_input_tokens, "written to the cache"),
        )
        if tokens
    ]
    thought = usage.reasoning_output_tokens
    parts = [
        f"{usage.input_tokens} tokens in" + (f" ({', '.join(read)})" if read else ""),
        f"{usage.output_tokens} out" + (f" ({thought} reasoning)" if thought else ""),
        f"${usage.cost_usd:.4f}" if usage.HasField("cost_usd") else "",
        usage.model,
    ]
    return ", ".join(part for part in parts if part)


def aligned_pairs(*pairs: tuple[str, object]) -> str:
    """Return one line `name: value` for each pair with a value; the values are aligned."""
    kept = [(name, safe(str(value))) for name, value in pairs if value not in ("", None)]
    width = max((len(name) for name, _ in kept), default=0) + 1
    return "\n".join(f"{name + ':':<{width}} {value}" for name, value in kept)


def print_table(rows: Iterable[MessageT], columns: Columns[MessageT]) -> None:
    """Print a table: drawn by rich on a terminal, elsewhere plain with tabs and never cut."""
    headings = [heading for heading, _ in columns]
    cells = ([safe(text(row)) for _, text in columns] for row in rows)
    if sys.stdout.isatty():
        _draw(headings, cells)
        return
    first = next(cells, None)  # raises if the call fails: then no headings are printed
    click.echo("\t".join(headings))
    for line in () if first is None else chain([first], cells):
        click.echo("\t".join(line))


def table(rows: Iterable[MessageT], columns: Columns[MessageT]) -> str:
    """Return a small table as aligned lines, to be part of other text."""
    lines = [[heading for heading, _ in columns]]
    lines += [[safe(text(row)) for _, text in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _draw(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    # Ids are copied, so they are never folded or cut; a long line wraps.
    console = Console()
    wide = max(console.width, console.measure(table).maximum)
    console.print(table, width=wide, soft_wrap=True, crop=False)
