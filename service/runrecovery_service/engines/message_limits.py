"""The limits on the messages of engines.

The prompt of a question and the output of a result have no limits of their own. They are limited by
the length of the line or of the final message.
"""

from __future__ import annotations

from typing import Final

MAX_JSONL_LINE_BYTES: Final = 1 << 20
"""The longest line that a JSON-lines engine is allowed to print, including the newline."""
MAX_CLI_LINE_BYTES: Final = 4 << 20
"""The longest event line of an agent CLI. Events quote the output of tools."""
MAX_FINAL_MESSAGE_BYTES: Final = 1 << 20
"""The most bytes of an agent CLI's final message that are stored. A longer one loses its beginning.

A line of a JSON-lines engine has the same limit, so every run's output fits into one gRPC message.
"""
MAX_SESSION_CHARS: Final = 4096
"""The longest session handle."""
