"""Runs, their legal changes, and the decisions of a restart. No I/O, no clock, no framework."""
