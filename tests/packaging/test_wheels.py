"""The two wheels, as a user gets them. Needs a package index: `make packaging`, not `make test`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engines import REPOSITORY, demo_command
from support.engines import EngineSpec as Engine
from support.service import Home

pytestmark = pytest.mark.timeout(300)


def build(project: Path, destination: Path) -> Path:
    """Build the wheel of a project, from a copy: nothing is left in the tree."""
    copy = destination / project.name
    ignored = shutil.ignore_patterns(".git", ".venv*", "runrecovery-data", "__pycache__")
    shutil.copytree(project, copy, ignore=ignored)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(destination)]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    shutil.rmtree(copy)
    return next(destination.glob("*.whl"))


@pytest.fixture(scope="module")
def client_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(REPOSITORY / "client", tmp_path_factory.mktemp("client"))


@pytest.fixture(scope="module")
def service_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(REPOSITORY, tmp_path_factory.mktemp("service"))


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def clean_environment(place: Path, *, lock: str, wheel: Path) -> Path:
    """Make an environment with what a lock names and the wheel; return its Python."""
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet"]
    locked = REPOSITORY / "requirements" / lock
    subprocess.run([*pip, "--require-hashes", "-r", str(locked)], check=True, capture_output=True)
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True, capture_output=True)
    return python


def blocks(heading: str) -> list[str]:
    """Return the Python blocks below a heading of the client's README."""
    text = (REPOSITORY / "client" / "README.md").read_text("utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real service with the engine that the README speaks of."""
    asking = Engine(command=(sys.executable, "-c", ASKING_AGENT, *demo_command("resumable")))
    with Home(tmp_path_factory.mktemp("served"), engines={"demo": asking}) as home:
        process, _ = home.start()
        yield process.address


ASKING_AGENT = """
import json, subprocess, sys
start = json.loads(sys.stdin.readline())
start["input"]["questions"] = [{"kind": "confirm", "prompt": "Go on?"}]
done = subprocess.run(sys.argv[1:], input=json.dumps(start).encode() + b"\\n")
sys.exit(done.returncode)
"""


WATCHING_BY_ASYNCIO = """
import asyncio
from runrecovery import AsyncRunRecoveryClient, RunEventKind, RunStatus

async def main():
    async with AsyncRunRecoveryClient("127.0.0.1:50051") as client:
        newest = await anext(client.runs.list())
        async for update in client.runs.watch(newest.run_id, after_sequence=0):
            event = update.event
            print(update.sequence, RunEventKind.Name(event.kind), RunStatus.Name(event.status))

asyncio.run(main())
"""


def test_the_client_wheel_holds_the_client_and_nothing_else(client_wheel: Path) -> None:
    names = names_in(client_wheel)

    assert {name.split("/")[0] for name in names} == {"runrecovery"}
    assert {"runrecovery/py.typed", "runrecovery/v1/run_pb2.pyi"} <= names


def test_the_service_wheel_holds_the_service_and_its_migrations(service_wheel: Path) -> None:
    names = names_in(service_wheel)

    assert {name.split("/")[0] for name in names} == {"runrecovery_service"}
    assert "runrecovery_service/storage/migrations/0001_initial.py" in names
    assert "runrecovery_service/rpc/contract.binpb" in names


@pytest.mark.parametrize("lock", ["client-floor.txt", "client-latest.txt"])
def test_the_client_wheel_alone_runs_the_quick_start_and_watches(
    client_wheel: Path, service: str, tmp_path: Path, lock: str
) -> None:
    python = clean_environment(tmp_path / "clean", lock=lock, wheel=client_wheel)
    printed = []
    for block in [*blocks("Quick start"), *blocks("Watching"), WATCHING_BY_ASYNCIO]:
        code = block.replace("127.0.0.1:50051", service)
        done = subprocess.run(
            [str(python), "-I", "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)

    assert "Go on?\nRUN_STATUS_SUCCEEDED" in printed[0]
    _, _, watched, decisions, watched_by_asyncio = printed
    assert watched.splitlines()[0] == "1 RUN_EVENT_KIND_CREATED RUN_STATUS_QUEUED"
    assert "RUN_EVENT_KIND_ASKED RUN_STATUS_WAITING_USER" in watched
    assert watched.splitlines()[-1].endswith("RUN_EVENT_KIND_SUCCEEDED RUN_STATUS_SUCCEEDED")
    assert decisions.split() == ["bookmark"]
    assert watched_by_asyncio == watched
