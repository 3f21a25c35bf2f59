"""A disk with little room stops launches and new runs, and nothing else, until there is room."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator

import grpc
import pytest
from support.api import refused, status_word
from support.service import Home

MIB = 1024**2
QUESTION = {"kind": "open_text", "prompt": "What next?"}
NewHome = Callable[..., Home]


@pytest.fixture
def home(new_home: NewHome) -> Iterator[Home]:
    """A home with its data on a file system of 64 MiB, where mounting is permitted."""
    made = new_home(min_free_bytes="32M")
    place = made.data
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield made
    made.clear()
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_run_waits_for_room_and_replies_and_cancels_do_not(home: Home) -> None:
    service, api = home.start()
    asked, unwanted = (api.create("resumable", {"questions": [QUESTION]}).run_id for _ in range(2))
    for run_id in (asked, unwanted):
        api.until_status(run_id, "WAITING_USER")
    ballast = home.data / "ballast"
    ballast.write_bytes(bytes(40 * MIB))
    service.until_event("service.disk_low")

    refusal = refused(lambda: api.create("resumable"))
    api.cancel(unwanted)
    api.reply(asked, 1, "yes")

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
    assert status_word(api.get(unwanted)) == "CANCELED"
    assert status_word(api.get(asked)) == "QUEUED"
    assert api.health_of() == "SERVING"

    ballast.unlink()

    service.until_event("service.disk_has_room")
    assert status_word(api.until_ended(asked)) == "SUCCEEDED"
    assert api.create("resumable").run_id
