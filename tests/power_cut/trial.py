"""One power cut of a recorded service: what must be true of the files that it leaves."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import grpc
from power_cut.recording import ANSWER, Answered
from runrecovery_service.domain.errors import RunNotFound
from runrecovery_service.domain.run import Run, RunStatus
from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage import interactions, runs
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.opening import open_database
from support.api import Api, status_word
from support.engines import RESUMABLE
from support.service import Home


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that a power cut broke. `kind`: `lost`, `damaged` or `refused`."""

    kind: str
    detail: str


def judge(home: Path, answered: Iterable[Answered]) -> list[Violation]:
    """Open the store below a directory as a start does, and look for each answered call."""
    data = home / "data"
    data.mkdir(exist_ok=True)  # the power was cut before the service made it
    try:
        db = open_database("", data)
    except DatabaseRefused as error:
        return [Violation("refused", str(error))]
    with contextlib.closing(db):
        damage = db.fetch_all("PRAGMA integrity_check(5)") + db.fetch_all(
            "PRAGMA foreign_key_check"
        )
        if damage != [("ok",)]:
            return [Violation("damaged", str(damage))]
        return [
            Violation("lost", f"{each.call} {each.run_id}")
            for each in answered
            if not _has_effect(db, each)
        ]


def judge_by_a_start(home: Path, answered: Iterable[Answered]) -> list[Violation]:
    """Start the service below a directory, and ask it for each answered call."""
    with Home(home, engines={"resumable": RESUMABLE}) as service_home:
        service, api = service_home.start()
        lost = [
            Violation("lost", f"{each.call} {each.run_id} after a start")
            for each in answered
            if not _is_answered_by(api, each)
        ]
        if code := service.stop():
            return [*lost, Violation("refused", f"the service stopped with exit code {code}")]
    return lost


def _is_answered_by(api: Api, answered: Answered) -> bool:
    try:
        run = api.get(answered.run_id)
    except grpc.RpcError:
        return False
    match answered.call:
        case "create":
            return True
        case "reply":
            return api.interactions(run.run_id)[0].response.string_value == ANSWER
        case _:
            return status_word(run) == "CANCELED"


def _has_effect(db: Database, answered: Answered) -> bool:
    try:
        run = runs.get(db, answered.run_id)
    except RunNotFound:
        return False
    match answered.call:
        case "create":
            return True
        case "reply":
            question = interactions.find(db, run.key, 1)
            return question is not None and question.response == ANSWER
        case _:
            return _is_canceled(run)


def _is_canceled(run: Run) -> bool:
    return run.cancel_requested or run.status is RunStatus.CANCELED


def empty(folder: Path) -> None:
    """Remove everything in a folder, which may not exist."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
