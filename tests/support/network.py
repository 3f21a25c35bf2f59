"""A network namespace of one test, in which packets to and from its database can be dropped.

It needs no root where the system lets users make namespaces.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from psycopg.conninfo import conninfo_to_dict

from support.pg_proxy import proxied

IS_ROOT: Final = os.geteuid() == 0
SIOCSIFFLAGS: Final = 0x8914
UP_AND_RUNNING: Final = 0x1 | 0x40
_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # users lack the latter two
_RULES: Final = """
table inet test {
  chain arriving {
    type filter hook input priority 0;
    tcp dport %(port)s counter drop
    tcp sport %(port)s counter drop
  }
}
"""


def why_no_network() -> str | None:
    """Return why there can be no such network here, or None."""
    missing = [word for word in ("unshare", "nsenter", "nft") if not _found(word)]
    if missing:
        return f"{missing[0]} is not installed"
    command = [*_unshare(), _found("nft"), "list", "ruleset"]
    tried = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    return f"no namespaces: {tried.stderr.decode().strip()}" if tried.returncode else None


class Network:
    """A network namespace with a path to the database.

    Attributes:
        url: the URL of the database for processes in the network.
        prefix: words before a command that run it in the network.
    """

    def __init__(self, pid: int, url: str) -> None:
        self.url = url
        as_root = () if IS_ROOT else ("--user", "--preserve-credentials")
        self.prefix = (_found("nsenter"), "--target", str(pid), "--net", *as_root)
        self._rules = _RULES % {"port": conninfo_to_dict(url)["port"]}

    def drop(self) -> None:
        """Drop every packet to and from the database from now on."""
        self._nft("-f", "-", given=self._rules)

    def restore(self) -> None:
        """Drop no packet any more."""
        self._nft("delete", "table", "inet", "test")

    def dropped(self) -> int:
        """Return how many packets were dropped so far."""
        listed = self._nft("list", "table", "inet", "test")
        return sum(map(int, re.findall(r"counter packets (\d+)", listed)))

    def _nft(self, *words: str, given: str = "") -> str:
        command = [*self.prefix, _found("nft"), *words]
        return subprocess.run(
            command, input=given, stdout=subprocess.PIPE, text=True, check=True
        ).stdout


@contextmanager
def own_network(database_url: str) -> Iterator[Network]:
    """Yield a network with a path to the server of a URL that names a socket directory."""
    command = [*_unshare(), sys.executable, "-m", "support.network", database_url]
    tests = Path(__file__).parents[1]
    with subprocess.Popen(
        command, cwd=tests, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as keeper:
        assert keeper.stdout is not None
        url = keeper.stdout.readline().rstrip("\n")
        assert url, "the network was not made"
        try:
            yield Network(keeper.pid, url)
        finally:
            keeper.communicate()  # closes its input, by which it ends


def _unshare() -> tuple[str, ...]:
    # Root itself would lose its way to the server's files, which belong to another user.
    return (_found("unshare"), "--net", *(() if IS_ROOT else ("--user", "--map-root-user")))


def _found(program: str) -> str:
    return shutil.which(program, path=_PATH) or ""


def main() -> None:
    """Keep the network, in whose namespaces this process is, until standard input closes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", UP_AND_RUNNING))
    with proxied(sys.argv[1]) as proxy:
        print(proxy.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
