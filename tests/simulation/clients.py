"""The callers of a simulated service, and what they were told.

A caller that got no answer sends the same request again later, with the same `request_id`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from runrecovery_service.domain.errors import (
    CommitsLost,
    Exhausted,
    Fenced,
    NotNow,
    RunRecoveryError,
)
from runrecovery_service.domain.run import NewRun, Run
from runrecovery_service.rpc.gate import Access
from runrecovery_service.storage import interactions, reopening, runs
from runrecovery_service.storage.requests import Receipt
from simulation.incarnation import Incarnation
from simulation.world import Cut, World

Write = Callable[..., Run]


@dataclass
class Call:
    """One request of a caller.

    Attributes:
        run_id: the run; for CreateRun the name by which the caller knows the run that it wants.
        tries: how often the request was sent.
        is_sent: the answer is awaited.
        answer: the run that was returned; None: no answer yet.
        refused: why the request was refused.
    """

    method: str
    request_id: str
    run_id: str
    write: Write
    arguments: tuple[Any, ...]
    is_sent: bool = False
    tries: int = 0
    answer: Run | None = None
    refused: RunRecoveryError | None = None

    @property
    def is_open(self) -> bool:
        """Whether the caller does not know what came of the request."""
        return self.answer is None and self.refused is None

    @property
    def number(self) -> int:
        """The question that a reply answers."""
        return int(self.arguments[1])


class Clients:
    """All callers."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.calls: list[Call] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def of(self, method: str) -> list[Call]:
        """Return the answered calls of one method."""
        return [call for call in self.calls if call.method == method and call.answer is not None]

    def create(self, new: NewRun) -> Call:
        """Prepare a call."""
        return self._prepare("CreateRun", new.run_id, runs.create, (new,))

    def reply(self, run_id: str, number: int, response: object) -> Call:
        """Prepare a call."""
        return self._prepare("SubmitReply", run_id, interactions.reply, (run_id, number, response))

    def cancel(self, run_id: str) -> Call:
        """Prepare a call."""
        return self._prepare("CancelRun", run_id, runs.cancel, (run_id,))

    def reopen(self, run_id: str) -> Call:
        """Prepare a call."""
        return self._prepare("ReopenRun", run_id, reopening.reopen, (run_id,))

    def _prepare(self, method: str, run_id: str, write: Write, arguments: tuple[Any, ...]) -> Call:
        call = Call(method, f"request-{len(self.calls)}", run_id, write, arguments)
        self.calls.append(call)
        return call

    def send(self, call: Call, service: Incarnation) -> None:
        """Send a request, perhaps again."""
        call.is_sent, call.tries = True, call.tries + 1
        task = self._world.loop.create_task(self._send(call, service))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, call: Call, service: Incarnation) -> None:
        was_answered = call.answer
        try:
            run = await self._perform(call, service)
        except (NotNow, Exhausted, Fenced, CommitsLost) as error:
            self._world.note(f"{call.method} {call.run_id}: no result ({type(error).__name__})")
        except RunRecoveryError as error:
            self._world.note(f"{call.method} {call.run_id}: {type(error).__name__}")
            call.refused = error
        except (Cut, asyncio.CancelledError):
            pass
        else:
            if self._world.is_alive:
                self._world.note(f"{call.method} {call.run_id}: OK")
                call.answer = was_answered or run
        finally:
            call.is_sent = False

    async def _perform(self, call: Call, service: Incarnation) -> Run:
        parts = service.parts
        parts.gate.check_access(Access.MUTATION)
        named: dict[str, Any] = {"etag": None}
        arguments = call.arguments
        if call.method == "CreateRun":
            parts.gate.check_launches_allowed()
            named = {"max_queued": 100}
            # As in the service, each try names another run. Only the receipt tells that the run
            # exists already.
            (new,) = arguments
            arguments = (replace(new, run_id=f"{call.run_id}.{call.tries}"),)
        elif call.method == "ReopenRun":
            named |= {
                "handle": None,
                "session_type_of": parts.catalog.session_type,
                "wait_s_of": parts.catalog.wait_s,
                "due_in": parts.clock.due_in,
                "steady": parts.clock.steady(),
            }
        receipt = Receipt(
            request_id=call.request_id,
            method=call.method,
            fingerprint=repr(call.arguments).encode(),
            caller=None,
        )
        return await parts.storage.write(
            call.write,
            *arguments,
            owner=parts.owner,
            receipt=receipt,
            now=parts.clock.now(),
            **named,
        )
