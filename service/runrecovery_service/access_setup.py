"""From settings to who may connect, for a start and for `runrecovery check`."""

from __future__ import annotations

from runrecovery_service.config.settings import Settings
from runrecovery_service.rpc.certificates import TlsFiles, TlsUnusable, read_certificate


def tls_files(settings: Settings) -> TlsFiles | None:
    """Return the files of the configured TLS; None without TLS."""
    if settings.tls is None:
        return None
    return TlsFiles(
        certificate=settings.tls.certificate,
        key=settings.tls.key,
        client_ca=settings.tls.client_ca,
    )


def tls_problems(settings: Settings) -> list[str]:
    """Return why a start would refuse the files of TLS, or clients their certificate."""
    files = tls_files(settings)
    if files is None:
        return []
    try:
        found = read_certificate(files)
    except TlsUnusable as error:
        return [f"tls: {error}"]
    return [f"tls: {files.certificate}: {found.invalid}"] if found.invalid else []
