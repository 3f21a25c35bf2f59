"""TLS of the HTTP server, with the certificate that gRPC uses. It notices changes of the files."""

from __future__ import annotations

import asyncio
import ssl
from typing import Final

from runrecovery_service.rpc.certificate_reload import ServerTls
from runrecovery_service.rpc.certificates import Certificate, ssl_context

FOLLOW_S: Final = 1.0
"""The most time for the check of the files before a handshake, because a disk that hangs must not
block it."""


class HttpTls:
    """Makes the context of each new connection. Use it on the event loop."""

    def __init__(self, tls: ServerTls) -> None:
        self._tls = tls
        self._found = tls.present()
        self._context = ssl_context(self._found)
        self._reading: asyncio.Task[Certificate] | None = None

    async def context(self) -> ssl.SSLContext:
        """Return the context for a connection, with the files as they are now."""
        if self._reading is None:
            # One for all: threads that hang would use up those of others.
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
