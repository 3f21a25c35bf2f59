"""The clients of a service that is killed again and again: a process of its own.

    python tests/campaign/kill_load.py --address unix:/... --journal FILE --seed 1

They create runs, answer, cancel, reopen and watch, and repeat each call with its request_id until
it is answered. The journal (`load.py`) has everything that they asked and got. After a line on
standard input the clients end. Once standard input is closed, the watchers end, and the process.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, Final

import click
import grpc

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).parents[1]))

from campaign.load import OUTAGES, POLICIES, QUESTION, Client, Journal
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refusal_of

SESSION_LOST: Final = "session_handle_lost"
"""The rule by which a recovery has failed a run that can be reopened."""
TRIES: Final = 1000
"""A client repeats a call until it is answered, for at least half a minute."""
RETRY_S: Final = 0.03
WATCH_S: Final = 5.0
LIVE_MOST: Final = 20
"""With so many live runs no run is created, so that most runs end, and a store stays small."""
FINISH_S: Final = 60.0
# More than a third of them ask quickly, so that many wait at each kill.
INPUTS: Final[tuple[tuple[str, dict[str, Any]], ...]] = (
    ("resumable", {}),
    ("resumable", {"work_s": 0.3}),
    ("resumable", {"work_s": 0.1, "children": 2}),
    ("resumable", {"work_s": 0.4, "ignore_sigterm": True}),
    *[("resumable", {"questions": [QUESTION]})] * 4,
    ("resumable", {"questions": [QUESTION, QUESTION], "work_s": 0.05}),
    ("sticky", {"questions": [QUESTION]}),
)


class KillClient(Client):
    """Calls one service until it answers, whatever happens to it."""

    inputs = INPUTS
    weights = (5, 8, 1, 4, 0)  # watches have threads of their own
    retry_s = RETRY_S

    def __init__(self, number: int, seed: int, journal: Journal, api: Api, period_s: float) -> None:
        super().__init__(number, seed, journal, lambda: [api], tries=TRIES)
        self._period_s = period_s
        self._next_s = time.monotonic()

    def pause_s(self) -> float:
        """Return the seconds until the next call; 0 if it should have been made by now."""
        now_s = time.monotonic()
        self._next_s = max(self._next_s + self._period_s, now_s - self._period_s)
        return max(0.0, self._next_s - now_s)

    def create_run(self, engine: str, given: Mapping[str, Any]) -> bool:
        """Create a run, unless many live."""
        alive = len(self._journal.runs) - len(self._journal.ended)
        return alive < LIVE_MOST and super().create_run(engine, given)

    def policies(self, engine: str) -> Sequence[run_pb2.RestartPolicy.ValueType]:
        """Return the restart policies that an engine supports."""
        return (*POLICIES, run_pb2.RESTART_POLICY_RESUME) if engine == "resumable" else POLICIES

    def get(self, run_id: str) -> run_pb2.Run | None:
        """Return a run. Reopen it if a recovery has failed it because its session was lost."""
        run = super().get(run_id)
        if run is not None and _is_reopenable(run):
            request = pb.ReopenRunRequest(
                run_id=run_id, keep_session=True, request_id=str(uuid.uuid4())
            )
            if self._call("reopen", lambda api: api.runs.ReopenRun(request, timeout=10)):
                self._journal.note("add_reopen", run_id)
        return run

    def is_over(self, run: run_pb2.Run) -> bool:
        """Return whether nothing more can happen to a run."""
        return super().is_over(run) and not _is_reopenable(run)


def _is_reopenable(run: run_pb2.Run) -> bool:
    return run.status == run_pb2.RUN_STATUS_FAILED and run.recovery.recovery_reason == SESSION_LOST


class Watcher(threading.Thread):
    """Watches one run after the other from its first event to its end, over restarts."""

    def __init__(self, number: int, seed: int, journal: Journal, api: Api) -> None:
        super().__init__(name=f"watcher-{number}", daemon=True)
        self._random = Random(f"{seed}-watcher-{number}")  # noqa: S311 - a plan, no secret
        self._journal, self._api = journal, api
        self.stop = threading.Event()

    def run(self) -> None:
        """Watch until `stop` is set."""
        while not self.stop.wait(RETRY_S):
            run_id = self._journal.pick(self._random)
            if run_id is None or not self._journal.begin_watch(run_id):
                continue
            try:
                self.watch(run_id)
            except Exception as error:  # noqa: BLE001 - a defect of the campaign is no success
                self._journal.violate(f"watcher: {type(error).__name__}: {error}")

    def watch(self, run_id: str) -> None:
        """Watch a run from its first event to its end, or until `stop` is set."""
        last = 0
        while not self.stop.is_set():
            request = pb.WatchRunRequest(run_id=run_id, after_sequence=last)
            try:
                for message in self._api.runs.WatchRun(request, timeout=WATCH_S):
                    if message.WhichOneof("update") == "event":
                        last = message.sequence
                        kind = run_pb2.RunEventKind.Name(message.event.kind)
                        word = kind.removeprefix("RUN_EVENT_KIND_")
                        self._journal.note("see", run_id, last, word)
            except grpc.RpcError as error:
                refusal = refusal_of(error)
                if refusal.code not in OUTAGES:
                    self._journal.violate(f"watch: {refusal.code} {refusal.message}")
                    return
                time.sleep(RETRY_S)
            else:
                self._journal.note("end_watch", run_id)
                return


@click.command()
@click.option("--address", required=True)
@click.option("--journal", "file", type=click.Path(path_type=Path), required=True)
@click.option("--seed", type=int, required=True)
@click.option("--clients", default=3, show_default=True)
@click.option("--watchers", default=2, show_default=True)
@click.option("--period-s", default=0.03, show_default=True, help="Between calls of a client.")
def main(
    *, address: str, file: Path, seed: int, clients: int, watchers: int, period_s: float
) -> None:
    """Call one service until standard input has a line, and watch it until that is closed."""
    journal = Journal(file)
    api = Api(address, timeout_s=4.0)
    calling = [KillClient(number, seed, journal, api, period_s) for number in range(clients)]
    watching = [Watcher(number, seed, journal, api) for number in range(watchers)]
    for thread in (*calling, *watching):
        thread.start()
    for threads in (calling, watching):
        sys.stdin.readline()
        for thread in threads:
            thread.stop.set()
        ends_s = time.monotonic() + FINISH_S
        for thread in threads:
            thread.join(max(0.0, ends_s - time.monotonic()))
            if thread.is_alive():
                journal.violate(f"{thread.name} got no answer within {FINISH_S:.0f} s")
        journal.note("count", "finished")
    os._exit(0)  # without waiting for what hangs, which the journal has


if __name__ == "__main__":
    main()
