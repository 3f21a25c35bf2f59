"""Defaults that the service and the command of its clients share. Importing it costs nothing."""

from __future__ import annotations

from typing import Final

LISTEN: Final = "127.0.0.1:50051"
