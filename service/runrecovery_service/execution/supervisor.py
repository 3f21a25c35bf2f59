"""Supervises one turn: launches the process, follows it, ends it and records the end of the turn.

Related modules: `turn_state.py` (the meaning of events), `agent_io.py` (pipes), `launcher.py`
(launch), `turn_records.py` (store), `turn_sessions.py` (the agent's session).
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from dataclasses import field
from functools import partial
from typing import Final, TypeGuard

import structlog

from runrecovery_service.agents.output import OutputFiles
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.interruption import InterruptionCause
from runrecovery_service.domain.run import (
    ErrorCode,
    InteractionState,
    Profile,
    Question,
    RestartPolicy,
    RunError,
    RunStatus,
    Session,
)
from runrecovery_service.domain.steady_time import Due, DueKind
from runrecovery_service.domain.turn import (
    Asked,
    Failed,
    Interrupted,
    ProcessEnd,
    SessionGone,
    TurnEnd,
    end_of_budget,
    is_repeated,
    judge,
)
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.engines.dialect import (
    HandleUnusable,
    Opening,
    Resumed,
    RunContext,
    SessionMessage,
)
from runrecovery_service.execution.agent_io import AgentIO
from runrecovery_service.execution.blocking import run_blocking
from runrecovery_service.execution.launcher import Launch, LeaseOver, Unguarded, Withdrawn
from runrecovery_service.execution.turn_permissions import USED_BEFORE, TurnPermissions
from runrecovery_service.execution.turn_records import TurnRecords
from runrecovery_service.execution.turn_sessions import TurnSessions
from runrecovery_service.execution.turn_state import (
    SECOND_END,
    SUSPENDED,
    Action,
    CompareEnds,
    DeadlinePassed,
    ProtocolBroken,
    RecordQuestion,
    RecordRetry,
    RecordSession,
    RecordUsage,
    ReportUnknown,
    Signal,
    TurnEvent,
    TurnRules,
    TurnState,
    advance,
)
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.ending_result import NOTHING_LEFT, Ending
from runrecovery_service.process.launch_errors import LaunchFailed
from runrecovery_service.process.shimmed_process import ShimmedProcess
from runrecovery_service.storage.launch_records import LaunchEnd, ResourceUse
from runrecovery_service.storage.turns import Turn

log = structlog.get_logger()

UNGUARDED_CHECKS: Final = 2
"""How many checks in a row, 2 s apart, must find a shim stopped or gone before the process is
ended. A single check can find the shim gone at a normal end of the turn."""
HANDLE_UNUSABLE: Final = "This engine could not have named the session's handle."


@dataclass(slots=True, kw_only=True, eq=False)
class TurnSupervisor:
    """The supervisor of one turn. `follow` does the work; other methods can be called meanwhile.

    Attributes:
        is_ending: whether the turn is over, so that its tree is being ended and its end recorded.
    """

    records: TurnRecords
    launch: Launch
    catalog: Catalog
    sessions: TurnSessions
    permissions: TurnPermissions
    output: OutputFiles
    threads: Executor
    exit_grace_s: float
    state: TurnState = field(default_factory=TurnState, init=False)
    is_ending: bool = field(default=False, init=False)
    _rules: TurnRules | None = field(default=None, init=False)
    _io: AgentIO | None = field(default=None, init=False)
    _events: asyncio.Queue[TurnEvent] = field(default_factory=asyncio.Queue, init=False)
    _reply_accepted: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _replies_written: asyncio.Queue[int] = field(default_factory=asyncio.Queue, init=False)
    _unguarded_checks: int = field(default=0, init=False)

    @property
    def turn(self) -> Turn:
        """The turn."""
        return self.records.turn

    def cancel(self) -> None:
        """End the process, because a cancel was accepted."""
        self._events.put_nowait(Signal.CANCELED)
        self.launch.stop_waiting()

    def time_out(self, kind: DueKind) -> None:
        """End the process, because a deadline of the run has passed."""
        self._events.put_nowait(DeadlinePassed(kind))
        self.launch.stop_waiting()

    def deliver(self) -> None:
        """Write the accepted reply to the process."""
        self._reply_accepted.set()

    def check_shim(self) -> None:
        """End the process if its shim is found stopped or gone in two checks in a row.

        That the pipe for the shim's reports is open says nothing about the shim, because another
        process can keep the pipe open.
        """
        self._unguarded_checks = 0 if self.launch.is_guarded else self._unguarded_checks + 1
        if self._unguarded_checks >= UNGUARDED_CHECKS:
            self._events.put_nowait(Signal.SHIM_USELESS)

    # -- the life of a turn --------------------------------------------------------------------

    async def follow(self) -> None:
        """Launch the process, follow it, end it and record the end of the turn.

        If the task is cancelled, the process keeps running and the run stays as it is recorded.

        Raises:
            Fenced: a newer epoch owns the run.
        """
        end = await self._run_process()
        if self.turn.interruption is not None and _is_session_lost(end):
            end = SessionGone(end.error)
        if self._rules is not None:
            end = end_of_budget(end, self._rules.why_used_up(self.state.used))
        self.is_ending = True
        self.launch.need_no_output()
        ending = await self._end_tree()
        await self._finish(end, ending)

    async def end_after_defect(self) -> None:
        """End the tree after a defect in `follow`, and fail the run, which must not stay RUNNING.

        Raises:
            Fenced: a newer epoch owns the run.
        """
        self.launch.need_no_output()
        await self._finish(_defect(), await self.launch.end_tree(why="defect"))

    async def _finish(self, end: TurnEnd, ending: Ending) -> None:
        """Reap the shim, and record the end of the turn."""
        release = partial(self.launch.release, gone=ending.gone)
        for event in await run_blocking(self.threads, release):
            self._advance(event)
        # Checked before any effect of the end, because another instance can have taken the run over
        # and ended the process. The write checks the owner again in its transaction.
        await self.records.demand_owned()
        await self.permissions.record_if_used()  # the use is possibly unnoticed so far
        if self._ends_run(end):  # removed before a caller can see the end
            await self.launch.remove_trust()
        await self._record(end, self._ended(ending))

    def _ends_run(self, end: TurnEnd) -> bool:
        return self.state.is_canceled or not isinstance(end, Asked | Interrupted | SessionGone)

    async def _run_process(self) -> TurnEnd:
        """Launch the process, supervise it until the end of the turn, and return this end."""
        try:
            engine = self._engine()
            opening = self._open(engine)
            if await self.permissions.record_if_used():
                return Interrupted(USED_BEFORE, InterruptionCause.RESTART)
            if (lost := await self.sessions.session_problem(engine, self._resumed)) is not None:
                return Failed(RunError(code=ErrorCode.SESSION_RESUME_FAILED, message=lost))
            await self.sessions.repair(engine, self._resumed)
            if opening.handle is not None:  # recorded before the process can act
                await self._take(engine, SessionMessage(value=opening.handle))
            process = await self.launch.start(engine, opening)
        except LaunchFailed as error:
            self.records.log.warning("execution.launch_failed", reason=error.reason)
            return Failed(RunError(code=ErrorCode.LAUNCH_FAILED, message=error.reason))
        except HandleUnusable:
            return Failed(RunError(code=ErrorCode.SESSION_RESUME_FAILED, message=HANDLE_UNUSABLE))
        except LeaseOver:
            return Interrupted(SUSPENDED)
        except Unguarded:
            self._advance(Signal.SHIM_USELESS)
            return self._judge(opening)
        except Withdrawn:
            while not self._events.empty():  # the events say why, unless only the store does
                await self._take(engine, self._events.get_nowait())
            return self._judge(opening)
        return await self._follow_process(engine, process, opening)

    def _engine(self) -> Engine:
        name = self.turn.run.engine
        if name not in self.catalog.names:
            raise LaunchFailed(f"no engine {name!r} is configured any more")
        return self.catalog.get(name)

    def _open(self, engine: Engine) -> Opening:
        run, dialect = self.turn.run, engine.dialect
        self._rules = TurnRules(
            profile=run.profile,
            resumes=run.session is not None,
            ends_once=dialect.ends_once,
            exit_grace_s=self.exit_grace_s,
            budget=run.budget,
            used_before=run.usage,
        )
        workspace = self.sessions.workspace
        task = RunContext(
            run_id=run.run_id,
            attempt=run.attempt,
            input=run.input or {},
            workspace=str(workspace),
            turn=run.turn,
            permissions=str(self.permissions.folder),
            deferred=self.permissions.deferred(),
        )
        return dialect.open(task, self._resumed)

    @property
    def _resumed(self) -> Resumed | None:
        session, reply, interruption = (
            self.turn.run.session, self.turn.reply, self.turn.interruption
        )  # fmt: skip
        if session is None or (reply is None and interruption is None):
            return None
        used = self.turn.session_usage
        return Resumed(session=session, reply=reply, interruption=interruption, usage=used)

    # -- following -----------------------------------------------------------------------------

    async def _follow_process(
        self, engine: Engine, process: ShimmedProcess, opening: Opening
    ) -> TurnEnd:
        io = self._io = AgentIO(
            process=process,
            listener=opening.listener,
            max_line_bytes=engine.dialect.max_line_bytes,
            events=self._events,
            output=self.output,
            threads=self.threads,
            log=self.records.log,
            journal=self.launch.journal,
        )
        try:
            await self._converse(engine, io, opening)
        except ExceptionGroup as group:  # the run must not stay RUNNING
            if (fenced := _first_fenced(group)) is not None:
                raise fenced from None
            log.exception("execution.session_failed", run_id=self.turn.run.run_id)
            return _defect()
        return self._judge(opening)

    async def _converse(self, engine: Engine, io: AgentIO, opening: Opening) -> None:
        """Handle events until the process has ended, or must be ended by the service."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(io.read_stdout()),
                group.create_task(io.parse_stdout()),
                group.create_task(io.read_stderr()),
                group.create_task(io.read_shim_report()),
                group.create_task(self._send_task(io, opening)),
                group.create_task(self._send_replies(engine, io)),
                group.create_task(self._watch_replies(io)),
            ]
            await self._take_events(engine, io)
            for task in tasks:
                task.cancel()
        await io.keep_held_stderr()
        if self.state.exited is not None and self.state.protocol_error is None:
            for event in await io.take_unfinished_line():
                await self._take(engine, event)

    async def _take_events(self, engine: Engine, io: AgentIO) -> None:
        while not self.state.is_over:
            try:
                async with asyncio.timeout_at(self.state.wake_s):
                    event = await self._events.get()
            except TimeoutError:
                if self.state.wakes_to_record:
                    await self._take(engine, Signal.USAGE_DUE)
                elif io.has_unread_output():
                    self._advance(Signal.OUTPUT_UNREAD)
                else:
                    return
                continue
            await self._take(engine, event)
            self._events.task_done()

    def _advance(self, event: TurnEvent) -> Action | None:
        """Change the state by an event, and return the action to carry out."""
        assert self._rules is not None  # noqa: S101 - `_open` precedes every event
        now_s = asyncio.get_running_loop().time()
        self.state, action = advance(self.state, event, self._rules, now_s=now_s)
        return action

    async def _take(self, engine: Engine, event: TurnEvent) -> None:
        match self._advance(event):
            case RecordSession(handle):
                kind, turn = engine.dialect.session_type, self.turn.run.turn
                await self.records.record_session(Session(type=kind, handle=handle, turn=turn))
            case RecordQuestion(question):
                await self._record_question(question)
            case CompareEnds(first, second):
                if not await run_blocking(self.threads, is_repeated, first, second):
                    self._advance(ProtocolBroken(SECOND_END))
            case RecordUsage(used):
                await self.records.record_usage(used)
            case RecordRetry(message):
                is_last = self.state.stopped is not None
                self.records.log.info("execution.agent_retries", is_last=is_last)
                await self.records.record_retry(message)
            case ReportUnknown(kind, problem):
                self.records.log.info("execution.message_ignored", type=kind, problem=problem)
            case None:
                pass

    async def _record_question(self, question: Question) -> None:
        number = (await self.records.read_run()).interaction_count + 1
        await self.records.record_question(number, question, due=self._wait_due())
        self.records.log.info("execution.waiting")

    def _wait_due(self) -> Due:
        """Return the deadline of a question that is being asked now."""
        return self.records.clock.due_in(self.catalog.wait_s(self.turn.run))

    # -- replies -------------------------------------------------------------------------------

    async def _send_task(self, io: AgentIO, opening: Opening) -> None:
        """Send the process its input: the task or, in a resumed session, the reply."""
        is_written = await io.write(opening.input[self.launch.prefilled :])
        if self.permissions.answer is not None:
            io.close_input()
            await self.permissions.wait_until_used()
            await self.permissions.record_if_used()
            return
        # The reply is recorded as delivered only after the process has read all of its input. Data
        # in the pipe is lost with the process, and then the next process must get the reply.
        if (reply := self.turn.reply) is not None:
            if is_written and await io.wait_until_input_read():
                await self.records.record_reply_read(reply.interaction_id)
            else:
                self._events.put_nowait(Signal.REPLY_LOST)
        if self.turn.run.profile is Profile.RESUMABLE:
            io.close_input()

    async def _send_replies(self, engine: Engine, io: AgentIO) -> None:
        """Send a sticky process each reply once it is accepted.

        This runs as a separate task, so that a cancel is handled while the process does not read.
        """
        while True:
            await self._reply_accepted.wait()
            self._reply_accepted.clear()
            if self.state.is_waiting:  # else the process has the reply already
                await self._send_reply(engine, io)

    async def _send_reply(self, engine: Engine, io: AgentIO) -> None:
        run = await self.records.read_run()
        reply = await self.records.read_reply(run)
        is_accepted = reply is not None and reply.state is InteractionState.ANSWERED
        if reply is None or not is_accepted or run.status is not RunStatus.RUNNING:
            return
        self._advance(Signal.REPLY_ACCEPTED)
        if await io.write(engine.dialect.reply(reply)):
            await self.records.record_reply_read(reply.interaction_id)
            self._replies_written.put_nowait(reply.interaction_id)
        else:
            self._events.put_nowait(Signal.REPLY_LOST)

    async def _watch_replies(self, io: AgentIO) -> None:
        """Notice that a sticky process closes its input before it has read a reply.

        This runs as a separate task, because a process can read a reply long after its next
        question.
        """
        while True:
            number = await self._replies_written.get()
            if not await io.wait_until_input_read():
                await self.records.record_reply_unread(number)
                self._events.put_nowait(Signal.REPLY_LOST)
                return

    # -- the end -------------------------------------------------------------------------------

    async def _end_tree(self) -> Ending:
        if self.state.is_tree_empty and not self.state.is_unsupervised:
            ending = NOTHING_LEFT  # as the kernel has reported to the shim
        else:
            ending = await self.launch.end_tree(why=self.state.end_reason)
        if self.state.interrupted is None:
            return ending
        return ending.with_shim_kills(await self.launch.killed_by_shim())

    def _judge(self, opening: Opening) -> TurnEnd:
        tail = "" if self._io is None else self._io.stderr_tail
        exit_code = None if self.state.exited is None else self.state.exited.code
        process = ProcessEnd(
            exit_code=exit_code,
            failure=opening.listener.failure(exit_code, tail),
            retry=opening.listener.retry(),
            stderr_tail=tail,
        )
        resumes = self.turn.run.restart_policy is RestartPolicy.RESUME
        return judge(self.state, process, resumes=resumes)

    async def _record(self, end: TurnEnd, ended: LaunchEnd) -> None:
        fingerprint = await self.sessions.fingerprint(end, gone=ended.gone)
        # The wait of a resumable run has no deadline if only the user is allowed to reply.
        due = None if self.turn.run.require_user_reply else self._wait_due()
        used = await self.sessions.usage(
            self.state.used, gone=ended.gone, is_last=self._ends_run(end)
        )
        run = await self.records.record_end(end, ended, due=due, fingerprint=fingerprint, used=used)
        resources = ended.resources
        tokens = None if used is None or used.is_of_session else used.turn
        self.records.log.turn_ended(
            status=run.status,
            error_code=run.error.code if run.error else None,
            exit_code=ended.exit_code,
            processes_ended=ended.processes_ended,
            cpu_s=None if resources is None else round(resources.cpu_s, 3),
            max_rss_kib=None if resources is None else resources.max_rss_kib,
            input_tokens=None if tokens is None else tokens.input_tokens,
            output_tokens=None if tokens is None else tokens.output_tokens,
            cost_usd=None if tokens is None else tokens.cost_usd,
        )

    def _ended(self, ending: Ending) -> LaunchEnd:
        exited = self.state.exited
        if exited is None:
            return LaunchEnd(exit_code=None, processes_ended=ending.ended, gone=ending.gone)
        resources = ResourceUse(
            user_us=exited.user_us, system_us=exited.system_us, max_rss_kib=exited.max_rss_kib
        )
        return LaunchEnd(
            exit_code=exited.code,
            processes_ended=ending.ended,
            gone=ending.gone,
            resources=resources,
        )


def _is_session_lost(end: TurnEnd) -> TypeGuard[Failed]:
    return isinstance(end, Failed) and end.error.code == ErrorCode.SESSION_RESUME_FAILED


def _first_fenced(group: ExceptionGroup[Exception]) -> Fenced | None:
    found = group.subgroup(Fenced)
    while found is not None:
        first = found.exceptions[0]
        if isinstance(first, Fenced):
            return first
        found = first
    return None


def _defect() -> Failed:
    message = "The service failed while it followed the process; its log says how."
    return Failed(RunError(code=ErrorCode.INTERNAL_ERROR, message=message))
