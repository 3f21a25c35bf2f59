"""gRPC ignores unknown channel options: all options of the service must be known to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from runrecovery import channel_options
from runrecovery_service.rpc.server_limits import ServerLimits, probe_limits, server_options

LIMITS = ServerLimits(
    max_concurrent_calls=1, max_concurrent_streams=1, stall_s=1.0, max_request_bytes=1
)
PROBED = probe_limits(8)
SET = (
    *server_options(LIMITS),
    *server_options(PROBED),
    *channel_options(),
)
NAMES = sorted({name for name, _ in SET})


@pytest.fixture(scope="module")
def library() -> bytes:
    """Return gRPC's library, which contains the names of all options."""
    (path,) = Path(grpc.__file__).parent.glob("_cython/cygrpc*.so")
    return path.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_grpc_knows_every_option_that_is_set(library: bytes, name: str) -> None:
    assert name.encode() in library


def test_a_client_may_ping_every_10_s() -> None:
    least_ms = dict(server_options(LIMITS))["grpc.http2.min_ping_interval_without_data_ms"]

    assert least_ms < 10_000


def test_a_connection_has_room_for_1000_watches_and_100_calls_and_not_for_more() -> None:
    many = dict(server_options(replace(LIMITS, max_concurrent_streams=5_000)))
    few = dict(server_options(replace(LIMITS, max_concurrent_streams=10)))

    assert many["grpc.max_concurrent_streams"] == 1_100
    assert few["grpc.max_concurrent_streams"] == 110


def test_a_connection_to_the_probe_address_ends_soon_whatever_it_does() -> None:
    options = dict(server_options(PROBED))

    assert options["grpc.max_concurrent_streams"] == 4
    assert options["grpc.max_connection_idle_ms"] == 5_000
    assert options["grpc.max_connection_age_ms"] == 10_000
    assert options["grpc.max_connection_age_grace_ms"] == 5_000
    assert options["grpc.server_handshake_timeout_ms"] == 5_000
