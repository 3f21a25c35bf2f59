"""One service on a PostgreSQL database that is cut off, goes silent, or refuses."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc
import pytest
from support.pg_proxy import Proxy, proxied
from support.service import Api, Home, refused, script, until

HOLDS = "import time; input(); time.sleep(600)"
ASKS = """
import json
input()
print(json.dumps({"type": "ask", "kind": "open_text", "prompt": "What?"}), flush=True)
input()
print(json.dumps({"type": "result", "output": {"done": True}}), flush=True)
"""
ENGINES = {"holds": script(HOLDS), "asks": script(ASKS, profile="sticky_process")}


@pytest.fixture
def proxy(postgresql_url: str) -> Iterator[Proxy]:
    """The way of the test's services to their database."""
    with proxied(postgresql_url) as proxy:
        yield proxy


@pytest.fixture
def home(proxy: Proxy, new_home: Callable[..., Home]) -> Home:
    """A home of services whose database is behind the proxy."""
    return new_home(engines=ENGINES, database=proxy.url, max_queued=1_000_000)


@contextmanager
def traffic(api: Api) -> Iterator[None]:
    """Have changes of other runs announced all the time: the looks that come without one do not."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(0.2):
            try:
                run = api.create("holds")
                api.cancel(run.run_id)
            except grpc.RpcError:
                continue

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# -- the answer to a COMMIT is lost --------------------------------------------------------------


def test_a_cancel_whose_commit_was_not_answered_is_carried_out_amid_other_traffic(
    home: Home, proxy: Proxy
) -> None:
    service, api = home.start()
    run = api.create("holds")
    api.until_status(run.run_id, "RUNNING")
    until(lambda: home.agents_of(run.run_id), "the agent lives")
    with traffic(api):
        request_id = str(uuid.uuid4())
        proxy.lose_answer_after(request_id)

        refusal = refused(lambda: api.cancel(run.run_id, request_id=request_id))

        assert proxy.lost.is_set()
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        until(lambda: not home.agents_of(run.run_id), "the agent is ended")
    assert service.stop() == 0


def test_a_reply_whose_commit_was_not_answered_is_delivered_amid_other_traffic(
    home: Home, proxy: Proxy
) -> None:
    service, api = home.start()
    run = api.create("asks")
    api.until_status(run.run_id, "WAITING_USER")
    with traffic(api):
        request_id = str(uuid.uuid4())
        proxy.lose_answer_after(request_id)

        refusal = refused(lambda: api.reply(run.run_id, 1, "yes", request_id=request_id))

        assert proxy.lost.is_set()
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        api.until_status(run.run_id, "SUCCEEDED")
    assert service.stop() == 0


# -- words and exit codes ------------------------------------------------------------------------


def test_a_connection_that_is_lost_at_the_claim_ends_the_start_in_true_words(
    home: Home, proxy: Proxy
) -> None:
    proxy.lose_answer_after("INSERT INTO instance_epoch")

    service = home.spawn()

    assert service.exit_code() == 6
    assert proxy.lost.is_set()
    assert service.text == (
        "error: the PostgreSQL database: consuming input failed: server closed the connection"
        " unexpectedly This probably means the server terminated abnormally before or while"
        " processing the request.\n"
    )
    service, _ = home.start()
    assert service.stop() == 0
