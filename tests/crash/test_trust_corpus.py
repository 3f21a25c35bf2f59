"""Unusual files of agent CLIs are restored byte for byte after a launch, a crash and a restart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from runrecovery.v1 import run_pb2
from support.api import ENDED, Api
from support.engines import EngineSpec
from support.service import Home
from support.stores import query
from support.waiting import until
from trust.cases import KINDS
from trust.corpus import W
from trust.test_refusals import REFUSED

NewHome = Callable[..., Home]

FILES: Final = {
    "codex": "config.toml",
    "gemini": ".gemini/trustedFolders.json",
    "claude": ".claude.json",
}
MIB: Final = 1 << 20
LARGE: Final = {
    "codex": b"# " + b"x" * 97 + b"\n",
    "gemini": b'"/x/%06d": "TRUST_FOLDER",\n',
    "claude": b'"/x/%06d": {"lastCost": 1.50},\n',
}
WORKS: Final = ("/bin/sh", "-c", "exec sleep 60")
"""A CLI that says nothing: what it is called with goes nowhere."""


def large(cli: str) -> bytes:
    """Return a file of more than 1 MiB; `tests/trust` edits larger ones."""
    line = LARGE[cli]
    count = MIB // len(line) + 1
    if cli == "codex":
        return line * count + b'[projects."/x"]\ntrust_level = "trusted"\n'
    lines = b"".join(line % number for number in range(count)).removesuffix(b",\n")
    return b'{"projects": {%s}}' % lines if cli == "claude" else b"{%s}" % lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A file, its agent home, and whether the file can be edited."""

    name: str
    run_id: str
    file: Path
    before: bytes | None
    usable: bool

    @property
    def now(self) -> bytes | None:
        return self.file.read_bytes() if self.file.exists() else None


def cases(cli: str, folder: Path, workspace: Callable[[int], str]) -> list[Case]:
    """Write every file of the corpus; the folder in the file is the workspace of its run."""
    good = {**KINDS[cli].files, "large": large(cli)}
    bad = {
        f"unusable: {name}": text
        for kind, name, text, _ in REFUSED
        if kind == cli and name != "too large"
    }
    made = []
    for number, (name, text) in enumerate({**good, **bad}.items(), 1):
        home = folder / str(number)
        file = home / FILES[cli]
        file.parent.mkdir(parents=True)
        before = None if text is None else text.replace(W.encode(), workspace(number).encode())
        if before is not None and number % 3:
            file.write_bytes(before)
        elif before is not None:  # every third one is reached by a link
            (folder / f"linked-{number}").write_bytes(before)
            file.symlink_to(folder / f"linked-{number}")
        made.append(
            Case(name=name, run_id=f"r{number}", file=file, before=before, usable=name in good)
        )
    return made


@pytest.mark.parametrize("cli", KINDS)
def test_a_restart_after_a_crash_restores_every_file_byte_for_byte(
    new_home: NewHome, tmp_path: Path, cli: str
) -> None:
    data = (tmp_path / "home-0" / "data").resolve()
    corpus = cases(cli, tmp_path / "homes", lambda key: str(data / f"runs/{key}/1/workspace"))
    home = new_home(
        engines={
            case.run_id: EngineSpec(
                command=WORKS,
                more={"preset": cli, "agent_home": str(tmp_path / "homes" / case.run_id[1:])},
            )
            for case in corpus
        },
        max_concurrent=100,
    )
    service, api = home.start()
    for case in corpus:
        api.create(case.run_id, {"prompt": case.name}, run_id=case.run_id)
    until_settled(api, corpus)
    kind = KINDS[cli]
    trusted = {
        case.name: kind.at(case.now, str(data / f"runs/{case.run_id[1:]}/1/workspace"))
        for case in corpus
        if case.usable
    }
    ours = query(home, "SELECT count(*) FROM trust_entry WHERE added LIKE '[true%'")[0][0]
    service.kill()
    _, api = home.start()

    report = api.status().reconciliation
    assert set(trusted.values()) == {kind.value}
    # A start takes out what it can in its time; the sweep takes out the rest while it serves.
    until(lambda: all(case.now == case.before for case in corpus), "no byte of ours is left")
    assert all(case.file.is_symlink() for case in corpus[2::3] if case.before is not None)
    until(
        lambda: query(home, "SELECT 1 FROM trust_entry WHERE removed_at IS NULL") == [],
        "every entry is recorded as removed",
    )
    assert all(warning.startswith("trust entries stay: ") for warning in report.warnings)
    assert ours > 0
    assert report.warnings or report.bindings.trust_entries == ours
    codes = {case.name: api.get(case.run_id).error.code for case in corpus}
    assert codes == {
        case.name: "ORCHESTRATOR_RESTART_INTERRUPTED" if case.usable else "LAUNCH_FAILED"
        for case in corpus
    }


def until_settled(api: Api, corpus: list[Case]) -> None:
    """Wait until each run works or has been refused."""
    open_cases = list(corpus)

    def look() -> bool:
        open_cases[:] = [case for case in open_cases if not is_settled(api, case)]
        return not open_cases

    until(look, "each works or has been refused")


def is_settled(api: Api, case: Case) -> bool:
    """Return whether a run works or has ended."""
    run = api.get(case.run_id)
    if not case.usable:
        return run.status in ENDED
    assert run.status not in ENDED, f"{case.name}: {run.error}"
    return run.status == run_pb2.RUN_STATUS_RUNNING and trusted_by_now(case)


def trusted_by_now(case: Case) -> bool:
    """Return whether a file was changed, or mentions trust already."""
    needs_none = case.before is not None and b"trusted" in case.before.lower()
    return needs_none or case.now != case.before
