"""Reloads the configuration of a running service, either completely or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import field, replace
from typing import Final, TypeAlias

import structlog

from runrecovery_service import daemon_threads
from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.reloading import RELOADABLE, ReloadPlan, plan_reload
from runrecovery_service.config.settings import Settings
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.systemd import SystemdNotifier

log = structlog.get_logger()

READ_S: Final = 30.0
"""Time limit for reading the files of the configuration, the tokens and the certificates."""

Apply: TypeAlias = Callable[[], None]
"""Puts a prepared part of the service in place of the present one. It neither blocks nor fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadablePart:
    """A part of the service that follows one key of the configuration.

    Attributes:
        key: the key in `Settings` and in `config.reloading.RELOADABLE`.
        prepare: builds the new part without any effect, in a thread that is allowed to block. It
            returns the function that puts the part in place; None if the part stays. Raises
            ConfigError if the part cannot be built.
        has_files: `prepare` is called even if the key is unchanged, because its files may have
            changed.
    """

    key: str
    prepare: Callable[[Settings], Apply | None]
    has_files: bool = False


@dataclass(frozen=True, slots=True)
class _Prepared:
    plan: ReloadPlan
    changes: dict[str, Apply]


@dataclass(slots=True, kw_only=True, eq=False)
class Reloader:
    """Reloads on request. Requests that arrive during a reload lead to one more reload.

    Attributes:
        settings: the present settings.
        load: reads the configuration again, with the flags and variables of this start.
    """

    settings: Settings
    load: Callable[[], Settings]
    parts: Sequence[ReloadablePart]
    systemd: SystemdNotifier
    _requested: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _task: asyncio.Task[None] | None = field(default=None, init=False)
    _is_stopped: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if {part.key for part in self.parts} != RELOADABLE:
            raise LookupError("each key of config.reloading.RELOADABLE needs one part")

    def request(self) -> bool:
        """Request a reload; return False if the service is stopping and will not reload."""
        self._requested.set()
        return not self._is_stopped

    def start(self) -> None:
        """Carry out requests from now on."""
        self._task = asyncio.create_task(self._run(), name="reload")

    async def stop(self) -> None:
        """Carry out no more requests."""
        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._requested.wait()
            self._requested.clear()
            self.systemd.begin_reload()
            is_done = False
            try:
                is_done = await self.reload()
            except Exception:  # the task must survive, to carry out later requests
                log.exception("service.reload_failed")
            finally:
                self.systemd.end_reload(refused=not is_done)

    async def reload(self) -> bool:
        """Read the configuration, and put all changes in place; return False if it is refused."""
        try:
            prepared = await daemon_threads.run_within(READ_S, self._prepare)
        except ConfigError as error:
            log.error("service.reload_refused", problems=list(error.problems))  # noqa: TRY400 - no defect
            return False
        except TimeoutError:
            problem = f"the files of the configuration did not answer within {READ_S:g} s"
            log.error("service.reload_refused", problems=[problem])  # noqa: TRY400 - no defect
            return False
        failed = self._apply(prepared)
        plan = prepared.plan
        # A part that failed keeps its old setting, so that the next reload tries it again.
        left = {key: getattr(self.settings, key) for key in failed}
        self.settings = replace(plan.settings, **left)
        if failed:
            return False
        taken_over, needs_restart = list(prepared.changes), list(plan.needs_restart)
        if needs_restart:
            log.warning("service.reloaded", changed=taken_over, needs_restart=needs_restart)
        else:
            log.info("service.reloaded", changed=taken_over, needs_restart=[])
        return True

    def _apply(self, prepared: _Prepared) -> list[str]:
        """Put all changes in place, without an await: no call sees only some of them.

        Returns:
            The keys of the parts that failed.
        """
        failed = []
        for key, apply in prepared.changes.items():
            try:
                apply()
            except Exception:  # a defect, which must not prevent the changes of other parts
                log.exception("service.reload_failed", part=key)
                failed.append(key)
        return failed

    def _prepare(self) -> _Prepared:
        """Build every new part without any effect.

        Raises:
            ConfigError: with the problems of all parts.
        """
        plan = plan_reload(self.settings, self.load())
        problems: list[str] = []
        changes: dict[str, Apply] = {}
        for part in self.parts:
            if part.key in plan.changed or part.has_files:
                try:
                    change = part.prepare(plan.settings)
                except ConfigError as error:
                    problems += error.problems
                else:
                    changes |= {} if change is None else {part.key: change}
        if problems:
            raise ConfigError(tuple(problems))
        return _Prepared(plan, changes)
