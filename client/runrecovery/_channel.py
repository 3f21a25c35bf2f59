"""A channel to the service: options for retries, keepalive, sizes and proxies; and TLS."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from os import PathLike
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

import grpc

from runrecovery.v1 import recovery_service_pb2, run_service_pb2

ChannelOption: TypeAlias = tuple[str, "int | str"]

DEFAULT_TIMEOUT_S = 10.0
DEFAULT_PAGE_SIZE = 50
# gRPC's default of 4 MiB is four runs with the largest input.
DEFAULT_MAX_RECEIVE_BYTES = 64 * 1024 * 1024

# gRPC does not retry a request above this size. Its default of 256 KiB is less than the 1 MiB that
# the service accepts.
_RETRY_BUFFER_BYTES = 4 * 1024 * 1024

# gRPC adds jitter, stops at 5 attempts, and obeys the pushback trailer of the service.
_RETRY_POLICY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "3s",
    "backoffMultiplier": 2,
    # A stopping server answers late calls with CANCELLED. A cancel by the caller is never retried.
    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
}

_IP_SCHEMES = frozenset({"dns", "ipv4", "ipv6"})

_SERVICES = tuple(
    service
    for file in (run_service_pb2.DESCRIPTOR, recovery_service_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)

_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": service.full_name} for service in _SERVICES],
            "retryPolicy": _RETRY_POLICY,
        },
        # The more specific name wins: streams are not retried, because the client resumes them.
        {
            "name": [
                {"service": service.full_name, "method": method.name}
                for service in _SERVICES
                for method in service.methods
                if method.server_streaming
            ]
        },
    ]
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """TLS of a connection. The files are in PEM, and are read once, when the client is made.

    Attributes:
        ca: the authorities of the service's certificate. None: the roots that gRPC trusts.
        certificate: the client's own certificate, if the service demands one.
        key: the private key of `certificate`.
        server_name: the name in the service's certificate, if it differs from the target's.
    """

    ca: str | PathLike[str] | None = None
    certificate: str | PathLike[str] | None = None
    key: str | PathLike[str] | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise TypeError("give certificate and key, or neither")

    def credentials(self) -> grpc.ChannelCredentials:
        """Read the files; raise OSError if one cannot be read."""
        return grpc.ssl_channel_credentials(
            _read(self.ca), _read(self.key), _read(self.certificate)
        )

    def options(self) -> list[ChannelOption]:
        """Return the options of a channel with these credentials."""
        name = self.server_name
        return [] if name is None else [("grpc.ssl_target_name_override", name)]


def _read(file: str | PathLike[str] | None) -> bytes | None:
    return None if file is None else Path(file).read_bytes()


def channel_options(
    *,
    target: str | None = None,
    max_receive_bytes: int = DEFAULT_MAX_RECEIVE_BYTES,
    options: Sequence[ChannelOption] = (),
) -> list[ChannelOption]:
    """Return the channel options for retries and long waits.

    The clients use them for their own channels. Use them for a channel that you make yourself.

    Args:
        target: the target of the channel. For loopback and Unix sockets, proxy variables such as
            `http_proxy` are ignored.
        max_receive_bytes: size of the largest response to accept; a page of runs has the inputs
            and outputs of its runs. -1 means no limit.
        options: further gRPC channel options; they override these.
    """
    own: dict[str, int | str] = {
        "grpc.service_config": json.dumps(_SERVICE_CONFIG),
        "grpc.enable_retries": 1,
        "grpc.per_rpc_retry_buffer_size": _RETRY_BUFFER_BYTES,
        # The service allows a ping every 10 s. A stream may be silent for hours.
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.http2.max_pings_without_data": 0,
        # gRPC's default is up to 2 minutes, longer than a restart and any deadline here.
        "grpc.initial_reconnect_backoff_ms": 200,
        "grpc.max_reconnect_backoff_ms": 2_000,
        "grpc.max_receive_message_length": max_receive_bytes,
    }
    if target is not None and is_on_this_machine(target):
        own["grpc.enable_http_proxy"] = 0
    return list((own | dict(options)).items())


def is_on_this_machine(target: str) -> bool:
    """Return True if a gRPC target names only loopback addresses or a Unix socket."""
    scheme, _, rest = target.partition(":")
    if scheme in {"unix", "unix-abstract"}:
        return True
    # `dns://authority/host:port`; the other schemes have a list and no authority.
    addresses = unquote(rest).rpartition("/")[2] if scheme in _IP_SCHEMES else target
    return all(_is_loopback(_host(address)) for address in addresses.split(","))


def _host(address: str) -> str:
    """Return the host of `host:port`, `[host]:port`, or of an address without a port."""
    if address.startswith("["):
        return address[1:].partition("]")[0]
    host, _, _ = address.partition(":") if address.count(":") == 1 else (address, "", "")
    return host


def _is_loopback(host: str) -> bool:
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback or address.is_unspecified  # Linux: 0.0.0.0 is loopback, too


def secured(
    options: Sequence[ChannelOption],
    *,
    tls: Tls | bool,
    credentials: grpc.ChannelCredentials | None,
) -> tuple[grpc.ChannelCredentials | None, list[ChannelOption]]:
    """Return the credentials (None: plaintext) and the options of a channel."""
    if not tls:
        return credentials, list(options)
    if credentials is not None:
        raise TypeError("give tls or credentials, not both")
    chosen = Tls() if tls is True else tls
    return chosen.credentials(), [*options, *chosen.options()]


def required_target(target: str | None) -> str:
    """Return the target; raise TypeError if there is none."""
    if not target:
        raise TypeError("give a target, for example '127.0.0.1:50051', or a channel")
    return target
