"""Sends spans to a collector. Imported only when `[traces]` is set."""
