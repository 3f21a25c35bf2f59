"""Adds and removes the entries by which agent CLIs trust a folder (docs/trust.md).

Only this package edits files of other programs. `config_files` returns the path of a CLI's file.
`codex`, `gemini` and `claude` edit its text. `files` replaces the file. The caller stores what was
added, because only that may be removed later.

The editors of TOML and JSON and the lock are our own: `toml_text`, `json_text` and `locks` say why.
"""
