"""The address for probes: health checks in plaintext, also if `listen` has TLS and callers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.api import Api, refused
from support.callers import caller
from support.certificates import Authority
from support.service import Home

NewHome = Callable[..., Home]


def test_probes_are_answered_in_plaintext_beside_tls_and_callers(new_home: NewHome) -> None:
    authority = Authority()
    home = new_home(
        probe_listen="127.0.0.1:0",
        callers=[caller("a", "operator")],
        credentials=authority.trust(),
    )
    certificate, key = authority.issue("127.0.0.1").write(home.path, "server")
    home.write_config(tls={"certificate": str(certificate), "key": str(key)})
    service, api = home.start()
    listening = service.until_event("service.listening")

    with closing((probe := Api(listening["probe_address"])).channel):
        names = ("", "liveness", "runrecovery.v1.RecoveryService")
        assert [probe.health_of(name) for name in names] == ["SERVING"] * 3
        assert refused(lambda: probe.get("r")).code is grpc.StatusCode.UNIMPLEMENTED
        watch = health_pb2_grpc.HealthStub(probe.channel).Watch
        assert (
            refused(lambda: next(watch(health_pb2.HealthCheckRequest()))).code
            is grpc.StatusCode.UNIMPLEMENTED
        )
    assert api.health_of() == "SERVING"
    assert service.stop() == 0
