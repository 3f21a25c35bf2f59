"""Start the service as an operator does, with a configuration, a log and an address; and stop it.

Everything is below a `Home`, one folder of one test (or of one module). `Home.clear` kills what was
started there and nothing else: it signals through a pidfd, and only after it has seen that the
working directory of the process is below that folder.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import grpc

from bench.seed import DEFAULT_MIX, Seeding, mix_from_text, seed_store
from support.api import Api
from support.defects import defect_in
from support.engines import GOOD_ENGINES, EngineSpec
from support.migrated_store import copy_migrated_store
from support.processes import (
    ProcessIdentity,
    are_dead,
    environment_of,
    is_alive,
    is_stopped,
    kill_below,
    living_process,
    processes_below,
    send_signal_if_alive,
)
from support.service_forker import PREPARE, ForkedService, can_be_forked, fork_service
from support.waiting import patience_s, until

Json: TypeAlias = dict[str, Any]

SHIMS: Final = (
    "SELECT l.pid, l.start_ticks FROM process_lease l JOIN run r ON r.id = l.run"
    " WHERE l.pid IS NOT NULL"
)


def config_text(settings: Mapping[str, object], engines: Mapping[str, EngineSpec]) -> str:
    """Return a configuration file."""
    tables = {key: value for key, value in settings.items() if isinstance(value, dict)}
    lines = [f"{key} = {_toml(value)}" for key, value in settings.items() if key not in tables]
    for key, table in tables.items():
        lines += ["", f"[{key}]"]
        lines += [f"{name} = {_toml(value)}" for name, value in table.items()]
    for name, engine in engines.items():
        table = {"command": list(engine.command), "profile": engine.profile, **engine.more}
        lines += ["", f"[engines.{name}]"]
        lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        rows = (", ".join(f"{key} = {_toml(cell)}" for key, cell in row.items()) for row in value)
        return f"[{', '.join(f'{{ {row} }}' for row in rows)}]"
    return json.dumps(value if not isinstance(value, Path) else str(value))


@dataclass(slots=True, kw_only=True, eq=False)
class ServiceProcess:
    """One start of the service.

    Attributes:
        credentials: of the channels to it; None: plaintext.
        token: the bearer token of the calls on them; empty: none.
    """

    popen: subprocess.Popen[bytes] | ForkedService
    log: Path
    credentials: grpc.ChannelCredentials | None = None
    token: str = ""
    address: str = ""
    _apis: list[Api] = field(default_factory=list)
    _parsed: list[Json] = field(default_factory=list)
    _parsed_size: int = -1

    @property
    def pid(self) -> int:
        """The pid of the service itself."""
        return self.popen.pid

    @property
    def text(self) -> str:
        """The log so far."""
        return self.log.read_text("utf-8", "replace")

    def events(self, name: str | None = None) -> list[Json]:
        """Return the complete log lines so far, of one event or all."""
        size = self.log.stat().st_size
        if size != self._parsed_size:  # `until_event` looks again and again
            *lines, _ = self.text.split("\n")
            self._parsed = [json.loads(line) for line in lines if line.startswith("{")]
            self._parsed_size = size
        return [event for event in self._parsed if name is None or event["event"] == name]

    def until_event(self, name: str) -> Json:
        """Wait until it has logged an event of this name and return the first one."""

        def look() -> list[Json]:
            events = self.events(name)
            if not events and self.popen.poll() is not None:
                raise AssertionError(f"the service ended without {name}:\n{self.text}")
            return events

        return until(look, f"the service logs {name}")[0]

    def api(self) -> Api:
        """Return a channel to it, which `close` closes."""
        api = Api(self.address, credentials=self.credentials, token=self.token)
        self._apis.append(api)
        return api

    def until_serving(self) -> Api:
        """Wait until health says SERVING and return a channel."""
        api = self.api()

        def look() -> bool:
            if self.popen.poll() is not None:
                raise AssertionError(f"the service ended:\n{self.text}")
            try:
                return api.health_of() == "SERVING"
            except grpc.RpcError:
                return False

        until(look, "health says SERVING")
        return api

    def kill(self) -> None:
        """Kill it by SIGKILL."""
        self.popen.kill()
        self.popen.wait()
        self.close()

    def suspend(self) -> None:
        """Stop it by SIGSTOP, so that it does nothing until it is killed."""
        identity = living_process(self.pid)
        assert identity is not None
        send_signal_if_alive(identity, signal.SIGSTOP)
        until(lambda: is_stopped(identity), "the service is suspended")

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.popen.terminate()

    def exit_code(self, *, timeout_s: float | None = None) -> int:
        """Wait until it exits and return the exit code."""
        return self.popen.wait(patience_s() if timeout_s is None else timeout_s)

    def stop(self) -> int:
        """Send SIGTERM, wait, and return the exit code."""
        self.terminate()
        try:
            return self.exit_code()
        finally:
            self.close()

    def close(self) -> None:
        """Close the channels to it."""
        while self._apis:
            self._apis.pop().channel.close()


class Home:
    """A folder with a configuration, in which services start one after another."""

    def __init__(
        self,
        path: Path,
        *,
        engines: Mapping[str, EngineSpec] = GOOD_ENGINES,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        may_fork: bool = True,
        prepare: Path | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        token: str = "",
        **settings: object,
    ) -> None:
        """Make the configuration.

        Args:
            prefix: words before the command of each service, of a program that becomes it.
            may_fork: whether services may start without their imports (`service_forker.py`), and
                the first one with a store (`migrated_store.py`).
            prepare: a program that changes each service before it runs: its `prepare` is called in
                a forked service; else it stands before `-m runrecovery_service …`.
            credentials, token: of the tests' channels to its services.
        """
        self.credentials, self.token = credentials, token
        self.prefix = tuple(prefix)
        self.may_fork = may_fork
        self.prepare = prepare
        self.path = path.resolve()
        self.data = self.path / "data"
        self.env = dict(env or {})
        self.services: list[ServiceProcess] = []
        self.expected_defects: set[str] = set()
        defaults = {"cancel_grace_s": 1.0, "orphan_grace_s": 0.5, "max_concurrent": 4}
        self.settings: dict[str, object] = {**defaults, **settings}
        self.engines = dict(engines)
        self.write_config()

    @property
    def config(self) -> Path:
        """The configuration file."""
        return self.path / "runrecovery.toml"

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.data / "runrecovery.db"

    def write_config(self, **settings: object) -> None:
        """Write the configuration (again), with some settings changed."""
        self.settings |= settings
        self.config.write_text(config_text(self.settings, self.engines), "utf-8")

    def spawn(self, *arguments: str, stderr: int | None = None) -> ServiceProcess:
        """Start the service and wait for nothing.

        Args:
            stderr: a descriptor to use instead of the log file.
        """
        log = self.path / f"service-{len(self.services)}.log"
        words = ["serve", "--config", str(self.config), "--data-dir", str(self.data)]
        words += ["--listen", "127.0.0.1:0", "--log-format", "json", *arguments]
        with log.open("wb") as output, Path(os.devnull).open("rb") as nothing:
            streams = (nothing.fileno(), output.fileno(), stderr or output.fileno())
            popen = self._spawn(words, streams)
        service = ServiceProcess(
            popen=popen, log=log, credentials=self.credentials, token=self.token
        )
        self.services.append(service)
        return service

    def _spawn(
        self, words: Sequence[str], streams: tuple[int, int, int]
    ) -> subprocess.Popen[bytes] | ForkedService:
        env = {**os.environ, **self.env}
        program = [] if self.prepare is None else [str(self.prepare)]
        if self.may_fork and not self.prefix and can_be_forked(self.env):
            self._lay_out_store(words)
            env[PREPARE] = str(self.prepare or "")
            return fork_service(words, cwd=self.path, env=env, streams=streams)
        stdin, stdout, stderr = streams
        return subprocess.Popen(
            [*self.prefix, sys.executable, *program, "-m", "runrecovery_service", *words],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            cwd=self.path,
            env=env,
            start_new_session=True,
        )

    def _lay_out_store(self, words: Sequence[str]) -> None:
        elsewhere = self.settings.get("database") or "--database" in words
        if not elsewhere and not self.data.exists():
            copy_migrated_store(self.data)

    def listen(self, *arguments: str) -> ServiceProcess:
        """Start the service and wait until its port answers."""
        service = self.spawn(*arguments)
        service.address = service.until_event("service.listening")["address"]
        return service

    def start(self, *arguments: str) -> tuple[ServiceProcess, Api]:
        """Start the service, wait until it is SERVING, and return it with a channel."""
        service = self.listen(*arguments)
        return service, service.until_serving()

    def seed(self, runs: int, *, mix: str = "", instance: str = "default") -> None:
        """Fill the store with live runs, as a service that was killed would leave them.

        Their engine, `seeded`, is not configured, so that their sessions are not looked for.
        """
        if not self.data.exists():
            copy_migrated_store(self.data)
        weights = mix_from_text(mix) if mix else DEFAULT_MIX
        seeding = Seeding(runs=runs, mix=weights, engine="seeded")
        seed_store("", self.data, seeding, instance=instance)

    def agents(self) -> list[int]:
        """Return the living processes whose working directory is below the runs' folder."""
        return processes_below(self.data / "runs")

    def agents_of(self, run_id: str) -> list[int]:
        """Return the living processes whose environment names the run."""
        return [
            pid for pid in self.agents() if environment_of(pid).get("RUNRECOVERY_RUN_ID") == run_id
        ]

    def watermark_of(self, run_id: str) -> int:
        """Return the watermark of a run's latest launch."""
        ((watermark,),) = self.rows(
            "SELECT l.watermark FROM process_lease l JOIN run r ON r.id = l.run"
            " WHERE r.run_id = ? ORDER BY l.id DESC LIMIT 1",
            run_id,
        )
        return int(watermark)

    def shims(self) -> list[ProcessIdentity]:
        """Return the living shims of all launch records."""
        return self._shims(self.rows(SHIMS) if self.database.exists() else [])

    def shims_of(self, run_id: str) -> list[ProcessIdentity]:
        """Return the living shims of one run's launch records."""
        return self._shims(self.rows(f"{SHIMS} AND r.run_id = ?", run_id))

    @staticmethod
    def _shims(rows: list[tuple[int, int]]) -> list[ProcessIdentity]:
        return [shim for shim in (ProcessIdentity(*row) for row in rows) if is_alive(shim)]

    def kill_with_shims(self, service: ServiceProcess) -> None:
        """Kill a service and its shims together, so that their agents stay as orphans."""
        # A shim may end by itself before a signal reaches it.
        shims = [shim for shim in self.shims() if send_signal_if_alive(shim, signal.SIGSTOP)]
        until(
            lambda: all(is_stopped(shim) or not is_alive(shim) for shim in shims),
            "the shims are stopped",
        )
        service.kill()
        for shim in shims:
            send_signal_if_alive(shim, signal.SIGKILL)
        until(lambda: not self.shims(), "the shims are dead")

    @contextmanager
    def store(self, *, writable: bool = False) -> Iterator[sqlite3.Connection]:
        """Open the SQLite file while a service may use it, by default to read only."""
        mode = "rw" if writable else "ro"
        connection = sqlite3.connect(f"file:{self.database}?mode={mode}", uri=True, timeout=5.0)
        with closing(connection):
            yield connection
            if writable:
                connection.commit()

    def rows(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        with self.store() as connection:
            return connection.execute(sql, values).fetchall()

    def logs(self) -> str:
        """Return the logs of all services of this home."""
        return "".join(service.text for service in self.services)

    def defects(self) -> list[str]:
        """Return the defects that services of this home have logged, each with its event."""
        events = (event for service in self.services for event in service.events())
        return [f"{name} in {event['event']}" for event in events if (name := defect_in(event))]

    def clear(self) -> list[int]:
        """Kill the services and every process below this folder; return the pids of the latter.

        Fail if a service has logged a defect that is not in `expected_defects`.
        """
        for service in self.services:
            if service.popen.poll() is None:
                service.popen.kill()
            service.popen.wait()
            service.close()
        with suppress(sqlite3.DatabaseError):  # a test replaced the file by something else
            for shim in self.shims():  # a stopped shim would stay
                send_signal_if_alive(shim, signal.SIGKILL)
        left: list[int] = []
        while ended := kill_below(self.path):
            left += ended
            until(partial(are_dead, ended), "the processes are dead")
        assert [one for one in self.defects() if one.split()[0] not in self.expected_defects] == []
        return left

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()
