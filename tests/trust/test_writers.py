"""Several programs edit one file at a time, and some of them are killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from runrecovery_service.trust import claude, codex, files
from runrecovery_service.trust.entry import Edit, Editor
from trust.cases import KINDS

EDITING = Path(__file__).with_name("editing.py")
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts programs of editing.py; kills those that still live at the end."""
    started: list[subprocess.Popen[str]] = []

    def make(*words: str | Path) -> subprocess.Popen[str]:
        program = subprocess.Popen(
            [sys.executable, str(EDITING), *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(program)
        return program

    yield make
    for program in started:
        with program:
            program.kill()


def _write_line(program: subprocess.Popen[str], line: str) -> None:
    assert program.stdin is not None
    program.stdin.write(f"{line}\n")
    program.stdin.flush()


def _read_line(program: subprocess.Popen[str]) -> str:
    assert program.stdout is not None
    return program.stdout.readline().strip()


def _temporary(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("kind", KINDS)
def test_no_edit_of_one_thread_is_lost_to_another(tmp_path: Path, kind: str) -> None:
    path, editor = tmp_path / "config", KINDS[kind].editor
    folders = [f"/w/{i}" for i in range(24)]

    def add(folder: str) -> Edit:
        return files.edit(path, lambda text: editor.add(text, folder))

    with ThreadPoolExecutor(8) as pool:
        edits = list(pool.map(add, folders))
    assert [KINDS[kind].at(path.read_bytes(), each) for each in folders] == [
        KINDS[kind].value for _ in folders
    ]

    def remove(index: int) -> object:
        added = edits[index].added
        return files.edit(path, lambda text: editor.remove(text, folders[index], added))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(remove, range(len(folders))))
    left = [KINDS[kind].at(path.read_bytes(), each) for each in folders] if path.exists() else []
    assert left in ([], ["absent" for _ in folders])


def _let_the_cli_write_between(
    writer: subprocess.Popen[str], cli: subprocess.Popen[str], turn: threading.Lock
) -> int:
    """Have the CLI rewrite the file between the decision and the write of each edit."""
    writes = 0
    while _read_line(writer):
        with turn:
            _write_line(cli, "write")
            writes += _read_line(cli) == "written"
        _write_line(writer, "go on")
    return writes


def test_two_services_and_a_cli_that_rewrites_the_file_lose_no_entry(
    tmp_path: Path, start: Start
) -> None:
    path = tmp_path / ".claude.json"
    path.write_text('{"count": 0, "mine": [1.50, "\\u00e9"], "projects": {"/mine": {}}}')
    names = {who: [f"/{who}/{i}" for i in range(15)] for who in ("a", "b")}
    cli = start("cli", path)
    writers = [start("add", path, "claude", *folders) for folders in names.values()]
    turn = threading.Lock()

    with ThreadPoolExecutor(2) as pool:
        writes = sum(pool.map(lambda each: _let_the_cli_write_between(each, cli, turn), writers))

    assert [writer.wait() for writer in writers] == [0, 0]
    document = json.loads(path.read_bytes())
    trusted = {"hasTrustDialogAccepted": True}
    wanted = {folder: trusted for folders in names.values() for folder in folders}
    assert (writes, document["count"]) == (30, 30)
    assert document["projects"] == {"/mine": {}} | wanted
    assert document["mine"] == [1.5, "é"]
    assert _temporary(tmp_path) == []


def test_a_cli_that_writes_at_any_time_never_reads_a_half_written_file(
    tmp_path: Path, start: Start
) -> None:
    path = tmp_path / ".claude.json"
    path.write_text('{"mine": "' + "x" * 100_000 + '"}')
    toggling = [start("toggle", path, "claude", f"/w/{who}") for who in "ab"]
    cli = start("cli", path)

    # An entry of one program may be lost to the replacement by another. The user's text may not.
    for _ in range(100):
        _write_line(cli, "write")
        assert _read_line(cli) == "written"
    assert {_read_line(each) for each in toggling} == {"added"}
    assert json.loads(path.read_bytes())["mine"] == "x" * 100_000


BEFORE = {
    "codex": b'# mine\r\na = 1\r\n[projects."/mine"]\r\ntrust_level = "untrusted"',
    "claude": b'{\n  "mine": 1.50\n}\n',
}
EDITORS: dict[str, Editor] = {"codex": codex.EDITOR, "claude": claude.EDITOR}


@pytest.mark.parametrize("before", [b"there", None], ids=["file", "no file"])
@pytest.mark.parametrize("kind", BEFORE)
def test_a_kill_at_any_step_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, start: Start, kind: str, before: bytes | None
) -> None:
    old = before and BEFORE[kind]
    new = EDITORS[kind].add(old, "/w").text
    states: list[bytes | None] = []
    step, ended = 0, "-9"
    path = tmp_path / "home" / "config"
    program = start("dying", path, kind, "/w")

    while ended == "-9":
        step += 1
        path.parent.mkdir()
        if old is not None:
            path.write_bytes(old)
        _write_line(program, str(step))
        ended = _read_line(program)
        states.append(path.read_bytes() if path.exists() else None)

        # Whatever the killed edit has left, the next edit succeeds and removes it.
        files.edit(path, lambda text: EDITORS[kind].add(text, "/w"))
        assert path.read_bytes() == new
        assert _temporary(path.parent) == []
        shutil.rmtree(path.parent)

    done = states.index(new)
    assert ended == "0"
    assert states[:done] == [old] * done
    assert states[done:] == [new] * (len(states) - done)
    assert 5 < done < len(states)  # the kills were before and after the replacement


@pytest.mark.parametrize("kind", BEFORE)
def test_a_kill_at_a_random_moment_leaves_the_old_file_or_the_new_one(
    tmp_path: Path, start: Start, kind: str
) -> None:
    path = tmp_path / "config"
    old = BEFORE[kind]
    new = EDITORS[kind].add(old, "/w").text

    for edits in range(1, 16):
        path.write_bytes(old)
        program = start("toggle", path, kind, "/w")
        assert all(_read_line(program) for _ in range(edits))
        program.kill()
        program.wait()

        assert path.read_bytes() in {old, new}


def _parsed(kind: str, data: bytes) -> object:
    return tomllib.loads(data.decode()) if kind == "codex" else json.loads(data)


@pytest.mark.parametrize("kind", BEFORE)
def test_a_reader_never_reads_a_half_written_file(tmp_path: Path, start: Start, kind: str) -> None:
    path = tmp_path / "config"
    path.write_bytes(BEFORE[kind])
    program = start("toggle", path, kind, "/w")
    listening = threading.Thread(target=lambda: [_read_line(program) for _ in range(60)])

    listening.start()
    seen = set()
    while listening.is_alive():
        seen.add(path.read_bytes())
    listening.join()

    assert seen == {BEFORE[kind], EDITORS[kind].add(BEFORE[kind], "/w").text}
    assert all(_parsed(kind, each) for each in seen)
