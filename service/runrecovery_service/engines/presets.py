"""The presets: agent CLIs that a configuration can name instead of describing an engine."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from runrecovery_service.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from runrecovery_service.engines.cli_dialect import CliDialect


class Preset(StrEnum):
    """The name of a CLI in a configuration."""

    CODEX = "codex"
    GEMINI = "gemini"
    CLAUDE = "claude"


@dataclass(frozen=True, slots=True, kw_only=True)
class CliDescription:
    """The properties of a CLI that its preset uses.

    Attributes:
        program: the command that the npm package of the CLI installs.
        home_variable: the variable that names the folder of the CLI's configuration and sessions.
        variables: variables of the service's environment that the CLI can need, for example for
            model endpoints and API keys.
        reports_cost: whether the CLI reports the cost of its model calls.
    """

    program: str
    home_variable: str
    variables: tuple[str, ...]
    reports_cost: bool = False


_NETWORK: Final = (
    "ALL_PROXY",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "all_proxy",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "NODE_EXTRA_CA_CERTS",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "TMPDIR",
)

PRESETS: Final[Mapping[Preset, CliDescription]] = {
    Preset.CODEX: CliDescription(
        program="codex",
        home_variable="CODEX_HOME",
        variables=("CODEX_HOME", "CODEX_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL", *_NETWORK),
    ),
    Preset.GEMINI: CliDescription(
        program="gemini",
        home_variable="GEMINI_CLI_HOME",
        variables=(
            "GEMINI_CLI_HOME",
            "GEMINI_CLI_TRUSTED_FOLDERS_PATH",
            "GEMINI_API_KEY",
            "GEMINI_MODEL",
            "GOOGLE_API_KEY",
            "GOOGLE_APPLICATION_CREDENTIALS",
            "GOOGLE_CLOUD_LOCATION",
            "GOOGLE_CLOUD_PROJECT",
            "GOOGLE_GEMINI_BASE_URL",
            "GOOGLE_GENAI_USE_VERTEXAI",
            *_NETWORK,
        ),
    ),
    Preset.CLAUDE: CliDescription(
        program="claude",
        home_variable="CLAUDE_CONFIG_DIR",
        variables=(
            "CLAUDE_CONFIG_DIR",
            "CLAUDE_CODE_OAUTH_TOKEN",
            "ANTHROPIC_API_KEY",
            "ANTHROPIC_AUTH_TOKEN",
            "ANTHROPIC_BASE_URL",
            "ANTHROPIC_CUSTOM_HEADERS",
            "ANTHROPIC_MODEL",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC",
            "DISABLE_AUTOUPDATER",
            "DISABLE_TELEMETRY",
            *_NETWORK,
        ),
        reports_cost=True,
    ),
}


def dialect_of(preset: Preset) -> CliDialect:
    """Return the dialect of a CLI."""
    # Imported here: a start without an engine of the CLI does not wait for the imports.
    match preset:
        case Preset.CODEX:
            from runrecovery_service.engines.codex import CODEX

            return CODEX
        case Preset.GEMINI:
            from runrecovery_service.engines.gemini import GEMINI

            return GEMINI
        case Preset.CLAUDE:
            from runrecovery_service.engines.claude import CLAUDE

            return CLAUDE
