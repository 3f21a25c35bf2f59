"""A file is replaced as a whole or not at all, and stays what it was besides."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypedDict, Unpack

import pytest
from runrecovery_service.trust import files, gemini, locks
from runrecovery_service.trust.entry import Edit, Removal
from runrecovery_service.trust.errors import (
    TrustFileBusy,
    TrustFileOutOfReach,
    TrustFileUnusable,
    UnusableReason,
)

NOBODY = 65534


@dataclass(frozen=True, slots=True)
class To:
    """A change to a given text."""

    text: bytes | None


class How(TypedDict, total=False):
    """The options of an edit."""

    record: Callable[[To], object]
    done: Callable[[To], object]
    side_folders: files.SideFolders
    lock_wait_s: float
    pause: Callable[[float], object]


def put(path: Path, text: bytes | None, **how: Unpack[How]) -> To:
    return files.edit(path, lambda _: To(text), **how)


def ours(folder: Path) -> list[str]:
    """Names of what an edit has left beside the file, the lock aside."""
    found = [name for name in names(folder) if "runrecovery" in name]
    return [name for name in found if not name.endswith(".lock")]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "config.toml"
    path.parent.mkdir()
    path.write_bytes(b"old")
    return path


def no_waiting(_: float) -> None:
    """For tests in which nobody will come."""


# -- what stays ------------------------------------------------------------------------------------


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
def test_the_mode_stays_and_backups_are_for_the_owner_alone(config: Path, mode: int) -> None:
    config.chmod(mode)

    put(config, b"new")

    assert stat.S_IMODE(config.stat().st_mode) == mode
    assert stat.S_IMODE(files.backup_file(config, 1).stat().st_mode) == mode & 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_owner_and_group_stay(config: Path) -> None:
    os.chown(config, 4321, 1234)

    put(config, b"new")

    status = config.stat()
    assert (status.st_uid, status.st_gid, config.read_bytes()) == (4321, 1234, b"new")


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
@pytest.mark.parametrize(
    ("uid", "gid", "mode", "left"),
    [(4321, 0, 0o600, b"old"), (0, 1234, 0o660, b"old"), (0, 1234, 0o600, b"new")],
)
def test_a_file_is_refused_if_it_would_lose_an_owner_that_matters(
    config: Path, monkeypatch: pytest.MonkeyPatch, uid: int, gid: int, mode: int, left: bytes
) -> None:
    os.chown(config, uid, gid)
    config.chmod(mode)

    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(os, "fchown", forbidden)
    if left == b"old":
        with pytest.raises(TrustFileUnusable, match="owner_lost"):
            put(config, b"new")
    else:
        put(config, b"new")

    assert config.read_bytes() == left
    assert not [name for name in ours(config.parent) if name.endswith(".tmp")]


def test_extended_attributes_stay(config: Path) -> None:
    try:
        os.setxattr(config, "user.note", b"mine")
    except OSError:
        pytest.skip("this file system has none")

    put(config, b"new")

    assert os.getxattr(config, "user.note") == b"mine"


def test_a_link_stays_and_what_it_leads_to_is_changed(config: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.toml"
    link.symlink_to("home/../home/config.toml")

    put(link, b"new")

    assert link.is_symlink()
    assert config.read_bytes() == b"new"
    assert ours(tmp_path) == []


def test_a_link_to_nothing_is_filled_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "dots" / "config.toml")

    put(tmp_path / "link", b"new")

    assert (tmp_path / "dots" / "config.toml").read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()


def test_the_last_three_versions_are_kept_the_newest_first(config: Path) -> None:
    for text in (b"1", b"2", b"3", b"4", b"5"):
        put(config, text)

    kept = [files.backup_file(config, age).read_bytes() for age in (1, 2, 3)]
    assert kept == [b"4", b"3", b"2"]
    assert len(ours(config.parent)) == 3


def test_locks_and_backups_can_lie_elsewhere(config: Path, tmp_path: Path) -> None:
    places = files.SideFolders(locks=tmp_path / "locks", backups=tmp_path / "backups")

    put(config, b"new", side_folders=places)

    assert names(config.parent) == ["config.toml"]
    assert files.backup_file(config, 1, places).read_bytes() == b"old"
    assert files.lock_file(config, places).exists()
    assert stat.S_IMODE((tmp_path / "backups").stat().st_mode) == 0o700


def test_nothing_is_written_when_nothing_changes(config: Path) -> None:
    before = config.stat()

    put(config, b"old")

    after = config.stat()  # without the time of the last reading, which may change
    assert (after.st_ino, after.st_ctime_ns) == (before.st_ino, before.st_ctime_ns)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert ours(config.parent) == []


def test_a_new_file_is_for_its_owner_alone_and_its_folder_too(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "config.toml"

    put(path, b"new")

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert path.stat().st_nlink == 1
    assert ours(path.parent) == []


def test_a_file_of_our_making_is_gone_after_its_last_entry(tmp_path: Path) -> None:
    path = tmp_path / "trustedFolders.json"
    edit = files.edit(path, lambda text: gemini.EDITOR.add(text, "/w"))
    assert path.exists()

    files.edit(path, lambda text: gemini.EDITOR.remove(text, "/w", edit.added))

    assert not path.exists()


def test_removing_from_a_home_that_is_not_there_makes_none(tmp_path: Path) -> None:
    put(tmp_path / "none" / "config.toml", None)

    assert names(tmp_path) == []


def test_a_decision_is_on_record_before_it_is_in_the_file(config: Path) -> None:
    found: list[tuple[bytes | None, bytes]] = []

    put(config, b"new", record=lambda change: found.append((change.text, config.read_bytes())))

    assert found == [(b"new", b"old")]


@pytest.mark.parametrize("text", [b"new", b"old", None], ids=["new", "as it was", "gone"])
def test_what_is_done_is_told_once_under_the_lock_when_the_file_holds_it(
    config: Path, text: bytes | None
) -> None:
    config.write_bytes(b"old")
    found = []

    def tell(change: To) -> None:
        with files.lock_file(config).open("rb") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found.append((change.text, config.read_bytes() if config.exists() else None))

    put(config, text, done=tell)

    assert found == [(text, text)]


def test_what_is_done_is_told_where_there_is_no_folder(tmp_path: Path) -> None:
    found: list[bytes | None] = []

    put(tmp_path / "none" / "config", None, done=lambda change: found.append(change.text))

    assert found == [None]
    assert names(tmp_path) == []


def test_nothing_is_told_to_be_done_that_was_refused(config: Path) -> None:
    config.chmod(0o400)
    found: list[To] = []

    with pytest.raises(TrustFileUnusable):
        put(config, b"new", done=found.append)

    assert found == []


def test_a_record_that_fails_leaves_the_file(config: Path) -> None:
    def fail(_: To) -> None:
        raise LookupError("the database is away")

    with pytest.raises(LookupError):
        put(config, b"new", record=fail)

    assert config.read_bytes() == b"old"
    assert ours(config.parent) == []


# -- what is refused -------------------------------------------------------------------------------


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _two_names(path: Path) -> None:
    path.write_bytes(b"old")
    os.link(path, path.with_name("other"))


def _large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(files.MAX_BYTES + 1)


def _read_only(path: Path) -> None:
    path.write_bytes(b"old")
    path.chmod(0o444)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_fifo, UnusableReason.NOT_REGULAR),
        (_folder, UnusableReason.NOT_REGULAR),
        (_two_names, UnusableReason.LINKED),
        (_large, UnusableReason.TOO_LARGE),
        (_read_only, UnusableReason.READ_ONLY),
    ],
)
def test_such_a_file_is_left_as_it_is(
    tmp_path: Path, make: Callable[[Path], None], reason: UnusableReason
) -> None:
    path = tmp_path / "config.toml"
    make(path)
    before = path.lstat()

    with pytest.raises(TrustFileUnusable) as refused:
        put(path, b"new")

    assert refused.value.reason is reason
    assert (path.lstat().st_ino, path.lstat().st_size) == (before.st_ino, before.st_size)
    assert ours(tmp_path) == []


def test_links_in_a_circle_are_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")

    with pytest.raises(TrustFileOutOfReach) as refused:
        put(tmp_path / "a", b"new")

    assert refused.value.errno == errno.ELOOP


@contextmanager
def as_nobody() -> Iterator[None]:
    """Be somebody who may not do everything."""
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
            put(path, b"new")
        Path(name).chmod(0o755)

        assert refused.value.errno == errno.EACCES
        assert path.read_bytes() == b"old"


def test_a_file_that_we_may_not_read_is_out_of_reach(config: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        path = Path(name) / "config.toml"
        path.write_bytes(b"old")
        path.chmod(0)

        with as_nobody(), pytest.raises(TrustFileOutOfReach) as refused:
            put(path, b"new")

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
            put(config, b"new")

    assert refused.value.errno == errno.ENOSPC
    assert config.read_bytes() == b"old"
    assert ours(config.parent) == []


# -- others who write ------------------------------------------------------------------------------


def _replaced(path: Path, text: bytes) -> None:
    new = path.with_name("cli.tmp")
    new.write_bytes(text)
    new.replace(path)


def _written_in_place(path: Path, text: bytes) -> None:
    path.write_bytes(text)


def _written_like_before(path: Path, text: bytes) -> None:
    """As large and as old as before: only its bytes (and the change time) tell."""
    status = path.stat()
    path.write_bytes(text)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("write", [_replaced, _written_in_place, _written_like_before])
def test_what_is_written_during_an_edit_is_not_lost(
    config: Path, write: Callable[[Path, bytes], None]
) -> None:
    seen: list[bytes | None] = []

    def decide(text: bytes | None) -> To:
        seen.append(text)
        return To((text or b"") + b"+ours")

    def meanwhile(_: To) -> None:
        if len(seen) == 1:
            write(config, b"CLI")

    files.edit(config, decide, record=meanwhile, pause=no_waiting)

    assert seen == [b"old", b"CLI"]
    assert config.read_bytes() == b"CLI+ours"
    assert files.backup_file(config, 1).read_bytes() == b"CLI"


def test_what_is_written_between_the_last_look_and_the_end_of_it_is_seen(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, looks = files._read, []

    def then_written(target: Path) -> object:
        seen = look(target)
        looks.append(seen)
        if len(looks) == 2:
            _replaced(target, b"CLI")
        return seen

    monkeypatch.setattr(files, "_read", then_written)
    files.edit(config, lambda text: To((text or b"") + b"+ours"), pause=no_waiting)

    assert config.read_bytes() == b"CLI+ours"


def test_a_write_that_the_clock_of_the_file_system_is_too_coarse_for_is_seen(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_of = files._State.of
    timeless = staticmethod(lambda status: replace(state_of(status), mtime_ns=0, ctime_ns=0))
    monkeypatch.setattr(files._State, "of", timeless)
    texts = iter([b"CLI"])

    def meanwhile(_: To) -> None:
        for text in texts:
            config.write_bytes(text)

    files.edit(
        config, lambda text: To((text or b"")[:3] + b"+"), record=meanwhile, pause=no_waiting
    )

    assert config.read_bytes() == b"CLI+"


def test_a_file_that_others_make_during_an_edit_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    seen: list[bytes | None] = []

    def decide(text: bytes | None) -> To:
        seen.append(text)
        return To((text or b"") + b"+ours")

    def meanwhile(_: To) -> None:
        if len(seen) == 1:
            path.write_bytes(b"CLI")

    files.edit(path, decide, record=meanwhile, pause=no_waiting)

    assert path.read_bytes() == b"CLI+ours"


def test_a_file_that_is_made_at_the_very_last_moment_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.toml"
    link = os.link

    def late(source: Path, target: Path) -> None:
        if not path.exists():
            path.write_bytes(b"CLI")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    files.edit(path, lambda text: To((text or b"") + b"+ours"), pause=no_waiting)

    assert path.read_bytes() == b"CLI+ours"


def test_a_file_that_vanishes_during_an_edit_is_looked_at_again(config: Path) -> None:
    seen: list[bytes | None] = []

    def decide(text: bytes | None) -> To:
        seen.append(text)
        return To(b"new")

    def meanwhile(_: To) -> None:
        if len(seen) == 1:
            config.unlink()

    files.edit(config, decide, record=meanwhile, pause=no_waiting)

    assert seen == [b"old", None]


def test_an_edit_gives_up_when_others_write_all_the_time(config: Path) -> None:
    count = iter(range(1000))

    with pytest.raises(TrustFileBusy):
        put(
            config,
            b"new",
            record=lambda _: config.write_bytes(b"CLI %d" % next(count)),
            pause=no_waiting,
        )

    assert config.read_bytes() == b"CLI %d" % (files.TRIES - 1)
    assert ours(config.parent) == []


def test_a_link_that_is_turned_elsewhere_meanwhile_is_not_followed(
    config: Path, tmp_path: Path
) -> None:
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(config)
    other.write_bytes(b"other")

    def turn(_: To) -> None:
        link.unlink()
        link.symlink_to(other)

    with pytest.raises(TrustFileBusy):
        put(link, b"new", record=turn)

    assert (config.read_bytes(), other.read_bytes()) == (b"old", b"other")


@pytest.mark.parametrize("half", [b"", b'{"a": 1', b'{"\xe6'])
def test_a_file_in_the_middle_of_being_written_is_waited_for(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "trustedFolders.json"
    path.write_bytes(half)

    def rest_comes(_: float) -> None:
        path.write_bytes(b'{"a": 1}')

    files.edit(path, lambda text: gemini.EDITOR.add(text, "/w"), pause=rest_comes)

    assert path.read_bytes() == b'{"a": 1,"/w": "TRUST_FOLDER"}'


def test_a_file_that_stays_broken_is_refused_and_left(tmp_path: Path) -> None:
    path = tmp_path / "trustedFolders.json"
    path.write_bytes(b'{"a": 1')

    with pytest.raises(TrustFileUnusable) as refused:
        files.edit(path, lambda text: gemini.EDITOR.add(text, "/w"), pause=no_waiting)

    assert refused.value.reason is UnusableReason.NOT_PARSABLE
    assert path.read_bytes() == b'{"a": 1'
    assert ours(tmp_path) == []


def test_a_file_that_stays_empty_is_filled_and_emptied(tmp_path: Path) -> None:
    path = tmp_path / "trustedFolders.json"
    path.touch()
    edit: Edit = files.edit(path, lambda t: gemini.EDITOR.add(t, "/w"), pause=no_waiting)

    removal: Removal = files.edit(path, lambda t: gemini.EDITOR.remove(t, "/w", edit.added))

    assert (removal.text, path.read_bytes()) == (b"", b"")


# -- our own files ---------------------------------------------------------------------------------


def test_an_edit_waits_for_the_lock_and_gives_up(config: Path) -> None:
    pauses: list[float] = []
    with files.lock_file(config).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        with pytest.raises(TrustFileBusy):
            put(config, b"new", lock_wait_s=0.05, pause=pauses.append)

    assert (config.read_bytes(), len(pauses)) == (b"old", 5)


def test_an_edit_goes_on_when_the_lock_is_let_go(config: Path) -> None:
    held = files.lock_file(config).open("w")
    fcntl.flock(held, fcntl.LOCK_EX)

    put(config, b"new", pause=lambda _: held.close())

    assert config.read_bytes() == b"new"


def test_two_names_of_one_file_share_one_lock(config: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(config)
    with files.lock_file(config).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        with pytest.raises(TrustFileBusy):
            put(tmp_path / "link", b"new", lock_wait_s=0)


def test_a_pipe_in_the_place_of_the_lock_is_refused_at_once(config: Path) -> None:
    os.mkfifo(files.lock_file(config))

    with pytest.raises(TrustFileOutOfReach):
        put(config, b"new")

    assert config.read_bytes() == b"old"


def test_what_a_killed_edit_has_left_is_cleared_away(config: Path) -> None:
    left = config.parent / ".runrecovery.config.toml.0123456789abcdef.tmp"
    left.write_bytes(b"half")
    others = config.parent / ".runrecovery.config.toml2.0123456789abcdef.tmp"
    others.write_bytes(b"of another file")

    put(config, b"old")

    assert not left.exists()
    assert others.exists()


# -- the place -------------------------------------------------------------------------------------


def test_the_token_of_a_place_stays_and_is_no_other_places(config: Path, tmp_path: Path) -> None:
    begun: list[str | None] = []
    other = tmp_path / "other"

    for path in (config, config, other):
        files.edit(path, lambda _: To(b"new"), begin=begun.append)

    assert begun == [begun[0], begun[0], begun[2]]
    assert [files.token_of(path) for path in (config, other)] == [begun[0], begun[2]]
    assert len({*begun, None}) == 3
    assert files.token_of(tmp_path / "nowhere") is None


def test_a_token_that_was_cut_off_is_drawn_anew(config: Path) -> None:
    files.lock_file(config).write_bytes(b"0123")
    put(config, b"new")
    assert len(files.token_of(config) or "") == 32


@pytest.mark.parametrize("folder", [True, False], ids=["no lock", "no folder"])
def test_where_nothing_is_of_us_nothing_is_made(
    config: Path, tmp_path: Path, *, folder: bool
) -> None:
    path = config if folder else tmp_path / "nowhere" / "config.toml"
    begun: list[str | None] = []
    seen: list[bytes | None] = []

    def decide(text: bytes | None) -> To:
        seen.append(text)
        return To(text)

    before = names(tmp_path), names(config.parent)
    files.edit(path, decide, begin=begun.append, make=False)

    assert (begun, seen) == ([None], [None])
    assert (names(tmp_path), names(config.parent)) == before


def test_a_lock_that_was_removed_before_it_was_had_is_not_enough(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(config, b"new")
    lock, others, opened = files.lock_file(config), list[int](), locks._open

    def open_late(path: Path) -> int:
        """Right after us, another one removes the lock and makes and takes his own."""
        ours = opened(path)
        if not others:
            lock.unlink()
            others.append(os.open(lock, os.O_RDWR | os.O_CREAT, 0o600))
            fcntl.flock(others[0], fcntl.LOCK_EX)
        return ours

    monkeypatch.setattr(locks, "_open", open_late)
    with pytest.raises(TrustFileBusy):
        put(config, b"newer", pause=no_waiting, lock_wait_s=0.1)
    os.close(others[0])

    put(config, b"newer")
    assert config.read_bytes() == b"newer"


def test_what_only_looks_like_a_leftover_is_left(config: Path) -> None:
    stem = f".runrecovery.{config.name}"
    kept = [f"{stem}.mine.tmp", f"{stem}.0123456789ABCDEF.tmp", f"{stem}.d.0123456789abcdef.tmp"]
    for name in [*kept, f"{stem}.0123456789abcdef.tmp"]:
        (config.parent / name).write_bytes(b"")

    put(config, b"new")

    assert [name for name in names(config.parent) if name.endswith(".tmp")] == sorted(kept)


def test_a_file_that_an_editor_renames_away_and_writes_anew_is_waited_for(config: Path) -> None:
    aside = config.with_name("config.toml~")
    config.rename(aside)
    seen: list[bytes | None] = []

    def write_anew(_: float) -> None:
        config.write_bytes(b"theirs")

    def decide(text: bytes | None) -> To:
        seen.append(text)
        return To(text)

    files.edit(config, decide, pause=write_anew)

    assert seen == [b"theirs"]
