"""Measures how many calls the service answers, against the least work of any such server.

    python bench/rpc.py --seconds 3 --rounds 3 --rows 100000

get      GetRun by random ids from a store of `--rows` runs, all of which a restart has recovered,
         with 1 and 16 callers. Floor: a grpc.aio server on uvloop, in a process of its own, that
         gives the same bytes to every call. It reads no row and checks no access.
page     A page of 50 of ListRecovered, at the start and at the far end. Floor: the start.
secure   GetRun with TLS, a token and metrics. Floor: the same service without, on a copy of the
         store.
create   CreateRun, each durable when it is answered.
reply    SubmitReply to runs that wait, each once.
cancel   CancelRun of runs that wait, each once.
         Floor of these three: a grpc.aio server on uvloop that changes the same rows of a copy of
         the store by plain SQL with synchronous=FULL, a commit for each call, and gives the same
         bytes to every call.

Floor and ours are measured in turns, by the generator in load.py.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sqlite3
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import grpc
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value
from rich.console import Console
from rich.table import Table
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import recovery_service_pb2_grpc as recovery_grpc
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery.v1 import run_service_pb2_grpc as pb_grpc

sys.path.insert(0, str(Path(__file__).parent.parent))

from runrecovery_service.storage.opening import open_database

from bench.load import Load, Target, generate
from bench.seed import DEFAULT_MIX, Seeding, claim, fill
from bench.servers import Server, floor, secure_config, service

CALLERS: Final = (1, 16)
IDS: Final = 5000
INPUT_BYTES: Final = 100
"""The size of a run's input, with which a Run has about 500 bytes on the wire."""
GET: Final = "/runrecovery.v1.RunService/GetRun"
FILE: Final = "runrecovery.db"
YES: Final = Value(string_value="yes")
CREATE: Final = "/runrecovery.v1.RunService/CreateRun"
PAGE: Final = "/runrecovery.v1.RecoveryService/ListRecovered"

CONSTANT_ANSWER: Final = """
import asyncio, sys
import grpc, uvloop
from runrecovery.v1 import run_service_pb2, run_service_pb2_grpc

answer = run_service_pb2.GetRunResponse.FromString(bytes.fromhex(sys.argv[1]))

class Constant(run_service_pb2_grpc.RunServiceServicer):
    async def GetRun(self, request, context):
        return answer

async def main():
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    run_service_pb2_grpc.add_RunServiceServicer_to_server(Constant(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()

uvloop.run(main())
"""

COMMITTING: Final = """
import asyncio, itertools, json, sqlite3, sys
import grpc, uvloop

method, answer, path, statements = sys.argv[1], bytes.fromhex(sys.argv[2]), *sys.argv[3:]
statements = json.loads(statements)
db = sqlite3.connect(path, isolation_level=None)
db.execute("PRAGMA journal_mode = wal")
db.execute("PRAGMA synchronous = FULL")
numbers = itertools.cycle(row[0] for row in db.execute(statements.pop(0)).fetchall())
turns = itertools.count()

async def change(request, context):
    at = {"run": next(numbers), "turn": next(turns)}
    db.execute("BEGIN IMMEDIATE")
    for statement in statements:
        db.execute(statement, at)
    db.execute("COMMIT")
    return answer

class Handlers(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(change) if details.method == method else None

async def main():
    server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
    server.add_generic_rpc_handlers((Handlers(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"127.0.0.1:{port}", flush=True)
    await server.wait_for_termination()

uvloop.run(main())
"""
"""A server that commits for each call. Its first statement selects the rows that it changes."""

WAITING: Final = (
    "SELECT r.id, r.run_id, r.interaction_count FROM run r"
    " JOIN interaction i ON i.run = r.id AND i.no = r.interaction_count AND i.state = 'OPEN'"
    " WHERE r.status = 'WAITING_USER' AND r.recovery_state <> 'QUARANTINED' ORDER BY r.id"
)
EVENT: Final = (
    "INSERT INTO run_event (run, no, kind, status, attempt, interaction, happened_at)"
    " SELECT id, 1000 + :turn, 'ANSWERED', status, attempt, 1, :turn FROM run WHERE id = :run"
)
REPLIED: Final = (
    f"SELECT id FROM ({WAITING})",
    (
        "UPDATE run SET status = 'QUEUED', wait_due_us = NULL, queued_at = :turn, resume_count = 0,"
        " auto_decided_count = 0, event_count = event_count + 1, updated_at = :turn,"
        " version = version + 1 WHERE id = :run"
    ),
    EVENT,
    (
        "UPDATE interaction SET state = 'ANSWERED', response = '1', replied_at = :turn"
        " WHERE run = :run"
    ),
)
CANCELED: Final = (
    f"SELECT id FROM ({WAITING})",
    (
        "UPDATE run SET status = 'CANCELED', wait_due_us = NULL, ended_at = :turn,"
        " session_type = NULL, session_value = NULL, cancel_requested_at = :turn,"
        " event_count = event_count + 1, updated_at = :turn, version = version + 1 WHERE id = :run"
    ),
    EVENT,
    "UPDATE interaction SET state = 'CLOSED' WHERE run = :run",
)

PARTS: Final = ("get", "secure", "page", "create", "reply", "cancel")
Measure = Callable[[], Load]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The floor and the service, each measured once a round."""

    name: str
    floor: list[Load]
    ours: list[Load]

    @property
    def rate(self) -> float:
        """Calls per second as a share of the floor's: the median of the rounds' ratios."""
        return statistics.median(
            ours.calls_per_s / base.calls_per_s
            for ours, base in zip(self.ours, self.floor, strict=True)
        )

    @property
    def cpu(self) -> float:
        """The processor time of the server for each call as a multiple of the floor's, likewise."""
        return statistics.median(
            ours.server_cpu_us / base.server_cpu_us
            for ours, base in zip(self.ours, self.floor, strict=True)
        )

    @property
    def latency(self) -> float:
        """The p50 as a multiple of the floor's, likewise."""
        return statistics.median(
            ours.p50_ms / base.p50_ms for ours, base in zip(self.ours, self.floor, strict=True)
        )


def compare(name: str, *, rounds: int, floor: Measure, ours: Measure) -> Comparison:
    """Measure both in turns."""
    result = Comparison(name=name, floor=[], ours=[])
    for _ in range(rounds):
        result.floor.append(floor())
        result.ours.append(ours())
    return result


# -- the store and the requests ---------------------------------------------------------


def seed(data_dir: Path, rows: int) -> list[str]:
    """Make a store with this many runs for a restart to recover; return some of their ids."""
    db = open_database("", data_dir)
    owner = claim(db, instance="default", data_dir=data_dir)
    seeding = Seeding(runs=rows, mix=DEFAULT_MIX, input_bytes=INPUT_BYTES)
    fill(db, owner, seeding, now=datetime.now(UTC))
    db.close()
    with closing(sqlite3.connect(data_dir / FILE)) as connection:
        ids = [row[0] for row in connection.execute("SELECT run_id FROM run")]
    return random.Random(1).sample(ids, min(IDS, rows))  # noqa: S311 - the same in every run


def waiting(file: Path) -> list[tuple[int, str, int]]:
    """Return key, id and question of the runs that wait."""
    with closing(sqlite3.connect(file)) as connection:
        return connection.execute(WAITING).fetchall()


def created(file: Path, run_id: str) -> tuple[str, ...]:
    """Return statements that insert this run again and again, each time with another id."""
    with closing(sqlite3.connect(file)) as connection:
        (key,) = connection.execute("SELECT id FROM run WHERE run_id = ?", (run_id,)).fetchone()
        names = [column[1] for column in connection.execute("PRAGMA table_info(run)")]
    same = ", ".join(name for name in names if name not in {"id", "run_id"})
    return (
        f"SELECT {key}",
        (
            f"INSERT INTO run (run_id, {same})"
            f" SELECT printf('floor-%030d', :turn), {same} FROM run WHERE id = :run"
        ),
    )


def far_page(channel: grpc.Channel, rows: int) -> str:
    """Walk the recovered runs to the last 1,000 or so and return that page's token."""
    stub, token, seen = recovery_grpc.RecoveryServiceStub(channel), "", 0
    while seen + 1000 < rows:
        request = recovery_pb.ListRecoveredRequest(page_size=1000, page_token=token)
        page = stub.ListRecovered(request)
        token, seen = page.next_page_token, seen + len(page.runs)
    return token


@dataclass(frozen=True, slots=True)
class Bench:
    """The settings that all measurements share."""

    top: Path
    seconds: float
    rounds: int

    def payloads(self, name: str, payloads: list[bytes]) -> Path:
        """Write the requests into a file for the generator."""
        file = self.top / f"{name}.payloads"
        file.write_text("\n".join(payload.hex() for payload in payloads))
        return file

    def load(
        self, server: Server, method: str, payloads: Path, callers: int, *, once: bool = False
    ) -> Measure:
        """Return a measurement of a server."""
        target = Target(address=server.address, method=method, ca=server.ca, token=server.token)
        return lambda: generate(
            target, payloads, callers=callers, seconds=self.seconds, pid=server.pid, once=once
        )

    # -- the comparisons -----------------------------------------------------------------------

    def get(self, ours: Server, ids: list[str]) -> list[Comparison]:
        """GetRun beside a constant answer."""
        with grpc.insecure_channel(ours.address) as channel:
            answer = pb_grpc.RunServiceStub(channel).GetRun(pb.GetRunRequest(run_id=ids[0]))
        payloads = self.payloads(
            "get", [pb.GetRunRequest(run_id=run_id).SerializeToString() for run_id in ids]
        )
        with floor(CONSTANT_ANSWER, answer.SerializeToString().hex()) as constant:
            return [
                compare(
                    f"GetRun ({answer.ByteSize()} bytes), {callers} callers",
                    rounds=self.rounds,
                    floor=self.load(constant, GET, payloads, callers),
                    ours=self.load(ours, GET, payloads, callers),
                )
                for callers in CALLERS
            ]

    def secure(self, plain: Server, secured: Server, ids: list[str]) -> list[Comparison]:
        """GetRun with TLS, a token and metrics beside the same without."""
        payloads = self.payloads(
            "secure", [pb.GetRunRequest(run_id=run_id).SerializeToString() for run_id in ids]
        )
        return [
            compare(
                f"GetRun with TLS, a token and metrics, {callers} callers",
                rounds=self.rounds,
                floor=self.load(plain, GET, payloads, callers),
                ours=self.load(secured, GET, payloads, callers),
            )
            for callers in CALLERS
        ]

    def page(self, ours: Server, rows: int) -> Comparison:
        """The far end of ListRecovered beside its start."""
        with grpc.insecure_channel(ours.address) as channel:
            token = far_page(channel, rows)
        requests = {
            name: recovery_pb.ListRecoveredRequest(page_size=50, page_token=token)
            for name, token in {"first": "", "far": token}.items()
        }
        first, far = (
            self.load(ours, PAGE, self.payloads(name, [request.SerializeToString()]), 1)
            for name, request in requests.items()
        )
        return compare(
            f"ListRecovered, 50 from {rows:,} against the first 50",
            rounds=self.rounds, floor=first, ours=far,
        )  # fmt: skip

    def create(self, ours: Server, store: Path) -> list[Comparison]:
        """CreateRun beside a commit of a run for each call."""
        request = pb.CreateRunRequest(engine="demo")
        request.input.update({"prompt": "x" * INPUT_BYTES})
        payloads = self.payloads("create", [request.SerializeToString()])
        with grpc.insecure_channel(ours.address) as channel:
            answer = pb_grpc.RunServiceStub(channel).CreateRun(request)
        statements = created(store / FILE, answer.run.run_id)
        with self._committing(
            "create", CREATE, answer.SerializeToString(), store, statements
        ) as base:
            return [
                compare(
                    f"CreateRun, {callers} callers",
                    rounds=self.rounds,
                    floor=self.load(base, CREATE, payloads, callers),
                    ours=self.load(ours, CREATE, payloads, callers),
                )
                for callers in CALLERS
            ]

    def reply(self, ours: Server, store: Path) -> list[Comparison]:
        """SubmitReply beside a commit of the same rows for each call."""
        requests = [
            pb.SubmitReplyRequest(run_id=run_id, interaction_id=number, response=YES)
            for _, run_id, number in waiting(store / FILE)[::2]
        ]
        return self._each_once("SubmitReply", ours, store, requests, REPLIED)

    def cancel(self, ours: Server, store: Path) -> list[Comparison]:
        """CancelRun beside a commit of the same rows for each call."""
        requests = [
            pb.CancelRunRequest(run_id=run_id) for _, run_id, _ in waiting(store / FILE)[1::2]
        ]
        return self._each_once("CancelRun", ours, store, requests, CANCELED)

    def _each_once(
        self,
        name: str,
        ours: Server,
        store: Path,
        requests: Sequence[Message],
        statements: Sequence[str],
    ) -> list[Comparison]:
        """Compare calls that can be made only once for each run."""
        method = f"/runrecovery.v1.RunService/{name}"
        first, *payloads = (request.SerializeToString() for request in requests)
        with grpc.insecure_channel(ours.address) as channel:
            call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(method)
            answer = call(first)
        size = len(payloads) // (self.rounds * len(CALLERS))
        parts = iter(
            self.payloads(f"{name}-{at}", payloads[at : at + size])
            for at in range(0, size * self.rounds * len(CALLERS), size)
        )
        with self._committing(name, method, answer, store, statements) as base:
            return [
                compare(
                    f"{name}, {callers} callers",
                    rounds=self.rounds,
                    floor=self.load(base, method, self.payloads(name, payloads), callers),
                    ours=lambda callers=callers: self.load(  # type: ignore[misc] # its default
                        ours, method, next(parts), callers, once=True
                    )(),
                )
                for callers in CALLERS
            ]

    def _committing(
        self,
        name: str,
        method: str,
        answer: bytes,
        store: Path,
        statements: Sequence[str],
    ) -> AbstractContextManager[Server]:
        copy = Path(shutil.copytree(store, self.top / f"floor-{name}"))
        return floor(COMMITTING, method, answer.hex(), str(copy / FILE), json.dumps(statements))


# -- the table ---------------------------------------------------------------------------------


def show(comparisons: list[Comparison]) -> None:
    """Print the table."""
    table = Table(title="Calls, min / median / max of the rounds")
    for heading in ("what", "", "calls/s", "p50 ms", "server CPU µs", "rate", "p50", "CPU"):
        table.add_column(heading, justify="left" if heading in {"what", ""} else "right")
    for one in comparisons:
        table.add_row(one.name, "floor", *_columns(one.floor))
        ratios = (f"{one.rate:.2f} x", f"{one.latency:.2f} x", f"{one.cpu:.2f} x")
        table.add_row("", "ours", *_columns(one.ours), *ratios, end_section=True)
    Console(width=130).print(table)


def _columns(loads: list[Load]) -> tuple[str, str, str]:
    cpu_us = statistics.median(load.server_cpu_us for load in loads)
    return (
        _spread([load.calls_per_s for load in loads], "{:,.0f}"),
        _spread([load.p50_ms for load in loads], "{:.2f}"),
        f"{cpu_us:.0f}",
    )


def _spread(values: list[float], form: str) -> str:
    shown = (min(values), statistics.median(values), max(values))
    return " / ".join(form.format(value) for value in shown)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--only", choices=PARTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as top:
        bench = Bench(Path(top), args.seconds, args.rounds)
        data_dir = Path(top, "data")
        data_dir.mkdir(mode=0o700)
        ids = seed(data_dir, args.rows)
        copy = Path(shutil.copytree(data_dir, Path(top, "copy")))
        comparisons: list[Comparison] = []
        with service(data_dir, until="service.serving") as ours:
            if args.only in {None, "get"}:
                comparisons += bench.get(ours, ids)
            if args.only in {None, "secure"}:
                config = secure_config(Path(top))
                with service(copy, config=config, until="service.serving") as secured:
                    comparisons += bench.secure(ours, secured, ids)
            if args.only in {None, "page"}:
                comparisons.append(bench.page(ours, args.rows))
            for name, writes in (
                ("create", bench.create), ("reply", bench.reply), ("cancel", bench.cancel),
            ):  # fmt: skip
                if args.only in {None, name}:
                    comparisons += writes(ours, data_dir)
    show(comparisons)


if __name__ == "__main__":
    main()
