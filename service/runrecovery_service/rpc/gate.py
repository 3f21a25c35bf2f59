"""The state of the service as a whole, and which methods may be called in it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, StrEnum, auto
from typing import Final

from runrecovery_service.clock import wait_within
from runrecovery_service.domain.errors import (
    ReconciliationInProgress,
    SafeMode,
    ShuttingDown,
    StorageFull,
)

DISK_LOW: Final = (
    "the disk of the service has less room than min_free_bytes, so no run is started; retry later"
)
DISK_LOW_RETRY_S: Final = 30.0


class ServiceState(StrEnum):
    """The state of the service as a whole."""

    RECOVERING = "RECOVERING"
    RECOVERY_FAILED = "RECOVERY_FAILED"
    SERVING = "SERVING"
    DRAINING = "DRAINING"


class Access(Enum):
    """The states of the service in which a method may be called."""

    ALWAYS = auto()
    """In every state, and outside the limit of concurrent calls."""
    READ = auto()
    """From the commit of recovery until the server closes."""
    MUTATION = auto()
    """From the commit of recovery until a stop refuses changes. If `finish_s` is set, the stop
    first waits for the turns under way."""


class Gate:
    """Holds the state of the service, and wakes tasks that wait for a change. Not thread-safe.

    The first state is RECOVERING. DRAINING is final: a recovery that ends later changes nothing.

    Args:
        retry_after_s: seconds after which refused callers are asked to retry.
    """

    def __init__(self, *, retry_after_s: float = 1.0) -> None:
        self._retry_after_s = retry_after_s
        self._state = ServiceState.RECOVERING
        self._recovered = False
        self._storage_answers = True
        self._safe_mode = False
        self._disk_low = False
        self._finishing = False
        self._closed = False
        self._listens = True
        self._change = asyncio.Event()
        self._events: set[asyncio.Event] = set()

    @property
    def state(self) -> ServiceState:
        """The present state."""
        return self._state

    @property
    def storage_answers(self) -> bool:
        """False while the database does not answer."""
        return self._storage_answers

    @property
    def listens(self) -> bool:
        """False while another process has the listen address."""
        return self._listens

    @property
    def disk_low(self) -> bool:
        """True while a disk has less room than `min_free_bytes`."""
        return self._disk_low

    @property
    def draining(self) -> bool:
        """True once the service is shutting down."""
        return self._state is ServiceState.DRAINING

    @property
    def ends_streams(self) -> bool:
        """True once streams must end. False while a stop still waits for turns under way."""
        return self.draining and not self._finishing

    @property
    def recovered(self) -> bool:
        """True once recovery has committed."""
        return self._recovered

    @property
    def change(self) -> asyncio.Event:
        """The event that the next change sets. Get it before you read the state."""
        return self._change

    def set_recovering(self) -> None:
        """Record that a recovery has started, perhaps again."""
        self._set_state(ServiceState.RECOVERING)

    def set_recovery_failed(self) -> None:
        """Record that the recovery failed and will be retried."""
        self._set_state(ServiceState.RECOVERY_FAILED)

    def open(self, *, safe_mode: bool = False) -> None:
        """Record that recovery has committed. In safe mode, refuse to create runs from now on."""
        self._safe_mode = safe_mode
        self._recovered = self._recovered or not self.draining
        self._set_state(ServiceState.SERVING)

    def finish(self) -> None:
        """Record that a stop waits for the turns under way: create no run from now on."""
        self._finishing = True
        self._set_state(ServiceState.DRAINING)

    def drain(self) -> None:
        """Record that the service is shutting down: refuse mutations from now on."""
        if self._finishing:
            self._finishing = False
            self._notify_all()
        self._set_state(ServiceState.DRAINING)

    def close(self) -> None:
        """Record that the server is about to close: refuse reads as well from now on."""
        self._closed = True

    def set_storage_answers(self, *, answers: bool) -> None:
        """Record whether the database answers; health depends on it."""
        if answers is not self._storage_answers:
            self._storage_answers = answers
            self._notify_all()

    def set_listens(self, *, listens: bool) -> None:
        """Record whether the service still has its address; health depends on it."""
        if listens is not self._listens:
            self._listens = listens
            self._notify_all()

    def set_disk_low(self, *, low: bool) -> None:
        """Record whether the disk has less room than `min_free_bytes`.

        Health does not depend on this, because replies, cancels and reads are still answered.
        """
        self._disk_low = low

    def check_access(self, access: Access) -> None:
        """Raise unless a method with this access may be called now.

        Raises:
            ReconciliationInProgress: recovery has not committed.
            ShuttingDown: the service drains and this is a mutation; or recovery never committed, so
                that reads would be wrong; or the server is closing.
        """
        if self._state is ServiceState.SERVING or access is Access.ALWAYS:
            return
        if not self.draining:
            raise ReconciliationInProgress(retry_after_s=self._retry_after_s)
        refuses_mutations = not self._finishing and access is Access.MUTATION
        if refuses_mutations or not self._recovered or self._closed:
            raise ShuttingDown(retry_after_s=self._retry_after_s)

    def check_launches_allowed(self) -> None:
        """Raise unless runs may be created.

        Raises:
            SafeMode: this start launches nothing.
            ShuttingDown: the service waits for the turns under way and launches nothing else.
            StorageFull: the disk has less room than `min_free_bytes`.
        """
        if self._finishing:
            raise ShuttingDown(retry_after_s=self._retry_after_s)
        if self._safe_mode:
            raise SafeMode(retry_after_s=self._retry_after_s)
        if self._disk_low:
            raise StorageFull(DISK_LOW, retry_after_s=DISK_LOW_RETRY_S)

    @contextmanager
    def notify(self, event: asyncio.Event) -> Iterator[None]:
        """Set the caller's event at every change, inside the context."""
        self._events.add(event)
        try:
            yield
        finally:
            self._events.discard(event)

    async def wait(self, change: asyncio.Event, *, timeout_s: float) -> None:
        """Wait for the change, for at most `timeout_s` seconds."""
        await wait_within(change, timeout_s)

    def _set_state(self, state: ServiceState) -> None:
        if state is not self._state and not self.draining:
            self._state = state
            self._notify_all()

    def _notify_all(self) -> None:
        change, self._change = self._change, asyncio.Event()
        change.set()
        for event in self._events:
            event.set()
