"""Builds TLS and the callers from the settings, for a start and for `runrecovery check`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

from runrecovery_service.config.settings import CallerSettings, Settings
from runrecovery_service.config.values import MAX_TOKENS
from runrecovery_service.domain.caller import Caller, Credentials, token_problem
from runrecovery_service.domain.role import Role
from runrecovery_service.domain.start_errors import CallersRefused
from runrecovery_service.process.safe_open import open_regular
from runrecovery_service.rpc.certificates import TlsFiles, TlsUnusable, read_certificate

MAX_TOKEN_FILE_BYTES: Final = 4096


def tls_files(settings: Settings) -> TlsFiles | None:
    """Return the files of the configured TLS; None without TLS."""
    if settings.tls is None:
        return None
    return TlsFiles(
        certificate=settings.tls.certificate,
        key=settings.tls.key,
        client_ca=settings.tls.client_ca,
    )


def read_callers(settings: Settings) -> list[Credentials]:
    """Return the credentials of every configured caller. Reads the token files.

    Raises:
        CallersRefused: a caller has a problem; the error lists all problems. No such caller is
            skipped: a typo in one file must not quietly lock a caller out.
    """
    found, problems = [], []
    for caller in settings.callers:
        try:
            found.append(_credentials(caller))
        except _TokenFileRefused as error:
            problems.append(f"caller {caller.name!r}: {error}")
    problems += _shared_tokens(found)
    if problems:
        raise CallersRefused(tuple(problems))
    return found


def access_problems(settings: Settings) -> list[str]:
    """Return the problems of TLS and callers that make a start or a client refuse."""
    problems: list[str] = []
    try:
        read_callers(settings)
    except CallersRefused as error:
        problems += error.problems
    files = tls_files(settings)
    if files is None:
        return problems
    try:
        invalid = read_certificate(files).invalid
    except TlsUnusable as error:
        return [*problems, f"tls: {error}"]
    return [*problems, f"tls: {files.certificate}: {invalid}"] if invalid else problems


class _TokenFileRefused(Exception):
    """A token file cannot be used. The text names the file, and never quotes a token."""


def _credentials(settings: CallerSettings) -> Credentials:
    digests = tuple(bytes.fromhex(digest) for digest in settings.token_sha256)
    if settings.token_file is not None:
        digests = tuple(_read_tokens(settings.token_file))
    return Credentials(
        caller=Caller(
            name=settings.name,
            role=Role[settings.role.name],
            engines=None if settings.engines is None else frozenset(settings.engines),
            max_calls=settings.max_calls,
            max_calls_per_s=settings.max_calls_per_s,
        ),
        tokens=digests,
        certificate_name=settings.certificate_name,
    )


def _read_tokens(file: Path) -> Iterator[bytes]:
    """Yield the SHA-256 of each token of a file."""
    try:
        # Kubernetes mounts a Secret as links, so links are resolved. A pipe could block.
        with open(open_regular(file.resolve(), os.O_RDONLY), "rb") as opened:  # noqa: PTH123 - safely
            data = opened.read(MAX_TOKEN_FILE_BYTES + 1)
    except OSError as error:
        # The value may be a token by mistake: a path that looks like a token is not quoted.
        shown = "token_file" if token_problem(str(file)) is None else file
        raise _TokenFileRefused(f"{shown}: {error.strerror}") from error
    tokens = [
        line.strip() for line in data.decode("utf-8-sig", "replace").splitlines() if line.strip()
    ]
    if not 1 <= len(tokens) <= MAX_TOKENS or len(data) > MAX_TOKEN_FILE_BYTES:
        raise _TokenFileRefused(
            f"{file}: must hold one token, or {MAX_TOKENS}, each on its own line"
        )
    for token in tokens:
        if problem := token_problem(token):
            raise _TokenFileRefused(f"{file}: a token {problem}")
        yield sha256(token.encode()).digest()


def _shared_tokens(found: list[Credentials]) -> Iterator[str]:
    """Yield a problem for each pair of callers with the same token."""
    owner: dict[bytes, str] = {}
    for each in found:
        for digest in set(each.tokens):
            other = owner.setdefault(digest, each.caller.name)
            if other != each.caller.name:
                yield f"callers {other!r} and {each.caller.name!r} have the same token"
