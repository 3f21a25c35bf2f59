"""A caller that is refused, and calls again without a pause, is not noticed by another caller."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused
from support.callers import caller, token_of
from support.service import Home, ServiceProcess
from support.waiting import until

IN_PROGRESS = 64
CALLS = 100
MOST_PER_CALL = 30
"""Refusals for each call of the other caller. A service that refuses at once refuses some 60: as
many as are in progress beside the one call of the other."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    callers = [
        caller("quiet", "operator"),
        caller("noisy", "viewer", max_calls=1),
        caller("fast", "viewer", max_calls_per_s=1),
    ]
    path: Path = tmp_path_factory.mktemp("excess")
    with Home(path, callers=callers, token=token_of("quiet")) as home:
        yield home.start()[0]


class Noise:
    """Keeps calls in progress: each is followed by another as soon as it has ended."""

    def __init__(self, call: Any, request: Any) -> None:
        self._call, self._request = call, request
        self._lock = threading.Lock()
        self._stopped = False
        self._running = 0
        self.codes: Counter[grpc.StatusCode] = Counter()

    def start(self, calls: int) -> None:
        """Begin the calls."""
        for _ in range(calls):
            self._begin()

    def stop(self) -> None:
        """Begin no more calls, and wait for those in progress."""
        with self._lock:
            self._stopped = True
        until(lambda: self._running == 0, "the calls have ended")

    def _begin(self) -> None:
        with self._lock:
            if self._stopped:
                return
            self._running += 1
        self._call.future(self._request, timeout=60).add_done_callback(self._end)

    def _end(self, call: Any) -> None:
        self.codes[call.code()] += 1
        self._begin()
        with self._lock:
            self._running -= 1


@contextmanager
def noise(call: Any, request: Any, code: grpc.StatusCode) -> Iterator[Noise]:
    """Call without a pause, from the first refusal with this code on."""
    noisy = Noise(call, request)
    noisy.start(IN_PROGRESS)
    try:
        until(lambda: noisy.codes[code], "a call was refused")
        yield noisy
    finally:
        noisy.stop()


def refusals_beside(noisy: Noise, code: grpc.StatusCode, quiet: Api) -> int:
    """Return how many calls are refused while the other caller makes its calls."""
    before = noisy.codes[code]
    for _ in range(CALLS):
        refused(lambda: quiet.get("none"))
    return noisy.codes[code] - before


@pytest.mark.parametrize("kind", ["wrong token", "denied", "too fast"])
def test_refusals_of_a_caller_without_a_pause_are_few_beside_the_calls_of_another(
    service: ServiceProcess, kind: str
) -> None:
    name = {"wrong token": "nobody", "denied": "noisy", "too fast": "fast"}[kind]
    with Api(service.address, token=token_of(name)) as api, service.api() as quiet:
        call, request, code = {
            "wrong token": (
                api.runs.ListRuns, pb.ListRunsRequest(), grpc.StatusCode.UNAUTHENTICATED,
            ),
            "denied": (
                api.recovery.PlanRecovery, recovery_pb.PlanRecoveryRequest(),
                grpc.StatusCode.PERMISSION_DENIED,
            ),
            "too fast": (
                api.runs.ListRuns, pb.ListRunsRequest(), grpc.StatusCode.RESOURCE_EXHAUSTED,
            ),
        }[kind]  # fmt: skip
        with noise(call, request, code) as noisy:
            refusals = refusals_beside(noisy, code, quiet)

    assert refusals < MOST_PER_CALL * CALLS
    assert set(noisy.codes) <= {code, grpc.StatusCode.OK}


def test_streams_beyond_max_calls_are_refused_slowly_and_the_open_one_continues(
    service: ServiceProcess,
) -> None:
    with Api(service.address, token=token_of("noisy")) as api, service.api() as quiet:
        run = quiet.create("resumable", {"questions": [{"kind": "open_text", "prompt": "?"}]})
        quiet.until_status(run.run_id, "WAITING_USER")
        watch = api.runs.WatchRun(pb.WatchRunRequest(run_id=run.run_id, after_sequence=0))
        assert next(watch).event.kind == run_pb2.RUN_EVENT_KIND_CREATED
        found = refused(lambda: api.get(run.run_id))
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
        with noise(api.runs.GetRun, pb.GetRunRequest(run_id=run.run_id), code) as noisy:
            refusals = refusals_beside(noisy, code, quiet)
            quiet.cancel(run.run_id)
            kinds = [update.event.kind for update in watch]

    assert (found.reason, found.retry_after_s, found.pushback_ms) == (
        "CALLER_OVERLOADED", 1.0, "1000",
    )  # fmt: skip
    assert refusals < MOST_PER_CALL * CALLS
    assert run_pb2.RUN_EVENT_KIND_CANCELED in kinds
