"""Decides to which addresses deliveries may go."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final, TypeAlias

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network

_NAT64: Final = IPv6Network("64:ff9b::/96")
_UNICAST: Final = IPv6Network("2000::/3")
"""The range of all public IPv6 addresses. Ranges that represent IPv4 addresses are outside of it.
"""
_RESERVED: Final[tuple[Network, ...]] = (
    IPv4Network("192.0.0.0/24"),
    IPv6Network("2001::/23"),
    IPv6Network("2001:db8::/32"),
    IPv6Network("3fff::/20"),
)
"""Ranges for which `is_global` differs between releases of Python."""


def address_problem(
    text: str, *, is_encrypted: bool, private: tuple[Network, ...], insecure_http: bool
) -> str | None:
    """Return why deliveries may not go to a resolved address; None: they may.

    Args:
        private: the networks in which private addresses are allowed.
        insecure_http: whether plain HTTP may go to public addresses.
    """
    address = _real(ip_address(text.partition("%")[0]))
    if address.is_multicast or address.is_unspecified:
        return f"{address} is not the address of a host"
    if not _is_public(address):
        is_allowed = any(address in network for network in private)
        return None if is_allowed else f"{address} is private, and allow_private does not name it"
    if not is_encrypted and not insecure_http:
        return f"{address} is public, and plain HTTP goes to private addresses only"
    return None


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _UNICAST:
        return False
    return address.is_global and not any(address in network for network in _RESERVED)


def _real(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address represents; otherwise the address itself."""
    if isinstance(address, IPv4Address):
        return address
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address
