"""TLS of the listen address. Its files are read again when they change.

gRPC asks for the certificate before each handshake, on a thread of its own. A changed file is
noticed there: all files are read together and tried (`certificates.py`), and used only if that
succeeds. While only one file of a pair is replaced, the new pair fails, and the previous pair stays
in use. A changed `client_ca` is used even while the pair is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from time import monotonic
from typing import Final

import grpc
import structlog

from runrecovery_service.domain.start_errors import TlsRefused
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc.certificates import (
    Certificate,
    TlsFiles,
    TlsUnusable,
    read_certificate,
    read_client_ca,
)

RETRY_S: Final = 5.0
"""How often unchanged files that were refused are tried again: a certificate can become valid."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Given:
    """Files of a configuration, and their content."""

    files: TlsFiles
    stamp: tuple[object, ...]
    found: Certificate


class ServerTls:
    """The TLS of a server, which reads its files again when they change. Thread-safe."""

    def __init__(self, files: TlsFiles) -> None:
        """Read the files.

        A certificate that is not valid now is used: a start must decide on runs in any case, and
        the files can be replaced while the service runs.

        Raises:
            TlsRefused: the files cannot be used.
        """
        stamp = files.stamp()  # before the files are read, so that no change is missed
        try:
            found = read_certificate(files)
        except TlsUnusable as error:
            raise TlsRefused(str(error)) from error
        if found.invalid:
            log.warning(
                "rpc.certificate_invalid", file=str(files.certificate), reason=found.invalid
            )
        else:
            _log_loaded(files, found)
        self._lock = threading.Lock()
        self._given = _Given(files, stamp, found)
        self._use(self._given)

    def credentials(self) -> grpc.ServerCredentials:
        """Return the credentials of one server."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._updates(self._configuration),  # type: ignore[arg-type] # the stub forgets None
            require_client_authentication=self._files.client_ca is not None,
        )

    def present(self) -> Certificate:
        """Return the content of the files that is in use now. Call it in a thread: it can block."""
        with self._lock:
            self._follow_files()
            return self._found

    def prepare(self, files: TlsFiles) -> Callable[[], None]:
        """Read other files, which name a `client_ca` if and only if the present ones do.

        Returns:
            A function that replaces the present files; it does not block.

        Raises:
            TlsUnusable: the other files cannot be used, or clients would refuse the certificate.
        """
        stamp = files.stamp()
        found = _read_valid(files)

        def replace_files() -> None:
            # Not under the lock: a handshake that reads from a disk that hangs may hold the lock.
            self._given = _Given(files, stamp, found)
            _log_loaded(files, found)

        return replace_files

    def _updates(
        self, given: grpc.ServerCertificateConfiguration
    ) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
        """Return the function that gRPC calls for a newer configuration than the given one."""

        def newer() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            with self._lock:
                self._follow_files()
                if self._configuration is given:
                    return None
                given = self._configuration
                return given

        return newer

    def _use(self, given: _Given) -> None:
        self._taken = given
        self._files, self._stamp, self._found = given.files, given.stamp, given.found
        self._configuration = _configuration(given.found)
        self._refused, self._retry_at = "", 0.0

    def _follow_files(self) -> None:
        if self._given is not self._taken:
            self._use(self._given)
        stamp = self._files.stamp()
        if stamp == self._stamp and not (self._refused and monotonic() >= self._retry_at):
            return
        self._stamp = stamp
        try:
            found = _read_valid(self._files)
        except TlsUnusable as error:
            self._refuse(str(error))
            self._follow_client_ca()
            return
        self._found, self._refused = found, ""
        self._configuration = _configuration(found)
        _log_loaded(self._files, found)

    def _follow_client_ca(self) -> None:
        """Use a changed `client_ca` although the new pair was refused.

        Otherwise clients of an authority that was removed from it could still connect.
        """
        try:
            roots = read_client_ca(self._files)
        except TlsUnusable:  # the refusal names it, unless the pair is refused for another reason
            return
        if roots != self._found.roots:
            self._found = replace(self._found, roots=roots)
            self._configuration = _configuration(self._found)
            log.info("rpc.client_ca_loaded", file=str(self._files.client_ca))

    def _refuse(self, reason: str) -> None:
        self._retry_at = monotonic() + RETRY_S
        if reason != self._refused:
            self._refused = reason
            log.warning("rpc.certificate_refused", reason=reason)


def _read_valid(files: TlsFiles) -> Certificate:
    """Read the files.

    Raises:
        TlsUnusable: they cannot be used, or clients would refuse the certificate now.
    """
    found = read_certificate(files)
    if found.invalid:
        raise TlsUnusable(f"{files.certificate}: {found.invalid}")
    return found


def _log_loaded(files: TlsFiles, found: Certificate) -> None:
    log.info("rpc.certificate_loaded", file=str(files.certificate), expires=found.expires)


def _configuration(found: Certificate) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(found.key, found.chain)], root_certificates=found.roots
    )
