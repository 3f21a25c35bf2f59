"""The length of a lease: the time for which an instance has the right to own its runs."""

from __future__ import annotations

from typing import Final

LEASE_TTL_S: Final = 15.0
"""How long a lease lasts after a renewal, unless it is configured."""
