"""How a channel to the service is set up: retries, keepalive, sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from typing import TypeAlias
from urllib.parse import unquote

from runrecovery.v1 import recovery_service_pb2, run_service_pb2

ChannelOption: TypeAlias = tuple[str, "int | str"]

DEFAULT_TIMEOUT_S = 10.0
DEFAULT_PAGE_SIZE = 50
# gRPC's own 4 MiB is four runs of the largest input. The service is trusted with more.
DEFAULT_MAX_RECEIVE_BYTES = 64 * 1024 * 1024

# A request above this size is not kept and so not sent again; gRPC's own 256 KiB is less than
# the 1 MiB that the service accepts.
_RETRY_BUFFER_BYTES = 4 * 1024 * 1024

# gRPC adds jitter, stops at 5 attempts, and obeys the pushback trailer of the service.
_RETRY_POLICY = {
    "maxAttempts": 5,
    "initialBackoff": "0.2s",
    "maxBackoff": "3s",
    "backoffMultiplier": 2,
    # CANCELLED: a server that stops answers with it what reaches it too late. A cancel of the
    # caller's own is never retried.
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
        # The more specific name wins: a stream is resumed from where it broke, not repeated.
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


def channel_options(
    *,
    target: str | None = None,
    max_receive_bytes: int = DEFAULT_MAX_RECEIVE_BYTES,
    options: Sequence[ChannelOption] = (),
) -> list[ChannelOption]:
    """The options that a channel to the service needs for retries and long waits.

    Give them to a channel that you make yourself; the clients use them for theirs.

    Args:
        target: where the channel leads. On this machine (loopback, a Unix socket) it uses no
            proxy, whatever `http_proxy` and its siblings say.
        max_receive_bytes: the largest answer to accept; a page of runs holds the inputs and
            outputs of its runs. -1 means any size.
        options: further gRPC channel options; they win over these.
    """
    own: dict[str, int | str] = {
        "grpc.service_config": json.dumps(_SERVICE_CONFIG),
        "grpc.enable_retries": 1,
        "grpc.per_rpc_retry_buffer_size": _RETRY_BUFFER_BYTES,
        # The service allows a ping every 10 s; a follower may hear nothing for hours.
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.http2.max_pings_without_data": 0,
        # gRPC backs off up to 2 minutes, longer than a restart and any deadline here.
        "grpc.initial_reconnect_backoff_ms": 200,
        "grpc.max_reconnect_backoff_ms": 2_000,
        "grpc.max_receive_message_length": max_receive_bytes,
    }
    if target is not None and is_on_this_machine(target):
        own["grpc.enable_http_proxy"] = 0
    return list((own | dict(options)).items())


def is_on_this_machine(target: str) -> bool:
    """Return whether a gRPC target names loopback addresses or a Unix socket only."""
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
    return address.is_loopback or address.is_unspecified  # Linux takes the latter for loopback


def required_target(target: str | None) -> str:
    """The target, which a client without a channel of its caller needs."""
    if not target:
        raise TypeError("give a target, for example '127.0.0.1:50051', or a channel")
    return target
