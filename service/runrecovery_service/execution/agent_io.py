"""The pipes of one process: parses its lines, and stores its output without secrets.

Everything that the process and its shim report becomes an event in a queue, in the order of
arrival.

Standard output is read at once, even while the parser or the store is busy. Otherwise the pipe
would fill up, and some agent CLIs exit without writing the rest of their output to a full pipe. The
output waits in a backlog until it is parsed. The shim can read the memory of the backlog too, so
that no output is lost when the service is killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import field
from functools import partial
from pathlib import Path
from typing import Final

from runrecovery_service.agents.output import OutputChannel, OutputFiles
from runrecovery_service.engines.dialect import Listener, ProtocolError
from runrecovery_service.execution.backlog import Backlog
from runrecovery_service.execution.blocking import run_blocking
from runrecovery_service.execution.pipes import (
    bytes_held,
    read,
    wait_until_read,
    write_all,
)
from runrecovery_service.execution.turn_log import TurnLog
from runrecovery_service.execution.turn_state import LineRead, ProtocolBroken, Signal, TurnEvent
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.shim_journal import record_kept
from runrecovery_service.process.shimmed_process import ShimmedProcess
from runrecovery_service.process.spool import READ_BYTES

LONG_LINE_BYTES: Final = 16384
"""The longest line that is parsed on the event loop. A line of 1 MiB would block the loop for a
second."""
STDERR_TAIL_BYTES: Final = 2000
UTF8_CONTINUATION: Final = bytes(range(0x80, 0xC0))
OVERTIME_BYTES: Final = 16 << 20
"""How much output is still parsed after a deadline. There is a limit because a descendant of the
agent can write for ever."""
BACKLOG_BYTES: Final = 4 << 20
"""How much output of one process can wait to be parsed. With more, the pipe is not read, and the
process waits."""
UNTAKEN_BYTES: Final = 1 << 20
UNTAKEN_EVENTS: Final = 1000
"""How many bytes of lines, and how many events, are parsed ahead of the supervisor, which is
sometimes waiting for the store."""


@dataclass(slots=True, kw_only=True, eq=False)
class AgentIO:
    """Reads, parses and stores what one process prints, and writes to the input of the process.

    Attributes:
        listener: parses the lines of this process.
        max_line_bytes: the longest line that the protocol allows.
        events: the queue of events for the supervisor.
        threads: the pool for blocking work.
        log: the log of the turn. The run of this turn determines the output files.
        journal: the journal of the launch. It gets a record once all of standard output is stored.
    """

    process: ShimmedProcess
    listener: Listener
    max_line_bytes: int
    events: asyncio.Queue[TurnEvent]
    output: OutputFiles
    threads: Executor
    log: TurnLog
    journal: Path
    _backlog: Backlog = field(init=False)
    _is_parsing: bool = field(default=False, init=False)
    _is_keeping: bool = field(default=False, init=False)
    _parsed_bytes: int = field(default=0, init=False)
    _untaken_bytes: int = field(default=0, init=False)
    _overtime_from: int | None = field(default=None, init=False)
    _line_start: list[bytes] = field(default_factory=list, init=False)
    _kept_from: int | None = field(default=None, init=False)
    _kept_to: int | None = field(default=None, init=False)
    _is_all_kept: bool = field(default=True, init=False)
    _stderr_tail: bytes = field(default=b"", init=False)
    _stderr_held: bytes = field(default=b"", init=False)

    def __post_init__(self) -> None:
        self._backlog = Backlog(self.process.spool, max_bytes=BACKLOG_BYTES)

    @property
    def stderr_tail(self) -> str:
        """The last part of the process's standard error, without secrets."""
        tail = self._stderr_tail
        if len(tail) == STDERR_TAIL_BYTES:  # the tail can begin inside a character
            tail = tail.lstrip(UTF8_CONTINUATION)
        return tail.decode("utf-8", "replace").replace("\0", "").strip()

    def has_unread_output(self) -> bool:
        """Return whether output is still unread or unparsed.

        If so, the supervisor gives the agent more time, because the service is what reads slowly.
        Once `OVERTIME_BYTES` were parsed since the first call, return False.
        """
        if self._overtime_from is None:
            self._overtime_from = self._parsed_bytes
        is_bounded = self._parsed_bytes - self._overtime_from < OVERTIME_BYTES
        pipes = (self.process.stdout, self.process.stderr)
        held = len(self._backlog) + sum(bytes_held(pipe.fileno()) for pipe in pipes)
        return is_bounded and (self._is_parsing or self._is_keeping or held > 0)

    # -- input ---------------------------------------------------------------------------------

    async def write(self, data: bytes) -> bool:
        """Write to the process; return False if it has closed its input."""
        try:
            await write_all(self.process.stdin.fileno(), data)
        except (BrokenPipeError, ValueError):
            self.log.info("execution.input_refused")
            return False
        return True

    async def wait_until_input_read(self) -> bool:
        """Wait until the process has read its input. Return False if it closes the input unread."""
        return await wait_until_read(self.process.stdin.fileno())

    def close_input(self) -> None:
        """Close the process's input, because no reply will follow."""
        self.process.stdin.close()

    # -- output --------------------------------------------------------------------------------

    async def read_stdout(self) -> None:
        """Read standard output into the backlog until its end."""
        while await self._backlog.fill(self.process.stdout.fileno()):
            pass

    async def parse_stdout(self) -> None:
        """Parse standard output until its end, and put its events into the queue."""
        while data := await self._backlog.take(READ_BYTES):
            self._is_parsing = True
            self._parsed_bytes += len(data)
            first, newline, more = data.partition(b"\n")
            self._line_start.append(first)
            if newline:
                *lines, last = more.split(b"\n")
                lines = [b"".join(self._line_start), *lines]
                self._line_start = [last]
                await self._take_lines(lines)
            if sum(map(len, self._line_start)) > self.max_line_bytes:
                await self._refuse_line(b"".join(self._line_start))
                return
            self._is_parsing = False
        if last := b"".join(self._line_start):
            self._is_parsing = True
            self._line_start = []
            await self._take_lines([last], end=b"")
        await self._record_kept()
        self.events.put_nowait(Signal.STDOUT_ENDED)

    async def _refuse_line(self, line: bytes) -> None:
        self._line_start = []
        await self._keep_stdout(self.listener.redact(line))
        longest = self.max_line_bytes
        self.events.put_nowait(
            ProtocolBroken(f"A line of the agent is longer than {longest} bytes.")
        )

    async def _take_lines(self, lines: list[bytes], *, end: bytes = b"\n") -> None:
        """Store the lines, and then put their events into the queue."""
        longest = max(self.listener.buffered_bytes, *map(len, lines))
        if longest > LONG_LINE_BYTES:
            parsed = await run_blocking(self.threads, lambda: [self._parse(line) for line in lines])
        else:
            parsed = [self._parse(line) for line in lines]
        await self._keep_stdout(b"".join(shown + end for shown, _ in parsed))
        for _, events in parsed:
            for event in events:
                self.events.put_nowait(event)
        self._untaken_bytes += sum(map(len, lines))
        if self._untaken_bytes > UNTAKEN_BYTES or self.events.qsize() > UNTAKEN_EVENTS:
            await self.events.join()
            self._untaken_bytes = 0

    def _parse(self, line: bytes) -> tuple[bytes, Sequence[TurnEvent]]:
        """Return the line without secrets, and the events in it."""
        try:
            heard = self.listener.hear(line)
        except ProtocolError as error:
            broken = ProtocolBroken(f"The agent broke the protocol: {error}.")
            return self.listener.redact(line), [broken]
        return heard.redacted, [*heard.messages, LineRead(heard.at_work)]

    async def read_stderr(self) -> None:
        """Read standard error until its end."""
        while data := await read(self.process.stderr.fileno()):
            self._is_keeping = True
            self._parsed_bytes += len(data)
            text = self.listener.redact(self._stderr_held + data)
            end = max(len(text) - max(self.listener.max_secret_bytes - 1, 0), 0)
            self._stderr_held = text[end:]  # a secret can arrive in two pieces
            await self._keep_stderr(text[:end])
            self._is_keeping = False
        held, self._stderr_held = self._stderr_held, b""
        await self._keep_stderr(held)
        self.events.put_nowait(Signal.STDERR_ENDED)

    async def take_unfinished_line(self) -> Sequence[TurnEvent]:
        """Store and parse the last line of an agent that has exited, if the line has no newline.

        Returns:
            The events of the line. If the line cannot be parsed, there are none, because it can be
                half a line of a child that still writes to the pipe.
        """
        line = b"".join(self._line_start)
        if not line:
            return []
        shown, events = await run_blocking(self.threads, self._parse, line)
        self._line_start = []
        await self._keep_stdout(shown)
        return [event for event in events if not isinstance(event, ProtocolBroken)]

    async def keep_held_stderr(self) -> None:
        """Store the end of standard error, which was held back as it could begin a secret."""
        await self._keep_stderr(self._stderr_held)

    async def _keep_stderr(self, text: bytes) -> None:
        self._stderr_tail = (self._stderr_tail + text)[-STDERR_TAIL_BYTES:]
        if text:
            append = partial(self._append, OutputChannel.STDERR, text)
            await self._keep(OutputChannel.STDERR, append)
        for message in self.listener.hear_stderr(text.decode("utf-8", "replace")):
            if self.events.qsize() <= UNTAKEN_EVENTS:  # the supervisor can be waiting for the store
                self.events.put_nowait(message)

    async def _keep_stdout(self, data: bytes) -> None:
        """Append data to the output file. The data ends where the unfinished line begins."""
        upto = self._backlog.taken_to - sum(map(len, self._line_start))
        await self._keep(OutputChannel.STDOUT, partial(self._append_stdout, data, upto))

    async def _keep(self, channel: OutputChannel, append: Callable[[], object]) -> None:
        try:
            await run_blocking(self.threads, append)
        except OSError as error:
            self.log.output_lost(channel=channel.value, error=error.strerror)

    def _append_stdout(self, data: bytes, upto: int) -> None:
        """Append to the output file, and record in the spool that data up to `upto` is stored."""
        size: int | None = None
        try:
            size = self._append(OutputChannel.STDOUT, data)
        finally:
            self._note_kept(len(data), size)
            begin = self._kept_from if self._is_all_kept else None
            self.process.spool.note_kept(upto, size=size, begin=begin)

    def _append(self, channel: OutputChannel, data: bytes) -> int | None:
        run = self.log.run
        return self.output.append(run.key, run.attempt, channel, data)

    def _note_kept(self, added: int, size: int | None) -> None:
        """Record how the file of standard output has grown.

        Args:
            added: the bytes that were appended.
            size: the size of the file; None: output was lost.
        """
        if size is None:
            self._is_all_kept = False
        elif self._kept_from is None:
            self._kept_from = size - added
        self._kept_to = size

    async def _record_kept(self) -> None:
        """Record that all standard output is stored, so that a restart can find a result in it."""
        begin, end = self._kept_from, self._kept_to
        if begin is None or end is None or not self._is_all_kept:
            return
        shim = (self.process.pid, self.process.start_ticks)
        try:
            await run_blocking(
                self.threads, partial(record_kept, self.journal, shim, begin=begin, end=end)
            )
        except OSError as error:
            self.log.warning("execution.journal_not_written", error=error.strerror)

    # -- the shim ------------------------------------------------------------------------------

    async def read_shim_report(self) -> None:
        """Put the events of the shim into the queue, until it closes its pipe for reports."""
        events, self.process.unread_events = self.process.unread_events, []
        while True:
            for event in events:
                self.events.put_nowait(event)
            data = await read(self.process.report)
            if not data:
                break
            events = self.process.parse_report(data)
        self.events.put_nowait(Signal.SHIM_GONE)
