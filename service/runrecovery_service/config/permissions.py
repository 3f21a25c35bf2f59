"""Refuses `permissions` and `ask_for` on engines that cannot ask their user for permission."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from runrecovery_service.config.settings import EngineSettings, PermissionPolicy
from runrecovery_service.config.values import InvalidValue
from runrecovery_service.engines.presets import Preset

_AGAINST_HOOKS: Final = frozenset({"--settings", "--bare"})
"""Options of Claude Code that replace the settings with the hook, or switch hooks off."""
_WHY_NOT_ASKED: Final[Mapping[Preset | None, str]] = {
    None: 'needs preset = "claude"',
    Preset.CODEX: (
        "does not work with Codex: its hooks can refuse a call, but not delay it until the user"
        ' has answered; use preset = "claude"'
    ),
    Preset.GEMINI: (
        "does not work with Gemini CLI: its hooks can refuse a call, but not delay it until the"
        ' user has answered; use preset = "claude"'
    ),
}


def permission_contradictions(settings: EngineSettings) -> Iterator[InvalidValue]:
    """Yield the contradictions between `permissions`, `ask_for` and the other keys of an engine."""
    if settings.permissions is not PermissionPolicy.ASK:
        if settings.ask_for:
            yield InvalidValue('is for engines with permissions = "ask"', below="ask_for")
        return
    if settings.preset is not Preset.CLAUDE:
        yield InvalidValue(f'"ask" {_WHY_NOT_ASKED[settings.preset]}', below="permissions")
        return
    if not settings.ask_for:
        yield InvalidValue('must name tools with permissions = "ask"', below="ask_for")
    for index, word in enumerate(settings.command):
        if word.partition("=")[0] in _AGAINST_HOOKS:
            yield InvalidValue(
                f'must not have {word.partition("=")[0]} with permissions = "ask", because the'
                " service passes its hook that way",
                below=f"command[{index}]",
            )
