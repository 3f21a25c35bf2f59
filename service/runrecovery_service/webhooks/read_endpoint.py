"""Builds an `Endpoint` from the settings and files of a webhook."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from runrecovery_service.config.settings import WebhookSettings
from runrecovery_service.domain.webhook import WebhookFilter
from runrecovery_service.webhooks.endpoint import Endpoint
from runrecovery_service.webhooks.signature import read_secret

MAX_SECRETS: Final = 2
"""The most secrets of a webhook: the present one, and the one that will replace it."""
MAX_SECRET_FILE_BYTES: Final = 4096


class FileRefused(Exception):
    """A file cannot be used. The text never quotes the content of the file."""


def read_endpoint(settings: WebhookSettings) -> Endpoint:
    """Return the endpoint for the settings of a webhook.

    Raises:
        FileRefused: the file of the secret or of the certificates cannot be used.
    """
    url = urlsplit(settings.url)
    is_encrypted = url.scheme == "https"
    authorities = None if settings.ca_file is None else _read_authorities(settings.ca_file)
    return Endpoint(
        filter=WebhookFilter(
            name=settings.name,
            events=frozenset(settings.events),
            engines=None if settings.engines is None else frozenset(settings.engines),
        ),
        host=url.hostname or "",
        port=url.port or (443 if is_encrypted else 80),
        target=(url.path or "/") + (f"?{url.query}" if url.query else ""),
        tls=ssl.create_default_context(cadata=authorities) if is_encrypted else None,
        authorities=authorities,
        keys=_read_keys(settings.secret_file),
        private=settings.allow_private,
        insecure_http=settings.insecure_http,
        timeout_s=settings.timeout_s,
        give_up_s=settings.give_up_s,
    )


def _read_authorities(file: Path) -> str:
    """Return the PEM certificates in a file."""
    try:
        text = file.read_bytes().decode("ascii", "replace")
        # `create_default_context` would not do: for an empty text it trusts the system's
        # authorities.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=text)
    except (ValueError, ssl.SSLError) as error:
        raise FileRefused(f"{file}: holds no certificates in PEM") from error
    except OSError as error:
        raise FileRefused(f"{file}: {error.strerror}") from error
    return text


def _read_keys(file: Path) -> tuple[bytes, ...]:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_SECRET_FILE_BYTES + 1)
    except OSError as error:
        # The configured value may be the secret itself, by mistake.
        shown = "secret_file" if str(file).startswith("whsec_") else file
        raise FileRefused(f"{shown}: {error.strerror}") from error
    lines = data.decode("utf-8-sig", "replace").splitlines()
    secrets = [line.strip() for line in lines if line.strip()]
    if not 1 <= len(secrets) <= MAX_SECRETS or len(data) > MAX_SECRET_FILE_BYTES:
        raise FileRefused(f"{file}: must hold one secret, or {MAX_SECRETS}, each on its own line")
    try:
        return tuple(map(read_secret, secrets))
    except ValueError as error:
        raise FileRefused(f"{file}: a secret {error}") from error
