"""One call of a case, and how it ended as a caller sees it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import grpc
from fuzz.cases import METHODS, Case, Manner
from support.callers import token_of

PATIENCE_S: Final = 20.0
"""For an answer. Nothing here takes a hundredth of it."""
GLANCE_S: Final = 0.1
"""For a stream that may have nothing to tell: it is then left."""
HURRY_S: Final = 0.001
AUTHORIZATION: Final = "authorization"
ANSWERS_READ: Final = 3
OPTIONS: Final = (
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 20),
    ("grpc.min_reconnect_backoff_ms", 20),
    ("grpc.max_reconnect_backoff_ms", 100),
    ("grpc.max_receive_message_length", 64 << 20),
    ("grpc.max_send_message_length", 64 << 20),
    ("grpc.max_metadata_size", 1 << 20),
    ("grpc.absolute_max_metadata_size", 1 << 20),
)

# A failed call is an RpcError and a Call at once, and multi-callables are generic over messages
# that are bytes here: grpc's types say neither.
Failed: TypeAlias = Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a call ended. `code` is None when the client library did not send the call."""

    code: grpc.StatusCode | None
    message: str = ""
    trailers: tuple[tuple[str, str | bytes], ...] = ()
    answers: tuple[bytes, ...] = ()

    @property
    def is_ok(self) -> bool:
        """True when the call was answered."""
        return self.code is grpc.StatusCode.OK


class Caller:
    """Makes calls over one channel."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=OPTIONS)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def call(self, case: Case, payload: bytes, *, patient: bool = False) -> Outcome:
        """Make the call, and return how it ended.

        Args:
            payload: the payload of the case, with the ids and tokens of the target in it.
            patient: wait for the end of a stream too, because the stream must have one.
        """
        method = METHODS.get(case.method)
        streams = method is not None and method.server_streaming
        try:
            return (self._stream if streams else self._unary)(case, payload, patient)
        except grpc.RpcError as error:
            return _failed(error)
        except (
            ValueError,
            TypeError,
            UnicodeError,
        ) as error:  # the client library refuses to make the call
            return Outcome(code=None, message=str(error))

    def _unary(self, case: Case, payload: bytes, _: bool) -> Outcome:  # noqa: FBT001 - see _stream
        method: Any = self._channel.unary_unary(case.method)
        call = method.future(payload, **_options(case, PATIENCE_S))
        if case.manner is Manner.CANCELED:
            call.cancel()
        with suppress(grpc.FutureCancelledError):
            answer = call.result()
            return Outcome(code=grpc.StatusCode.OK, trailers=_trailers(call), answers=(answer,))
        return Outcome(code=grpc.StatusCode.CANCELLED)

    def _stream(self, case: Case, payload: bytes, patient: bool) -> Outcome:  # noqa: FBT001
        described = METHODS[case.method]
        if described.client_streaming:
            method: Any = self._channel.stream_stream(case.method)
            given: Any = iter([payload])
        else:
            method, given = self._channel.unary_stream(case.method), payload
        call = method(given, **_options(case, PATIENCE_S if patient else GLANCE_S))
        answers: list[bytes] = []
        try:
            if case.manner is Manner.UNREAD:
                call.initial_metadata()  # the stream has begun
            if case.manner not in {Manner.UNREAD, Manner.CANCELED}:
                answers += (answer for _, answer in zip(range(ANSWERS_READ), call, strict=False))
        except grpc.RpcError as error:
            return _failed(error, tuple(answers))
        finally:
            call.cancel()
        return Outcome(
            code=call.code() if len(answers) < ANSWERS_READ else grpc.StatusCode.CANCELLED,
            message=call.details() or "",
            trailers=_trailers(call),
            answers=tuple(answers),
        )


def _options(case: Case, timeout_s: float) -> dict[str, Any]:
    gzip = case.manner is Manner.GZIP
    metadata = case.metadata
    if AUTHORIZATION not in {key for key, _ in metadata}:
        metadata += ((AUTHORIZATION, f"Bearer {token_of('operator')}"),)
    return {
        "timeout": HURRY_S if case.manner is Manner.HURRIED else timeout_s,
        "metadata": metadata,
        "compression": grpc.Compression.Gzip if gzip else None,
        "wait_for_ready": True,
    }


def _trailers(call: Failed) -> tuple[tuple[str, str | bytes], ...]:
    return tuple((key, value) for key, value in call.trailing_metadata() or ())


def _failed(error: Failed, answers: tuple[bytes, ...] = ()) -> Outcome:
    return Outcome(
        code=error.code(),
        message=error.details() or "",
        trailers=_trailers(error),
        answers=answers,
    )
