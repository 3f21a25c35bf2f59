"""A model that fails, and what a run with a real CLI shows of that."""

from __future__ import annotations

import socket
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from cli_agents.model_endpoint import ModelEndpoint, ModelRequest, Reply

WHY: Final = "the model is not well"
ANSWER: Final = '{"result": {"well": true}}'


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """How the model fails.

    Attributes:
        status: it answers with this HTTP status; None: it cuts its answers off.
        retry_after_s: the header `retry-after` of that answer.
        times: how often it fails before it is well; None: for ever.
    """

    status: int | None = None
    retry_after_s: int | None = None
    times: int | None = None


class FailingModel:
    """Fails as often as its fault says. Then it gives its result."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._failed = 0
        self._lock = threading.Lock()

    def __call__(self, request: ModelRequest) -> Reply:
        """Return the reply to one request. A request for a title does not count as a failure."""
        with self._lock:
            is_over = self._fault.times is not None and self._failed >= self._fault.times
            self._failed += request.offers_tools
        if is_over:
            return Reply(ANSWER)
        if self._fault.status is None:
            return Reply(ANSWER, is_cut=True)
        return Reply(
            refusal=WHY, status=self._fault.status, retry_after_s=self._fault.retry_after_s
        )


class NoEndpoint(ModelEndpoint):
    """An endpoint whose port refuses every connection, and belongs to nobody else meanwhile."""

    @property
    def url(self) -> str:
        """The URL of the port."""
        return f"http://127.0.0.1:{self._port.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._port = socket.socket()
        self._port.bind(("127.0.0.1", 0))  # nobody listens
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._port.close()
