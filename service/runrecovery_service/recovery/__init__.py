"""Recovers runs: between a start and SERVING, at a planned stop, and in a takeover."""
