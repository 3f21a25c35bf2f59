"""The lease of an instance: the right to own its runs until a time. `ownership.py` renews it."""

from __future__ import annotations

from typing import Final

LEASE_TTL_S: Final = 15.0
"""How long a lease lasts after a renewal, unless it is configured."""
