"""Forged forms, and addresses that lead elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from runrecovery_service.console.actions import local_path
from runrecovery_service.console.visitors import Visitors, form_token, is_same_origin
from runrecovery_service.rpc.callers import CallerGuard, CallerTable
from starlette.responses import Response

HOST = {"host": "console.example:8080"}


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({"sec-fetch-site": "same-origin", "origin": "http://console.example:8080"}, True),
        ({"origin": "https://console.example:8080"}, True),
        ({"sec-fetch-site": "same-origin"}, True),
        ({}, False),
        ({"sec-fetch-site": "cross-site", "origin": "http://console.example:8080"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "none"}, False),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "http://console.example:9090"}, False),
        ({"origin": "null"}, False),
    ],
)
def test_only_pages_of_the_console_may_send_forms(
    headers: Mapping[str, str], *, is_own: bool
) -> None:
    assert is_same_origin({**HOST, **headers}) is is_own


def test_the_token_of_a_form_does_not_show_the_token_of_the_caller() -> None:
    assert form_token("a" * 32) == form_token("a" * 32)
    assert form_token("a" * 32) != form_token("a" * 31 + "b")
    assert "aaaa" not in form_token("a" * 32)


def test_over_tls_the_cookie_belongs_to_this_very_host_and_needs_tls() -> None:
    response = Response()

    visitors = Visitors(CallerGuard(CallerTable([])), has_tls=True, may_all_write=False)
    visitors.keep_token(response, "t")

    assert response.headers["set-cookie"] == (
        "__Host-runrecovery-token=t; HttpOnly; Max-Age=43200; Path=/; SameSite=strict; Secure"
    )


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/runs?status=failed", "/runs?status=failed"),
        ("", "/"),
        ("runs", "/"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("https://evil.example/", "/"),
        ("javascript:alert(1)", "/"),
        ("/\n/evil.example", "/"),
        ("/\t/evil.example", "/"),
    ],
)
def test_a_login_leads_only_to_pages_of_the_console(text: str, path: str) -> None:
    assert local_path(text) == path
