"""Gemini CLI: `trustedFolders.json` has `{"<dir>": "TRUST_FOLDER"}`."""

from __future__ import annotations

from typing import Final

from runrecovery_service.trust.json_entry import JsonEditor

# TRUST_PARENT at a folder trusts its parent, and so the folder too.
EDITOR: Final = JsonEditor(value='"TRUST_FOLDER"', trusting=("TRUST_FOLDER", "TRUST_PARENT"))
