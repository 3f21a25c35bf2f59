"""An edit loses no text that other programs write to the file meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from runrecovery_service.trust import files, gemini
from runrecovery_service.trust.entry import Edit, Removal
from runrecovery_service.trust.errors import (
    TrustFileBusy,
    TrustFileUnusable,
    UnusableReason,
)
from trust.replacing import NewText, no_pause, replace_text, side_files


def _replace(path: Path, text: bytes) -> None:
    new = path.with_name("cli.tmp")
    new.write_bytes(text)
    new.replace(path)


def _write_in_place(path: Path, text: bytes) -> None:
    path.write_bytes(text)


def _write_with_the_same_size_and_time(path: Path, text: bytes) -> None:
    """Keep size and modification time: only the bytes and the change time differ."""
    status = path.stat()
    path.write_bytes(text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("write", [_replace, _write_in_place, _write_with_the_same_size_and_time])
def test_text_that_another_program_writes_during_an_edit_is_not_lost(
    config: Path, write: Callable[[Path, bytes], None]
) -> None:
    seen: list[bytes | None] = []

    def decide(text: bytes | None) -> NewText:
        seen.append(text)
        return NewText((text or b"") + b"+ours")

    def meanwhile(_: NewText) -> None:
        if len(seen) == 1:
            write(config, b"CLI")

    files.edit(config, decide, record=meanwhile, pause=no_pause)

    assert seen == [b"old", b"CLI"]
    assert config.read_bytes() == b"CLI+ours"
    assert files.backup_file(config, 1).read_bytes() == b"CLI"


def test_a_write_right_after_the_last_read_is_noticed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = files._read, []

    def read_then_write(target: Path) -> object:
        seen = read(target)
        reads.append(seen)
        if len(reads) == 2:
            _replace(target, b"CLI")
        return seen

    monkeypatch.setattr(files, "_read", read_then_write)
    files.edit(config, lambda text: NewText((text or b"") + b"+ours"), pause=no_pause)

    assert config.read_bytes() == b"CLI+ours"


def test_a_write_that_changes_no_file_time_is_noticed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_of = files._State.of
    timeless = staticmethod(lambda status: replace(state_of(status), mtime_ns=0, ctime_ns=0))
    monkeypatch.setattr(files._State, "of", timeless)
    texts = iter([b"CLI"])

    def meanwhile(_: NewText) -> None:
        for text in texts:
            config.write_bytes(text)

    files.edit(
        config, lambda text: NewText((text or b"")[:3] + b"+"), record=meanwhile, pause=no_pause
    )

    assert config.read_bytes() == b"CLI+"


def test_a_file_that_another_program_creates_during_an_edit_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    seen: list[bytes | None] = []

    def decide(text: bytes | None) -> NewText:
        seen.append(text)
        return NewText((text or b"") + b"+ours")

    def meanwhile(_: NewText) -> None:
        if len(seen) == 1:
            path.write_bytes(b"CLI")

    files.edit(path, decide, record=meanwhile, pause=no_pause)

    assert path.read_bytes() == b"CLI+ours"


def test_a_file_that_another_program_creates_just_before_the_edit_does_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.toml"
    link = os.link

    def link_late(source: Path, target: Path) -> None:
        if not path.exists():
            path.write_bytes(b"CLI")
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    files.edit(path, lambda text: NewText((text or b"") + b"+ours"), pause=no_pause)

    assert path.read_bytes() == b"CLI+ours"


def test_an_edit_decides_again_if_the_file_is_removed_meanwhile(config: Path) -> None:
    seen: list[bytes | None] = []

    def decide(text: bytes | None) -> NewText:
        seen.append(text)
        return NewText(b"new")

    def meanwhile(_: NewText) -> None:
        if len(seen) == 1:
            config.unlink()

    files.edit(config, decide, record=meanwhile, pause=no_pause)

    assert seen == [b"old", None]


def test_an_edit_fails_as_busy_if_the_file_keeps_changing(config: Path) -> None:
    count = iter(range(1000))

    with pytest.raises(TrustFileBusy):
        replace_text(
            config,
            b"new",
            record=lambda _: config.write_bytes(b"CLI %d" % next(count)),
            pause=no_pause,
        )

    assert config.read_bytes() == b"CLI %d" % (files.TRIES - 1)
    assert side_files(config.parent) == []


def test_a_symlink_that_is_redirected_during_an_edit_is_not_followed(
    config: Path, tmp_path: Path
) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(config)
    other.write_bytes(b"other")

    def redirect(_: NewText) -> None:
        link.unlink()
        link.symlink_to(other)

    with pytest.raises(TrustFileBusy):
        replace_text(link, b"new", record=redirect)

    assert (config.read_bytes(), other.read_bytes()) == (b"old", b"other")


@pytest.mark.parametrize("half", [b"", b'{"a": 1', b'{"\xe6'])
def test_an_edit_waits_for_a_half_written_file(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "trustedFolders.json"
    path.write_bytes(half)

    def write_the_rest(_: float) -> None:
        path.write_bytes(b'{"a": 1}')

    files.edit(path, lambda text: gemini.EDITOR.add(text, "/w"), pause=write_the_rest)

    assert path.read_bytes() == b'{"a": 1,"/w": "TRUST_FOLDER"}'


def test_a_file_that_stays_unparsable_is_refused_and_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "trustedFolders.json"
    path.write_bytes(b'{"a": 1')

    with pytest.raises(TrustFileUnusable) as refused:
        files.edit(path, lambda text: gemini.EDITOR.add(text, "/w"), pause=no_pause)

    assert refused.value.reason is UnusableReason.NOT_PARSABLE
    assert path.read_bytes() == b'{"a": 1'
    assert side_files(tmp_path) == []


def test_a_file_that_stays_empty_gets_the_entry_and_is_empty_after_its_removal(
    tmp_path: Path,
) -> None:
    path = tmp_path / "trustedFolders.json"
    path.touch()
    edit: Edit = files.edit(path, lambda t: gemini.EDITOR.add(t, "/w"), pause=no_pause)

    removal: Removal = files.edit(path, lambda t: gemini.EDITOR.remove(t, "/w", edit.added))

    assert (removal.text, path.read_bytes()) == (b"", b"")


def test_an_edit_waits_for_a_file_that_an_editor_has_renamed_away(config: Path) -> None:
    aside = config.with_name("config.toml~")
    config.rename(aside)
    seen: list[bytes | None] = []

    def write_anew(_: float) -> None:
        config.write_bytes(b"theirs")

    def decide(text: bytes | None) -> NewText:
        seen.append(text)
        return NewText(text)

    files.edit(config, decide, pause=write_anew)

    assert seen == [b"theirs"]
