"""The list of runs: its filter, its rows, and the addresses of its pages. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Final
from urllib.parse import urlencode

from google.protobuf.timestamp_pb2 import Timestamp
from runrecovery.v1 import run_pb2, run_service_pb2

from runrecovery_service.console.moments import Moment, moment
from runrecovery_service.console.words import STATUS_BY_NAME, Word, recovery_word, status_word
from runrecovery_service.lazy_dataclass import dataclass

PAGE_SIZE: Final = 50
_RUN_ID: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_MINUTE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}")


@dataclass(frozen=True, slots=True)
class RunFilter:
    """The filter that the page's form sets. An empty field does not filter.

    Attributes:
        status: a word of `STATUS_BY_NAME`.
        label: `key=value`, or several of these with commas.
        after, before: runs that were created at or after the first time, and before the second.
            Minutes in UTC, for example `2026-11-30T09:05`.
    """

    status: str = ""
    engine: str = ""
    label: str = ""
    after: str = ""
    before: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> RunFilter:
        """Return the filter that the query of an address sets.

        An unknown status and a text that is not a time are ignored.
        """
        status = query.get("status", "")
        return cls(
            status=status if status in STATUS_BY_NAME else "",
            engine=query.get("engine", "").strip(),
            label=query.get("label", "").strip(),
            after=_minute(query.get("after", "")),
            before=_minute(query.get("before", "")),
        )

    @property
    def is_empty(self) -> bool:
        """True if the filter selects all runs."""
        return self == RunFilter()

    def request(self, page_token: str) -> run_service_pb2.ListRunsRequest:
        """Return the request for a page of runs."""
        return run_service_pb2.ListRunsRequest(
            filter=run_service_pb2.RunFilter(
                statuses=[_status(self.status)] if self.status else [],
                engine=self.engine,
                labels=_labels(self.label),
                created_after=_timestamp(self.after),
                created_before=_timestamp(self.before),
            ),
            page_size=PAGE_SIZE,
            page_token=page_token,
            view=run_pb2.RUN_VIEW_BASIC,
        )

    def address(self, **changed: str) -> str:
        """Return the address of the list with this filter, after a change of some fields."""
        fields = asdict(self) | changed
        query = urlencode({name: value for name, value in fields.items() if value})
        return f"/runs?{query}" if query else "/runs"


def _status(word: str) -> run_pb2.RunStatus.ValueType:
    return run_pb2.RunStatus.ValueType(STATUS_BY_NAME[word])


def _labels(text: str) -> dict[str, str]:
    parts = (part.partition("=") for part in text.split(",") if part.strip())
    return {key.strip(): value.strip() for key, _, value in parts}


def _minute(text: str) -> str:
    """Return the text if it names a minute, else an empty text."""
    if not _MINUTE.fullmatch(text):
        return ""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return ""
    return text


def _timestamp(minute: str) -> Timestamp | None:
    if not minute:
        return None
    at = Timestamp()
    at.FromDatetime(datetime.fromisoformat(minute))
    return at


def is_run_id(text: str) -> bool:
    """Return whether a text can be the id of a run."""
    return _RUN_ID.fullmatch(text) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """A run in a list. `note`: its error code, a requested cancel, or a second or later attempt."""

    run_id: str
    engine: str
    status: Word
    note: str
    labels: tuple[tuple[str, str], ...]
    created_at: Moment | None
    updated_at: Moment | None
    recovery: Word | None


def row_of(run: run_pb2.Run) -> RunRow:
    """Return the row of a run."""
    state = run.recovery.recovery_state
    is_decided = state not in {run_pb2.RECOVERY_STATE_UNSPECIFIED, run_pb2.RECOVERY_STATE_NONE}
    return RunRow(
        run_id=run.run_id,
        engine=run.engine,
        status=status_word(run.status),
        note=_note(run),
        labels=tuple(sorted(run.labels.items())),
        created_at=moment(run.created_at),
        updated_at=moment(run.updated_at),
        recovery=recovery_word(state) if is_decided else None,
    )


def _note(run: run_pb2.Run) -> str:
    if run.error.code:
        return run.error.code
    if run.cancel_requested and run.status != run_pb2.RUN_STATUS_CANCELED:
        return "cancel requested"
    return f"attempt {run.attempt}" if run.attempt > 1 else ""
