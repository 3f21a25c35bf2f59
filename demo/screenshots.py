"""Takes the pictures of docs/images: pages of the console. `make screenshots` runs it.

It needs a Chromium on this machine.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from playwright.sync_api import Page, sync_playwright
from runrecovery.v1 import run_pb2 as pb

from demo.console import Scene, playing_scene
from demo.console_scene import wait_for

IMAGES: Final = Path(__file__).resolve().parents[1] / "docs" / "images"
WIDTH: Final = 1080
ANSWERED: Final = "export-bug"


def main(arguments: Sequence[str]) -> int:
    """Write the pictures into a folder: docs/images, or the one that is named."""
    folder = Path(arguments[0]) if arguments else IMAGES
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium on this machine: apt install chromium")
    folder.mkdir(parents=True, exist_ok=True)
    with playing_scene(port=0) as scene, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(
            base_url=scene.url,
            viewport={"width": WIDTH, "height": 760},
            timezone_id="Europe/Berlin",
            locale="en-GB",
        )
        _take_pictures(page, scene, folder)
        browser.close()
    return 0


def _take_pictures(page: Page, scene: Scene, folder: Path) -> None:
    page.goto("/")
    _take(page, folder / "console-waiting.png", 760)
    page.goto("/plan")
    _take(page, folder / "console-plan.png", 640)
    page.goto("/restarts")
    page.locator("td.first a").first.click()
    page.wait_for_load_state()
    _take(page, folder / "console-report.png", 700)
    with scene.connect() as client:
        run = client.runs.get(ANSWERED)
        answer = "That is the case they mean. Please fix it."
        client.runs.reply(ANSWERED, run.pending_interaction.interaction_id, answer)
        wait_for(client, ANSWERED, pb.RUN_STATUS_SUCCEEDED)
    page.goto(f"/runs/{ANSWERED}")
    _take(page, folder / "console-run.png", 890)


def _take(page: Page, file: Path, height: int) -> None:
    """Take a picture of the upper part of a page, once its script has shown the times."""
    page.wait_for_function("!document.querySelector('time')?.textContent.includes('UTC')")
    page.screenshot(
        path=file, clip={"x": 0, "y": 0, "width": WIDTH, "height": height}, full_page=True
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
