"""Converts single values of the configuration, and refuses invalid values."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Final, TypeAlias, TypeVar
from urllib.parse import urlsplit

from runrecovery_service.domain.caller import NO_TOKEN_DIGEST
from runrecovery_service.engines.presets import Preset
from runrecovery_service.engines.tool_patterns import MAX_PATTERNS, pattern_problem

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PORT: Final = re.compile(r"[0-9]{1,5}")
_SIZE: Final = re.compile(r"([0-9]{1,12}) ?([KMGT]?)(?:iB|B)?", re.IGNORECASE)
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}")
MAX_TOKENS: Final = 2
"""The most tokens of one caller: the present token, and its replacement."""
_AGE: Final = re.compile(r"([0-9]{1,9}) ?([dhms])")
_AGE_UNITS: Final = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
_UNITS: Final = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}

_HOST: Final = re.compile(
    r"[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_][a-z0-9_-]{0,62})*", re.IGNORECASE
)
_ORIGIN: Final = re.compile(
    r"(?P<scheme>https?)://(?:(?P<ip>\[[0-9a-f:.]+\])|(?P<name>[^:/\[\]]+))(?::(?P<port>[0-9]{1,5}))?"
)
_URL: Final = re.compile(r"[!-~]{1,2048}")
Network: TypeAlias = IPv4Network | IPv6Network
EVERYWHERE: Final[tuple[Network, ...]] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)
Reader: TypeAlias = Callable[[object], T]
"""Converts a value from a file, a flag or the environment, or raises `InvalidValue`."""


class InvalidValue(ValueError):
    """A value cannot be used.

    Attributes:
        below: the part of the value that is invalid; empty: the whole value.
    """

    def __init__(self, text: str, *, below: str = "") -> None:
        super().__init__(text)
        self.below = below


def quote(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        text = f'"{value}"' if isinstance(value, str) else str(value)
        return text if len(text) <= 80 else text[:77] + "…"
    return "a list" if isinstance(value, list) else "a table" if isinstance(value, dict) else "this"


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidValue(f"must be true or false, not {quote(value)}")
    return value


def whole(least: int, most: int) -> Reader[int]:
    def read(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidValue(f"must be a whole number, not {quote(value)}")
        if not least <= value <= most:
            raise InvalidValue(f"must be from {least} to {most}, not {value}")
        return value

    return read


def seconds(least: float, most: float) -> Reader[float]:
    def read(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InvalidValue(f"must be a number of seconds, not {quote(value)}")
        if not least <= value <= most:  # also true of nan
            raise InvalidValue(f"must be from {least:g} to {most:g} seconds, not {value}")
        return float(value)

    return read


def dollars(above: float, most: float) -> Reader[float]:
    def read(value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise InvalidValue(f"must be a number of US dollars, not {quote(value)}")
        if not above < value <= most:  # also true of nan
            raise InvalidValue(f"must be above {above:g} and at most {most:.0f}, not {value}")
        return float(value)

    return read


def size_bytes(least: int, most: int) -> Reader[int]:
    def read(value: object) -> int:
        found = _SIZE.fullmatch(value) if isinstance(value, str) else None
        if found is not None:
            value = int(found[1]) * _UNITS[found[2].upper()]
        elif isinstance(value, str):
            raise InvalidValue(f'must be bytes, or a text like "512M" or "2G", not {quote(value)}')
        return whole(least, most)(value)

    return read


def age(least: float, most: float) -> Reader[float]:
    def read(value: object) -> float:
        found = _AGE.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise InvalidValue(f'must be a text like "30d", "12h" or "90m", not {quote(value)}')
        seconds = int(found[1]) * _AGE_UNITS[found[2]]
        if not least <= seconds <= most:
            raise InvalidValue(
                f"must be from {least / 60:.0f} minutes to {most / 86_400:.0f} days, not"
                f" {quote(value)}"
            )
        return float(seconds)

    return read


def text(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidValue(f"must be a string, not {quote(value)}")
    if "\0" in value:
        raise InvalidValue("must not contain a NUL character")
    return value


def filled(value: object) -> str:
    if not text(value):
        raise InvalidValue("must not be empty")
    return text(value)


def name(value: object) -> str:
    if not _NAME.fullmatch(text(value)):
        raise InvalidValue(
            f"must be 1 to 63 of a-z, 0-9, - and _, beginning with a letter or digit,"
            f" not {quote(value)}"
        )
    return text(value)


def path(value: object) -> Path:
    return value if isinstance(value, Path) else Path(filled(value))


def one_of(kind: type[E]) -> Reader[E]:
    known = {member.value.lower(): member for member in kind}

    def read(value: object) -> E:
        if not isinstance(value, str) or value not in known:
            *words, last = (f'"{word}"' for word in known)
            raise InvalidValue(f"must be {', '.join(words)} or {last}, not {quote(value)}")
        return known[value]

    return read


def database(value: object) -> str:
    # No message quotes the value, because the value can contain a password.
    url = text(value)
    if url.startswith("sqlite://") and not re.match(r"sqlite:///[^?#]", url):
        raise InvalidValue("SQLite is sqlite:///relative/path or sqlite:////absolute/path")
    if url.startswith("sqlite:///:memory:"):
        raise InvalidValue("a SQLite database in memory is lost with the process; name a file")
    if url and not url.startswith(("sqlite:///", "postgresql://")):
        raise InvalidValue("must be empty, postgresql://… or sqlite:///path")
    return url


def database_direct(value: object) -> str:
    url = text(value)
    if url and not url.startswith("postgresql://"):
        raise InvalidValue("must be empty or postgresql://…")
    return url


def listen(value: object) -> str:
    address = filled(value)
    if _is_socket_file(address):
        if not address.partition(":")[2]:
            raise InvalidValue("a unix: address needs a path")
        return address
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or (":" in host and not bracketed) or re.search(r"[\s/@,]", host):
        raise InvalidValue(f"must be HOST:PORT, [IPV6]:PORT or unix:PATH, not {quote(value)}")
    if not _PORT.fullmatch(port) or int(port) > 65_535:
        raise InvalidValue(f"the port must be from 0 (any free one) to 65535, not {quote(port)}")
    return address


def tcp_listen(value: object) -> str:
    address = text(value)
    if _is_socket_file(address):
        raise InvalidValue("must be empty, HOST:PORT or [IPV6]:PORT: it needs TCP")
    return listen(address) if address else ""


def _is_socket_file(address: str) -> bool:
    return address.startswith(("unix:", "unix-abstract:"))


def is_loopback(address: str) -> bool:
    """Return whether only this machine can reach a valid listen address.

    Every host name except `localhost` counts as reachable from other machines. It is not resolved.
    """
    if _is_socket_file(address):
        return True
    host = address.rpartition(":")[0].strip("[]").lower()
    try:
        ip = ip_address(host)
    except ValueError:
        return host == "localhost"
    # Before Python 3.13, `is_loopback` does not know IPv4-mapped addresses.
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise InvalidValue(f"must be a list of strings, not {quote(value)}")
    for index, word in enumerate(value):
        try:
            text(word)
        except InvalidValue as error:
            raise InvalidValue(str(error), below=f"[{index}]") from None
    return tuple(value)


def command(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        raise InvalidValue('must be a list, not a shell line: ["program", "argument"]')
    words = strings(value)
    if not words:
        raise InvalidValue("must name a program")
    if "" in words:
        raise InvalidValue("must not be empty", below=f"[{words.index('')}]")
    # A relative path would start from the workspace of a run.
    if "/" in words[0] and not words[0].startswith("/"):
        raise InvalidValue(
            f'must be an absolute path, or a name without "/" that is found in PATH, not'
            f" {quote(words[0])}",
            below="[0]",
        )
    return words


def names(value: object) -> tuple[str, ...]:
    found = strings(value)
    if not found:
        raise InvalidValue("must not be empty")
    for index, each in enumerate(found):
        try:
            name(each)
        except InvalidValue as error:
            raise InvalidValue(str(error), below=f"[{index}]") from None
    return found


def token_digests(value: object) -> tuple[str, ...]:
    # No message quotes the value, which can be a token by mistake.
    found = (value,) if isinstance(value, str) else strings(value)
    if not 1 <= len(found) <= MAX_TOKENS:
        raise InvalidValue(f"must be one digest, or a list of at most {MAX_TOKENS}")
    if not all(_SHA256.fullmatch(digest) for digest in found):
        raise InvalidValue("must be the SHA-256 of the token: 64 hexadecimal digits")
    digests = tuple(digest.lower() for digest in found)
    if NO_TOKEN_DIGEST in digests:
        raise InvalidValue("is the SHA-256 of an empty text; hash the token")
    return digests


def variables(value: object) -> tuple[str, ...]:
    names = strings(value)
    for index, name in enumerate(names):
        if not _VARIABLE.fullmatch(name):
            raise InvalidValue(f"{quote(name)} is not the name of a variable", below=f"[{index}]")
    return names


def tool_patterns(value: object) -> tuple[str, ...]:
    patterns = strings(value)
    if len(patterns) > MAX_PATTERNS:
        raise InvalidValue(f"must be at most {MAX_PATTERNS} patterns, not {len(patterns)}")
    for index, pattern in enumerate(patterns):
        if (problem := pattern_problem(pattern)) is not None:
            raise InvalidValue(f"{problem}, not {quote(pattern)}", below=f"[{index}]")
    return patterns


def cgroup_parent(value: object) -> str:
    if text(value) and not text(value).startswith("/"):
        raise InvalidValue(f"must be empty or an absolute path, not {quote(value)}")
    return text(value)


def session_file(value: object) -> str:
    if "{value}" not in text(value):
        raise InvalidValue("must contain {value}, which is replaced by the session handle")
    return text(value)


def absolute(value: object) -> str:
    if not filled(value).startswith("/"):
        raise InvalidValue(f"must be an absolute path, not {quote(value)}")
    return filled(value)


def trust(value: object) -> str | None:
    if value == "none":
        return None
    if not isinstance(value, str) or value not in set(Preset):
        words = ", ".join(f'"{preset}"' for preset in Preset)
        raise InvalidValue(f'must be {words} or "none", not {quote(value)}')
    return value


def words_of(kind: type[E]) -> Reader[tuple[E, ...]]:
    def read(value: object) -> tuple[E, ...]:
        found = strings(value)
        if not found:
            raise InvalidValue("must not be empty")
        for index, word in enumerate(found):
            if word not in set(kind):
                known = ", ".join(f'"{member}"' for member in kind)
                raise InvalidValue(f"must be one of {known}, not {quote(word)}", below=f"[{index}]")
        return tuple(map(kind, dict.fromkeys(found)))

    return read


def webhook_url(value: object) -> str:
    return _http_url(value, instead="deliveries are signed")


def collector_url(value: object) -> str:
    url = _http_url(value, instead="headers come from the environment")
    if urlsplit(url).query:
        raise InvalidValue("must not have a query (?…)")
    return url


def http_origins(value: object) -> tuple[str, ...]:
    return tuple(_http_origin(each) for each in _comma_separated(value))


def http_hosts(value: object) -> tuple[str, ...]:
    found = tuple(name.lower() for name in _comma_separated(value))
    for index, each in enumerate(found):
        if not _HOST.fullmatch(each):
            raise InvalidValue(
                f"must be a host name in ASCII, without a port, not {quote(each)}",
                below=f"[{index}]",
            )
    return found


def _http_origin(value: str) -> str:
    """Return an origin as browsers write it."""
    found = _ORIGIN.fullmatch(value.lower())
    if found is None or not (found["ip"] or _HOST.fullmatch(found["name"])):
        raise InvalidValue(f'must be an origin like "https://app.example", not {quote(value)}')
    port = found["port"]
    if port is not None and not 0 < int(port) <= 65_535:
        raise InvalidValue(f"the port must be from 1 to 65535, not {quote(port)}")
    return found[0].removesuffix(":443" if found["scheme"] == "https" else ":80")


def _comma_separated(value: object) -> tuple[str, ...]:
    """Return a list of strings; the text of an environment variable is split at commas."""
    if isinstance(value, str):
        return tuple(each.strip() for each in value.split(","))
    return strings(value)


def ratio(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InvalidValue(f"must be a number from 0 to 1, not {quote(value)}")
    return float(value)


def _http_url(value: object, *, instead: str) -> str:
    # No message quotes the value, because path and query of a webhook can be secret.
    url = filled(value)
    if not _URL.fullmatch(url):
        raise InvalidValue("must be a URL of at most 2048 visible ASCII characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise InvalidValue("must be a URL with a valid host and port") from None
    if parts.scheme not in {"https", "http"}:
        raise InvalidValue("must begin with https:// or http://")
    if parts.username is not None or parts.password is not None:
        raise InvalidValue(f"must not hold a user or a password; {instead}")
    if parts.fragment:
        raise InvalidValue("must not have a fragment (#…)")
    if port == 0 or not (":" in (parts.hostname or "") or _HOST.fullmatch(parts.hostname or "")):
        raise InvalidValue("must name a host, in ASCII, and a port above 0 if it names one")
    return url


def networks(value: object) -> tuple[Network, ...]:
    if isinstance(value, bool):
        return EVERYWHERE if value else ()
    if isinstance(value, str):
        raise InvalidValue("must be true, false, or a list of addresses and networks")
    found: list[Network] = []
    for index, each in enumerate(strings(value)):
        try:
            found.append(ip_network(each))
        except ValueError:
            raise InvalidValue(
                f'must be an address, or a network like "10.0.0.0/8", not {quote(each)}',
                below=f"[{index}]",
            ) from None
    return tuple(found)
