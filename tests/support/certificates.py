"""Certificates for tests: authorities, and certificates of services and clients."""

from __future__ import annotations

import ssl
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final, TypeAlias

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

Key: TypeAlias = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
DAY: Final = timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A certificate and its private key, in PEM."""

    certificate: bytes
    key: bytes

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write both files, and return their paths."""
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        certificate.write_bytes(self.certificate)
        key.write_bytes(self.key)
        return certificate, key


# Clients of Python 3.13 demand of a certificate what RFC 5280 does.
_SIGNS_CERTIFICATES: Final = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


class Authority:
    """Signs certificates. `certificate` is its own, in PEM."""

    def __init__(self, name: str = "tests") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _named(name)
        builder = _builder(self._name, self._name, self._key, DAY * -1, DAY * 1)
        constraint = x509.BasicConstraints(ca=True, path_length=None)
        identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        signed = (
            builder.add_extension(constraint, critical=True)
            .add_extension(_SIGNS_CERTIFICATES, critical=True)
            .add_extension(identifier, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        self.certificate = signed.public_bytes(serialization.Encoding.PEM)

    def issue(
        self,
        *names: str,
        common_name: str = "",
        begins: timedelta = -DAY,
        ends: timedelta = DAY,
        key: Key | None = None,
    ) -> Pair:
        """Return a certificate for DNS names, IP addresses and URIs.

        Args:
            begins, ends: when it is valid, from now.
            key: None: a new one of the curve P-256.
        """
        key = key or ec.generate_private_key(ec.SECP256R1())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        builder = _builder(_named(common_name), self._name, key, begins, ends)
        builder = builder.add_extension(issuer, critical=False)
        if names:
            alternative = x509.SubjectAlternativeName([_general_name(name) for name in names])
            builder = builder.add_extension(alternative, critical=not common_name)
        return _pair(builder.sign(self._key, hashes.SHA256()), key)

    def write(self, folder: Path, name: str = "ca") -> Path:
        """Write the certificate, and return its path."""
        path = folder / f"{name}.pem"
        path.write_bytes(self.certificate)
        return path

    def trust(self, own: Pair | None = None) -> grpc.ChannelCredentials:
        """Return the credentials of a client that trusts this authority, with its own pair."""
        key, certificate = (None, None) if own is None else (own.key, own.certificate)
        return grpc.ssl_channel_credentials(self.certificate, key, certificate)


def self_signed(*names: str) -> Pair:
    """Return a certificate that no authority has signed."""
    key, name = ec.generate_private_key(ec.SECP256R1()), _named("self")
    builder = _builder(name, name, key, -DAY, DAY)
    alternative = x509.SubjectAlternativeName([_general_name(each) for each in names])
    return _pair(builder.add_extension(alternative, critical=False).sign(key, hashes.SHA256()), key)


def old_client(version: ssl.TLSVersion) -> ssl.SSLContext:
    """Return a client that speaks this version of TLS only, and checks nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the old versions, on purpose
        context.minimum_version = context.maximum_version = version
    return context


def _named(common_name: str) -> x509.Name:
    if not common_name:
        return x509.Name([])
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: Key,
    begins: timedelta,
    ends: timedelta,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
    )


def _general_name(name: str) -> x509.GeneralName:
    if "://" in name:
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pair(signed: x509.Certificate, key: Key) -> Pair:
    return Pair(
        certificate=signed.public_bytes(serialization.Encoding.PEM),
        key=key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
