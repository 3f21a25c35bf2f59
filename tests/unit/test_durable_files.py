"""A file that must survive a power cut is synced, and so is its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from runrecovery_service.storage.durable_files import durably_write


def test_a_durable_write_syncs_the_whole_file_and_then_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "note"
    synced: list[tuple[Path, bytes]] = []

    def note(descriptor: int) -> None:
        place = Path(f"/proc/self/fd/{descriptor}").resolve()
        synced.append((place, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", note)

    durably_write(path, b"commits are lost\n")

    assert synced == [(path, b"commits are lost\n"), (tmp_path, b"commits are lost\n")]
