"""Follows one process from its launch to its end, and records what it does."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum, auto
from typing import IO, Final, TypeAlias, TypeVar

import structlog

from runrecovery_service.domain.errors import Exhausted, Fenced, NotNow
from runrecovery_service.domain.run import (
    ErrorCode,
    InteractionState,
    Profile,
    Run,
    RunError,
    RunStatus,
    Session,
)
from runrecovery_service.domain.turn import Asked, Failed, Observed, Succeeded, TurnEnd, judge
from runrecovery_service.engines import jsonl
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.engines.jsonl import (
    AskMessage,
    Message,
    ProgressMessage,
    ProtocolError,
    ResultMessage,
    SessionMessage,
    UnknownMessage,
)
from runrecovery_service.execution.output import OutputChannel, OutputFiles
from runrecovery_service.process.evidence import COOKIE_VARIABLE, LeaseEvidence
from runrecovery_service.process.launch import (
    LaunchedProcess,
    LaunchFailed,
    agent_environment,
    dispose,
    launch,
    wait_exit,
)
from runrecovery_service.process.sweep import Ending, end_trees
from runrecovery_service.storage import interactions, processes, runs, turns
from runrecovery_service.storage.adapter import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.processes import Ended, Lease
from runrecovery_service.storage.turns import Turn

log = structlog.get_logger()

R = TypeVar("R")

SESSION_TYPE: Final = "jsonl"
READ_BYTES: Final = 65536
LONG_LINE_BYTES: Final = 16384
"""Longer lines are parsed in a thread: one of 1 MiB takes the loop a second and more."""
IGNORED_TYPES: Final = 100
"""Unknown message types of one turn that are told apart in the log."""
SESSION_SHOWN: Final = b'{"type":"session","value":"[secret]"}'
"""What stands in the kept output for the line that names a session."""
STDERR_TAIL_BYTES: Final = 2000
LAST_OUTPUT_S: Final = 1.0
"""How long a process that has exited may leave its output open (a child may hold it)."""
RETRY_FIRST_S, RETRY_MOST_S = 0.2, 5.0
ENDING_DEADLINE_S: Final = 30.0
"""On top of the grace: for ending one tree. What is alive then is recorded as KILL_PENDING."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What every session works with."""

    storage: Storage
    owner: Owner
    catalog: Catalog
    output: OutputFiles
    threads: Executor
    environ: Mapping[str, str]
    cancel_grace_s: float
    exit_grace_s: float
    now: Callable[[], datetime]


class _Signal(Enum):
    """What can come beside a message of the agent."""

    STDOUT_ENDED = auto()
    STDERR_ENDED = auto()
    CANCELED = auto()


@dataclass(frozen=True, slots=True)
class _Exited:
    code: int


@dataclass(frozen=True, slots=True)
class _Broken:
    how: str


_News: TypeAlias = "Message | _Signal | _Exited | _Broken"


def evidence_of(lease: Lease) -> LeaseEvidence:
    """Return what a lease proves about processes."""
    return LeaseEvidence(
        lease_key=lease.key,
        run_key=lease.run_key,
        cookie=lease.cookie,
        pid=lease.pid,
        start_ticks=lease.start_ticks,
        boot_id=lease.place.boot_id,
        pid_namespace=lease.place.pid_namespace,
        host_id=lease.place.host_id,
    )


@dataclass(slots=True, kw_only=True, eq=False)
class RunSession:
    """One turn under way. `follow` is its whole life; the rest may be called meanwhile."""

    turn: Turn
    shop: Workshop
    evidence: LeaseEvidence = field(init=False)
    _news: asyncio.Queue[_News] = field(default_factory=asyncio.Queue)
    _replied: asyncio.Event = field(default_factory=asyncio.Event)
    _said: Asked | Succeeded | None = None
    _broken: str | None = None
    _exit_code: int | None = None
    _canceled: bool = False
    _in_wait: bool = False
    _has_session: bool = False
    _open_outputs: int = 2
    _ignored: Counter[str] = field(default_factory=Counter)
    _stderr_tail: bytes = b""
    _deadline: float | None = None
    _process: LaunchedProcess | None = None

    def __post_init__(self) -> None:
        self.evidence = evidence_of(self.turn.lease)

    def cancel(self) -> None:
        """End the process; a cancel has been accepted."""
        self._news.put_nowait(_Signal.CANCELED)

    def deliver(self) -> None:
        """Give the process the reply that has been accepted."""
        self._replied.set()

    async def follow(self) -> None:
        """Launch, converse, end, record. What is not on record is tried until it is.

        Cancelling the task leaves the run as it is on record: the next start converges it.

        Raises:
            Fenced: a newer epoch owns the run.
        """
        try:
            process = await self._launch()
        except LaunchFailed as error:
            self._warn("execution.launch_failed", reason=error.reason)
            failed = Failed(RunError(code=ErrorCode.LAUNCH_FAILED, message=error.reason))
            await self._record(failed, Ended(exit_code=None, processes_ended=0, gone=True))
            return
        end = await self._conversation_end(process)
        ending = await self._end_tree()
        exit_code = await self._in_thread(self.release)
        await self._record(
            end, Ended(exit_code=exit_code, processes_ended=ending.ended, gone=ending.gone)
        )

    def release(self) -> int | None:
        """Close the pipes and reap the process; its exit code, None if it could not be ended.

        Blocking, shortly. Only after its tree was ended: until then the unreaped leader keeps
        its session's number from being given away.
        """
        process = self._process
        if process is None:
            return None
        if process.popen.poll() is not None:
            return dispose(process)
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
        return None

    # -- launching -----------------------------------------------------------------------------

    async def _launch(self) -> LaunchedProcess:
        run, shop = self.turn.run, self.shop
        if run.engine not in shop.catalog.names:
            raise LaunchFailed(f"no engine {run.engine!r} is configured any more")
        spawning = asyncio.ensure_future(self._in_thread(self._spawn, shop.catalog.get(run.engine)))
        try:
            process = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            self._adopt(await spawning)  # the thread goes on: whoever stops us must end it too
            raise
        self._adopt(process)
        self._log("execution.launched", pid=process.pid)
        await self._insist(
            lambda: shop.storage.write(
                processes.launched,
                self.turn.lease.key,
                pid=process.pid,
                start_ticks=process.start_ticks,
            )
        )
        return process

    def _adopt(self, process: LaunchedProcess) -> None:
        self._process = process
        self.evidence = replace(self.evidence, pid=process.pid, start_ticks=process.start_ticks)

    def _spawn(self, engine: Engine) -> LaunchedProcess:
        try:
            return self._spawn_or_fail(engine)
        except (OSError, RuntimeError) as error:  # no descriptor, no thread, no memory left
            raise LaunchFailed(f"the system refused: {error}") from error

    def _spawn_or_fail(self, engine: Engine) -> LaunchedProcess:
        run = self.turn.run
        try:
            workspace = self.shop.output.prepare(run.key, run.attempt, fresh=run.turn == 1)
        except OSError as error:
            raise LaunchFailed(f"the workspace cannot be made: {error.strerror}") from error
        extra = {
            COOKIE_VARIABLE: self.evidence.token,
            "RUNRECOVERY_RUN_ID": run.run_id,
            "RUNRECOVERY_ATTEMPT": str(run.attempt),
        }
        env = agent_environment(engine.env_allow, self.shop.environ, extra)
        return launch(engine.command, cwd=workspace, env=env)

    # -- conversing ----------------------------------------------------------------------------

    async def _conversation_end(self, process: LaunchedProcess) -> TurnEnd:
        try:
            await self._converse(process)
        except (
            ExceptionGroup
        ) as group:  # the edge of this process's task: the run must not stay RUNNING
            if group.subgroup(Fenced) is not None:
                raise Fenced(f"run {self.turn.run.run_id!r}") from None
            log.exception("execution.session_failed", run_id=self.turn.run.run_id)
            message = "The service failed while it followed the process; its log says how."
            return Failed(RunError(code=ErrorCode.INTERNAL_ERROR, message=message))
        return judge(self._observed())

    async def _converse(self, process: LaunchedProcess) -> None:
        """Take the news until the process has ended or must be ended."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._read_stdout(process.stdout)),
                group.create_task(self._read_stderr(process.stderr)),
                group.create_task(self._watch_exit(process)),
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
        return await self._insist(
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
        ended = self._exit_code is not None and not self._open_outputs
        return ended or self._canceled or self._broken is not None

    async def _take(self, news: _News) -> None:
        match news:
            case _Signal.CANCELED:
                self._canceled = True
            case _Signal.STDOUT_ENDED:
                self._open_outputs -= 1
                self._expect_end_within(self.shop.exit_grace_s)
            case _Signal.STDERR_ENDED:
                self._open_outputs -= 1
            case _Exited(code):
                self._exit_code = code
                self._expect_end_within(LAST_OUTPUT_S)
            case _Broken(how):
                self._broken = how
            case _:
                await self._hear(news)

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
            self._log("execution.message_ignored", type=kind)
        if len(self._ignored) < IGNORED_TYPES:
            self._ignored[kind] += 1

    async def _keep_session(self, handle: str) -> None:
        session = Session(type=SESSION_TYPE, handle=handle, turn=self.turn.run.turn)
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
            turns.ask_and_stay, number=number, question=asked.question, now=self.shop.now()
        )
        self._log("execution.waiting")

    # -- speaking ------------------------------------------------------------------------------

    async def _greet(self, process: LaunchedProcess) -> None:
        """Give the process its task, and with it the reply that it resumes by."""
        run, reply = self.turn.run, self.turn.reply
        workspace = self.shop.output.workspace(run.key, run.attempt)
        task = jsonl.Task(
            run_id=run.run_id, attempt=run.attempt, input=run.input, workspace=str(workspace)
        )
        if reply is None or run.session is None:
            await self._say(process, jsonl.start_message(task))
        else:
            line = jsonl.resume_message(
                task,
                session=run.session,
                interaction_id=reply.interaction_id,
                response=reply.response,
            )
            # After it was handed over, not before: a crash in between gives it again.
            if await self._say(process, line):
                await self._write(turns.delivered)
        if run.profile is Profile.RESUMABLE:
            process.stdin.close()

    async def _hand_over_replies(self, process: LaunchedProcess) -> None:
        """Give a sticky process each reply as it is accepted.

        Beside the news, so that a cancel is heard while the process does not read.
        """
        while True:
            await self._replied.wait()
            self._replied.clear()
            if self._in_wait:  # else it was told twice, or was a resumed process's greeting
                await self._hand_over_reply(process)

    async def _hand_over_reply(self, process: LaunchedProcess) -> None:
        run = await self._look()
        reply = await self._insist(
            lambda: self.shop.storage.point(interactions.find, run.key, run.interaction_count)
        )
        accepted = reply is not None and reply.state is InteractionState.ANSWERED
        if reply is None or not accepted or run.status is not RunStatus.RUNNING:
            return
        self._in_wait = False
        line = jsonl.reply_message(interaction_id=reply.interaction_id, response=reply.response)
        if await self._say(process, line):
            await self._write(turns.delivered)

    async def _say(self, process: LaunchedProcess, line: bytes) -> bool:
        """Write a line to the process; False when it does not listen any more."""
        try:
            await _write_all(process.stdin.fileno(), line)
        except (BrokenPipeError, ValueError):
            self._log("execution.input_refused")
            return False
        return True

    # -- listening -----------------------------------------------------------------------------

    async def _read_stdout(self, pipe: IO[bytes]) -> None:
        begun = b""
        while data := await _read(pipe.fileno()):
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
            heard = await self._in_thread(lambda: [_understand(line) for line in lines])
        else:
            heard = [_understand(line) for line in lines]
        await self._keep(OutputChannel.STDOUT, b"".join(shown + end for shown, _ in heard))
        for _, news in heard:
            if news is not None:
                self._news.put_nowait(news)
        await self._news.join()  # an agent that floods us waits in its pipe

    async def _read_stderr(self, pipe: IO[bytes]) -> None:
        while data := await _read(pipe.fileno()):
            self._stderr_tail = (self._stderr_tail + data)[-STDERR_TAIL_BYTES:]
            await self._keep(OutputChannel.STDERR, data)
        self._news.put_nowait(_Signal.STDERR_ENDED)

    async def _keep(self, channel: OutputChannel, data: bytes) -> None:
        run = self.turn.run
        if not data:
            return
        try:
            await self._in_thread(self.shop.output.append, run.key, run.attempt, channel, data)
        except OSError as error:
            self._warn("execution.output_lost", channel=channel.value, error=error.strerror)

    async def _watch_exit(self, process: LaunchedProcess) -> None:
        self._news.put_nowait(_Exited(await wait_exit(process.popen)))

    # -- ending --------------------------------------------------------------------------------

    async def _end_tree(self) -> Ending:
        """End what is left of the process's tree, if only a child that it forgot."""
        grace_s = self.shop.cancel_grace_s
        endings = await self._insist(
            lambda: self._in_thread(
                lambda: end_trees(
                    [self.evidence], grace_s=grace_s, deadline_s=grace_s + ENDING_DEADLINE_S
                )
            )
        )
        ending = endings[self.turn.lease.key]
        for refusal in ending.refused:
            self._warn("execution.tree_not_ended", reason=refusal)
        return ending

    def _observed(self) -> Observed:
        tail = self._stderr_tail.decode("utf-8", "replace").replace("\0", "").strip()
        return Observed(
            said=self._said,
            broken=self._broken,
            exit_code=self._exit_code,
            in_wait=self._in_wait,
            stderr_tail=tail,
        )

    async def _record(self, end: TurnEnd, ended: Ended) -> None:
        run = await self._insist(
            lambda: self.shop.storage.write(
                turns.end,
                self.turn.run.key,
                owner=self.shop.owner,
                lease_key=self.turn.lease.key,
                end=end,
                ended=ended,
                now=self.shop.now(),
            )
        )
        self._log(
            "execution.turn_ended",
            status=run.status.value if run.status else None,
            error_code=run.error.code if run.error else None,
            exit_code=ended.exit_code,
            processes_ended=ended.processes_ended,
        )

    # -- tools ---------------------------------------------------------------------------------

    def _log(self, event: str, **facts: object) -> None:
        run = self.turn.run
        log.info(event, run_id=run.run_id, attempt=run.attempt, turn=run.turn, **facts)

    def _warn(self, event: str, **facts: object) -> None:
        run = self.turn.run
        log.warning(event, run_id=run.run_id, attempt=run.attempt, turn=run.turn, **facts)

    async def _in_thread(self, do: Callable[..., R], *args: object) -> R:
        return await asyncio.get_running_loop().run_in_executor(self.shop.threads, do, *args)

    async def _write(self, use: Callable[..., object], **facts: object) -> None:
        storage, owner = self.shop.storage, self.shop.owner
        await self._insist(lambda: storage.write(use, self.turn.run.key, owner=owner, **facts))

    async def _insist(self, do: Callable[[], Awaitable[R]]) -> R:
        """Do it until it is done: what a process did is not forgotten over a full disk, a database
        that is away, or a defect. Meanwhile the run keeps its slot, and the log says why."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                return await do()
            except Fenced:
                raise
            except Exception as error:  # noqa: BLE001 - giving up would leave a run half told
                known = isinstance(error, NotNow | Exhausted)
                self._warn(
                    "execution.write_retried", error=type(error).__name__, exc_info=not known
                )
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_MOST_S)


def _understand(line: bytes) -> tuple[bytes, _News | None]:
    """Return what of a line may be kept and shown, and the news that it is."""
    if not line.strip():
        return line, None
    try:
        message = jsonl.parse(line)
    except ProtocolError as error:
        return line, _Broken(f"The agent broke the protocol: {error}.")
    return (SESSION_SHOWN if isinstance(message, SessionMessage) else line), message


# Pipes are read and written by their descriptors, not as the loop's transports: uvloop closes the
# descriptor of a pipe transport twice, and the second time it may be another thread's new one.


async def _read(descriptor: int) -> bytes:
    """Return what a pipe holds, as soon as it holds something; nothing at its end."""
    os.set_blocking(descriptor, False)
    loop = asyncio.get_running_loop()
    while True:
        try:
            return os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            await _until_ready(descriptor, loop.add_reader, loop.remove_reader)


async def _write_all(descriptor: int, data: bytes) -> None:
    """Write to a pipe whose reader may be slow, or may never read."""
    os.set_blocking(descriptor, False)
    loop = asyncio.get_running_loop()
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            await _until_ready(descriptor, loop.add_writer, loop.remove_writer)


async def _until_ready(
    descriptor: int,
    watch: Callable[[int, Callable[[], None]], None],
    unwatch: Callable[[int], object],
) -> None:
    ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def note() -> None:
        if not ready.done():
            ready.set_result(None)

    watch(descriptor, note)
    try:
        await ready
    finally:
        unwatch(descriptor)
