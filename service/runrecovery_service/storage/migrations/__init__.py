"""Numbered steps of the schema, each a frozen copy of its tables.

A released file never changes: its checksum is recorded where it was applied.
"""
