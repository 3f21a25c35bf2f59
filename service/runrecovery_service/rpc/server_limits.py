"""Limits of a gRPC server, and gRPC's options that apply them."""

from __future__ import annotations

from typing import Final

from runrecovery_service.lazy_dataclass import dataclass

HANDSHAKE_S: Final = 20.0
"""How long a new connection may take to finish its handshake, before it is closed."""
MAX_WATCHES_PER_CONNECTION: Final = 1_000
CALLS_PER_CONNECTION: Final = 100
"""How many calls one connection may have beside its watches. Further calls wait in the client."""
KEEPALIVE_MS: Final = 60_000
"""How long a connection may be silent before it is pinged."""
KEEPALIVE_TIMEOUT_MS: Final = 20_000
"""How long the answer to a ping may take before the connection is closed."""
MIN_PING_INTERVAL_MS: Final = 9_000
"""The shortest interval of pings by a client. Clients that ping more often are disconnected. The
docs allow a ping every 10 s; the margin is for pings that are delayed on their way. The Python
client pings every 30 s."""

IDLE_S: Final = 300.0
PROBE_REQUEST_BYTES: Final = 4096
"""The largest request of a probe. It has only the name of a service."""
PROBE_CALLS_PER_CONNECTION: Final = 4
PROBE_IDLE_S: Final = 5.0
PROBE_MAX_AGE_S: Final = 10.0
"""How long the connection of a probe may live. A probe that stays would take the place of the next
one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Limits of the server.

    Attributes:
        stall_s: a stream is closed when its reader has taken nothing for this many seconds.
        max_connections: concurrent connections.
        idle_s: a connection without calls is closed after this many seconds.
        handshake_s: a connection without a finished handshake is closed after this many seconds.
        calls_per_connection: calls and streams of one connection at one time. None: computed from
            the limit of streams.
        max_age_s: every connection is closed after this many seconds. None: connections stay open.
    """

    max_concurrent_calls: int
    max_concurrent_streams: int
    stall_s: float
    max_request_bytes: int
    max_connections: int = 10_000
    idle_s: float = IDLE_S
    handshake_s: float = HANDSHAKE_S
    calls_per_connection: int | None = None
    max_age_s: float | None = None


def calls_per_connection(max_concurrent_streams: int) -> int:
    """Return how many calls and streams one connection may have at one time."""
    return min(max_concurrent_streams, MAX_WATCHES_PER_CONNECTION) + CALLS_PER_CONNECTION


def probe_limits(max_connections: int) -> ServerLimits:
    """Return the limits of the server for health probes."""
    return ServerLimits(
        max_concurrent_calls=max_connections,
        max_concurrent_streams=max_connections,
        stall_s=PROBE_IDLE_S,
        max_request_bytes=PROBE_REQUEST_BYTES,
        max_connections=max_connections,
        idle_s=PROBE_IDLE_S,
        handshake_s=PROBE_IDLE_S,
        calls_per_connection=PROBE_CALLS_PER_CONNECTION,
        max_age_s=PROBE_MAX_AGE_S,
    )


def server_options(limits: ServerLimits) -> tuple[tuple[str, int], ...]:
    """Return the options of a gRPC server with these limits."""
    calls = limits.calls_per_connection
    if calls is None:
        calls = calls_per_connection(limits.max_concurrent_streams)
    age = (
        ()
        if limits.max_age_s is None
        else (
            ("grpc.max_connection_age_ms", int(limits.max_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", int(limits.idle_s * 1000)),
        )
    )
    return (
        # By default a second server silently shares a taken port.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        # A larger request gets RESOURCE_EXHAUSTED from gRPC itself, without details.
        ("grpc.max_receive_message_length", limits.max_request_bytes),
        # Further connections are closed at once, so that descriptors remain for runs and database.
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
        # gRPC receives requests before the service sees a token: unfinished ones take memory.
        ("grpc.max_concurrent_streams", calls),
        # Idle connections and those of dead callers would use up max_connections.
        ("grpc.max_connection_idle_ms", int(limits.idle_s * 1000)),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),  # a watch may be silent without a limit
        *age,
    )
