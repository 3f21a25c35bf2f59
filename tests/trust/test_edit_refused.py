"""An edit that is refused or that fails leaves the file as it was."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from runrecovery_service.trust import files
from runrecovery_service.trust.errors import (
    TrustFileOutOfReach,
    TrustFileUnusable,
    UnusableReason,
)
from trust.replacing import replace_text, side_files

NOBODY = 65534


def _make_fifo(path: Path) -> None:
    os.mkfifo(path)


def _make_folder(path: Path) -> None:
    path.mkdir()


def _make_hard_link(path: Path) -> None:
    path.write_bytes(b"old")
    os.link(path, path.with_name("other"))


def _make_too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(files.MAX_BYTES + 1)


def _make_read_only(path: Path) -> None:
    path.write_bytes(b"old")
    path.chmod(0o444)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_make_fifo, UnusableReason.NOT_REGULAR),
        (_make_folder, UnusableReason.NOT_REGULAR),
        (_make_hard_link, UnusableReason.LINKED),
        (_make_too_large, UnusableReason.TOO_LARGE),
        (_make_read_only, UnusableReason.READ_ONLY),
    ],
)
def test_a_file_that_cannot_be_replaced_is_refused_and_unchanged(
    tmp_path: Path, make: Callable[[Path], None], reason: UnusableReason
) -> None:
    path = tmp_path / "config.toml"
    make(path)
    before = path.lstat()

    with pytest.raises(TrustFileUnusable) as refused:
        replace_text(path, b"new")

    assert refused.value.reason is reason
    assert (path.lstat().st_ino, path.lstat().st_size) == (before.st_ino, before.st_size)
    assert side_files(tmp_path) == []


def test_a_circle_of_symlinks_is_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")

    with pytest.raises(TrustFileOutOfReach) as refused:
        replace_text(tmp_path / "a", b"new")

    assert refused.value.errno == errno.ELOOP


@contextmanager
def as_nobody() -> Iterator[None]:
    """Run the block as an unprivileged user; the tests may run as root."""
    if os.getuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_out_of_reach() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "config.toml"
        path.write_bytes(b"old")
        path.chmod(0o666)
        Path(name).chmod(0o555)

        with as_nobody(), pytest.raises(TrustFileOutOfReach) as refused:
            replace_text(path, b"new")
        Path(name).chmod(0o755)

        assert refused.value.errno == errno.EACCES
        assert path.read_bytes() == b"old"


def test_a_file_that_the_service_may_not_read_is_out_of_reach(config: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        path = Path(name) / "config.toml"
        path.write_bytes(b"old")
        path.chmod(0)

        with as_nobody(), pytest.raises(TrustFileOutOfReach) as refused:
            replace_text(path, b"new")

        assert refused.value.errno == errno.EACCES


@pytest.mark.parametrize("step", ["fsync", "replace", "fchmod"])
def test_a_step_that_fails_leaves_the_old_file_and_nothing_else(
    config: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr(os, step, full)
        with pytest.raises(TrustFileOutOfReach) as refused:
            replace_text(config, b"new")

    assert refused.value.errno == errno.ENOSPC
    assert config.read_bytes() == b"old"
    assert side_files(config.parent) == []
