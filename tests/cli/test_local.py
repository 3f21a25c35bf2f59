"""Commands on this machine: serve, check, migrate, backup, demo."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from runrecovery_service.cli import local
from runrecovery_service.cli.exit_codes import ExitCode
from runrecovery_service.domain import start_errors
from runrecovery_service.domain.errors import Fenced
from support.processes import processes_below
from support.waiting import until

from .conftest import Run

START_ERRORS = {
    ExitCode.HELD: start_errors.Held("data directory /d", "pid 7"),
    ExitCode.STORAGE: start_errors.DatabaseRefused("/d/x.db", "is not one of ours"),
    ExitCode.RECOVERY: start_errors.RecoveryGaveUp(5, "StorageFull"),
    ExitCode.FENCED: Fenced("instance 'a'"),
}


@pytest.mark.parametrize("command", [["serve"], ["check"], ["migrate"], ["backup", "copy.db"]])
def test_all_problems_of_a_refused_configuration_are_reported(run: Run, command: list[str]) -> None:
    Path("runrecovery.toml").write_text("max_queued = 0\nlistn = 1", encoding="utf-8")

    ended = run(*command, "--instance", "Not This")

    assert ended.code == ExitCode.USAGE
    assert ended.out == ""
    for place in ("runrecovery.toml: max_queued", "runrecovery.toml: listn", "flag --instance"):
        assert f"\n  {place}: " in ended.err


def test_a_refusal_prints_no_control_characters(run: Run) -> None:
    Path("runrecovery.toml").write_text(r'instance = "\u001b[2Jx"', encoding="utf-8")

    ended = run("check")

    assert ended.code == ExitCode.USAGE
    assert "\x1b" not in ended.err
    assert r"\x1b[2Jx" in ended.err


def test_an_endless_configuration_file_is_refused_with_the_size_limit(run: Run) -> None:
    ended = run("check", "--config", "/dev/zero")

    assert ended.code == ExitCode.USAGE
    assert "  /dev/zero: has more than 1048576 bytes\n" in ended.err


def test_a_byte_of_a_path_that_is_not_utf8_is_shown_as_that_byte(run: Run) -> None:
    ended = run("check", "--config", os.fsdecode(b"/nonexistent/a\xffb.toml"))

    assert ended.code == ExitCode.USAGE
    assert r"  /nonexistent/a\xffb.toml: No such file or directory" in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_gets_a_signal_leaves_no_process_and_no_file(
    tmp_path: Path, number: int
) -> None:
    command = [sys.executable, "-m", "runrecovery_service", "demo"]

    with subprocess.Popen(
        command, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL
    ) as process:
        until(lambda: len(processes_below(tmp_path)) > 1, "its service and an agent run")
        process.send_signal(number)

        assert process.wait(60) == 128 + number
    assert processes_below(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_demo_without_a_writable_folder_says_so(tmp_path: Path) -> None:
    code = "import tempfile, sys; tempfile.tempdir = sys.argv.pop(); "
    code += "from runrecovery_service.cli import main; main(['demo'])"

    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "none")],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert ended.returncode == ExitCode.FAILED
    assert ended.stderr.startswith("error: the demo cannot continue: ")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("code", START_ERRORS)
def test_a_refused_start_has_its_own_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, code: ExitCode
) -> None:
    from runrecovery_service import app

    def refuse(_settings: object, _load: object) -> None:
        raise START_ERRORS[code]

    monkeypatch.setattr(app, "serve", refuse)

    ended = run("serve")

    assert ended.code == code
    assert f"error: {START_ERRORS[code]}\n" in ended.err


def test_a_taken_port_has_its_own_exit_code_and_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "runrecovery_service", "serve", "--listen", listen]

        ended = subprocess.run(
            command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60
        )

    assert ended.returncode == ExitCode.LISTEN
    *log, error, hint = ended.stderr.splitlines()
    assert all(json.loads(line)["event"] for line in log)
    assert error == f"error: cannot listen on {listen}: Address already in use"
    assert hint == "hint: choose another address with --listen, or free this one"


def test_flags_reach_the_service(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from runrecovery_service import app

    taken: list[Any] = []
    monkeypatch.setattr(app, "serve", lambda settings, _load: taken.append(settings))

    assert (
        run("serve", "--listen", "127.0.0.1:0", "--data-dir", "d", "--log-level", "error").code == 0
    )
    assert [("127.0.0.1:0", Path("d"), "error")] == [
        (settings.listen, settings.data_dir, settings.log_level) for settings in taken
    ]


def test_every_start_error_that_is_mapped_is_a_start_error() -> None:
    assert all(
        issubclass(kind, start_errors.StartRefused | Fenced) for kind in local.START_EXIT_CODES
    )
    assert local.HINTS.keys() <= local.START_EXIT_CODES.keys()


def test_a_kind_of_error_that_is_not_listed_has_the_exit_code_of_its_parent(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runrecovery_service import app

    class DatabaseTooNew(start_errors.DatabaseRefused):
        pass

    def refuse(_settings: object, _load: object) -> None:
        raise DatabaseTooNew("/d/x.db", "was migrated by a newer version")

    monkeypatch.setattr(app, "serve", refuse)

    assert run("serve").code == 4


def test_every_error_that_ends_a_service_has_its_documented_exit_code() -> None:
    assert {kind.__name__: int(code) for kind, code in local.START_EXIT_CODES.items()} == {
        "CgroupRefused": 2,
        "PackagesMissing": 2,
        "TracesRefused": 2,
        "WebhooksRefused": 2,
        "TlsRefused": 2,
        "CallersRefused": 2,
        "Held": 3,
        "DatabaseRefused": 4,
        "StoreLost": 4,
        "DataDirRefused": 4,
        "OpenFilesRefused": 4,
        "ThreadsRefused": 4,
        "DatabaseOutOfReach": 6,
        "BackupRefused": 8,
        "RecoveryGaveUp": 9,
        "Fenced": 10,
        "ClaimLost": 10,
        "CommitsLost": 10,
        "RunGone": 10,
        "LeaseLost": 10,
        "ContainmentRefused": 11,
    }
