"""Claude Code: `.claude.json` has `projects["<dir>"].hasTrustDialogAccepted = true`."""

from __future__ import annotations

from typing import Final

from runrecovery_service.trust.json_entry import JsonEditor

EDITOR: Final = JsonEditor(
    before=("projects",), after=("hasTrustDialogAccepted",), value="true", trusting=(True,)
)
