"""Conversion of messages: large JSON does not delay the event loop; the time before a retry."""

from __future__ import annotations

import threading

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery_service.http.call_context import CallFailed, Detail
from runrecovery_service.http.messages import THREAD_BYTES, Codec, retry_after_s


@pytest.mark.parametrize(("size", "on_the_loop"), [(THREAD_BYTES, True), (THREAD_BYTES + 1, False)])
async def test_a_large_json_is_converted_in_a_thread(size: int, on_the_loop: bool) -> None:  # noqa: FBT001
    seen = []

    def parse(_data: bytes, kind: type[Message]) -> Message:
        seen.append(threading.current_thread())
        return kind()

    codec = Codec("json", parse, Message.SerializeToString, in_thread=True)

    await codec.decode(b" " * size, pb.GetRunRequest)

    assert [thread is threading.current_thread() for thread in seen] == [on_the_loop]


async def test_a_small_message_is_converted_on_the_loop_and_a_large_one_in_a_thread() -> None:
    seen = []

    def convert(_message: Message) -> bytes:
        seen.append(threading.current_thread())
        return b"{}"

    codec = Codec("json", lambda _, kind: kind(), convert, in_thread=True)
    for size in (1, THREAD_BYTES):
        packed = pb.StreamOutputResponse(data=b"x" * size).SerializeToString()
        assert await codec.encode(packed, pb.StreamOutputResponse) == b"{}"

    assert [thread is threading.current_thread() for thread in seen] == [True, False]


@pytest.mark.parametrize(
    ("milliseconds", "seconds"), [(1, 1), (1000, 1), (1001, 2), (29_500, 30), (None, None)]
)
def test_the_whole_seconds_before_a_retry_are_never_too_few(
    milliseconds: int | None, seconds: int | None
) -> None:
    details: list[Detail] = [error_details_pb2.ErrorInfo(reason="STORAGE_BUSY")]
    if milliseconds is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(milliseconds)
        details.append(retry)

    failed = CallFailed(grpc.StatusCode.UNAVAILABLE, "later", tuple(details))

    assert retry_after_s(failed) == seconds
