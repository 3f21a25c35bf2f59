"""Callers of tests: tokens that are long enough, and their tables of the configuration."""

from __future__ import annotations

from hashlib import sha256


def token_of(name: str) -> str:
    """Return the token of a test's caller; each name has its own."""
    return sha256(f"the token of {name}".encode()).hexdigest()


def digest_of(token: str) -> str:
    """Return what the configuration holds of a token."""
    return sha256(token.encode()).hexdigest()


def caller(name: str, role: str, **more: object) -> dict[str, object]:
    """Return one `[[callers]]` table, by default with the caller's token."""
    known = {"token_sha256", "token_file", "certificate_name"} & more.keys()
    token = {} if known else {"token_sha256": digest_of(token_of(name))}
    return {"name": name, "role": role, **token, **more}
