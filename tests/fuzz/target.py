"""The target of the hostile cases: a real service with a run in every status.

Between two cases no run changes by itself: running agents hold, and queued runs have no slot. So a
call without effect must leave every column of the store as it was, and a call with an effect may
change only rows of the run that it names.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import grpc
from fuzz.calls import Caller
from fuzz.cases import OURS, ROLES, Case, changes
from fuzz.lexicon import REQUEST_IDS, Lexicon, etag_slot, run_id
from fuzz.store import AT_REST, Store
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from runrecovery.v1 import run_pb2
from support.api import Api, status_word
from support.callers import caller, token_of
from support.engines import EngineSpec
from support.service import Home, ServiceProcess
from support.waiting import until

HERE: Final = Path(__file__).parent
SEEDED: Final = 300
"""Runs of a killed service: pages are full, and keys have three hexadecimal digits."""
SPARES: Final = {"kept": 4, "lost": 4, "damaged": 1, "interrupted": 1}
"""Roles that only a restart gives, and how many runs there are for each."""
STATUSES: Final = {
    "running": "RUNNING", "queued": "QUEUED", "waiting": "WAITING_USER", "sticky": "WAITING_USER",
    "succeeded": "SUCCEEDED", "failed": "FAILED", "canceled": "CANCELED",
    "kept": "WAITING_USER", "lost": "FAILED", "damaged": "UNSPECIFIED", "interrupted": "FAILED",
}  # fmt: skip
"""The status of the run in each role."""
ENGINE_OF: Final = {"running": "held", "queued": "held", "interrupted": "held", "sticky": "sticky"}
ACT_OF: Final = {
    "running": "hold", "queued": "hold", "interrupted": "hold", "failed": "fail",
    "succeeded": "end",
}  # fmt: skip


def _engine(profile: str, **more: object) -> EngineSpec:
    command = (sys.executable, "-I", "-S", str(HERE / "agent.py"), profile)
    table = {"max_concurrent": 1, **more}
    return EngineSpec(
        command=command,
        profile="sticky_process" if profile == "sticky" else profile,
        more=table,
    )


ENGINES: Final = {
    "held": _engine("resumable"),
    "quick": _engine("resumable", session_file="{workspace}/{value}"),
    "sticky": _engine("sticky", session_timeout_s=86_400.0),
}


class Target:
    """One started service, a run in each role, and the words that stand for ids and tokens."""

    def __init__(self, home: Home, service: ServiceProcess) -> None:
        self.home = home
        self.service = service
        self.api = service.until_serving()
        self.caller = Caller(service.address)
        self.store = Store(home.database)
        self.lexicon = Lexicon()
        self._numbers: dict[str, int] = {}
        for role in SPARES:
            self._fill(role)
        self.repair()
        self._harvest()

    def close(self) -> None:
        """Close what was opened."""
        self.caller.close()
        self.store.close()

    def serves(self) -> bool:
        """Return whether health says SERVING, within the time of a call."""
        try:
            return self.api.health_of() == "SERVING"
        except grpc.RpcError:
            return False

    def resident_mib(self) -> float:
        """Return the resident memory of the service in MiB."""
        pages = int(Path(f"/proc/{self.service.pid}/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    # -- runs ----------------------------------------------------------------------------------

    def repair(self) -> None:
        """Cancel runs that a case created, replace runs that it ended; wait until all rest."""
        until(self._has_all_roles, "there is a run in each role again")

    def _has_all_roles(self) -> bool:
        now = {role: self._status(role) for role in STATUSES}
        vacant = [
            role for role, status in STATUSES.items() if now[role] in {None, *AT_REST} - {status}
        ]
        filled = {role for role, status in STATUSES.items() if now[role] == status}
        if "running" in vacant:
            filled.discard("queued")  # the new run gets the free slot
        unwanted = self.store.restless().keys() - {self._run_in_role(role) for role in filled}
        unwanted -= {
            run_id(role, spare)
            for role in SPARES
            for spare in range(self._numbers[role] + 1, SPARES[role])
        }
        for run in unwanted:
            self._cancel(run)
        if unwanted or filled | set(vacant) < now.keys():  # the others are about to end
            return False
        for role in vacant:
            self._fill(role)
        return not self.store.unaccounted()

    def _run_in_role(self, role: str) -> str:
        return run_id(role, self._numbers[role])

    def _status(self, role: str) -> str | None:
        """Return the status of the run in a role; None before there is one."""
        if role not in self._numbers:
            return None
        run = self.api.get(self._run_in_role(role))
        word = status_word(run)
        return word if word in AT_REST or not run.cancel_requested else "ENDING"

    def _fill(self, role: str) -> None:
        """Put another run into a role: a new one, or a spare one while spares are left."""
        number = self._numbers.get(role, -1) + 1
        if role not in SPARES:
            run = create_for(self.api, role, number)
        elif number < SPARES[role]:
            run = self.api.get(run_id(role, number))
        else:
            return
        self._numbers[role] = number
        self._know(role, run)

    def _cancel(self, run: str) -> None:
        with suppress(grpc.RpcError):  # it has ended meanwhile
            self.api.cancel(run)

    def _know(self, role: str, run: run_pb2.Run) -> None:
        self.lexicon.mean(run_id(role).encode(), run.run_id.encode())
        self.lexicon.mean(etag_slot(role), run.etag.encode())

    # -- words ---------------------------------------------------------------------------------

    def _harvest(self) -> None:
        """Collect page tokens, cursors and report ids from the responses of all methods."""
        for path, method in OURS.items():
            if not changes(method):
                for name, word in self._words(path):
                    self._learn(name, word.encode())
        self.lexicon.canned = _canned()

    def _words(self, path: str) -> Iterator[tuple[str, str]]:
        method = OURS[path]
        fields = {"run_id": run_id("kept"), "page_size": 1}
        known = {name: fields[name] for name in fields if name in method.input_type.fields_by_name}
        payload = GetMessageClass(method.input_type)(**known).SerializeToString()
        outcome = self.caller.call(Case(method=path, payload=payload), payload)
        for answer in outcome.answers:
            yield from _texts(GetMessageClass(method.output_type).FromString(answer))

    def _learn(self, name: str, word: bytes) -> None:
        lexicon = self.lexicon
        if name == "reconciliation_id" and len(lexicon.report_ids) < 2:
            lexicon.report_ids.append(lexicon.add("r", word))
        elif ("token" in name or "cursor" in name) and word:
            altered = word[:-1] + (b"A" if word[-1:] != b"A" else b"B")
            lexicon.tokens += [lexicon.add("t", word), lexicon.add("x", altered)]


def _texts(message: Message) -> Iterator[tuple[str, str]]:
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            yield field.name, value
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            for one in value if field.is_repeated else [value]:
                yield from _texts(one)


def create_for(api: Api, role: str, number: int = 0) -> run_pb2.Run:
    """Create a run, and bring it into the status of its role."""
    more: dict[str, Any] = (
        {"request_id": REQUEST_IDS[0].decode()} if _is_first(role, number) else {}
    )
    run = api.create(
        ENGINE_OF.get(role, "quick"),
        {"act": ACT_OF.get(role, "ask")},
        run_id=run_id(role, number),
        labels={"team": role},
        **more,
    )
    if role in {"canceled", "damaged", "kept", "lost"}:
        run = api.until_status(run.run_id, "WAITING_USER")
    if role == "canceled":
        api.cancel(run.run_id)
    if role in SPARES:
        return run
    return api.until_status(run.run_id, STATUSES[role])


def _is_first(role: str, number: int) -> bool:
    return (role, number) == ("succeeded", 0)


def _canned() -> Mapping[str, Sequence[bytes]]:
    """Return requests with an effect, and the one that has prepared the target."""
    answer = {"interaction_id": 1, "response": {"string_value": "yes"}}
    created = {
        "engine": "quick", "input": {"act": "end"}, "run_id": run_id("succeeded"),
        "labels": {"team": "succeeded"}, "request_id": REQUEST_IDS[0].decode(),
    }  # fmt: skip
    wanted: dict[str, list[dict[str, Any]]] = {
        "CreateRun": [
            created,
            {**created, "engine": "held"},
            {"engine": "held"},
            {"engine": "quick"},
        ],
        "SubmitReply": [
            {"run_id": run_id(role), **answer} for role in ("waiting", "sticky", "kept")
        ]
        + [{"run_id": run_id("waiting"), "etag": etag_slot("waiting").decode(), **answer}],
        "CancelRun": [{"run_id": run_id(role)} for role in STATUSES]
        + [{"run_id": run_id("waiting"), "etag": etag_slot("sticky").decode()}],
        "ReopenRun": [
            {"run_id": run_id("lost"), "keep_session": True},
            {"run_id": run_id("lost"), "session_handle": "another"},
        ],
    }
    return {
        path: [
            GetMessageClass(method.input_type)(**fields).SerializeToString(deterministic=True)
            for fields in wanted.get(method.name, [])
        ]
        for path, method in OURS.items()
    }


# -- the home --------------------------------------------------------------------------------------


@contextmanager
def start_target(place: Path, *, mutant: str = "") -> Iterator[Target]:
    """Start a service in a directory of its own, after a kill and a restart."""
    callers = [caller(role, role) for role in ROLES]
    with Home(
        place, engines=ENGINES, max_concurrent=8, callers=callers, token=token_of("operator")
    ) as home:
        home.seed(SEEDED)
        _create_runs_to_recover(home)
        if mutant:
            home.prefix = (sys.executable, str(HERE / "mutants.py"), mutant)
        service, _ = home.start()
        made = Target(home, service)
        try:
            yield made
        finally:
            made.close()


def _create_runs_to_recover(home: Home) -> None:
    """Let a service create the runs that its next start recovers, and kill it."""
    service, api = home.start()
    for role, count in SPARES.items():
        for number in range(count):
            create_for(api, role, number)
    api.until_status(run_id("interrupted"), "RUNNING")
    service.kill()
    with home.store(writable=True) as store:
        store.execute("UPDATE run SET status = 'ODD' WHERE run_id = ?", (run_id("damaged"),))
        lost = store.execute(
            "SELECT session_value FROM run WHERE run_id LIKE 'fz-lost-%'"
        ).fetchall()
    for (handle,) in lost:
        for file in home.data.glob(f"runs/*/*/workspace/{handle}"):
            file.unlink()
