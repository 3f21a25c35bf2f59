"""A service closes everything that it has opened before it ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.service import Home

NewHome = Callable[..., Home]
WARN = {"PYTHONWARNINGS": "always::ResourceWarning"}


@pytest.mark.parametrize("stop", ["stop", "kill"])
def test_a_service_closes_every_connection_file_and_socket(
    new_home: NewHome, new_database_url: Callable[[], str], stop: str
) -> None:
    home = new_home(env=WARN, database=new_database_url())
    service, api = home.start()
    asked = api.create("resumable", {"questions": [{"kind": "confirm", "prompt": "Go on?"}]})
    api.create("resumable", {"hold": True})
    sticky = api.create("sticky", {"questions": [{"kind": "confirm", "prompt": "Go on?"}]})
    for run in (asked, sticky):
        api.until_status(run.run_id, "WAITING_USER")
    api.reply(asked.run_id, 1, "yes")
    api.until_ended(asked.run_id)

    if stop == "kill":  # what the next start opens in its recovery
        service.kill()
        service, api = home.start()
    code = service.stop()

    assert code == 0
    assert "ResourceWarning" not in service.text
