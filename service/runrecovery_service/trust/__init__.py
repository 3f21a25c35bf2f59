"""The only room that edits other programs' files: the entries by which agent CLIs trust a folder.

`homes` says which file that is, `codex`, `gemini` and `claude` edit its text, `files` puts the new
text into its place. What was added is told to the caller, who keeps it. `docs/trust.md`.
"""
