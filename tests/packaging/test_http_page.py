"""The code of docs/http.md for browsers, taken from the page and run by Node and by Chromium.

`make packaging` installs the npm packages. What a machine lacks is skipped by name.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Self

import pytest
from support.engines import REPOSITORY, RESUMABLE
from support.http_api import http_address
from support.pages import code_blocks
from support.service import Home

NODE_MODULES = Path(os.environ.get("NODE_CLIENT", REPOSITORY / ".node-client")) / "node_modules"
PATIENCE_S = 120.0


EVENTS = ["CREATED", "STARTED", "ASKED", "ANSWERED", "STARTED", "SUCCEEDED"]
REFUSED = "no run has the id 'no-such-run'; retention may have removed it"
IMPORTS = {
    "@bufbuild/protobuf": "protobuf/dist/esm/index.js",
    "@bufbuild/protobuf/codegenv2": "protobuf/dist/esm/codegenv2/index.js",
    "@bufbuild/protobuf/wire": "protobuf/dist/esm/wire/index.js",
    "@bufbuild/protobuf/wkt": "protobuf/dist/esm/wkt/index.js",
    "@connectrpc/connect": "connect/dist/esm/index.js",
    "@connectrpc/connect/protocol": "connect/dist/esm/protocol/index.js",
    "@connectrpc/connect/protocol-connect": "connect/dist/esm/protocol-connect/index.js",
    "@connectrpc/connect/protocol-grpc-web": "connect/dist/esm/protocol-grpc-web/index.js",
    "@connectrpc/connect-web": "connect-web/dist/esm/index.js",
}
"""What a bundler would resolve: files of each package, below the folder of its scope."""
BROWSER_PAGE = """<!doctype html><meta charset="utf-8">
<script type="importmap">%s</script>
<script type="module">
const printed = [];
console.log = (line) => printed.push(line);
try { await import("./main.js"); } catch (error) { printed.push(`failed: ${error}`); }
await fetch("/printed", { method: "POST", body: printed.join("\\n") });
</script>
"""


class Site(ThreadingHTTPServer):
    """Serves a folder at an origin of its own, and receives what its page has printed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(SiteHandler, directory=str(folder)))
        self.origin = f"http://127.0.0.1:{self.server_port}"
        self.printed: Queue[str] = Queue()

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()  # waits for the threads of its requests


class SiteHandler(SimpleHTTPRequestHandler):
    """Handles one request to a `Site`."""

    def do_POST(self) -> None:
        """Receive what the page has printed."""
        assert isinstance(self.server, Site)
        size = int(self.headers["Content-Length"])
        self.server.printed.put(self.rfile.read(size).decode())
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its signature
        """Log nothing."""


@contextmanager
def service_of(folder: Path, *, origins: Sequence[str] = ()) -> Iterator[str]:
    """Start a service with the engine `demo`; the context has its HTTP address."""
    folder.mkdir()
    listen, engines = "127.0.0.1:0", {"demo": RESUMABLE}
    with Home(folder, engines=engines, http_listen=listen, http_origins=list(origins)) as home:
        service, _ = home.start()
        yield http_address(service)


def run(words: list[str], cwd: Path) -> str:
    """Run a program that must succeed, and return what it printed."""
    path = f"{NODE_MODULES / '.bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=PATIENCE_S,
        env={**os.environ, "PATH": path},
    )
    assert ended.returncode == 0, f"{words}: {ended.stdout}\n{ended.stderr}"
    return ended.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the generated messages, as the page says."""
    if shutil.which("node") is None or not (NODE_MODULES / "@connectrpc").exists():
        pytest.skip("not on this machine: node, @connectrpc/connect-web")
    made = tmp_path / "project"
    made.mkdir()
    (made / "proto").symlink_to(REPOSITORY / "proto")
    (made / "node_modules").symlink_to(NODE_MODULES)
    run(["bash", "-euc", code_blocks("docs/http.md")[-1]], made)
    (made / "package.json").write_text('{"type": "module"}', "utf-8")
    return made


def write_code(project: Path, address: str) -> None:
    (code,) = code_blocks("docs/http.md", language="js")
    assert code.count("127.0.0.1:8080") == 1
    (project / "main.js").write_text(code.replace("127.0.0.1:8080", address), "utf-8")


def printed_in_chromium(site: Site, profile: Path) -> list[str]:
    """Open the page of a site in Chromium, and return the lines that the page prints."""
    words = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu"]
    nothing = subprocess.DEVNULL
    browser = subprocess.Popen(
        [*words, f"--user-data-dir={profile}", f"{site.origin}/"], stdout=nothing, stderr=nothing
    )
    try:
        return site.printed.get(timeout=PATIENCE_S).splitlines()
    finally:
        browser.terminate()
        browser.wait(PATIENCE_S)


def test_the_code_for_browsers_creates_watches_and_answers_a_run(
    project: Path, tmp_path: Path
) -> None:
    with service_of(tmp_path / "home") as address:
        write_code(project, address)

        *events, refused = run(["node", "main.js"], project).splitlines()

    assert [line.split()[1] for line in events] == EVENTS
    assert refused == REFUSED


def test_a_browser_lets_pages_of_named_origins_call_and_no_others(
    project: Path, tmp_path: Path
) -> None:
    if shutil.which("chromium") is None:
        pytest.skip("not on this machine: chromium")
    imports = {
        name: f"/node_modules/{name.partition('/')[0]}/{file}" for name, file in IMPORTS.items()
    }
    page = BROWSER_PAGE % json.dumps({"imports": imports})
    (project / "index.html").write_text(page, "utf-8")
    with (
        Site(project) as named,
        Site(project) as other,
        service_of(tmp_path / "home", origins=[named.origin]) as address,
    ):
        write_code(project, address)

        *events, refused = printed_in_chromium(named, tmp_path / "named")
        kept_out = printed_in_chromium(other, tmp_path / "other")

    assert [line.split()[1] for line in events] == EVENTS
    assert refused == REFUSED
    assert kept_out == ["failed: ConnectError: [unknown] Failed to fetch"]
