"""The lock of an edit, and the temporary files that a killed edit leaves."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest
from runrecovery_service.trust import files, locks
from runrecovery_service.trust.errors import TrustFileBusy, TrustFileOutOfReach
from trust.replacing import names, no_pause, replace_text


def test_an_edit_waits_for_the_lock_and_then_fails_as_busy(config: Path) -> None:
    pauses: list[float] = []
    with files.lock_file(config).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        with pytest.raises(TrustFileBusy):
            replace_text(config, b"new", lock_wait_s=0.05, pause=pauses.append)

    assert (config.read_bytes(), len(pauses)) == (b"old", 5)


def test_an_edit_continues_when_the_lock_is_released(config: Path) -> None:
    held = files.lock_file(config).open("w")
    fcntl.flock(held, fcntl.LOCK_EX)

    replace_text(config, b"new", pause=lambda _: held.close())

    assert config.read_bytes() == b"new"


def test_a_file_and_a_symlink_to_it_share_one_lock(config: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(config)
    with files.lock_file(config).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        with pytest.raises(TrustFileBusy):
            replace_text(tmp_path / "link", b"new", lock_wait_s=0)


def test_a_pipe_at_the_path_of_the_lock_is_refused_at_once(config: Path) -> None:
    os.mkfifo(files.lock_file(config))

    with pytest.raises(TrustFileOutOfReach):
        replace_text(config, b"new")

    assert config.read_bytes() == b"old"


def test_temporary_files_of_a_killed_edit_are_removed(config: Path) -> None:
    left = config.parent / ".runrecovery.config.toml.0123456789abcdef.tmp"
    left.write_bytes(b"half")
    others = config.parent / ".runrecovery.config.toml2.0123456789abcdef.tmp"
    others.write_bytes(b"of another file")

    replace_text(config, b"old")

    assert not left.exists()
    assert others.exists()


def test_a_lock_file_that_is_removed_before_it_is_acquired_does_not_count(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_text(config, b"new")
    lock, others, opened = files.lock_file(config), list[int](), locks._open

    def open_late(path: Path) -> int:
        """Open the lock file; then another process replaces it and acquires the new one."""
        ours = opened(path)
        if not others:
            lock.unlink()
            others.append(os.open(lock, os.O_RDWR | os.O_CREAT, 0o600))
            fcntl.flock(others[0], fcntl.LOCK_EX)
        return ours

    monkeypatch.setattr(locks, "_open", open_late)
    with pytest.raises(TrustFileBusy):
        replace_text(config, b"newer", pause=no_pause, lock_wait_s=0.1)
    os.close(others[0])

    replace_text(config, b"newer")
    assert config.read_bytes() == b"newer"


def test_files_that_only_resemble_temporary_files_are_kept(config: Path) -> None:
    stem = f".runrecovery.{config.name}"
    kept = [f"{stem}.mine.tmp", f"{stem}.0123456789ABCDEF.tmp", f"{stem}.d.0123456789abcdef.tmp"]
    for name in [*kept, f"{stem}.0123456789abcdef.tmp"]:
        (config.parent / name).write_bytes(b"")

    replace_text(config, b"new")

    assert [name for name in names(config.parent) if name.endswith(".tmp")] == sorted(kept)
