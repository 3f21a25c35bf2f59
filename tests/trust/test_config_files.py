"""The path of the file into which trust entries of each CLI are written."""

from __future__ import annotations

from pathlib import Path

import pytest
from runrecovery_service.trust.config_files import AgentCli, config_file, editor_of
from runrecovery_service.trust.errors import HomeUnknown

FILES = [
    (AgentCli.CODEX, {"HOME": "/h"}, "/h/.codex/config.toml"),
    (AgentCli.CODEX, {"HOME": "/h", "CODEX_HOME": "/c"}, "/c/config.toml"),
    (AgentCli.CODEX, {"HOME": "/h", "CODEX_HOME": ""}, "/h/.codex/config.toml"),
    (AgentCli.GEMINI, {"HOME": "/h"}, "/h/.gemini/trustedFolders.json"),
    (AgentCli.GEMINI, {"GEMINI_CLI_HOME": "/g"}, "/g/.gemini/trustedFolders.json"),
    (AgentCli.GEMINI, {"HOME": "/h", "GEMINI_CLI_TRUSTED_FOLDERS_PATH": "/t.json"}, "/t.json"),
    (AgentCli.CLAUDE, {"HOME": "/h"}, "/h/.claude.json"),
    (AgentCli.CLAUDE, {"HOME": "/h", "CLAUDE_CONFIG_DIR": "/c"}, "/c/.claude.json"),
]  # fmt: skip


@pytest.mark.parametrize(("cli", "env", "path"), FILES)
def test_the_trust_file_is_where_its_cli_reads_it(
    cli: AgentCli, env: dict[str, str], path: str
) -> None:
    assert config_file(cli, env) == Path(path)


@pytest.mark.parametrize(
    ("env", "variable"),
    [({}, "HOME"), ({"HOME": "h"}, "HOME"), ({"HOME": "/h", "CODEX_HOME": "c"}, "CODEX_HOME")],
)
def test_a_home_that_depends_on_the_working_directory_is_refused(
    env: dict[str, str], variable: str
) -> None:
    with pytest.raises(HomeUnknown) as refused:
        config_file(AgentCli.CODEX, env)

    assert refused.value.variable == variable


def test_every_cli_has_an_editor_of_its_own() -> None:
    editors = [editor_of(cli) for cli in AgentCli]

    assert len({id(editor) for editor in editors}) == len(AgentCli)
