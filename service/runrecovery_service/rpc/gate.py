"""What the service does as a whole, and therefore who may be let in. One place, one truth."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum, StrEnum, auto

from runrecovery_service.domain.errors import ReconciliationInProgress, SafeMode, ShuttingDown


class ServiceState(StrEnum):
    """What the service is doing as a whole."""

    RECOVERING = "RECOVERING"
    RECOVERY_FAILED = "RECOVERY_FAILED"
    SERVING = "SERVING"
    DRAINING = "DRAINING"


class Access(Enum):
    """When a method may be called."""

    ALWAYS = auto()
    """In every state, and beside the limit of calls: one must be able to ask what is going on."""
    READ = auto()
    """Once recovery has committed, until the end."""
    MUTATION = auto()
    """Once recovery has committed, until the service drains."""


class Gate:
    """The state of the service and who waits for it to change. Use it on the event loop only.

    It begins closed, RECOVERING. DRAINING is final: whatever a recovery that is still at work
    reports afterwards changes nothing.

    Args:
        retry_after_s: when callers that come too early are told to try again.
    """

    def __init__(self, *, retry_after_s: float = 1.0) -> None:
        self._retry_after_s = retry_after_s
        self._state = ServiceState.RECOVERING
        self._recovered = False
        self._storage_answers = True
        self._safe_mode = False
        self._closed = False
        self._listens = True
        self._change = asyncio.Event()
        self._followers: set[asyncio.Event] = set()

    @property
    def state(self) -> ServiceState:
        """What the service is doing."""
        return self._state

    @property
    def storage_answers(self) -> bool:
        """False while the database is known not to answer."""
        return self._storage_answers

    @property
    def listens(self) -> bool:
        """False while somebody else has the address on which the service listens."""
        return self._listens

    @property
    def draining(self) -> bool:
        """True once the service is shutting down."""
        return self._state is ServiceState.DRAINING

    @property
    def recovered(self) -> bool:
        """True once recovery has committed, until the end."""
        return self._recovered

    @property
    def change(self) -> asyncio.Event:
        """Set by the next change. Take it before looking at the state, and none is missed."""
        return self._change

    def recovering(self) -> None:
        """A recovery is at work (again)."""
        self._become(ServiceState.RECOVERING)

    def recovery_failed(self) -> None:
        """The recovery failed and will be tried again."""
        self._become(ServiceState.RECOVERY_FAILED)

    def open(self, *, safe_mode: bool = False) -> None:
        """Recovery has committed: let everybody in. In safe mode no run may be created."""
        self._safe_mode = safe_mode
        self._recovered = self._recovered or not self.draining
        self._become(ServiceState.SERVING)

    def drain(self) -> None:
        """The service is shutting down. Mutations are refused from now on, reads are not."""
        self._become(ServiceState.DRAINING)

    def close(self) -> None:
        """The server is about to end. Reads are refused as well from now on."""
        self._closed = True

    def set_storage_answers(self, *, answers: bool) -> None:
        """Record whether the database answers; health tells it."""
        if answers is not self._storage_answers:
            self._storage_answers = answers
            self._announce()

    def set_listens(self, *, listens: bool) -> None:
        """Record whether the service still has its address; health tells it."""
        if listens is not self._listens:
            self._listens = listens
            self._announce()

    def demand(self, access: Access) -> None:
        """Let a call pass, or refuse it.

        Raises:
            ReconciliationInProgress: recovery has not committed.
            ShuttingDown: the service drains, and this would change something (or recovery never
                committed, so that even a read could not be trusted), or the server is ending.
        """
        if self._state is ServiceState.SERVING or access is Access.ALWAYS:
            return
        if not self.draining:
            raise ReconciliationInProgress(retry_after_s=self._retry_after_s)
        if access is Access.MUTATION or not self._recovered or self._closed:
            raise ShuttingDown(retry_after_s=self._retry_after_s)

    def demand_launches(self) -> None:
        """Let a new run pass.

        Raises:
            SafeMode: this start launches nothing.
        """
        if self._safe_mode:
            raise SafeMode(retry_after_s=self._retry_after_s)

    @contextmanager
    def following(self, event: asyncio.Event) -> Iterator[None]:
        """Have an event of the caller's own set with every change."""
        self._followers.add(event)
        try:
            yield
        finally:
            self._followers.discard(event)

    async def wait(self, change: asyncio.Event, *, timeout_s: float) -> None:
        """Return at the change, or after `timeout_s` seconds without one."""
        with suppress(TimeoutError):
            await asyncio.wait_for(change.wait(), timeout_s)

    def _become(self, state: ServiceState) -> None:
        if state is not self._state and not self.draining:
            self._state = state
            self._announce()

    def _announce(self) -> None:
        change, self._change = self._change, asyncio.Event()
        change.set()
        for event in self._followers:
            event.set()
