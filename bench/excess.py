"""What other callers notice of a caller that is refused without a pause.

    python bench/excess.py --seconds 2 --rounds 5

One caller makes GetRun, one call at a time: alone, and beside a second caller that makes each call
as soon as the one before has ended. Each client is a process of its own, with the generator of
load.py. The ratio is that of the first caller's times beside the second caller to its times alone,
the median of the rounds.

4 calls       within `max_calls = 4`. The service answers them as fast as it can.
16 calls      12 of them are beyond `max_calls = 4`.
rate          16 calls of a caller with `max_calls_per_s = 50` as well.
wrong token   16 and 64 calls that no caller makes.
denied        16 calls for which the role is not sufficient.
streams       64 watches; 60 of them are beyond `max_calls = 4`.
elsewhere     the 16 calls of a wrong token go to a second service on the machine: what is left is
              the cost of the processes, not of sharing a service.
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Final

import grpc
from rich.console import Console
from rich.table import Table
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery.v1 import run_service_pb2_grpc as pb_grpc

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.load import END_STREAM, Connection, Frame, Load, Target, cpu_s, generate
from bench.rpc import GET, seed
from bench.servers import CONFIG, Server, service

ROWS: Final = 1000
MAX_CALLS: Final = 4
MAX_CALLS_PER_S: Final = 50
WATCH: Final = "/runrecovery.v1.RunService/WatchRun"
PLAN: Final = "/runrecovery.v1.RecoveryService/PlanRecovery"
QUIET: Final = secrets.token_hex(32)
NOISY: Final = secrets.token_hex(32)
SLOWED: Final = secrets.token_hex(32)
WRONG: Final = secrets.token_hex(32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """The second caller."""

    name: str
    calls: int
    token: str = NOISY
    method: str = GET
    elsewhere: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One measurement alone, and one beside the second caller, whose ends of calls it counts."""

    alone: Load
    beside: Load
    answered_per_s: float
    refused_per_s: float
    server_cpu: float
    """Share of one processor that the service used beside the second caller."""


NOISES: Final = (
    Noise(name="4 calls", calls=4),
    Noise(name="16 calls", calls=16),
    Noise(name="rate", calls=16, token=SLOWED),
    Noise(name="wrong token, 16", calls=16, token=WRONG),
    Noise(name="wrong token, 64", calls=64, token=WRONG),
    Noise(name="denied", calls=16, method=PLAN),
    Noise(name="streams", calls=64, method=WATCH),
    Noise(name="elsewhere", calls=16, token=WRONG, elsewhere=True),
)


class NoisyConnection(Connection):
    """Calls again at once, and counts how calls end. A refused call is not a failure here."""

    def __init__(self, target: Target, payloads: list[bytes]) -> None:
        super().__init__(target, payloads)
        self.answered = self.refused = 0

    def repeat(self, calls: int) -> None:
        """Keep this many calls in progress until the process is interrupted."""
        self._socket.sendall(b"".join(self._call() for _ in range(calls)))
        while True:
            ends = list(self._receive())
            frames = [end if isinstance(end, bytes) else self._call() for end in ends]
            if frames:
                self._socket.sendall(b"".join(frames))

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> int | bytes | None:
        if kind == Frame.HEADERS and flags & END_STREAM and stream not in self._answered:
            self.refused += 1
            self._begun.pop(stream)
            return stream
        end = super()._take(kind, flags, stream, payload)
        if isinstance(end, int):
            self.answered += 1
            self._begun.pop(end)
        return end


def make_noise(target: Target, payloads: Path, calls: int) -> None:
    """Call until SIGINT, then print the numbers of answered and refused calls."""
    connection = NoisyConnection(target, _read(payloads))
    print("ready", flush=True)
    try:
        connection.repeat(calls)
    except KeyboardInterrupt:
        print(json.dumps([connection.answered, connection.refused]), flush=True)


def _read(payloads: Path) -> list[bytes]:
    return [
        bytes.fromhex(line) for line in payloads.read_text().split("\n")
    ]  # an empty request is an empty line


@contextmanager
def noise(target: Target, payloads: Path, calls: int) -> Iterator[list[int]]:
    """Run the second caller; the list gets its answered and refused calls at the end."""
    counted: list[int] = []
    command = [
        sys.executable, __file__, "--noise", target.address, "--method", target.method,
        "--payloads", str(payloads), "--calls", str(calls), "--token", target.token,
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE) as popen:
        try:
            if popen.stdout is None or not popen.stdout.readline():
                raise ChildProcessError("the second caller did not start")
            yield counted
            popen.send_signal(signal.SIGINT)
            counted += json.loads(popen.stdout.read())
        finally:
            popen.kill()


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements share."""

    server: Server
    other: Server
    payloads: dict[str, Path]
    seconds: float

    def measure(self, one: Noise) -> Round:
        """Measure once alone, and once beside this caller."""
        alone = self._get()
        server = self.other if one.elsewhere else self.server
        target = Target(address=server.address, method=one.method, token=one.token)
        with noise(target, self.payloads[one.method], one.calls) as counted:
            used_s, begun = cpu_s(self.server.pid), time.perf_counter()
            beside = self._get()
            elapsed_s = time.perf_counter() - begun
            used_s = cpu_s(self.server.pid) - used_s
        answered, refused = counted
        return Round(
            alone=alone,
            beside=beside,
            answered_per_s=answered / elapsed_s,
            refused_per_s=refused / elapsed_s,
            server_cpu=used_s / elapsed_s,
        )

    def _get(self) -> Load:
        target = Target(address=self.server.address, method=GET, token=QUIET)
        return generate(
            target, self.payloads[GET], callers=1, seconds=self.seconds, pid=self.server.pid
        )


def config(*, with_rate: bool) -> str:
    """Return the configuration with the callers of the measurements."""
    tables = {"quiet": (QUIET, ""), "noisy": (NOISY, f"max_calls = {MAX_CALLS}\n")}
    if with_rate:
        limits = f"max_calls = {MAX_CALLS}\nmax_calls_per_s = {MAX_CALLS_PER_S}\n"
        tables["slowed"] = (SLOWED, limits)
    return CONFIG + "".join(
        f'\n[[callers]]\nname = "{name}"\nrole = "viewer"\n'
        f'token_sha256 = "{sha256(token.encode()).hexdigest()}"\n{limits}'
        for name, (token, limits) in tables.items()
    )


def requests(top: Path, server: Server, ids: list[str]) -> dict[str, Path]:
    """Write the requests of each method into a file. The watched run waits for its user."""
    with grpc.insecure_channel(server.address) as channel:
        waiting = pb_grpc.RunServiceStub(channel).ListRuns(
            pb.ListRunsRequest(
                filter=pb.RunFilter(statuses=[run_pb2.RUN_STATUS_WAITING_USER]), page_size=1
            ),
            metadata=(("authorization", f"Bearer {QUIET}"),),
        )
    messages = {
        GET: [pb.GetRunRequest(run_id=run_id).SerializeToString() for run_id in ids],
        WATCH: [pb.WatchRunRequest(run_id=waiting.runs[0].run_id).SerializeToString()],
        PLAN: [recovery_pb.PlanRecoveryRequest().SerializeToString()],
    }
    files = {}
    for number, (method, payloads) in enumerate(messages.items()):
        files[method] = top / f"{number}.payloads"
        files[method].write_text("\n".join(payload.hex() for payload in payloads))
    return files


def run(top: Path, *, seconds: float, rounds: int, noises: list[Noise]) -> dict[str, list[Round]]:
    """Measure all noises in turns, and return the rounds of each."""
    folders = [top / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir(mode=0o700)
    ids = seed(folders[0], ROWS)
    text = config(with_rate=any(one.token == SLOWED for one in noises))
    measured: dict[str, list[Round]] = {one.name: [] for one in noises}
    with (
        service(folders[0], config=text, until="service.serving") as server,
        service(folders[1], config=text, until="service.serving") as other,
    ):
        bench = Bench(server, other, requests(top, server, ids), seconds)
        for _ in range(rounds):
            for one in noises:
                measured[one.name].append(bench.measure(one))
    return measured


def show(rounds: dict[str, list[Round]]) -> None:
    """Print the table."""
    table = Table(title="GetRun of one caller beside another, medians of the rounds")
    for heading in ("the other", "p50 alone", "p50 beside", "ratio", "p99 alone", "p99 beside",
                    "answered/s", "refused/s", "server CPU"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "the other" else "right")
    for name, measured in rounds.items():
        ratio = statistics.median(one.beside.p50_ms / one.alone.p50_ms for one in measured)
        table.add_row(
            name,
            _median(f"{one.alone.p50_ms}" for one in measured),
            _median(f"{one.beside.p50_ms}" for one in measured),
            f"{ratio:.2f} x",
            _median(f"{one.alone.p99_ms}" for one in measured),
            _median(f"{one.beside.p99_ms}" for one in measured),
            f"{statistics.median(one.answered_per_s for one in measured):,.0f}",
            f"{statistics.median(one.refused_per_s for one in measured):,.0f}",
            f"{statistics.median(one.server_cpu for one in measured):.0%}",
        )
    Console(width=130).print(table)


def _median(values: Iterator[str]) -> str:
    return f"{statistics.median(map(float, values)):.2f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="the beginning of the name of a measurement")
    parser.add_argument("--no-rate", action="store_true")
    parser.add_argument("--noise", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--payloads", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--token", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.noise:
        target = Target(address=args.noise, method=args.method, token=args.token)
        make_noise(target, args.payloads, args.calls)
        return
    noises = [
        one
        for one in NOISES
        if one.name.startswith(args.only) and not (args.no_rate and one.token == SLOWED)
    ]
    with tempfile.TemporaryDirectory(prefix="runrecovery-bench-") as top:
        rounds = run(Path(top), seconds=args.seconds, rounds=args.rounds, noises=noises)
    show(rounds)


if __name__ == "__main__":
    main()
