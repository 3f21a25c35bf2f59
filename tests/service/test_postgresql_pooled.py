"""One service behind PgBouncer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.engines import script
from support.pgbouncer import PROGRAM, pooled, set_what_is_needed
from support.service import Home
from support.service_forker import run_command

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed")

ASKS = """
import json
input()
print(json.dumps({"type": "ask", "kind": "open_text", "prompt": "What?"}), flush=True)
input()
print(json.dumps({"type": "result", "output": {"done": True}}), flush=True)
"""
ENGINES = {"asks": script(ASKS, profile="sticky_process")}


def check(home: Home) -> tuple[int, str]:
    """Return the exit code and the output of `check`."""
    done = run_command("check", "--config", home.config, "--data-dir", home.data, cwd=home.path)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("pool_mode", "is_direct"),
    [("session", False), ("transaction", False), ("transaction", True)],
)
def test_a_service_works_and_recovers_behind_a_pooler_that_ignores_its_options(
    new_home: Callable[..., Home],
    postgresql_url: str,
    tmp_path: Path,
    pool_mode: str,
    *,
    is_direct: bool,
) -> None:
    set_what_is_needed(postgresql_url)
    settings = {"pool_mode": pool_mode, "ignore_startup_parameters": "options"}
    with pooled(postgresql_url, tmp_path, **settings) as url:
        direct = postgresql_url if is_direct else ""
        home = new_home(engines=ENGINES, database=url, database_direct=direct)
        service, api = home.start()
        answered, interrupted = api.create("asks"), api.create("asks")
        api.until_status(answered.run_id, "WAITING_USER")
        api.until_status(interrupted.run_id, "WAITING_USER")
        api.reply(answered.run_id, 1, "yes")
        api.until_status(answered.run_id, "SUCCEEDED")
        service.kill()
        service, api = home.start()

        error = api.get(interrupted.run_id).error.code
        code, said = check(home)
        assert service.stop() == 0

    assert error == "INTERACTION_PROCESS_LOST"
    assert (code, said) == (0, "no problem found\n")


def test_a_pooler_that_refuses_the_options_is_quoted(
    new_home: Callable[..., Home], postgresql_url: str, tmp_path: Path
) -> None:
    with pooled(postgresql_url, tmp_path) as url:
        home = new_home(database=url)
        service = home.spawn()

        assert service.exit_code() == 6
        code, said = check(home)

    assert code == 1
    for text in (service.text, said):
        assert "unsupported startup parameter" in text
        assert "Traceback" not in text


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("statement_timeout", "1min"),
        ("lock_timeout", "10s"),
        ("idle_in_transaction_session_timeout", "5s"),
    ],
)
def test_a_pooler_that_drops_the_options_is_refused_by_the_setting_that_is_missing(
    new_home: Callable[..., Home],
    postgresql_url: str,
    tmp_path: Path,
    setting: str,
    wanted: str,
) -> None:
    set_what_is_needed(postgresql_url, but=setting)
    settings = {"pool_mode": "transaction", "ignore_startup_parameters": "options"}
    with pooled(postgresql_url, tmp_path, **settings) as url:
        home = new_home(database=url)
        service = home.spawn()

        assert service.exit_code() == 4
        code, said = check(home)

    reason = (
        f"the PostgreSQL database: {setting} is 0, not {wanted}, although the connection"
        " sets it; behind a pooler, set it for the role"
    )
    assert code == 1
    assert reason in service.text
    assert reason in said
