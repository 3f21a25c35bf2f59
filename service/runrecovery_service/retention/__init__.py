"""Removes what ended runs leave, when it has reached its age."""
