"""Servers that live as long as a `with` block: the service itself, and the floors beside it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Final

STOP_S: Final = 15.0

# One agent that does nothing holds the only slot, so that runs which are created stay queued.
CERTIFICATE: Final = "bench.pem"
TOKEN: Final = secrets.token_hex(32)
CONFIG: Final = """\
max_concurrent = 1
max_queued = 10000000
cancel_grace_s = 0.2

[engines.demo]
command = ["/bin/sleep", "3600"]
profile = "resumable"
"""

_WITHOUT: Final = (
    "import sys; sys.modules.update(dict.fromkeys(({names}))); "
    "from runrecovery_service.cli import main; main()"
)


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers at `address`.

    Attributes:
        ca: the certificate that clients trust; None: plaintext.
        token: the token of the only caller; empty: everyone may call.
    """

    address: str
    pid: int
    ca: Path | None = None
    token: str = ""


def secure_config(folder: Path) -> str:
    """Return a configuration with TLS, one caller and metrics.

    The certificate is in the folder.
    """
    certificate, key = folder / CERTIFICATE, folder / "bench.key"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
            "-nodes", "-days", "1", "-subj", "/CN=bench", "-addext", "subjectAltName=IP:127.0.0.1",
            "-keyout", key, "-out", certificate,
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    digest = sha256(TOKEN.encode()).hexdigest()
    return (
        f'metrics_listen = "127.0.0.1:0"\n{CONFIG}\n'
        f'[tls]\ncertificate = "{certificate}"\nkey = "{key}"\n\n[[callers]]\n'
        f'name = "bench"\nrole = "operator"\ntoken_sha256 = "{digest}"\n'
    )


def service_command(*, hidden: Sequence[str] = ()) -> list[str]:
    """Return the command of the service. `hidden`: modules that it must not find."""
    if not hidden:
        return [sys.executable, "-m", "runrecovery_service"]
    names = "".join(f"{name!r}, " for name in hidden)
    return [sys.executable, "-c", _WITHOUT.format(names=names)]


@contextmanager
def service(
    data_dir: Path, *, config: str = CONFIG, hidden: Sequence[str] = (), until: str
) -> Iterator[Server]:
    """Run the service on a store in `data_dir`, from the event `until` in its log on."""
    file = data_dir / "bench.toml"
    file.write_text(config)
    command = [
        *service_command(hidden=hidden), "serve", "--config", str(file), "--data-dir",
        str(data_dir), "--listen", "127.0.0.1:0", "--log-format", "json",
    ]  # fmt: skip
    with _process(command, stream="stderr") as popen:
        address = ""
        for line in popen.stderr or ():
            event = json.loads(line)
            address = event.get("address", address)
            if event["event"] == until:
                break
        else:
            raise ChildProcessError(f"the service ended before {until}")
        # If nobody read the log, the service would stop once the pipe is full.
        threading.Thread(target=_drain, args=(popen.stderr,), daemon=True).start()
        if "[tls]" in config:
            yield Server(address, popen.pid, ca=data_dir.parent / CERTIFICATE, token=TOKEN)
        else:
            yield Server(address, popen.pid)


def _drain(stream: IO[bytes] | None) -> None:
    for _ in stream or ():
        pass


@contextmanager
def floor(script: str, *arguments: str) -> Iterator[Server]:
    """Run a Python program that prints its address once it answers there."""
    with _process([sys.executable, "-c", script, *arguments], stream="stdout") as popen:
        line = popen.stdout.readline() if popen.stdout else b""
        if not line:
            raise ChildProcessError("the floor did not start")
        yield Server(line.decode().strip(), popen.pid)


@contextmanager
def _process(command: Sequence[str], *, stream: str) -> Iterator[subprocess.Popen[bytes]]:
    to: Mapping[str, int] = {stream: subprocess.PIPE}
    popen = subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, **to)  # type: ignore[call-overload] # of a mapping it knows nothing
    try:
        yield popen
    finally:
        popen.terminate()
        try:
            popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()
