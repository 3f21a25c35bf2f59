"""The moments and arguments with which an edit calls `begin`, `record` and `done`."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest
from runrecovery_service.trust import files
from runrecovery_service.trust.errors import TrustFileUnusable
from trust.replacing import NewText, names, replace_text, side_files


def test_record_is_called_before_the_file_changes(config: Path) -> None:
    found: list[tuple[bytes | None, bytes]] = []

    replace_text(
        config, b"new", record=lambda change: found.append((change.text, config.read_bytes()))
    )

    assert found == [(b"new", b"old")]


@pytest.mark.parametrize("text", [b"new", b"old", None], ids=["new", "as it was", "gone"])
def test_done_is_called_once_under_the_lock_after_the_file_has_changed(
    config: Path, text: bytes | None
) -> None:
    config.write_bytes(b"old")
    found = []

    def done(change: NewText) -> None:
        with files.lock_file(config).open("rb") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found.append((change.text, config.read_bytes() if config.exists() else None))

    replace_text(config, text, done=done)

    assert found == [(text, text)]


def test_done_is_called_for_a_removal_where_there_is_no_folder(tmp_path: Path) -> None:
    found: list[bytes | None] = []

    replace_text(tmp_path / "none" / "config", None, done=lambda change: found.append(change.text))

    assert found == [None]
    assert names(tmp_path) == []


def test_done_is_not_called_for_a_refused_edit(config: Path) -> None:
    config.chmod(0o400)
    found: list[NewText] = []

    with pytest.raises(TrustFileUnusable):
        replace_text(config, b"new", done=found.append)

    assert found == []


def test_the_file_is_unchanged_if_record_raises(config: Path) -> None:
    def fail(_: NewText) -> None:
        raise LookupError("the database is unreachable")

    with pytest.raises(LookupError):
        replace_text(config, b"new", record=fail)

    assert config.read_bytes() == b"old"
    assert side_files(config.parent) == []


def test_each_file_has_one_token_that_no_other_file_has(config: Path, tmp_path: Path) -> None:
    begun: list[str | None] = []
    other = tmp_path / "other"

    for path in (config, config, other):
        files.edit(path, lambda _: NewText(b"new"), begin=begun.append)

    assert begun == [begun[0], begun[0], begun[2]]
    assert [files.token_of(path) for path in (config, other)] == [begun[0], begun[2]]
    assert len({*begun, None}) == 3
    assert files.token_of(tmp_path / "nowhere") is None


def test_a_truncated_token_is_replaced(config: Path) -> None:
    files.lock_file(config).write_bytes(b"0123")
    replace_text(config, b"new")
    assert len(files.token_of(config) or "") == 32


@pytest.mark.parametrize("folder", [True, False], ids=["no lock", "no folder"])
def test_without_make_a_file_that_was_never_edited_is_not_touched(
    config: Path, tmp_path: Path, *, folder: bool
) -> None:
    path = config if folder else tmp_path / "nowhere" / "config.toml"
    begun: list[str | None] = []
    seen: list[bytes | None] = []

    def decide(text: bytes | None) -> NewText:
        seen.append(text)
        return NewText(text)

    before = names(tmp_path), names(config.parent)
    files.edit(path, decide, begin=begun.append, make=False)

    assert (begun, seen) == ([None], [None])
    assert (names(tmp_path), names(config.parent)) == before
