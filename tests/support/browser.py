"""A real Chromium for tests, and what they ask of a page."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES: Final = ("chromium", "chromium-browser", "google-chrome")
"""The commands of a Chromium, as distributions name it."""
AXE: Final = Path(axe_playwright_python.__file__).with_name("axe.min.js")
REBOUND: Final = "rebound.example"
"""A name of which the test's browser believes that it leads to this machine."""


def chromium_path() -> str | None:
    """Return the Chromium of this machine; None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def opened_browser() -> Iterator[Browser]:
    """Start the Chromium of this machine; skip the test if there is none."""
    path = chromium_path()
    if path is None:
        pytest.skip(f"no Chromium on this machine: {', '.join(NAMES)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            # Tests run as root in containers, where Chromium has no sandbox.
            args=["--no-sandbox", f"--host-resolver-rules=MAP {REBOUND} 127.0.0.1"],
        )
        try:
            yield browser
        finally:
            browser.close()


def accessibility_problems(page: Page) -> list[str]:
    """Return what axe-core finds wrong with a page."""
    page.evaluate(AXE.read_text("utf-8"))
    found: dict[str, Any] = page.evaluate("axe.run()")
    return [
        f"{problem['id']}: {node['html'][:200]}"
        for problem in found["violations"]
        for node in problem["nodes"]
    ]


def free_port() -> int:
    """Return a port that is free now, for a service that must come back at the same one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
