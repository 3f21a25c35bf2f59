"""Posts spans to the collector, and bounds what its answers can cost."""

from __future__ import annotations

from time import monotonic
from typing import Any, Final

import requests

ANSWER_BYTES: Final = 64 * 1024
"""The most bytes of an answer that are read, so that its connection can be used again. Answers by
OTLP are much smaller."""


class CollectorSession(requests.Session):
    """Sends requests to the collector, without proxies and passwords of the environment.

    Only the status of an answer counts. The body can be cut off, or can have no end.
    """

    def __init__(self, limit_s: float) -> None:
        """Make the session.

        Args:
            limit_s: the time limit of an answer, in seconds. A longer body is not read to its end.
        """
        super().__init__()
        self.trust_env = False  # no proxy, and no password of ~/.netrc
        self._limit_s = limit_s

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send a request and return the answer, without its body.

        Args:
            options: those of `requests`. Their timeout is shortened to the limit of this session.

        Raises:
            requests.RequestException: there was no answer; or it was a redirect, which
                OpenTelemetry would take for a success, although it does not follow redirects.
        """
        deadline_s = monotonic() + self._limit_s
        # OpenTelemetry computes the timeout by the wall clock, which may be set back meanwhile.
        options["timeout"] = min(options["timeout"], self._limit_s)
        response = super().send(request, **{**options, "stream": True})
        try:
            _skip_body(response, deadline_s)
        finally:
            response.close()
        if 300 <= response.status_code < 400:
            raise requests.RequestException("the collector has answered with a redirect")
        return response


def _skip_body(response: requests.Response, deadline_s: float) -> None:
    left = ANSWER_BYTES
    try:
        while left > 0 and monotonic() < deadline_s:
            data = response.raw.read1(left, decode_content=False)
            if not data:
                return
            left -= len(data)
    except Exception:  # noqa: BLE001 - the status has arrived, and only that counts
        return
