"""Follows the process of one turn from its launch to its end, and records what it does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import IO, Final, TypeAlias

import structlog

from runrecovery_service.domain.deadline import Due, DueKind
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.run import (
    ErrorCode,
    InteractionState,
    Profile,
    Run,
    RunError,
    RunStatus,
    Session,
)
from runrecovery_service.domain.turn import (
    Asked,
    Failed,
    Interrupted,
    Observed,
    Succeeded,
    TurnEnd,
    judge,
)
from runrecovery_service.engines import jsonl
from runrecovery_service.engines.jsonl import (
    AskMessage,
    Message,
    ProgressMessage,
    ProtocolError,
    ResultMessage,
    SessionMessage,
    UnknownMessage,
)
from runrecovery_service.execution.launching import Launch, StoodStill, Unguarded
from runrecovery_service.execution.output import OutputChannel
from runrecovery_service.execution.pipes import read, until_read, write_all
from runrecovery_service.execution.workshop import TurnLog, Workshop
from runrecovery_service.process.launch import (
    Empty,
    EndsItself,
    Exited,
    Gated,
    LaunchFailed,
    NotStarted,
    ShimEvent,
    ShimmedProcess,
    Started,
)
from runrecovery_service.process.sweep import NOTHING_LEFT, Ending
from runrecovery_service.storage import interactions, runs, turns
from runrecovery_service.storage.processes import Ended, Usage
from runrecovery_service.storage.turns import Turn

log = structlog.get_logger()


LONG_LINE_BYTES: Final = 16384
"""Longer lines are parsed in a thread: one of 1 MiB takes the loop a second and more."""
IGNORED_TYPES: Final = 100
"""Unknown message types of one turn that are told apart in the log."""
SESSION_SHOWN: Final = b'{"type":"session","value":"[secret]"}'
"""What stands in the kept output for the line that names a session."""
STDERR_TAIL_BYTES: Final = 2000
LAST_OUTPUT_S: Final = 1.0
"""How long a process that has exited may leave its output open (a child may hold it)."""
UNGUARDED_LOOKS: Final = 2
"""Looks, 2 s apart, at which a shim must be found stopped or gone: one may be at its very end."""
STOOD_STILL: Final = (
    "The service stood still for longer than its lease, so that the run's processes were ended."
)


class _Signal(Enum):
    """What can come beside a message of the agent."""

    STDOUT_ENDED = auto()
    STDERR_ENDED = auto()
    SHIM_GONE = auto()
    SHIM_USELESS = auto()
    CANCELED = auto()


@dataclass(frozen=True, slots=True)
class _Broken:
    how: str


@dataclass(frozen=True, slots=True)
class _TimedOut:
    kind: DueKind


_News: TypeAlias = "Message | ShimEvent | _Signal | _Broken | _TimedOut"


@dataclass(slots=True, kw_only=True, eq=False)
class RunSession:
    """One turn under way. `follow` is its whole life; the rest may be called meanwhile.

    `is_ending`: it is decided how the turn ended; that is only to be carried out and recorded.
    """

    turn: Turn
    shop: Workshop
    launch: Launch = field(init=False)
    _log: TurnLog = field(init=False)
    _news: asyncio.Queue[_News] = field(default_factory=asyncio.Queue)
    _replied: asyncio.Event = field(default_factory=asyncio.Event)
    _said: Asked | Succeeded | None = None
    _broken: str | None = None
    _exited: Exited | None = None
    _interrupted: str | None = None
    _unsupervised: bool = False
    _emptied: bool = False
    _timed_out: DueKind | None = None
    _canceled: bool = False
    _in_wait: bool = False
    _has_session: bool = False
    _open_outputs: int = 2
    _ignored: Counter[str] = field(default_factory=Counter)
    _stderr_tail: bytes = b""
    _deadline: float | None = None
    _unguarded_looks: int = 0
    is_ending: bool = False

    def __post_init__(self) -> None:
        self._log = TurnLog(self.turn.run)
        self.launch = Launch(turn=self.turn, shop=self.shop, log=self._log)

    def cancel(self) -> None:
        """End the process; a cancel has been accepted."""
        self._news.put_nowait(_Signal.CANCELED)

    def time_out(self, kind: DueKind) -> None:
        """End the process; one of the run's deadlines has passed."""
        self._news.put_nowait(_TimedOut(kind))

    def deliver(self) -> None:
        """Give the process the reply that has been accepted."""
        self._replied.set()

    def look_at_shim(self) -> None:
        """Notice, at the second look, a shim that was stopped, or is gone although its report is
        held open by somebody."""
        self._unguarded_looks = 0 if self.launch.is_guarded else self._unguarded_looks + 1
        if self._unguarded_looks >= UNGUARDED_LOOKS:
            self._news.put_nowait(_Signal.SHIM_USELESS)

    async def follow(self) -> None:
        """Launch, converse, end, record. What is not on record is tried until it is.

        Cancelling the task leaves the run as it is on record: whoever stops us decides on it.

        Raises:
            Fenced: a newer epoch owns the run.
        """
        end = await self._live()
        self.is_ending = True
        ending = await self._end_tree()
        for event in await self.shop.in_thread(lambda: self.launch.release(gone=ending.gone)):
            self._note(event)
        await self._record(end, self._ended(ending))

    async def give_up(self) -> None:
        """After a defect in `follow`: end the tree all the same; the run must not stay RUNNING.

        Raises:
            Fenced: a newer epoch owns the run.
        """
        ending = await self.launch.end_tree(why="defect")
        await self.shop.in_thread(lambda: self.launch.release(gone=ending.gone))
        await self._record(_defect(), self._ended(ending))

    async def _live(self) -> TurnEnd:
        """Launch and converse; return how the turn ended."""
        try:
            process = await self.launch.start()
        except LaunchFailed as error:
            self._log.warning("execution.launch_failed", reason=error.reason)
            return Failed(RunError(code=ErrorCode.LAUNCH_FAILED, message=error.reason))
        except StoodStill:
            return Interrupted(STOOD_STILL)
        except Unguarded:
            self._unsupervised = True
            return judge(self._observed())
        return await self._conversation_end(process)

    # -- conversing ----------------------------------------------------------------------------

    async def _conversation_end(self, process: ShimmedProcess) -> TurnEnd:
        try:
            await self._converse(process)
        except (
            ExceptionGroup
        ) as group:  # the edge of this process's task: the run must not stay RUNNING
            if group.subgroup(Fenced) is not None:
                raise Fenced(f"run {self.turn.run.run_id!r}") from None
            log.exception("execution.session_failed", run_id=self.turn.run.run_id)
            return _defect()
        return judge(self._observed())

    async def _converse(self, process: ShimmedProcess) -> None:
        """Take the news until the process has ended or must be ended."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._read_stdout(process.stdout)),
                group.create_task(self._read_stderr(process.stderr)),
                group.create_task(self._hear_shim(process)),
                group.create_task(self._greet(process)),
                group.create_task(self._hand_over_replies(process)),
            ]
            # A cancel that came before this session was known to anybody is only on record.
            if (await self._look()).cancel_requested:
                self.cancel()
            await self._take_news()
            for task in tasks:
                task.cancel()

    async def _look(self) -> Run:
        """Return the run as it is on record now."""
        return await self._log.insist(
            lambda: self.shop.storage.point(runs.get_by_key, self.turn.run.key)
        )

    async def _take_news(self) -> None:
        while not self._is_over():
            try:
                async with asyncio.timeout_at(self._deadline):
                    news = await self._news.get()
            except TimeoutError:
                return
            await self._take(news)
            self._news.task_done()

    def _is_over(self) -> bool:
        # Its whole output comes before its end: whoever follows it must miss nothing.
        ended = self._exited is not None and not self._open_outputs
        lost = self._unsupervised or self._interrupted is not None
        stopped = self._canceled or self._timed_out is not None
        return ended or lost or stopped or self._broken is not None

    async def _take(self, news: _News) -> None:
        match news:
            case _Signal.CANCELED:
                self._canceled = True
            case _TimedOut(kind):
                self._timed_out = kind
            case _Signal.STDOUT_ENDED:
                self._open_outputs -= 1
                self._expect_end_within(self.shop.exit_grace_s)
            case _Signal.STDERR_ENDED:
                self._open_outputs -= 1
            case _Signal.SHIM_GONE:
                self._unsupervised = self._exited is None
                self._expect_end_within(LAST_OUTPUT_S)
            case _Signal.SHIM_USELESS:
                self._unsupervised = True
            case Exited() | EndsItself() | Empty():
                self._note(news)
                self._expect_end_within(LAST_OUTPUT_S)
            case Gated() | Started() | NotStarted():
                pass  # was waited for by the launch
            case _Broken(how):
                self._broken = how
            case _:
                await self._hear(news)

    def _note(self, event: ShimEvent) -> None:
        match event:
            case EndsItself():
                # What it did before that counts: it may have ended well, unheard.
                self._interrupted = STOOD_STILL if self._exited is None else None
            case Exited():
                self._exited = event
            case Empty():
                self._emptied = True

    def _expect_end_within(self, seconds: float) -> None:
        self._deadline = asyncio.get_running_loop().time() + seconds

    async def _hear(self, message: Message) -> None:
        if self._said is not None and not isinstance(message, ProgressMessage):
            self._broken = "The agent went on after its result or question."
            return
        match message:
            case SessionMessage(value=handle):
                await self._keep_session(handle)
            case AskMessage(question=question):
                await self._hear_question(Asked(question))
            case ResultMessage(output=output):
                self._said = Succeeded(output)
                self._expect_end_within(self.shop.exit_grace_s)
            case UnknownMessage(type=kind):
                self._ignore(kind)
            case ProgressMessage():
                pass

    def _ignore(self, kind: str) -> None:
        if not self._ignored[kind]:
            self._log.info("execution.message_ignored", type=kind)
        if len(self._ignored) < IGNORED_TYPES:
            self._ignored[kind] += 1

    async def _keep_session(self, handle: str) -> None:
        session = Session(type=jsonl.SESSION_TYPE, handle=handle, turn=self.turn.run.turn)
        await self._write(turns.keep_session, session=session, now=self.shop.now())
        self._has_session = True

    async def _hear_question(self, asked: Asked) -> None:
        if self.turn.run.profile is Profile.RESUMABLE:
            if not self._has_session and self.turn.run.session is None:
                self._broken = "The agent asked without having named a session to resume."
                return
            self._said = asked
            self._expect_end_within(self.shop.exit_grace_s)
            return
        if self._in_wait:
            self._broken = "The agent asked while its last question was open."
            return
        number = (await self._look()).interaction_count + 1
        self._in_wait = True  # before the commit: the reply may come right after it
        await self._write(
            turns.ask_and_stay,
            number=number,
            question=asked.question,
            due=self._wait_due(),
            now=self.shop.now(),
        )
        self._log.info("execution.waiting")

    def _wait_due(self) -> Due:
        """Return when a question that is asked now will have waited long enough."""
        run = self.turn.run
        own_s = run.session_timeout_s
        return self.shop.due_in(own_s or self.shop.catalog.get(run.engine).session_timeout_s)

    # -- speaking ------------------------------------------------------------------------------

    async def _greet(self, process: ShimmedProcess) -> None:
        """Give the process its task, and with it the reply that it resumes by."""
        run, reply = self.turn.run, self.turn.reply
        workspace = self.shop.output.workspace(run.key, run.attempt)
        task = jsonl.Task(
            run_id=run.run_id, attempt=run.attempt, input=run.input or {}, workspace=str(workspace)
        )
        if reply is None or run.session is None:
            await self._say(process, jsonl.start_message(task))
        else:
            line = jsonl.resume_message(task, session=run.session, reply=reply)
            # Once it was read, not before: what lies in the pipe dies with the process, and a crash
            # gives it to another one. Who reads to the end of its input has read it by then.
            if await self._say(process, line):
                await until_read(process.stdin.fileno())
                await self._write(turns.delivered)
        if run.profile is Profile.RESUMABLE:
            process.stdin.close()

    async def _hand_over_replies(self, process: ShimmedProcess) -> None:
        """Give a sticky process each reply as it is accepted.

        Beside the news, so that a cancel is heard while the process does not read.
        """
        while True:
            await self._replied.wait()
            self._replied.clear()
            if self._in_wait:  # else it was told twice, or was a resumed process's greeting
                await self._hand_over_reply(process)

    async def _hand_over_reply(self, process: ShimmedProcess) -> None:
        run = await self._look()
        reply = await self._log.insist(
            lambda: self.shop.storage.point(interactions.find, run.key, run.interaction_count)
        )
        accepted = reply is not None and reply.state is InteractionState.ANSWERED
        if reply is None or not accepted or run.status is not RunStatus.RUNNING:
            return
        self._in_wait = False
        if await self._say(process, jsonl.reply_message(reply)):
            await self._write(turns.delivered)

    async def _say(self, process: ShimmedProcess, line: bytes) -> bool:
        """Write a line to the process; False when it does not listen any more."""
        try:
            await write_all(process.stdin.fileno(), line)
        except (BrokenPipeError, ValueError):
            self._log.info("execution.input_refused")
            return False
        return True

    # -- listening -----------------------------------------------------------------------------

    async def _read_stdout(self, pipe: IO[bytes]) -> None:
        begun = b""
        while data := await read(pipe.fileno()):
            *lines, begun = (begun + data).split(b"\n")
            await self._take_lines(lines)
            if len(begun) > jsonl.MAX_LINE_BYTES:
                await self._keep(OutputChannel.STDOUT, begun)
                how = f"A line of the agent is longer than {jsonl.MAX_LINE_BYTES} bytes."
                self._news.put_nowait(_Broken(how))
                return
        if begun:
            await self._take_lines([begun], end=b"")
        self._news.put_nowait(_Signal.STDOUT_ENDED)

    async def _take_lines(self, lines: list[bytes], *, end: bytes = b"\n") -> None:
        """Keep what the lines say, then act on it."""
        if any(len(line) > LONG_LINE_BYTES for line in lines):
            heard = await self.shop.in_thread(lambda: [_understand(line) for line in lines])
        else:
            heard = [_understand(line) for line in lines]
        await self._keep(OutputChannel.STDOUT, b"".join(shown + end for shown, _ in heard))
        for _, news in heard:
            if news is not None:
                self._news.put_nowait(news)
        await self._news.join()  # an agent that floods us waits in its pipe

    async def _read_stderr(self, pipe: IO[bytes]) -> None:
        while data := await read(pipe.fileno()):
            self._stderr_tail = (self._stderr_tail + data)[-STDERR_TAIL_BYTES:]
            await self._keep(OutputChannel.STDERR, data)
        self._news.put_nowait(_Signal.STDERR_ENDED)

    async def _keep(self, channel: OutputChannel, data: bytes) -> None:
        run = self.turn.run
        if not data:
            return
        try:
            await self.shop.in_thread(self.shop.output.append, run.key, run.attempt, channel, data)
        except OSError as error:
            self._log.warning("execution.output_lost", channel=channel.value, error=error.strerror)

    async def _hear_shim(self, process: ShimmedProcess) -> None:
        events, process.told = process.told, []
        while True:
            for event in events:
                self._news.put_nowait(event)
            data = await read(process.report)
            if not data:
                break
            events = process.take(data)
        self._news.put_nowait(_Signal.SHIM_GONE)

    # -- ending --------------------------------------------------------------------------------

    async def _end_tree(self) -> Ending:
        if self._emptied and not self._unsupervised:
            ending = NOTHING_LEFT  # the kernel told the shim so
        else:
            ending = await self.launch.end_tree(why=self._why_ended())
        if self._interrupted is None:
            return ending
        return ending.with_book(await self.shop.in_thread(self.launch.killed_by_shim))

    def _why_ended(self) -> str:
        reasons = {
            "canceled": self._canceled,
            "timed_out": self._timed_out is not None,
            "protocol_broken": self._broken is not None,
            "shim_lost": self._unsupervised,
        }
        return next((why for why, so in reasons.items() if so), "turn_over")

    def _observed(self) -> Observed:
        tail = self._stderr_tail.decode("utf-8", "replace").replace("\0", "").strip()
        return Observed(
            said=self._said,
            broken=self._broken,
            exit_code=None if self._exited is None else self._exited.code,
            in_wait=self._in_wait,
            stderr_tail=tail,
            interrupted=self._interrupted,
            unsupervised=self._unsupervised,
            timed_out=self._timed_out,
        )

    async def _record(self, end: TurnEnd, ended: Ended) -> None:
        run = await self._log.insist(
            lambda: self.shop.storage.write(
                turns.end,
                self.turn.run.key,
                owner=self.shop.owner,
                lease_key=self.turn.lease.key,
                end=end,
                ended=ended,
                # A resumable wait ends only where an automatic decision ends it.
                due=None if self.turn.run.require_user_reply else self._wait_due(),
                now=self.shop.now(),
            )
        )
        usage = ended.usage
        self._log.info(
            "execution.turn_ended",
            status=run.status.value if run.status else None,
            error_code=run.error.code if run.error else None,
            exit_code=ended.exit_code,
            processes_ended=ended.processes_ended,
            cpu_s=None if usage is None else round((usage.user_us + usage.system_us) / 1e6, 3),
            max_rss_kib=None if usage is None else usage.max_rss_kib,
        )

    def _ended(self, ending: Ending) -> Ended:
        exited = self._exited
        if exited is None:
            return Ended(exit_code=None, processes_ended=ending.ended, gone=ending.gone)
        usage = Usage(
            user_us=exited.user_us, system_us=exited.system_us, max_rss_kib=exited.max_rss_kib
        )
        return Ended(
            exit_code=exited.code, processes_ended=ending.ended, gone=ending.gone, usage=usage
        )

    # -- tools ---------------------------------------------------------------------------------

    async def _write(self, use: Callable[..., object], **facts: object) -> None:
        storage, owner = self.shop.storage, self.shop.owner
        await self._log.insist(lambda: storage.write(use, self.turn.run.key, owner=owner, **facts))


def _defect() -> Failed:
    message = "The service failed while it followed the process; its log says how."
    return Failed(RunError(code=ErrorCode.INTERNAL_ERROR, message=message))


def _understand(line: bytes) -> tuple[bytes, _News | None]:
    """Return what of a line may be kept and shown, and the news that it is."""
    if not line.strip():
        return line, None
    try:
        message = jsonl.parse(line)
    except ProtocolError as error:
        return line, _Broken(f"The agent broke the protocol: {error}.")
    return (SESSION_SHOWN if isinstance(message, SessionMessage) else line), message
