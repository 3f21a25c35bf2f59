"""Stays the owner of this instance's runs: lease, tree deadline, trials of the store, files."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import structlog

from runrecovery_service import daemon_threads
from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import Fenced, LeaseLost, StartRefused, error_facts
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.locks import Holdings
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances, trial
from runrecovery_service.storage.adapter import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner

log = structlog.get_logger()

RENEWALS_PER_LEASE: Final = 5
SELF_FENCE_SHARE: Final = 2 / 3
"""An instance that could not renew its lease for this part of it stops before it runs out. Not on
SQLite: there the lock on the file fences, and a disk that is full is no reason to go."""
TRY_SHARE: Final = 0.3
"""The part of the lease that one try to renew it may take on PostgreSQL."""
TREES_BEFORE_LEASE_S: Final = 1.0
"""Process trees end themselves so long before the lease of a silent service runs out: whoever
takes over then finds nothing alive."""
WRITE_TRIAL_LEASES: Final = 2
"""On PostgreSQL a write is tried once in so many leases: each trial uses up keys."""
FAILURES_IN_A_ROW: Final = 2
"""So many trials of the work's statements must fail until health says NOT_SERVING."""
FILES_LOOK_S: Final = 1.0
"""How soon a removed lock, or file of the SQLite store, is noticed without a write."""
FILES_LOOK_MOST_S: Final = 5.0
"""When a file system that has not answered such a look is logged."""


@dataclass(slots=True, kw_only=True, eq=False)
class Ownership:
    """What keeps this service the owner of its runs, or stops it.

    Attributes:
        unrenewed: set while the lease could not be renewed for `SELF_FENCE_SHARE` of it.
    """

    lease_ttl_s: float
    storage: Storage
    owner: Owner
    clock: Clock
    dispatcher: Dispatcher
    gate: Gate
    held: Holdings
    stop: StopSignal
    unrenewed: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _silent: set[str] = field(default_factory=set, init=False)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop, init=False)

    def start(self) -> Sequence[asyncio.Task[None]]:
        """Begin, and return the tasks, which run until they are cancelled."""
        staying = [
            asyncio.create_task(self._renew()),
            asyncio.create_task(watch_files(self._demand_files, self.stop.fail)),
            asyncio.create_task(self._try_statements()),
        ]
        if self.storage.is_shared:
            staying.append(asyncio.create_task(self.storage.follow_shared()))
        else:
            staying.append(asyncio.create_task(self._keep_trees()))
        for task in staying:
            task.add_done_callback(self.stop.task_ended)
        return staying

    def demand_current(self, db: Database) -> None:
        """Fence the transaction that begins, on whatever thread, and stop a service that was
        superseded. The lease alone would tell it only at the next renewal.

        Raises:
            Fenced: a newer epoch of this instance has started.
        """
        try:
            instances.demand_current(db, self.owner)
        except Fenced as error:
            self._loop.call_soon_threadsafe(self.stop.fail, error)
            raise

    async def _renew(self) -> None:
        """Prolong the lease for ever; stop the service once it cannot be sure to be the owner."""
        ttl_s, shared = self.lease_ttl_s, self.storage.is_shared
        self_fence_s = ttl_s * SELF_FENCE_SHARE
        renewed = last = boot_time_ns() / 1e9
        pause_s = ttl_s / RENEWALS_PER_LEASE
        while True:
            await asyncio.sleep(pause_s)
            begun_ns = boot_time_ns()
            begun = begun_ns / 1e9
            if begun - last > ttl_s - TREES_BEFORE_LEASE_S:
                log.warning("service.stood_still", seconds=round(begun - last, 1))
            last = begun
            left_s = max(0.1, renewed + self_fence_s - begun)
            try:
                # One try of several where a connection may hang that another one replaces.
                async with asyncio.timeout(min(left_s, ttl_s * TRY_SHARE) if shared else left_s):
                    await self.storage.renewal(instances.renew, self.owner, ttl_s=ttl_s)
            except Fenced as error:
                self.stop.fail(error)
                return
            except Exception as error:  # noqa: BLE001 - whatever it was, the lease is not renewed
                log.warning("service.lease_not_renewed", **error_facts(error))
                self._note_storage("lease", answers=False)
                pause_s = ttl_s / RENEWALS_PER_LEASE / 3
            else:
                renewed = begun
                if shared:
                    self._heartbeat(begun_ns)
                self._note_storage("lease", answers=True)
                self.unrenewed.clear()
                pause_s = ttl_s / RENEWALS_PER_LEASE
            if boot_time_ns() / 1e9 - renewed > self_fence_s:
                self.unrenewed.set()
                if shared:
                    self.stop.fail(LeaseLost(self.owner.instance, self_fence_s))
                    self.storage.abandon()  # or what waits for an answer would hang on
                    return

    def _note_storage(self, part: str, *, answers: bool) -> None:
        """Note whether a part of the storage answers; health needs all of them."""
        if answers:
            self._silent.discard(part)
        else:
            self._silent.add(part)
        self.gate.set_storage_answers(answers=not self._silent)

    async def _try_statements(self) -> None:
        """For ever, once the gate is open: see that the statements of the work answer."""
        failed, looks = 0, 0
        write_every = 1
        if self.storage.is_shared:
            write_every = RENEWALS_PER_LEASE * WRITE_TRIAL_LEASES
        while True:
            await asyncio.sleep(self.lease_ttl_s / RENEWALS_PER_LEASE)
            if not self.gate.recovered or self.stop.is_set():
                continue
            # After a failure every look: a read alone would call a failing write well.
            error = await self._failing_statement(write=bool(failed) or looks % write_every == 0)
            looks += 1
            failed = 0 if error is None else failed + 1
            self.dispatcher.check_queue()  # its last failure, or success, is news no more
            if error is not None:
                log.warning("service.statements_failed", **error, times=failed)
            self._note_storage("statements", answers=failed < FAILURES_IN_A_ROW)

    async def _failing_statement(self, *, write: bool) -> dict[str, str] | None:
        """Try the statements; return what the log says of a failure, None if all answered."""
        storage = self.storage
        try:
            async with asyncio.timeout(self.lease_ttl_s):
                await storage.attempt(trial.read)
                if storage.is_shared:
                    await storage.attempt(trial.demand_rights)
            if write:
                # SQLite has one thread that writes. Elsewhere it is a connection that may hang.
                bound_s = self.lease_ttl_s if storage.is_shared else None
                async with asyncio.timeout(bound_s):
                    await (storage.attempt if storage.is_shared else storage.write_own)(
                        trial.create_and_take,
                        owner=self.owner,
                        due_in=self.clock.due_in,
                        steady=self.clock.steady(),
                        now=self.clock.now(),
                    )
        except Exception as error:  # noqa: BLE001 - whatever it was, the work meets it as well
            return error_facts(error)
        failing_s = self.lease_ttl_s / RENEWALS_PER_LEASE
        return {"error": "take_next"} if self.dispatcher.failing_s >= failing_s else None

    async def _keep_trees(self) -> None:
        """Where nobody can take over, let the process trees live as long as the service does: a
        full disk, which makes renewals fail or hang, ends none."""
        while True:
            await asyncio.sleep(self.lease_ttl_s / RENEWALS_PER_LEASE)
            self._heartbeat(boot_time_ns())

    def _demand_files(self) -> None:
        self.storage.demand_in_place()
        self.held.demand_in_place()

    def _heartbeat(self, begun_ns: int) -> None:
        """Let the process trees live on: the lease was, or needed not be, renewed at `begun_ns`."""
        self.dispatcher.turns.heartbeat(trees_until(self.lease_ttl_s, begun_ns))


async def watch_files(demand: Callable[[], None], fail: Callable[[Exception], None]) -> None:
    """Fail once a file of the store or a lock was removed or replaced.

    Each look has a thread: a file system that hangs (NFS, FUSE) must not stop the event loop.
    There is one look at a time, and one that is not answered proves nothing.
    """
    while True:
        await asyncio.sleep(FILES_LOOK_S)
        try:
            look = asyncio.wrap_future(daemon_threads.start(demand))
        except RuntimeError as error:  # the system gives no thread now
            log.warning("service.files_not_seen", error=str(error))
            continue
        answered, _ = await asyncio.wait({look}, timeout=FILES_LOOK_MOST_S)
        if not answered:
            log.warning("service.files_not_seen", error="no answer")
        try:
            await look
        except StartRefused as error:
            fail(error)
            return
        except OSError as error:  # the renewal meets it as well, and says NOT_SERVING
            log.warning("service.files_not_seen", error=error.strerror)


def trees_until(lease_ttl_s: float, renewed_ns: int) -> int:
    """Return until when (CLOCK_BOOTTIME, which also runs while the machine sleeps) process trees
    may live after a renewal that began at `renewed_ns`."""
    return renewed_ns + int((lease_ttl_s - TREES_BEFORE_LEASE_S) * 1e9)
