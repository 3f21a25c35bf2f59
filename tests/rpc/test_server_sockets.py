"""The search for the server's own sockets leaves other files and connections alone."""

from __future__ import annotations

import fcntl
import socket
import subprocess
import sys
from pathlib import Path

from runrecovery_service.rpc import server_sockets

TRY_TO_LOCK = """
import fcntl, sys
with open(sys.argv[1], "r+b") as file:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
"""


def test_the_search_for_sockets_keeps_the_file_locks_of_the_process(
    tmp_path: Path,
) -> None:
    path = tmp_path / "database"
    with path.open("wb") as file, socket.create_server(("127.0.0.1", 0)) as listener:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

        names = []
        for one in server_sockets._stream_sockets():
            names.append(one.getsockname())
            one.close()

        other = subprocess.run(
            [sys.executable, "-c", TRY_TO_LOCK, path], capture_output=True, check=False, text=True
        )
        assert listener.getsockname() in names
    assert "BlockingIOError" in other.stderr


async def test_a_connection_to_another_server_with_the_same_port_is_left_alone() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_server(("127.0.0.3", 0)) as elsewhere,
    ):
        port = listener.getsockname()[1]
        ours = server_sockets.ServerSockets(port)
        with (
            socket.create_connection(
                elsewhere.getsockname(), source_address=("127.0.0.2", port)
            ) as connection,
            elsewhere.accept()[0] as other_end,
            socket.create_connection(listener.getsockname()) as caller,
            listener.accept()[0],
        ):
            ours._shut_down_connections()

            connection.sendall(b"still open")
            assert other_end.recv(100) == b"still open"
            assert caller.recv(100) == b""
