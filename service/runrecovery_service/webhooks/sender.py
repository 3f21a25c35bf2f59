"""Delivers the events of one webhook: in order for each run, and for several runs concurrently.

Each run with due deliveries has a task, which makes the deliveries one after another. If a delivery
fails, only its run pauses. At most `RUNS_AT_ONCE` runs have a task: if so many fail, further runs
wait.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import field
from datetime import datetime, timedelta
from functools import partial
from typing import Final, TypeAlias

import structlog

from runrecovery_service.clock import Clock, wait_within
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.metric_counters import Meters
from runrecovery_service.periodic import FailureLog, PeriodicTask
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import webhook_deliveries
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.webhook_deliveries import Delivery, Unreadable
from runrecovery_service.webhooks import message
from runrecovery_service.webhooks.endpoint import Endpoint
from runrecovery_service.webhooks.http_post import Answer, PostFailed, Resolver, post
from runrecovery_service.webhooks.retries import pause_s, retry_after_s

log = structlog.get_logger()

RUNS_AT_ONCE: Final = 64
POSTS_AT_ONCE: Final = 8
LOOK_PAUSE_S: Final = 0.1
"""The shortest pause between two queries for runs with due deliveries."""
POLL_S: Final = 30.0
SHARED_POLL_S: Final = 3.0
"""`POLL_S` for a shared store. There other instances can record events of this instance's runs, and
the hints about these events can be lost."""
STORE_PAUSE_S: Final = 1.0
"""The pause after a failed query."""
TIDY_S: Final = 600.0
FAILING_S: Final = 3_600
"""How long tries must have failed before a delivery is given up. A service that was down for days
must try again first."""
KEPT_DAYS: Final = 30
"""How long a given-up delivery is kept, so that `retry` can make it due again."""
STOP_S: Final = 2.0
"""How long a stop waits for tries that are under way."""
GONE: Final = 410

Post: TypeAlias = Callable[[Endpoint, Mapping[str, str], bytes], Awaitable[Answer]]
Pause: TypeAlias = Callable[[asyncio.Event, float], Awaitable[bool]]


@dataclass(slots=True, kw_only=True)
class SenderState:
    """The state of a sender, and its counts since the start of the service.

    Attributes:
        tries: the number of tries by outcome: `delivered` or `failed`.
        given_up: the number of deliveries that were given up.
        is_disabled: whether the endpoint has answered 410 Gone, after which nothing is sent.
        failing_since: the time of the first failed try after the last successful one; None: the
            last try succeeded.
        last_delivery_at: the time of the latest successful try; None: none has succeeded.
        last_failure: the reason of the latest failed try; empty: none has failed.
    """

    tries: Counter[str] = field(default_factory=Counter)
    given_up: int = 0
    is_disabled: bool = False
    failing_since: datetime | None = None
    last_delivery_at: datetime | None = None
    last_failure: str = ""


@dataclass(slots=True, kw_only=True, eq=False)
class WebhookSender:
    """Makes the deliveries of one webhook until it is stopped.

    Attributes:
        meters: the counters to update.
        post: sends one request.
        pause: waits for an event, for at most some seconds.
    """

    endpoint: Endpoint
    storage: Storage
    owner: Owner
    clock: Clock
    stop_signal: StopSignal
    meters: Meters = field(default_factory=Meters)
    post: Post = field(default_factory=lambda: partial(post, resolver=Resolver()))
    pause: Pause = wait_within
    state: SenderState = field(default_factory=SenderState, init=False)
    _runs: dict[int, asyncio.Task[None]] = field(default_factory=dict, init=False)
    _latest_run: int = field(default=0, init=False)
    _failing_runs: dict[int, int] = field(default_factory=dict, init=False)
    _failing_us: int | None = field(default=None, init=False)
    _posts: asyncio.Semaphore = field(init=False)
    _woken: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _at_once: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _is_stopping: bool = field(default=False, init=False)
    _task: asyncio.Task[None] | None = field(default=None, init=False)
    _tidying: PeriodicTask = field(init=False)
    _failures: FailureLog = field(init=False)
    _run_failures: FailureLog = field(init=False)

    def __post_init__(self) -> None:
        self._posts = asyncio.Semaphore(POSTS_AT_ONCE)
        self._failures = FailureLog(failure_event="webhook.store_failed")
        self._run_failures = FailureLog(failure_event="webhook.store_failed")
        self._tidying = PeriodicTask(
            name=f"webhook-tidying-{self.endpoint.name}",
            step=self.tidy,
            interval_s=TIDY_S,
            failure_event="webhook.store_failed",
            stop_signal=self.stop_signal,
        )

    # -- the life of a sender ------------------------------------------------------------------

    def start(self) -> None:
        """Start to make due deliveries."""
        self._task = asyncio.create_task(self._work(), name=f"webhook-{self.endpoint.name}")
        self._task.add_done_callback(self.stop_signal.task_ended)
        self._tidying.start()

    async def stop(self) -> None:
        """Stop. A try that takes longer than `STOP_S` is cut off, and the next start repeats it."""
        self._is_stopping = True
        self._hurry()
        if self._task is not None:
            self._task.cancel()
        await self._tidying.cancel()
        runs = set(self._runs.values())
        if runs:
            await asyncio.wait(runs, timeout=STOP_S)
        for task in runs:
            task.cancel()
        await asyncio.gather(*runs, *filter(None, [self._task]), return_exceptions=True)

    async def try_again(self) -> int:
        """Try all deliveries at once, and return how many given-up ones are due again."""
        revived = await self._in_steps(webhook_deliveries.try_again)
        self.state.is_disabled = False
        self._hurry()
        return revived

    async def _in_steps(self, change: Callable[..., int], **named: object) -> int:
        """Repeat a change of at most `ROWS` rows until none is left. Return the number of rows."""
        instance, name = self.owner.instance, self.endpoint.name
        rows = 0
        while changed := await self.storage.write_own(change, instance, name, **named):
            rows += changed
        return rows

    def _hurry(self) -> None:
        """End all pauses, so that every run tries at once."""
        self._at_once.set()
        self._at_once = asyncio.Event()
        self._woken.set()

    @property
    def _is_over(self) -> bool:
        """Whether this sender is stopping, or the service stops because of an error.

        After an error, another instance may own the deliveries.
        """
        return self._is_stopping or self.stop_signal.failure is not None

    @property
    def _may_try(self) -> bool:
        return not self._is_over and not self.state.is_disabled

    # -- runs ----------------------------------------------------------------------------------

    async def _work(self) -> None:
        poll_s = SHARED_POLL_S if self.storage.is_shared else POLL_S
        with self.storage.changes.of_all_runs(self._woken):
            while not self._is_over:
                self._woken.clear()
                try:
                    await self._start_runs()
                    self._failures.note_success()
                except Fenced as error:
                    self.stop_signal.fail(error)
                    return
                except Exception as error:  # noqa: BLE001 - logged; the next round tries again
                    self._failures.report(error)
                await asyncio.sleep(LOOK_PAUSE_S)
                await wait_within(self._woken, poll_s)

    async def _start_runs(self) -> None:
        """Start tasks for runs with due deliveries, up to `RUNS_AT_ONCE`."""
        free = RUNS_AT_ONCE - len(self._runs)
        if not free or not self._may_try:
            return
        keys = await self.storage.read(
            webhook_deliveries.due_runs,
            self.owner.instance,
            self.endpoint.name,
            without=list(self._runs),
            limit=free,
            after=self._latest_run,
        )
        for key in keys:
            self._latest_run = key
            self._runs[key] = asyncio.create_task(self._follow(key), name=f"webhook-run-{key}")

    async def _follow(self, run_key: int) -> None:
        """Make the deliveries of a run, until none is due."""
        try:
            await self._deliver_all(run_key)
        except Fenced as error:
            self.stop_signal.fail(error)
        except Exception as error:  # noqa: BLE001 - logged; the run gets another task
            self._run_failures.report(error)
            await self.pause(self._at_once, STORE_PAUSE_S)
        finally:
            self._failing_runs.pop(run_key, None)
            del self._runs[run_key]
            self._woken.set()

    async def _deliver_all(self, run_key: int) -> None:
        failures = 0
        while self._may_try:
            try:
                delivery = await self.storage.read_row(
                    webhook_deliveries.next_delivery,
                    self.owner.instance,
                    self.endpoint.name,
                    run_key,
                )
            except Unreadable as error:
                await self._give_up_unreadable(run_key, error)
                continue
            if delivery is None:
                return
            async with self._posts:
                if not self._may_try:
                    return
                at_once = self._at_once  # taken before the try: a `try_again` during it counts
                asked_s = await self._try(delivery)
            if asked_s is None:
                failures = 0
                self._failing_runs.pop(run_key, None)
                await self._remove(delivery)
                continue
            failures += 1
            self._failing_runs.setdefault(run_key, self.clock.steady().us)
            jitter = random.random()  # noqa: S311 - no secret
            await self.pause(at_once, pause_s(failures, jitter=jitter, retry_after_s=asked_s))

    async def _remove(self, delivery: Delivery) -> None:
        """Remove a delivery that has arrived. If the store fails, repeat only the removal."""
        failures = 0
        while True:
            at_once = self._at_once
            try:
                await self.storage.write_own(webhook_deliveries.remove_delivered, delivery)
            except Fenced:
                raise
            except Exception as error:  # noqa: BLE001 - logged; tried again
                self._run_failures.report(error)
            else:
                self._run_failures.note_success()
                return
            if self._is_over:
                return
            failures += 1
            await self.pause(at_once, pause_s(failures, jitter=0.0))

    async def _give_up_unreadable(self, run_key: int, error: Unreadable) -> None:
        """Give up a delivery that cannot be read, which must not block later ones of its run."""
        await self.storage.write_own(
            webhook_deliveries.give_up_first,
            self.owner.instance,
            self.endpoint.name,
            run_key,
            now=self.clock.now(),
        )
        self.state.given_up += 1
        log.error("webhook.delivery_damaged", webhook=self.endpoint.name, reason=str(error))

    # -- one try -------------------------------------------------------------------------------

    async def _try(self, delivery: Delivery) -> float | None:
        """Send a delivery once. Return None if it arrived; else the requested pause in seconds."""
        now = self.clock.now()
        try:
            content = message.body(delivery)
            headers = message.headers(delivery, content, keys=self.endpoint.keys, now=now)
            answer = await self.post(self.endpoint, headers, content)
        except PostFailed as error:
            self._note_failure(delivery, str(error))
            return 0.0
        except Exception as error:  # noqa: BLE001 - logged; a defect must not skip the pause
            # The text of the error may contain the URL.
            self._note_failure(delivery, f"the service failed: {type(error).__name__}")
            return 0.0
        if 200 <= answer.status < 300:
            self._note_success(delivery)
            return None
        self._note_failure(delivery, f"the answer has the status {answer.status}")
        if answer.status == GONE:
            self._disable()
        return retry_after_s(answer.retry_after, now=now)

    def _note_success(self, delivery: Delivery) -> None:
        state = self.state
        if state.failing_since is not None:
            log.info("webhook.works_again", webhook=self.endpoint.name)
        state.failing_since, state.last_delivery_at = None, self.clock.now()
        self._failing_us = None
        state.tries["delivered"] += 1
        self.meters.webhook_tries.add(self.endpoint.name, "delivered")
        log.debug(
            "webhook.delivered",
            webhook=self.endpoint.name,
            run_id=delivery.run_id,
            sequence=delivery.sequence,
        )

    def _note_failure(self, delivery: Delivery, reason: str) -> None:
        """Count a failed try; log it if it is the first after a success, or has a new reason."""
        state = self.state
        if state.failing_since is None or state.last_failure != reason:
            log.warning(
                "webhook.failed",
                webhook=self.endpoint.name,
                run_id=delivery.run_id,
                sequence=delivery.sequence,
                reason=reason,
            )
        if state.failing_since is None:
            state.failing_since, self._failing_us = self.clock.now(), self.clock.steady().us
        state.last_failure = reason
        state.tries["failed"] += 1
        self.meters.webhook_tries.add(self.endpoint.name, "failed")

    def _disable(self) -> None:
        if not self.state.is_disabled:
            self.state.is_disabled = True
            log.error("webhook.disabled", webhook=self.endpoint.name)
            self._hurry()

    # -- deliveries that fail for too long -----------------------------------------------------

    async def tidy(self) -> None:
        """Give up old deliveries that keep failing, and delete deliveries given up long ago."""
        now = self.clock.now()
        # By the steady clock, because a jump of the wall clock must not end the hour.
        begun_by = self.clock.steady().us - FAILING_S * 1_000_000
        runs = None
        if self._failing_us is None or self._failing_us > begun_by:
            runs = [key for key, begun in self._failing_runs.items() if begun <= begun_by]
        given_up = 0
        if runs is None or runs:
            before = now - timedelta(seconds=self.endpoint.give_up_s)
            given_up = await self._in_steps(
                webhook_deliveries.give_up, before=before, runs=runs, now=now
            )
        if given_up:
            self.state.given_up += given_up
            log.error("webhook.given_up", webhook=self.endpoint.name, deliveries=given_up)
        await self._in_steps(
            webhook_deliveries.forget_given_up, before=now - timedelta(days=KEPT_DAYS)
        )
