"""What a run is, how it may change, and what a restart decides. No I/O, no clock, no framework."""
