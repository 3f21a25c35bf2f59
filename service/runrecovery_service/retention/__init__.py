"""Removes ended runs, or parts of them, that have reached their configured age."""
