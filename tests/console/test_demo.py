"""`make console` and `make screenshots`: real services, a real kill, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import pytest
from support.browser import chromium_path
from support.engines import REPOSITORY
from support.waiting import patience_s, until


@pytest.fixture
def playing(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`make console`, with temporary files below the folder of the test."""
    player = subprocess.Popen(
        [sys.executable, "-m", "demo.console"],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert player.stdout is not None
    with player, player.stdout:
        yield player
        player.kill()


def read_until(player: subprocess.Popen[str], pattern: str) -> str:
    """Read what it prints up to a line that matches; return the first group."""
    assert player.stdout is not None
    for line in player.stdout:
        if found := re.search(pattern, line):
            return found[1]
    raise AssertionError(f"it ended without {pattern}")


def is_answering(url: str) -> bool:
    """Return whether a page can be opened."""
    with suppress(OSError, HTTPException), urlopen(url, timeout=5) as response:  # noqa: S310
        return bool(response.status == 200)
    return False


def test_the_console_to_play_with_comes_back_after_a_kill_and_leaves_nothing(
    playing: subprocess.Popen[str], tmp_path: Path
) -> None:
    url = read_until(playing, r"(http://127\.0\.0\.1:\d+/)")
    pid = int(read_until(playing, r"kill -9 (\d+)"))
    with urlopen(url, timeout=patience_s()) as response:  # noqa: S310 - http, as printed
        page = response.read().decode()

    os.kill(pid, signal.SIGKILL)
    read_until(playing, r"it is back: pid (\d+)")
    until(lambda: is_answering(url), "the console is back")
    playing.send_signal(signal.SIGINT)

    assert playing.wait(patience_s()) == 0
    assert page.count('<article class="card ask"') == 5
    assert list(tmp_path.iterdir()) == []
    assert not is_answering(url)


def test_the_pictures_are_taken(tmp_path: Path) -> None:
    if chromium_path() is None:
        pytest.skip("no Chromium on this machine")

    taken = subprocess.run(
        [sys.executable, "-m", "demo.screenshots", str(tmp_path / "images")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert (taken.returncode, taken.stderr) == (0, "")
    names = ("plan", "report", "run", "waiting")
    assert sorted(tmp_path.rglob("*.png")) == [
        tmp_path / "images" / f"console-{name}.png" for name in names
    ]
