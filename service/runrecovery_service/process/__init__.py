"""Launching, recognising and ending processes: the only room with /proc and signals. Linux only."""
