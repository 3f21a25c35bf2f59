"""Replicas whose wall clocks differ: each run has one owner, and the queue moves."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from runrecovery.v1 import run_pb2
from support.api import status_word
from support.engines import GOOD_ENGINES, script
from support.owner_history import HISTORY, STALE_WRITES
from support.service import Home
from support.stores import change, query
from support.waiting import until

LIBRARY: Final = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
ENGINES: Final = {**GOOD_ENGINES, "works": script("import time; input(); time.sleep(600)")}

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="libfaketime is not installed")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ahead_s", [-3600, -600, 600, 3600])
def test_a_peer_with_another_wall_clock_takes_queued_runs_and_takes_over(
    new_home: Callable[..., Home], postgresql_url: str, ahead_s: int
) -> None:
    settings: dict[str, Any] = {"database": postgresql_url, "engines": ENGINES}
    first = new_home(instance="a", max_concurrent=1, lease_ttl_s=15, **settings)
    second = new_home(
        instance="b",
        lease_ttl_s=15,
        may_fork=False,
        env={
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME": f"{ahead_s:+d}s",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "PATH": os.environ["PATH"],
        },
        **settings,
    )
    service, api = first.start()
    for statement in HISTORY:
        change(first, statement)
    held = api.create("works", restart_policy=run_pb2.RESTART_POLICY_REQUEUE).run_id
    until(lambda: first.agents_of(held), "the agent runs")
    peer, through_peer = second.start()

    quick = [api.create("resumable").run_id for _ in range(3)]  # the only slot of `a` is taken
    ended = [api.until_ended(run_id) for run_id in quick]
    assert [(status_word(run), run.error.code) for run in ended] == [("SUCCEEDED", "")] * 3

    service.kill()
    until(lambda: second.agents_of(held), "the agent runs at the peer")
    assert status_word(through_peer.get(held)) == "RUNNING"
    assert query(second, STALE_WRITES) == []
    assert query(second, "SELECT owner FROM run") == [("b",)] * 4
    assert peer.stop() == 0
