"""Defaults that the service and its command-line client share. This module imports little."""

from __future__ import annotations

from typing import Final

LISTEN: Final = "127.0.0.1:50051"
