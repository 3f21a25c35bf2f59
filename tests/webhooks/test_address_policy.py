"""Which addresses deliveries may go to."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from runrecovery_service.config.values import EVERYWHERE
from runrecovery_service.webhooks.address_policy import address_problem

PRIVATE = (
    "127.0.0.1",
    "127.8.8.8",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "198.18.0.1",
    "240.0.0.1",
    "::1",
    "fe80::1",
    "fe80::1%lo",
    "fc00::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "192.0.0.9",
    "fec0::1",
    "64:ff9b:1::1",
    "::10.0.0.1",
    "::8.8.8.8",
    "::ffff:0:10.0.0.1",
    "1000::1",
    "4000::1",
    "5f00::1",
    "3fff::1",
    "2001::1",
    "2001:1::1",
    "2001:20::1",
    "2001:db8::1",
)
PUBLIC = ("8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808")
NO_HOST = ("0.0.0.0", "::", "224.0.0.1", "ff02::1", "::ffff:0.0.0.0")  # noqa: S104 - not bound


@pytest.mark.parametrize("address", PRIVATE)
@pytest.mark.parametrize("is_encrypted", [True, False])
def test_a_private_address_is_called_only_if_it_is_named(
    address: str, *, is_encrypted: bool
) -> None:
    def problem(*networks: str) -> str | None:
        return address_problem(
            address,
            is_encrypted=is_encrypted,
            private=tuple(map(ip_network, networks)),
            insecure_http=True,
        )

    assert (problem() or "").endswith("is private, and allow_private does not name it")
    assert (problem("192.0.2.0/24", "2001:db8:1::/48") or "").endswith("does not name it")
    assert problem("0.0.0.0/0", "::/0") is None


def test_only_the_named_network_is_allowed() -> None:
    def problem(address: str) -> str | None:
        named = (ip_network("10.1.0.0/16"),)
        return address_problem(address, is_encrypted=True, private=named, insecure_http=False)

    assert problem("10.1.255.255") is None
    assert problem("::ffff:10.1.0.1") is None
    assert problem("10.2.0.0") == "10.2.0.0 is private, and allow_private does not name it"


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_needs_tls_or_insecure_http(address: str) -> None:
    def problem(*, is_encrypted: bool, insecure_http: bool = False) -> str | None:
        return address_problem(
            address, is_encrypted=is_encrypted, private=EVERYWHERE, insecure_http=insecure_http
        )

    assert problem(is_encrypted=True) is None
    assert (problem(is_encrypted=False) or "").endswith(
        "is public, and plain HTTP goes to private addresses only"
    )
    assert problem(is_encrypted=False, insecure_http=True) is None


@pytest.mark.parametrize("address", NO_HOST)
def test_an_address_of_no_host_is_never_called(address: str) -> None:
    problem = address_problem(address, is_encrypted=True, private=EVERYWHERE, insecure_http=True)

    assert (problem or "").endswith("is not the address of a host")
