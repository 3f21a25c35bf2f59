"""The bearer token of a caller, as metadata of each call."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import grpc

from runrecovery._channel import is_on_this_machine
from runrecovery.errors import ErrorDetails, TokenUnusable

Metadata: TypeAlias = "tuple[tuple[str, str], ...]"

_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""The characters of RFC 6750."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BearerToken:
    """A token, or the file that holds it. The file is read for each call, so it can be replaced."""

    token: str | None = field(default=None, repr=False)
    file: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.token is not None and self.file is not None:
            raise TypeError("give token or token_file, not both")
        if self.token is not None:
            _checked(self.token, "token")

    @property
    def is_given(self) -> bool:
        """True if calls carry a token."""
        return self.token is not None or self.file is not None

    def metadata(self) -> Metadata | None:
        """Return the metadata of the next call; None without a token.

        Raises:
            TokenUnusable: the file cannot be read, or holds no token.
        """
        if self.token is not None:
            return (("authorization", f"Bearer {self.token}"),)
        if self.file is None:
            return None
        try:
            text = Path(self.file).read_text(encoding="utf-8", errors="replace").strip()
            return (("authorization", f"Bearer {_checked(text, str(self.file))}"),)
        except OSError as error:
            raise _unusable(f"{self.file}: {error.strerror}") from error
        except ValueError as error:
            raise _unusable(str(error)) from error


def _unusable(text: str) -> TokenUnusable:
    return TokenUnusable(text, details=ErrorDetails(code=grpc.StatusCode.UNAUTHENTICATED))


def _checked(text: str, source: str) -> str:
    if not _TOKEN.fullmatch(text):  # the text itself is a secret
        raise ValueError(f"{source}: is not a token (one line of letters, digits and -._~+/=)")
    return text


def demand_encrypted(token: BearerToken, target: str) -> None:
    """Raise ValueError if a plaintext channel would carry the token to another machine."""
    if token.is_given and not is_on_this_machine(target):
        raise ValueError(f"a token would be sent to {target} without encryption; give tls=")
