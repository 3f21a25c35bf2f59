"""Certificates: read the PEM files of a server, and try them by a handshake in memory.

This module needs no gRPC, so that `runrecovery check` starts quickly.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.safe_open import open_regular
from runrecovery_service.rpc.certificate_key import key_problem

MAX_FILE_BYTES: Final = 1_048_576
_HANDSHAKE_STEPS: Final = 10
"""The most steps of a handshake in memory. It takes three."""


class TlsUnusable(Exception):
    """The files cannot be used. The text says why, for operators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """The PEM files of a server.

    Attributes:
        certificate: the certificate of the server, followed by the intermediate certificates.
        key: the private key of the certificate, without a password.
        client_ca: certificates that sign the certificates of clients. None: clients need none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None

    def stamp(self) -> tuple[object, ...]:
        """Return values that change when a file is written or replaced."""
        return tuple(_stamp(file) for file in (self.certificate, self.key, self.client_ca) if file)


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """The content of the files when they were read and tried.

    Attributes:
        chain, key, roots: the content of `certificate`, `key` and `client_ca`.
        expires: the end of the validity; empty when the certificate is not valid now.
        invalid: why clients refuse the certificate now; empty: they do not.
    """

    chain: bytes
    key: bytes = field(repr=False)
    roots: bytes | None
    expires: str
    invalid: str


def read_certificate(files: TlsFiles) -> Certificate:
    """Read the files and try them.

    Raises:
        TlsUnusable: a file cannot be read or holds something else, the key is not that of the
            certificate, or gRPC cannot use this kind of key.
    """
    chain, key = _read(files.certificate), _read(files.key)
    roots = read_client_ca(files)
    if b"ENCRYPTED" in key:
        raise TlsUnusable(f"{files.key}: the key has a password; give one without")
    server = _server_context(files, chain, key)
    if problem := key_problem(chain):
        raise TlsUnusable(f"{files.certificate}: {problem}")
    expires = invalid = ""
    try:
        expires = _handshake(server, _client_context(files.certificate, chain))
    except ssl.SSLCertVerificationError as error:
        invalid = error.verify_message
    except ssl.SSLError as error:
        raise TlsUnusable(f"{files.certificate}: {_reason(error)}") from error
    return Certificate(chain=chain, key=key, roots=roots, expires=expires, invalid=invalid)


def ssl_context(found: Certificate) -> ssl.SSLContext:
    """Return the context of a server that uses Python's TLS.

    Raises:
        OSError: no descriptor is left.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    # A resumed TLS session would skip the check of its certificate, whose authority can have been
    # removed since.
    context.num_tickets = 0
    context.options |= ssl.OP_NO_TICKET
    _load_chain(context, found.chain, found.key)
    if found.roots is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=found.roots.decode("ascii", "ignore"))
    return context


def read_client_ca(files: TlsFiles) -> bytes | None:
    """Return the content of `client_ca`, if there is one.

    Raises:
        TlsUnusable: the file cannot be read, or holds no certificate.
    """
    if files.client_ca is None:
        return None
    roots = _read(files.client_ca)
    _client_context(files.client_ca, roots)
    return roots


def _stamp(file: Path) -> tuple[int, ...] | None:
    try:
        found = file.stat()
    except OSError:  # the read reports it
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read(file: Path) -> bytes:
    try:
        # A Secret is mounted as links. A pipe could block for ever.
        with open(open_regular(file.resolve(), os.O_RDONLY), "rb") as opened:  # noqa: PTH123 - safely
            data = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TlsUnusable(f"{file}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise TlsUnusable(f"{file}: has more than {MAX_FILE_BYTES} bytes")
    return data


def _server_context(files: TlsFiles, chain: bytes, key: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        _load_chain(context, chain, key)
    except ssl.SSLError as error:
        raise TlsUnusable(f"{files.certificate}, {files.key}: {_reason(error)}") from error
    except OSError as error:  # no descriptor is left, for example
        raise TlsUnusable(f"{files.certificate}: {error.strerror}") from error
    return context


def _load_chain(context: ssl.SSLContext, chain: bytes, key: bytes) -> None:
    # Loading takes only a path. A copy is loaded, so that exactly what was read is tried.
    with open(os.memfd_create("certificate"), "wb", buffering=0) as memory:  # noqa: PTH123
        memory.write(chain + b"\n" + key)
        context.load_cert_chain(f"/proc/self/fd/{memory.fileno()}")


def _client_context(file: Path, trusted: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    # The certificate itself is trusted, so that only its own validity is tried.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        # Between the certificates may be comments in any encoding.
        context.load_verify_locations(cadata=trusted.decode("ascii", "ignore"))
    except (ValueError, ssl.SSLError) as error:
        raise TlsUnusable(f"{file}: holds no certificate in PEM") from error
    return context


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> str:
    """Connect both sides in memory, and return the end of the server certificate's validity.

    Raises:
        ssl.SSLCertVerificationError: the certificate is not valid now, or not for a server.
        ssl.SSLError: the handshake failed otherwise.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    for _ in range(_HANDSHAKE_STEPS):
        done = [_advanced(side) for side in sides]
        if all(done):
            break
    seen = sides[0].getpeercert() or {}
    until = ssl.cert_time_to_seconds(str(seen["notAfter"]))
    return datetime.fromtimestamp(until, UTC).isoformat()


def _advanced(side: ssl.SSLObject) -> bool:
    """Continue the handshake of a side; return whether it is done."""
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _reason(error: ssl.SSLError) -> str:
    """Return OpenSSL's reason in words."""
    if error.reason == "KEY_VALUES_MISMATCH":
        return "the key does not belong to the certificate"
    known = f" ({error.reason.replace('_', ' ').lower()})" if error.reason else ""
    return f"not a certificate and its key in PEM{known}"
