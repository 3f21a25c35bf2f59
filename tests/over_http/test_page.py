"""The lines of docs/http.md, README.md and docs/api.md, typed with the real curl and buf."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from support.api import Api
from support.engines import REPOSITORY, RESUMABLE
from support.http_api import HttpApi
from support.pages import code_blocks
from support.service import Home

TIMEOUT_S: Final = 60.0
ADDRESS: Final = "127.0.0.1:8080"
GRPC_LINE: Final = re.compile(
    r"^buf curl --protocol grpc .* -d ('.*') http://[^/]*(/runrecovery\S+)$", re.MULTILINE
)
"""The example of a call on docs/api.md: its message and its path."""
STREAMS: Final = ("WatchRun", "StreamOutput", "WatchRecovered")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    path = tmp_path_factory.mktemp("http-page")
    with Home(path, engines={"demo": RESUMABLE}, http_listen="127.0.0.1:0") as home:
        yield home


def demand(*programs: str) -> None:
    """Skip the test, naming what this machine lacks."""
    lacking = [name for name in programs if shutil.which(name) is None]
    if lacking:
        pytest.skip(f"not on this machine: {', '.join(lacking)}")


def typed(lines: str, http: HttpApi) -> str:
    """Type lines into a shell in the folder of the repository; return what they print."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", lines.replace(ADDRESS, http.address)],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path, "no_proxy": "127.0.0.1"},
        timeout=TIMEOUT_S,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, f"{lines}: {ended.stdout}\n{ended.stderr}"
    return ended.stdout


def test_the_lines_of_the_page_create_answer_list_and_read_a_run(http: HttpApi, api: Api) -> None:
    demand("curl", "jq")
    _, first, by_get, by_buf, _ = code_blocks("docs/http.md")
    variables = first.splitlines()[0]

    printed = typed(first, http)
    api.until_ended("by-curl")
    read = [json.loads(typed(f"{variables}\n{line}", http)) for line in (by_get, by_buf)]

    assert '"prompt": "Ship it?"' in printed
    assert "by-curl" in printed.splitlines()
    assert [found["run"]["output"] for found in read] == [{"answers": ["yes"]}] * 2


@pytest.mark.parametrize(("page", "run_id"), [("README.md", "first"), ("docs/api.md", "nightly-7")])
def test_the_line_of_another_page_reads_a_run(http: HttpApi, page: str, run_id: str) -> None:
    demand("curl")
    # It exists already if the test of the examples came first.
    http.post("/runrecovery.v1.RunService/CreateRun", {"engine": "demo", "runId": run_id})
    (line,) = re.findall(
        rf"curl -sS -H 'Content-Type.*{ADDRESS}/[\w./]*", (REPOSITORY / page).read_text("utf-8")
    )

    assert json.loads(typed(line, http))["run"]["runId"] == run_id


def test_the_message_of_every_example_is_understood_over_http(http: HttpApi) -> None:
    page = (REPOSITORY / "docs" / "api.md").read_text("utf-8")
    examples = [
        (method, *shlex.split(message))
        for message, method in GRPC_LINE.findall(page)
        if not method.endswith(STREAMS)
    ]

    replies = [(method, http.post(method, message)) for method, message in examples]

    # A run in the state that a call needs is not there for each: a reason shows that the message
    # was understood.
    assert [
        (method, reply.body)
        for method, reply in replies
        if reply.status != 200 and not reply.reason
    ] == []
    assert len(examples) >= 15
