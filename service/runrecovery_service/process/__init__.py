"""Launch, find and end processes: the only package that uses /proc and signals. Linux only."""
