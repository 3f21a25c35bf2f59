"""Clients that create runs and answer their questions, and use another replica for each call.

A call that gets no answer is repeated at the next replica with the same `request_id`, so it takes
effect once. The journal of acknowledged calls is kept here, outside of the service.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from runrecovery import RunRecoveryClient
from runrecovery.errors import DeadlineExceeded, RunRecoveryClientError, Unavailable
from runrecovery.v1 import run_pb2 as pb
from runrecovery_service.cli.demo.scenario import DemoFailed

from demo.cluster import ENGINE, Cluster

CLIENTS: Final = 3
CALL_TIMEOUT_S: Final = 1.5
"""A replica that does not answer within this time is left for another."""
PATIENCE_S: Final = 30.0
PAUSE_S: Final = 0.05
REPLY: Final = "yes"

T = TypeVar("T")


class AnyReplica:
    """Calls any replica that answers, beginning with another one each time."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._clients: dict[str, RunRecoveryClient] = {}
        self._turns = itertools.count()
        self.repeated = 0

    def call(self, use: Callable[[RunRecoveryClient], T]) -> T:
        """Return the first answer. `use` may be called several times.

        Raises:
            DemoFailed: no replica answered within `PATIENCE_S`.
        """
        deadline = time.monotonic() + PATIENCE_S
        while True:
            for client in self._in_turn():
                try:
                    return use(client)
                except (Unavailable, DeadlineExceeded):
                    self.repeated += 1
            if time.monotonic() > deadline:
                raise DemoFailed(f"no replica answered within {PATIENCE_S:g} s")
            time.sleep(PAUSE_S)

    def close(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            client.close()

    def _in_turn(self) -> list[RunRecoveryClient]:
        names = sorted(self._cluster.in_use)
        first = next(self._turns) % max(1, len(names))
        addresses = [self._cluster.address(name) for name in names[first:] + names[:first]]
        for address in addresses:
            if address not in self._clients:
                self._clients[address] = RunRecoveryClient(address, timeout_s=CALL_TIMEOUT_S)
        return [self._clients[address] for address in addresses]


@dataclass(slots=True)
class Load:
    """Some clients at work in threads, and the journal of the acknowledged calls.

    Attributes:
        created: runs whose creation was acknowledged.
        replied: runs whose reply was acknowledged.
        repeated: the number of calls that were repeated at another replica.
        errors: failures after which a client could not continue.
    """

    cluster: Cluster
    created: list[str] = field(default_factory=list)
    replied: set[str] = field(default_factory=set)
    repeated: int = 0
    errors: list[str] = field(default_factory=list)
    _is_over: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Let the clients begin."""
        for number in range(CLIENTS):
            thread = threading.Thread(target=self._work, args=(number,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Let each client finish its run, and wait for them."""
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _work(self, client: int) -> None:
        replicas = AnyReplica(self.cluster)
        try:
            for number in itertools.count():
                if self._is_over.wait(PAUSE_S):
                    break
                self._play(replicas, f"load-{client}-{number}", asks=number % 2 == 0)
        except (RunRecoveryClientError, DemoFailed) as error:
            self.errors.append(str(error))
        finally:
            self.repeated += replicas.repeated
            replicas.close()

    def _play(self, replicas: AnyReplica, run_id: str, *, asks: bool) -> None:
        request_id = str(uuid.uuid4())
        replicas.call(
            lambda client: client.runs.create(
                engine=ENGINE,
                run_id=run_id,
                input={"work_s": 0.2, "questions": [{"prompt": "Go on?"}] if asks else []},
                restart_policy=pb.RESTART_POLICY_RESUME,
                request_id=request_id,
            )
        )
        self.created.append(run_id)
        if asks and self._until_asked(replicas, run_id):
            reply_id = str(uuid.uuid4())
            replicas.call(lambda client: client.runs.reply(run_id, 1, REPLY, request_id=reply_id))
            self.replied.add(run_id)

    def _until_asked(self, replicas: AnyReplica, run_id: str) -> bool:
        """Return whether the run waits for its reply before the load is over."""
        while not self._is_over.wait(PAUSE_S):
            run = replicas.call(lambda client: client.runs.get(run_id))
            if run.status == pb.RUN_STATUS_WAITING_USER:
                return True
            if run.status not in (pb.RUN_STATUS_QUEUED, pb.RUN_STATUS_RUNNING):
                return False
        return False
