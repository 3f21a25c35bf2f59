"""The configuration: what can be set (settings), and how it is read from its sources (reading)."""
