"""The store for one turn. Each call passes the turn and its owner, and is retried."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from runrecovery_service.clock import Clock
from runrecovery_service.domain.run import Interaction, Question, Run, Session
from runrecovery_service.domain.session_check import SessionFingerprint
from runrecovery_service.domain.steady_time import Due
from runrecovery_service.domain.turn import TurnEnd
from runrecovery_service.domain.usage import TurnUsage
from runrecovery_service.execution.turn_log import TurnLog, retry_until_done
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import instances, interactions, launch_records, turn_ends, turns
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchEnd
from runrecovery_service.storage.turns import Turn

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRecords:
    """Reads and writes the records of one turn.

    Each method repeats its call until the store answers. All except `read_reply` and
    `read_fingerprint` raise Fenced if a newer epoch owns the run.
    """

    storage: Storage
    owner: Owner
    clock: Clock
    turn: Turn
    log: TurnLog

    async def read_run(self) -> Run:
        """Return the run as it is now recorded."""
        return await self._read(turns.current_run, self.turn, owner=self.owner)

    async def read_reply(self, run: Run) -> Interaction | None:
        """Return the latest question of the run, with its reply if there is one."""
        return await self._read(interactions.find, run.key, run.interaction_count)

    async def read_fingerprint(self) -> SessionFingerprint | None:
        """Return the session fingerprint at the latest question; None: none was taken."""
        return await self._read(turns.recorded_fingerprint, self.turn)

    async def demand_owned(self) -> None:
        """Raise Fenced if a newer epoch of this instance has started."""
        await self._read(instances.demand_current, self.owner)

    async def record_shim(self, *, pid: int, start_ticks: int) -> None:
        """Record the shim, which waits for permission to start the agent."""
        lease = self.turn.launch
        await self._write(
            launch_records.record_gated, lease, owner=self.owner, pid=pid, start_ticks=start_ticks
        )

    async def record_start(self) -> None:
        """Record that the shim is about to be allowed to start the agent."""
        await self._write(launch_records.record_running, self.turn.launch, owner=self.owner)

    async def record_session(self, session: Session) -> None:
        """Record the session with which the conversation can be resumed."""
        await self._write(
            turns.record_session, self.turn, owner=self.owner, session=session, now=self.clock.now()
        )

    async def record_question(self, number: int, question: Question, *, due: Due) -> None:
        """Record the question of a sticky process, which waits for the reply."""
        await self._write(
            turns.record_sticky_question,
            self.turn,
            owner=self.owner,
            number=number,
            question=question,
            due=due,
            now=self.clock.now(),
        )

    async def record_usage(self, used: TurnUsage) -> None:
        """Record the usage of the turn so far."""
        await self._write(turns.record_usage, self.turn, owner=self.owner, used=used)

    async def record_retry(self, message: str) -> None:
        """Record, as an event of the run, that the agent is waiting to call its model again."""
        await self._write(
            turns.record_retry, self.turn, owner=self.owner, message=message, now=self.clock.now()
        )

    async def record_reply_read(self, number: int) -> None:
        """Record that the accepted reply is delivered.

        A sticky process can still read the reply later.
        """
        await self._write(turns.record_delivered, self.turn, owner=self.owner, number=number)

    async def record_reply_unread(self, number: int) -> None:
        """Record that the process never read the reply to the question `number`."""
        await self._write(turns.record_undelivered, self.turn, owner=self.owner, number=number)

    async def record_end(
        self,
        end: TurnEnd,
        ended: LaunchEnd,
        *,
        due: Due | None,
        fingerprint: SessionFingerprint | None,
        used: TurnUsage | None,
    ) -> Run:
        """Record the ends of the turn and its process, and return the run.

        Args:
            due: the deadline of the question if the turn has asked one; None: no deadline.
            fingerprint: the fingerprint of the session file; None: none could be taken.
            used: the usage of the turn; None: none is known.
        """
        return await self._write(
            turn_ends.record_end,
            self.turn,
            owner=self.owner,
            end=end,
            ended=ended,
            due=due,
            due_in=self.clock.due_in,
            mark=fingerprint,
            used=used,
            now=self.clock.now(),
        )

    async def _read(
        self, use: Callable[Concatenate[Database, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        return await retry_until_done(lambda: self.storage.read_row(use, *args, **kwargs), self.log)

    async def _write(
        self, use: Callable[Concatenate[Database, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        return await retry_until_done(
            lambda: self.storage.write_own(use, *args, **kwargs), self.log
        )
