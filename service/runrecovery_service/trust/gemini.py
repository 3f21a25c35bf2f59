"""Gemini CLI: `trustedFolders.json` holds `{"<dir>": "TRUST_FOLDER"}`."""

from __future__ import annotations

from typing import Final

from runrecovery_service.trust.json_entry import JsonEditor

# TRUST_PARENT, at a folder, trusts the folder above it and with that the folder.
EDITOR: Final = JsonEditor(value='"TRUST_FOLDER"', trusting=("TRUST_FOLDER", "TRUST_PARENT"))
