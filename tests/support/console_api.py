"""Requests to the console of a service, as a browser sends them, without a browser."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from http.client import HTTPResponse
from http.cookies import SimpleCookie
from typing import Final
from urllib.parse import urlencode

from google.protobuf.json_format import MessageToDict

from support.api import Api
from support.http_api import HttpApi, Reply

FORM_TOKEN: Final = re.compile(r'name="form_token" value="([0-9a-f]+)"')
ETAG: Final = re.compile(r'name="etag" value="([^"]+)"')


def first_answer(api: Api, run_id: str) -> object:
    """Return the answer that the demo agent got to its first question, once its run has ended."""
    return MessageToDict(api.until_ended(run_id).output)["answers"][0]


class ConsoleVisit:
    """A visitor with the cookies of one browser."""

    def __init__(self, address: str) -> None:
        self._api = HttpApi(address)
        self.address = address
        self.cookies: dict[str, str] = {}

    def get(self, path: str, **headers: str) -> Reply:
        """Open a page."""
        return self._send("GET", path, None, headers)

    def post(self, path: str, fields: Mapping[str, str], **headers: str) -> Reply:
        """Send a form, as a page of the console does unless the headers say otherwise."""
        given = {
            "Content-Type": "application/x-www-form-urlencoded",
            "Origin": f"http://{self.address}",
            "Sec-Fetch-Site": "same-origin",
            **headers,
        }
        return self._send("POST", path, urlencode(fields), given)

    def opened(self, path: str) -> AbstractContextManager[HTTPResponse]:
        """Open a page, and return the response while it arrives."""
        return self._api.opened("GET", path, headers=self._cookie_header())

    def log_in(self, token: str) -> Reply:
        """Log in with a token."""
        return self.post("/login", {"token": token, "next": "/"})

    def form_of(self, run_id: str) -> dict[str, str]:
        """Return the hidden fields of the form of a run's question."""
        page = self.get(f"/runs/{run_id}").body.decode()
        token, etag = FORM_TOKEN.search(page), ETAG.search(page)
        return {
            "form_token": token[1] if token else "",
            "etag": etag[1] if etag else "",
            "interaction_id": "1",
        }

    def _send(self, verb: str, path: str, body: str | None, headers: Mapping[str, str]) -> Reply:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        reply = self._api.request(verb, path, body, {**given, **self._cookie_header()})
        for name, morsel in SimpleCookie(reply.headers.get("set-cookie", "")).items():
            self.cookies[name] = morsel.value
        return reply

    def _cookie_header(self) -> dict[str, str]:
        pairs = [f"{name}={value}" for name, value in self.cookies.items()]
        return {"Cookie": "; ".join(pairs)} if pairs else {}
