"""Malformed requests to health and reflection are refused, without internals in the answer."""

from __future__ import annotations

from typing import Any, Final

import grpc
import pytest
from support.api import Api, refused
from support.service import Home

NO_MESSAGES: Final = {
    "corrupt": b"\xff\xff\xff\xff",
    "longer than it is": b"\x0a\x7fx",
    "bad UTF-8": b"\x0a\x02\xff\xff",
    "a lone surrogate": b"\x0a\x03\xed\xa0\x80",
}
REFLECTIONS: Final = ("v1", "v1alpha")
TIMEOUT_S: Final = 10.0


@pytest.mark.parametrize("payload", NO_MESSAGES.values(), ids=NO_MESSAGES)
@pytest.mark.parametrize("method", ["Check", "Watch"])
def test_health_refuses_a_malformed_request(api: Api, method: str, payload: bytes) -> None:
    call: Any = api.channel.unary_stream(f"/grpc.health.v1.Health/{method}")

    refusal = refused(lambda: list(call(payload, timeout=TIMEOUT_S)))

    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.message == "not a valid HealthCheckRequest message"


@pytest.mark.parametrize("payload", NO_MESSAGES.values(), ids=NO_MESSAGES)
@pytest.mark.parametrize("version", REFLECTIONS)
def test_reflection_refuses_a_malformed_request(api: Api, version: str, payload: bytes) -> None:
    path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
    call: Any = api.channel.stream_stream(path)

    refusal = refused(lambda: list(call(iter([payload]), timeout=TIMEOUT_S)))

    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.message == "not a valid ServerReflectionRequest message"


def test_reflection_answers_until_a_malformed_request(api: Api) -> None:
    path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
    call: Any = api.channel.stream_stream(path)
    answers: list[bytes] = []

    refusal = refused(lambda: answers.extend(call(iter([b"\x3a\x00", b"\xff"]), timeout=TIMEOUT_S)))

    assert len(answers) == 1
    assert b"runrecovery.v1.RunService" in answers[0]
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT


def test_malformed_requests_are_no_defects_in_the_log(api: Api, home: Home) -> None:
    call: Any = api.channel.unary_unary("/grpc.health.v1.Health/List")

    refused(lambda: call(b"\xff", timeout=TIMEOUT_S))

    assert "DecodeError" not in home.logs()
    assert "Traceback" not in home.logs()
