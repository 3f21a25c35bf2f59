"""TLS of the listen address. Its files are read again when they change.

gRPC asks for the certificate before each handshake, on a thread of its own. A changed file is
noticed there: all files are read together and tried (`certificates.py`), and used only if that
succeeds. A pair of which only one file was replaced fails, so the pair before it stays in use until
the other file is replaced as well.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Final

import grpc
import structlog

from runrecovery_service.domain.start_errors import TlsRefused
from runrecovery_service.rpc.certificates import (
    Certificate,
    TlsFiles,
    TlsUnusable,
    read_certificate,
)

RETRY_S: Final = 5.0
"""How often unchanged files that were refused are tried again: a certificate may become valid."""

log = structlog.get_logger()


class ServerTls:
    """The TLS of a server, which follows its files. Thread-safe."""

    def __init__(self, files: TlsFiles) -> None:
        """Read the files.

        A certificate that is not valid now is used: a start must decide on runs in any case, and
        the files can be replaced while the service runs.

        Raises:
            TlsRefused: the files cannot be used.
        """
        self._files = files
        self._stamp = files.stamp()  # before the files are read, so that no change is missed
        try:
            found = read_certificate(files)
        except TlsUnusable as error:
            raise TlsRefused(str(error)) from error
        if found.invalid:
            log.warning(
                "rpc.certificate_invalid", file=str(files.certificate), reason=found.invalid
            )
        else:
            log.info("rpc.certificate_loaded", file=str(files.certificate), expires=found.expires)
        self._configuration = _configuration(found)
        self._refused = ""
        self._retry_at = 0.0
        self._lock = threading.Lock()

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials of one server."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._updates(self._configuration),  # type: ignore[arg-type] # the stub forgets None
            require_client_authentication=self._files.client_ca is not None,
        )

    def _updates(
        self, given: grpc.ServerCertificateConfiguration
    ) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
        """Return gRPC's question for a newer configuration than the one that it was given."""

        def newer() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            with self._lock:
                self._follow_files()
                if self._configuration is given:
                    return None
                given = self._configuration
                return given

        return newer

    def _follow_files(self) -> None:
        stamp = self._files.stamp()
        if stamp == self._stamp and not (self._refused and monotonic() >= self._retry_at):
            return
        self._stamp = stamp
        try:
            found = read_certificate(self._files)
        except TlsUnusable as error:
            self._refuse(str(error))
            return
        if found.invalid:
            self._refuse(f"{self._files.certificate}: {found.invalid}")
            return
        self._configuration, self._refused = _configuration(found), ""
        log.info("rpc.certificate_loaded", file=str(self._files.certificate), expires=found.expires)

    def _refuse(self, reason: str) -> None:
        self._retry_at = monotonic() + RETRY_S
        if reason != self._refused:
            self._refused = reason
            log.warning("rpc.certificate_refused", reason=reason)


def _configuration(found: Certificate) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(found.key, found.chain)], root_certificates=found.roots
    )
