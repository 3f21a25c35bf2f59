"""A secret in standard error is hidden even if the service reads it in two pieces."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from runrecovery_service.execution.agent_io import AgentIO
from support.waiting import until_async

SECRET = b"s3cret"


@pytest.mark.parametrize("first_bytes", [1, 3, 5])
async def test_a_secret_that_arrives_in_two_pieces_is_not_kept(first_bytes: int) -> None:
    kept: list[bytes] = []
    listener: Any = SimpleNamespace(
        max_secret_bytes=len(SECRET),
        redact=lambda text: text.replace(SECRET, b"[hidden]"),
        hear_stderr=lambda _: (),
    )
    output: Any = SimpleNamespace(append=lambda *args: kept.append(args[-1]))
    log: Any = SimpleNamespace(run=SimpleNamespace(key=1, attempt=1))
    reads, writes = os.pipe()
    stderr = SimpleNamespace(fileno=lambda: reads)
    process: Any = SimpleNamespace(spool=SimpleNamespace(end=0), stderr=stderr)
    with ThreadPoolExecutor(1) as threads:
        io = AgentIO(
            process=process,
            listener=listener,
            max_line_bytes=1000,
            events=asyncio.Queue(),
            output=output,
            threads=threads,
            log=log,
            journal=Path("/nowhere"),
        )
        reading = asyncio.create_task(io.read_stderr())
        os.write(writes, b"the session is " + SECRET[:first_bytes])

        async def is_first_piece_kept() -> bool:
            return bool(kept)

        await until_async(is_first_piece_kept, "the first piece is kept")
        os.write(writes, SECRET[first_bytes:] + b".")
        os.close(writes)
        await reading
    os.close(reads)

    assert b"".join(kept) == b"the session is [hidden]."
