"""gRPC ignores unknown channel options: all options of the service must be known to it."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from runrecovery import channel_options
from runrecovery_service.rpc import server

LIMITS = server.ServerLimits(
    max_concurrent_calls=1, max_concurrent_streams=1, stall_s=1.0, max_request_bytes=1
)
NAMES = sorted({name for name, _ in (*server._options(LIMITS), *channel_options())})


@pytest.fixture(scope="module")
def library() -> bytes:
    """Return gRPC's library, which contains the names of all options."""
    (path,) = Path(grpc.__file__).parent.glob("_cython/cygrpc*.so")
    return path.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_grpc_knows_every_option_that_is_set(library: bytes, name: str) -> None:
    assert name.encode() in library


def test_a_client_may_ping_every_10_s() -> None:
    least_ms = dict(server._options(LIMITS))["grpc.http2.min_ping_interval_without_data_ms"]

    assert least_ms < 10_000
