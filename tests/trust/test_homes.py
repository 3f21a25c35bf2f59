"""Where the files are."""

from __future__ import annotations

from pathlib import Path

import pytest
from runrecovery_service.trust.errors import HomeUnknown
from runrecovery_service.trust.homes import EDITORS, Cli, config_file

FILES = [
    (Cli.CODEX, {"HOME": "/h"}, "/h/.codex/config.toml"),
    (Cli.CODEX, {"HOME": "/h", "CODEX_HOME": "/c"}, "/c/config.toml"),
    (Cli.CODEX, {"HOME": "/h", "CODEX_HOME": ""}, "/h/.codex/config.toml"),
    (Cli.GEMINI, {"HOME": "/h"}, "/h/.gemini/trustedFolders.json"),
    (Cli.GEMINI, {"GEMINI_CLI_HOME": "/g"}, "/g/.gemini/trustedFolders.json"),
    (Cli.GEMINI, {"HOME": "/h", "GEMINI_CLI_TRUSTED_FOLDERS_PATH": "/t.json"}, "/t.json"),
    (Cli.CLAUDE, {"HOME": "/h"}, "/h/.claude.json"),
    (Cli.CLAUDE, {"HOME": "/h", "CLAUDE_CONFIG_DIR": "/c"}, "/c/.claude.json"),
]  # fmt: skip


@pytest.mark.parametrize(("cli", "env", "path"), FILES)
def test_the_file_is_where_its_cli_looks_for_it(cli: Cli, env: dict[str, str], path: str) -> None:
    assert config_file(cli, env) == Path(path)


@pytest.mark.parametrize(
    ("env", "variable"),
    [({}, "HOME"), ({"HOME": "h"}, "HOME"), ({"HOME": "/h", "CODEX_HOME": "c"}, "CODEX_HOME")],
)
def test_a_home_that_depends_on_the_working_directory_is_refused(
    env: dict[str, str], variable: str
) -> None:
    with pytest.raises(HomeUnknown) as refused:
        config_file(Cli.CODEX, env)

    assert refused.value.variable == variable


def test_every_cli_has_an_editor() -> None:
    assert set(EDITORS) == set(Cli)
