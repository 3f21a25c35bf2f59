"""An edit changes only the text of a file, and keeps backups of earlier texts."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from runrecovery_service.trust import files, gemini
from runrecovery_service.trust.errors import TrustFileUnusable
from trust.replacing import names, replace_text, side_files


@pytest.mark.parametrize(
    "mode",
    [
        0o600,
        0o644,
        0o640,
        pytest.param(
            0o200,
            marks=pytest.mark.skipif(os.getuid() != 0, reason="only root may read such a file"),
        ),
        0o666,
    ],
)
def test_the_mode_is_kept_and_backups_are_for_the_owner_alone(config: Path, mode: int) -> None:
    config.chmod(mode)

    replace_text(config, b"new")

    assert stat.S_IMODE(config.stat().st_mode) == mode
    assert stat.S_IMODE(files.backup_file(config, 1).stat().st_mode) == mode & 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_owner_and_group_are_kept(config: Path) -> None:
    os.chown(config, 4321, 1234)

    replace_text(config, b"new")

    status = config.stat()
    assert (status.st_uid, status.st_gid, config.read_bytes()) == (4321, 1234, b"new")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize(
    ("uid", "gid", "mode", "left"),
    [(4321, 0, 0o600, b"old"), (0, 1234, 0o660, b"old"), (0, 1234, 0o600, b"new")],
)
def test_an_edit_is_refused_if_the_owner_or_a_group_with_access_would_be_lost(
    config: Path, monkeypatch: pytest.MonkeyPatch, uid: int, gid: int, mode: int, left: bytes
) -> None:
    os.chown(config, uid, gid)
    config.chmod(mode)

    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "fchown", forbidden)
    if left == b"old":
        with pytest.raises(TrustFileUnusable, match="owner_lost"):
            replace_text(config, b"new")
    else:
        replace_text(config, b"new")

    assert config.read_bytes() == left
    assert not [name for name in side_files(config.parent) if name.endswith(".tmp")]


def test_extended_attributes_are_kept(config: Path) -> None:
    try:
        os.setxattr(config, "user.note", b"mine")
    except OSError:
        pytest.skip("this file system has none")

    replace_text(config, b"new")

    assert os.getxattr(config, "user.note") == b"mine"


def test_a_symlink_is_kept_and_its_target_is_replaced(config: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to("home/../home/config.toml")

    replace_text(link, b"new")

    assert link.is_symlink()
    assert config.read_bytes() == b"new"
    assert side_files(tmp_path) == []


def test_a_dangling_symlink_gets_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "dots" / "config.toml")

    replace_text(tmp_path / "link", b"new")

    assert (tmp_path / "dots" / "config.toml").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()


def test_the_last_three_versions_are_kept_the_newest_first(config: Path) -> None:
    for text in (b"1", b"2", b"3", b"4", b"5"):
        replace_text(config, text)

    kept = [files.backup_file(config, age).read_bytes() for age in (1, 2, 3)]
    assert kept == [b"4", b"3", b"2"]
    assert len(side_files(config.parent)) == 3


def test_the_new_file_is_on_disk_before_it_replaces_the_old_one_and_its_name_afterwards(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, replace = os.fsync, os.replace
    synced: list[str] = []
    before_replacement: list[str] = []

    def note_sync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    def note_replacement(source: Path, target: Path) -> None:
        if target == config:
            assert str(source) in synced
            before_replacement.extend(synced)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replacement)
    replace_text(config, b"new")

    assert config.read_bytes() == b"new"
    assert synced[len(before_replacement) :] == [str(config.parent)]


def test_an_edit_that_changes_nothing_writes_nothing(config: Path) -> None:
    before = config.stat()

    replace_text(config, b"old")

    after = config.stat()  # without the time of the last read, which may change
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert side_files(config.parent) == []


def test_a_new_file_and_its_folder_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "config.toml"

    replace_text(path, b"new")

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.stat().st_nlink == 1
    assert side_files(path.parent) == []


def test_a_file_that_an_edit_created_is_removed_with_its_last_entry(tmp_path: Path) -> None:
    path = tmp_path / "trustedFolders.json"
    edit = files.edit(path, lambda text: gemini.EDITOR.add(text, "/w"))
    assert path.exists()

    files.edit(path, lambda text: gemini.EDITOR.remove(text, "/w", edit.added))

    assert not path.exists()


def test_a_removal_creates_no_missing_folder(tmp_path: Path) -> None:
    replace_text(tmp_path / "none" / "config.toml", None)

    assert names(tmp_path) == []
