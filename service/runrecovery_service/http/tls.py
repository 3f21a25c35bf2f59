"""TLS of the HTTP server, with the certificate that gRPC uses. Changed files are read again."""

from __future__ import annotations

import asyncio
import ssl
from typing import Final

from runrecovery_service.rpc.certificate_reload import ServerTls
from runrecovery_service.rpc.certificates import Certificate, ssl_context

FOLLOW_S: Final = 1.0
"""The most seconds that a handshake waits for the check of the files. A disk that hangs must not
block the handshake."""


class HttpTls:
    """Returns the TLS context of each new connection. Use it on the event loop."""

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._found = tls.present()
        self._context = ssl_context(self._found)
        self._reading: asyncio.Task[Certificate] | None = None

    async def context(self) -> ssl.SSLContext:
        """Return the context for a connection, after at most `FOLLOW_S` for reading the files."""
        if self._reading is None:
            # One read for all connections: each read that hangs would block one more thread.
            self._reading = asyncio.create_task(asyncio.to_thread(self._tls.present))
        reading = self._reading
        await asyncio.wait({reading}, timeout=FOLLOW_S)
        if reading.done():
            if self._reading is reading:
                self._reading = None
            self._use(reading.result())
        return self._context

    def _use(self, found: Certificate) -> None:
        if found is not self._found:
            self._context = ssl_context(found)
            self._found = found
