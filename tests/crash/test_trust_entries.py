"""Agent CLIs trust the workspace of a run exactly while the run lives, over kills and stops.

Their files are otherwise unchanged.
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from runrecovery.v1 import recovery_pb2, run_pb2
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery_service.agents import trust_keeper as trust_keeper_module
from runrecovery_service.trust import files
from support.api import Api, status_word
from support.engines import RESUMABLE, STICKY, EngineSpec
from support.service import Home
from support.stores import change, key_of, lose_session, query
from support.waiting import until

NewHome = Callable[..., Home]

ASKS: Final = {"questions": [{"prompt": "Which?"}]}
HOLDS: Final = {"hold": True}
PATIENCE_S: Final = 20.0
FILES: Final = {
    "codex": "config.toml",
    "gemini": ".gemini/trustedFolders.json",
    "claude": ".claude.json",
}
HOMES: Final = {"codex": "CODEX_HOME", "gemini": "GEMINI_CLI_HOME", "claude": "CLAUDE_CONFIG_DIR"}
USERS: Final = {
    "codex": b'# mine\r\nmodel = "m"\n\n\n[projects."/mine"] # c\ntrust_level = "untrusted"',
    "gemini": b'{ "/mine": "DO_NOT_TRUST",\r\n\n  "/other" : "TRUST_PARENT" }',
    "claude": b'{"n": 1.50,\n\t"projects": {"/mine": {"hasTrustDialogAccepted": false}}, "n": 2}\n',
}
BROKEN: Final = b'model = "m"\n[projects."/mine"\nsecret = 1\n'


def trusting(engine: EngineSpec, cli: str, **more: object) -> EngineSpec:
    """Return the engine with the trust setting of a CLI."""
    own = {"trust": cli, "env_allow": ["PATH", HOMES[cli]]}
    return EngineSpec(
        command=engine.command, profile=engine.profile, more={**engine.more, **own, **more}
    )


class Trusted:
    """A home whose engines run a CLI, and the CLI's file."""

    def __init__(
        self, new_home: NewHome, folder: Path, cli: str = "codex", **settings: Any
    ) -> None:
        self.cli = cli
        self.file = folder / FILES[cli]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if not self.file.exists():
            self.file.write_bytes(USERS[cli])
        engines = {
            "resumable": trusting(RESUMABLE, cli),
            "sticky": trusting(STICKY, cli),
            "limited": trusting(RESUMABLE, cli, max_run_time_s=4.0),
            "lost": EngineSpec(
                command=RESUMABLE.command, more={"trust": cli, "env_allow": ["PATH"]}
            ),
        }
        env = {HOMES[cli]: str(folder)}
        self.home = new_home(engines=engines, env=env, **settings)

    @property
    def text(self) -> bytes:
        """The file."""
        return self.file.read_bytes()

    def workspace(self, run_id: str) -> str:
        """The workspace of a run's first attempt, which must be there."""
        (found,) = (self.home.data / "runs" / str(key_of(self.home, run_id))).glob("*/work*")
        return str(found)

    def trusts(self, run_id: str) -> bool:
        """Return whether the file trusts the workspace of the run."""
        sql = "SELECT folder FROM trust_entry WHERE run = ? AND removed_at IS NULL"
        rows = query(self.home, sql, key_of(self.home, run_id))
        return any(folder.encode() in self.text for (folder,) in rows)

    def until_as_before(self, text: bytes | None = None) -> None:
        """Wait until the file is as it was."""
        wanted = USERS[self.cli] if text is None else text
        until(lambda: self.text == wanted, f"the file is as it was, not {self.text!r}")

    def rows(self) -> int:
        """Return how many recorded entries are not known to be removed."""
        return len(query(self.home, "SELECT folder FROM trust_entry WHERE removed_at IS NULL"))


@pytest.fixture
def codex(new_home: NewHome, tmp_path: Path) -> Trusted:
    """A home whose engines run Codex."""
    return Trusted(new_home, tmp_path / "cli")


def waiting(api: Api, run_id: str, engine: str = "resumable") -> None:
    """Create a run that waits."""
    api.create(engine, ASKS, run_id=run_id)
    api.until_status(run_id, "WAITING_USER")


def holding(trusted: Trusted, api: Api, run_id: str) -> None:
    """Create a run that works."""
    api.create("resumable", HOLDS, run_id=run_id)
    until(lambda: trusted.home.agents_of(run_id), "the agent runs")


class Cli:
    """A program that rewrites its file on demand without a lock, like the CLIs."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._popen = popen

    def write(self) -> None:
        """Let the program write its next number into the file."""
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write("write\n")
        self._popen.stdin.flush()
        assert self._popen.stdout.readline() == "written\n"


@contextmanager
def running_cli(file: Path) -> Iterator[Cli]:
    """Run such a program until its input closes."""
    program = Path(__file__).parents[1] / "trust" / "editing.py"
    command = [sys.executable, str(program), "cli", str(file)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as popen:
        yield Cli(popen)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold the lock of the file, like another service that edits it."""
    with files.lock_file(file).open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# -- while it is alive, and no longer --------------------------------------------------------------


@pytest.mark.parametrize("cli", FILES)
@pytest.mark.parametrize("engine", ["resumable", "sticky"])
def test_a_workspace_is_trusted_while_its_run_waits_and_not_when_it_has_succeeded(
    new_home: NewHome, tmp_path: Path, cli: str, engine: str
) -> None:
    trusted = Trusted(new_home, tmp_path / "cli", cli)
    _, api = trusted.home.start()

    waiting(api, "r", engine)
    seen = trusted.trusts("r")
    api.reply("r", 1, "this")
    ended = api.until_ended("r")

    assert seen
    assert status_word(ended) == "SUCCEEDED"
    assert trusted.text == USERS[cli]
    assert trusted.rows() == 0


def test_the_entry_is_written_before_the_agent_starts(codex: Trusted) -> None:
    looks = (
        "import json, os, pathlib, sys\n"
        "sys.stdin.readline()\n"
        "text = pathlib.Path(os.environ['CODEX_HOME'], 'config.toml').read_text()\n"
        'found = f\'[projects."{os.getcwd()}"]\\ntrust_level = "trusted"\' in text\n'
        "print(json.dumps({'type': 'result', 'output': {'found': found}}), flush=True)\n"
    )
    command = (sys.executable, "-I", "-S", "-c", looks)
    codex.home.engines["looks"] = trusting(EngineSpec(command=command), "codex")
    codex.home.write_config()
    _, api = codex.home.start()

    api.create("looks", run_id="r")

    assert api.until_ended("r").output["found"] is True
    assert codex.text == USERS["codex"]


def test_a_workspace_is_not_trusted_after_its_run_failed(codex: Trusted) -> None:
    _, api = codex.home.start()

    api.create("resumable", {"fail": "exit3"}, run_id="r")

    assert api.until_ended("r").error.code == "ENGINE_FAILED"
    assert codex.text == USERS["codex"]
    until(lambda: "trust.entry_removed" in codex.home.logs(), "the removal is logged")


def test_a_workspace_is_not_trusted_after_its_running_run_was_canceled(codex: Trusted) -> None:
    _, api = codex.home.start()
    holding(codex, api, "r")
    assert codex.trusts("r")

    api.cancel("r")

    assert status_word(api.until_ended("r")) == "CANCELED"
    assert codex.text == USERS["codex"]


def test_a_workspace_is_soon_not_trusted_after_its_waiting_run_was_canceled(codex: Trusted) -> None:
    _, api = codex.home.start()
    waiting(api, "r")
    waiting(api, "other")
    both = codex.text

    api.cancel("r")

    until(lambda: codex.text != both, "the file is written")
    assert not codex.trusts("r")
    assert codex.trusts("other")
    api.cancel("other")
    codex.until_as_before()


def test_a_workspace_is_soon_not_trusted_after_its_waiting_run_timed_out(codex: Trusted) -> None:
    _, api = codex.home.start()
    waiting(api, "r", "limited")

    assert api.until_ended("r").error.code == "RUN_TIMEOUT"
    codex.until_as_before()
    until(lambda: codex.rows() == 0, "nor is it on record")


# -- restarts --------------------------------------------------------------------------------------


def test_a_restart_removes_entries_of_dead_runs_and_keeps_those_of_waiting_runs(
    new_database_url: Callable[[], str], new_home: NewHome, tmp_path: Path
) -> None:
    trusted = Trusted(new_home, tmp_path / "cli", database=new_database_url())
    service, api = trusted.home.start()
    waiting(api, "waits")
    kept = trusted.text
    holding(trusted, api, "works")
    folder = trusted.workspace("works")
    assert trusted.trusts("works")

    service.kill()
    _, api = trusted.home.start()

    assert trusted.text == kept
    assert status_word(api.get("waits")) == "WAITING_USER"
    report = api.status().reconciliation
    assert report.bindings.trust_entries == 1
    assert list(report.trust_removals) == [
        recovery_pb2.TrustRemoval(
            run_id="works", file=str(trusted.file), folder=folder, outcome="removed"
        )
    ]
    assert [phase.name for phase in report.phases][3:5] == ["bindings", "trust"]
    api.reply("waits", 1, "this")
    assert status_word(api.until_ended("waits")) == "SUCCEEDED"
    assert trusted.text == USERS["codex"]


def test_a_restart_without_runs_to_decide_removes_stale_entries(codex: Trusted) -> None:
    service, api = codex.home.start()
    waiting(api, "r")

    with locked(codex.file):  # so that the running service does not get at it
        api.cancel("r")
        service.kill()
    assert codex.trusts("r")
    _, api = codex.home.start()

    report = api.status().reconciliation
    assert (report.runs_scanned, report.bindings.trust_entries) == (0, 1)
    assert codex.text == USERS["codex"]


def test_a_planned_stop_removes_entries_of_the_runs_that_it_ends(codex: Trusted) -> None:
    service, api = codex.home.start()
    waiting(api, "waits")
    kept = codex.text
    holding(codex, api, "works")

    assert service.stop() == 0

    assert codex.text == kept
    _, api = codex.home.start()
    reports = api.recovery.ListReconciliations(
        recovery_pb.ListReconciliationsRequest(page_size=2), timeout=PATIENCE_S
    ).reconciliations
    assert [report.bindings.trust_entries for report in reports] == [0, 1]
    assert reports[1].trigger == recovery_pb2.RECONCILIATION_TRIGGER_SHUTDOWN


def test_only_the_new_workspace_of_a_restarted_run_is_trusted(codex: Trusted) -> None:
    service, api = codex.home.start()
    again = run_pb2.RESTART_POLICY_REQUEUE
    api.create("resumable", HOLDS, run_id="r", restart_policy=again)
    until(lambda: codex.home.agents_of("r"), "the agent runs")
    first = codex.text

    service.kill()
    _, api = codex.home.start()
    until(lambda: codex.home.agents_of("r") and api.get("r").attempt == 2, "it works again")

    until(lambda: codex.rows() == 1, "the first workspace is not trusted any more")
    assert codex.trusts("r")
    assert codex.text != first
    api.cancel("r")
    api.until_ended("r")
    assert codex.text == USERS["codex"]


def test_a_reopened_run_is_trusted_again_when_it_works(codex: Trusted) -> None:
    service, api = codex.home.start()
    waiting(api, "r")
    service.kill()
    lost = lose_session(codex.home, "r")
    _, api = codex.home.start()
    assert codex.text == USERS["codex"]
    for name, text in lost.items():
        Path(name).write_bytes(text)

    request = pb.ReopenRunRequest(run_id="r", keep_session=True)
    api.runs.ReopenRun(request, timeout=PATIENCE_S)
    api.reply("r", 1, "this")

    assert status_word(api.until_ended("r")) == "SUCCEEDED"
    assert codex.text == USERS["codex"]
    assert codex.home.logs().count("trust.entry_removed") == 2


# -- files that cannot be edited -------------------------------------------------------------------


def test_an_unparsable_file_is_left_unchanged_and_the_service_serves(codex: Trusted) -> None:
    service, api = codex.home.start()
    holding(codex, api, "r")
    with_entry = codex.text
    service.kill()
    codex.file.write_bytes(BROKEN)

    _, api = codex.home.start()

    assert api.health_of() == "SERVING"
    assert codex.text == BROKEN
    report = api.status().reconciliation
    assert report.state == recovery_pb2.RECONCILIATION_STATE_COMPLETED
    (warning,) = report.warnings
    assert warning.startswith(f"trust entries stay: {codex.file}: not_parsable")
    assert "secret" not in codex.home.logs()
    # A run in it cannot be launched, and says why; nothing of the file changes.
    api.create("resumable", run_id="next")
    failed = api.until_ended("next")
    assert failed.error.code == "LAUNCH_FAILED"
    assert f"codex cannot be made to trust the workspace: {codex.file}: not_parsable" in (
        failed.error.message
    )
    assert codex.text == BROKEN
    # It is tried again: once its user has mended it, the entry goes.
    until(lambda: "trust.entry_kept" in codex.home.services[-1].text, "the sweep tells")
    codex.file.write_bytes(with_entry)
    codex.until_as_before()
    assert codex.home.services[-1].text.count("trust.entry_kept") == 1


def test_a_file_that_is_not_mounted_at_a_start_is_cleared_once_it_is(codex: Trusted) -> None:
    service, api = codex.home.start()
    holding(codex, api, "r")
    service.kill()
    away = codex.file.parent.rename(codex.file.parent.with_name("away"))

    service, api = codex.home.start()

    (warning,) = api.status().reconciliation.warnings
    assert warning.startswith(f"trust entries stay: {codex.file}: entries stay recorded")
    assert not codex.file.parent.exists()
    assert codex.rows() == 1
    service.kill()
    away.rename(codex.file.parent)
    _, api = codex.home.start()
    assert codex.text == USERS["codex"]
    assert api.status().reconciliation.bindings.trust_entries == 1


def test_an_entry_that_a_cli_writes_back_after_the_end_is_removed_again(codex: Trusted) -> None:
    _, api = codex.home.start()
    waiting(api, "r")
    read = codex.text
    api.reply("r", 1, "this")
    api.until_ended("r")

    codex.file.write_bytes(b"# mine\n" + read)

    until(lambda: codex.text == b"# mine\n" + USERS["codex"], "it goes again")


def test_a_run_whose_cli_has_no_home_fails_and_says_so(codex: Trusted) -> None:
    _, api = codex.home.start()

    api.create("lost", run_id="r")

    failed = api.until_ended("r")
    assert failed.error.code == "LAUNCH_FAILED"
    assert "HOME is not an absolute path" in failed.error.message
    assert codex.text == USERS["codex"]


def test_a_failed_launch_leaves_no_entry(codex: Trusted) -> None:
    codex.home.engines["absent"] = trusting(EngineSpec(command=("/nowhere/to-be-found",)), "codex")
    codex.home.write_config()
    _, api = codex.home.start()

    api.create("absent", run_id="r")

    assert api.until_ended("r").error.code == "LAUNCH_FAILED"
    assert codex.text == USERS["codex"]
    assert "trust.entry_removed" in codex.home.logs()  # it had been there


def test_the_end_of_a_run_does_not_wait_forever_for_a_locked_file(codex: Trusted) -> None:
    _, api = codex.home.start()
    holding(codex, api, "r")

    with locked(codex.file):
        api.cancel("r")
        ended = api.until_ended("r")
        assert codex.trusts("r")

    assert status_word(ended) == "CANCELED"
    codex.until_as_before()


def launching(trusted: Trusted, api: Api, engine: str) -> None:
    """Create a run whose launch waits for the held lock."""
    api.create(engine, HOLDS, run_id="r")
    until(lambda: status_word(api.get("r")) == "RUNNING", "it is launched")


def test_a_launch_that_waits_for_the_file_ends_with_a_cancel(codex: Trusted) -> None:
    _, api = codex.home.start()
    waiting(api, "first")
    with_first = codex.text

    with locked(codex.file):
        launching(codex, api, "resumable")
        api.cancel("r")
        begun = time.monotonic()
        ended = api.until_ended("r")

    assert status_word(ended) == "CANCELED"
    assert time.monotonic() - begun < trust_keeper_module.ADD_LOCK_WAIT_S / 2
    assert codex.text == with_first


def test_a_launch_that_waits_for_the_file_ends_with_the_runs_time(codex: Trusted) -> None:
    _, api = codex.home.start()
    waiting(api, "first")

    with locked(codex.file):
        launching(codex, api, "limited")
        assert api.until_ended("r").error.code == "RUN_TIMEOUT"


def test_a_launch_that_waits_for_the_file_ends_with_a_stop(codex: Trusted) -> None:
    service, api = codex.home.start()
    waiting(api, "first")

    with locked(codex.file):
        launching(codex, api, "resumable")
        begun = time.monotonic()
        assert service.stop() == 0

    # The stop itself waits for the lock, once, to take out what it can.
    assert time.monotonic() - begun < trust_keeper_module.RESTART_LOCK_WAIT_S + 8.0


def test_a_launch_waits_for_the_file_and_says_so_once(codex: Trusted) -> None:
    _, api = codex.home.start()
    waiting(api, "first")

    with locked(codex.file):
        launching(codex, api, "resumable")
        until(lambda: "trust.lock_waited" in codex.home.logs(), "it is told")
        assert status_word(api.get("r")) == "RUNNING"
    until(lambda: codex.home.agents_of("r"), "the agent runs")

    assert codex.home.logs().count("trust.lock_waited") == 1
    assert codex.trusts("r")


def test_safe_mode_removes_stale_entries_too(codex: Trusted) -> None:
    service, api = codex.home.start()
    waiting(api, "r")
    service.kill()
    codex.home.write_config(safe_mode_after=1, recovery_tries=1)
    change(
        codex.home,
        "UPDATE reconciliation SET state = 'FAILED', error = 'x' WHERE state = 'COMPLETED'",
    )
    _, api = codex.home.start()
    assert api.status().reconciliation.safe_mode

    api.cancel("r")

    codex.until_as_before()


# -- with others -----------------------------------------------------------------------------------


def test_two_services_and_a_cli_write_one_file_and_lose_nothing(
    new_home: NewHome, tmp_path: Path, new_database_url: Callable[[], str]
) -> None:
    url = new_database_url()  # one store, or one for each
    places = [
        Trusted(new_home, tmp_path / "cli", "claude", database=url, instance=name)
        for name in ("a", "b")
    ]
    file = places[0].file
    file.write_text(json.dumps({"count": 0, "mine": [1.5, "é"], "projects": {"/mine": {}}}))
    apis = [place.home.start()[1] for place in places]
    turn = threading.Lock()

    def live(of: int, cli: Cli) -> list[str]:
        api, ends = apis[of], []
        for at in range(4):
            run_id = f"{of}-{at}"
            waiting(api, run_id)
            assert places[of].trusts(run_id)
            # What it writes right before our replacement would be lost; `tests/trust` tries that.
            with turn, locked(file):
                cli.write()
            api.cancel(run_id) if at % 2 else api.reply(run_id, 1, "this")
            ends.append(status_word(api.until_ended(run_id)))
        return ends

    with running_cli(file) as cli, ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(live, (0, 1), (cli, cli)))
    until(lambda: not any(place.rows() for place in places), "all is taken out")

    assert ends == [["SUCCEEDED", "CANCELED"] * 2] * 2
    assert json.loads(file.read_bytes()) == {
        "count": 8, "mine": [1.5, "é"], "projects": {"/mine": {}}
    }  # fmt: skip
    assert list(file.parent.glob("*.tmp")) == []
