"""Which data directories and SQLite files a start and `runrecovery check` refuse, and why."""

from __future__ import annotations

import os
import resource
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from runrecovery_service import paths
from runrecovery_service.domain.start_errors import DataDirRefused

ORDINARY = 65534
"""The user `nobody`."""


def of_database(path: Path) -> str | None:
    return paths.database_problem(path, path.parent)


def tree(below: Path) -> list[str]:
    return sorted(str(path.relative_to(below)) for path in below.rglob("*"))


@pytest.fixture
def limit_of_file_size() -> Iterator[int]:
    """The limit on the size of files is one megabyte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    yield 1_000_000
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# -- the data directory ------------------------------------------------------------------------


def test_a_missing_directory_is_accepted_and_created_for_its_owner_alone(
    tmp_path: Path,
) -> None:
    wanted = tmp_path / "some" / "where"
    assert paths.directory_problem(wanted) is None
    assert tree(tmp_path) == []

    umask = os.umask(0o777)
    try:
        (tmp_path / "some").mkdir(mode=0o755)
        (tmp_path / "some").chmod(0o755)
        paths.make_directory(wanted)
    finally:
        os.umask(umask)

    assert stat.S_IMODE(wanted.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o1777, 0o2775, 0o755, 0o700])
def test_a_directory_that_exists_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    there = tmp_path / "there"
    there.mkdir()
    there.chmod(mode)

    assert paths.directory_problem(there) is None
    paths.make_directory(there)

    assert stat.S_IMODE(there.stat().st_mode) == mode


@pytest.mark.parametrize(
    ("mode", "others"),
    [(0o700, None), (0o755, None), (0o770, "group 7"), (0o1777, "group 7, every user")],
)
def test_other_users_with_write_access_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, others: str | None
) -> None:
    found = os.stat_result((mode, 0, 0, 0, os.geteuid(), 7, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda _: found)

    assert paths.others_who_may_write(tmp_path) == others


def test_another_owner_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = os.stat_result((0o700, 0, 0, 0, os.geteuid() + 4711, 7, 0, 0, 0, 0))
    monkeypatch.setattr(Path, "stat", lambda _: found)

    assert paths.others_who_may_write(tmp_path) == f"user {os.geteuid() + 4711}"


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    assert paths.directory_problem(tmp_path / "file") == "is not a directory"
    assert paths.directory_problem(tmp_path / "file" / "below") == "Not a directory"


def test_a_dangling_symlink_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    problem = f"is a link to {tmp_path}/nowhere, which does not exist; is a volume not mounted?"

    assert paths.directory_problem(tmp_path / "link") == problem
    assert paths.directory_problem(tmp_path / "link" / "below") == (
        f"cannot be created: {tmp_path}/link {problem}"
    )
    assert of_database(tmp_path / "link") == problem


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    assert paths.directory_problem(tmp_path / ("n" * 300)) == "File name too long"


def test_a_path_that_is_not_utf8_is_refused_and_shown_with_escapes(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"b\xffd")

    assert paths.directory_problem(path) == "the path is not valid UTF-8"
    assert of_database(path) == "the path is not valid UTF-8"
    assert paths.shown(path) == f"{tmp_path}/b\\xffd"


def test_a_relative_path_needs_a_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    with pytest.raises(DataDirRefused, match="working directory was removed"):
        paths.absolute(Path("data"))
    assert paths.absolute(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)


# -- the SQLite file ---------------------------------------------------------------------------


def test_a_database_is_accepted_if_its_directory_exists_or_will_be_created(tmp_path: Path) -> None:
    assert of_database(tmp_path / "x.db") is None
    assert of_database(tmp_path / "later" / "x.db") is None
    assert paths.database_problem(tmp_path / "later" / "x.db", tmp_path) == (
        f"its directory {tmp_path}/later does not exist"
    )
    assert tree(tmp_path) == []


def test_only_a_regular_file_can_be_a_database(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("")

    assert of_database(tmp_path) == "is a directory, not a database file"
    assert of_database(tmp_path / "fifo") == "is not a regular file"
    assert of_database(Path("/dev/null")) == "is not a regular file"
    assert of_database(tmp_path / "file" / "x.db") == (
        f"its directory {tmp_path}/file is not a directory"
    )
    assert of_database(tmp_path / "file") is None


def test_a_path_longer_than_sqlite_accepts_is_refused(tmp_path: Path) -> None:
    folder = tmp_path
    while len(str(folder)) < 380:
        folder /= "d" * 50
    folder.mkdir(parents=True)
    longest = folder / ("x" * (499 - len(str(folder))))
    assert len(str(longest)) == 500

    assert of_database(longest) is None
    assert of_database(longest.with_name(longest.name + "x")) == (
        "its path has 501 bytes; SQLite takes at most 500"
    )


def test_a_database_with_the_longest_accepted_path_can_be_opened(tmp_path: Path) -> None:
    from runrecovery_service.storage.opening import open_database

    folder = tmp_path
    while len(str(folder)) < 380:
        folder /= "d" * 50
    folder.mkdir(parents=True)
    longest = folder / ("x" * (499 - len(str(folder))))

    for _ in range(2):
        db = open_database(f"sqlite:///{longest}", folder)
        with db.transaction():
            db.execute("UPDATE instance SET pid = 1")
        db.close()


def test_a_file_size_limit_that_is_too_low_is_refused(
    tmp_path: Path, limit_of_file_size: int
) -> None:
    (tmp_path / "there").write_bytes(b"x" * 1000)

    for name, needed in (("new", 67_108_864), ("there", 67_109_864)):
        assert of_database(tmp_path / name) == (
            f"a file may have {limit_of_file_size} bytes at most here (ulimit -f), and the"
            f" database needs room for {needed}"
        )


@pytest.fixture
def as_ordinary_user() -> Iterator[Path]:
    """Run the test as an ordinary user, and return a directory of that user."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        before = os.geteuid()
        if before == 0:
            os.chown(folder, ORDINARY, ORDINARY)
            os.seteuid(ORDINARY)
        try:
            yield Path(folder)
        finally:
            os.seteuid(before)


def test_a_database_that_may_not_be_written_is_refused(as_ordinary_user: Path) -> None:
    file, user = as_ordinary_user / "x.db", os.geteuid()
    file.write_text("")
    file.chmod(0o444)

    assert of_database(file) == (
        f"may not be read and changed by user {user}: its mode is 0444, its owner user {user}"
    )


def test_a_database_directory_that_may_not_be_written_is_refused(as_ordinary_user: Path) -> None:
    folder, user = as_ordinary_user / "data", os.geteuid()
    folder.mkdir()
    (folder / "x.db").write_text("")
    folder.chmod(0o555)

    reason = f"may not be read and changed by user {user}: its mode is 0555, its owner user {user}"
    assert of_database(folder / "x.db") == f"its directory {folder} {reason}"
    assert paths.directory_problem(folder) == reason
    assert paths.directory_problem(folder / "new") == f"cannot be created: {folder} {reason}"


@pytest.mark.parametrize("suffix", ["-wal", "-shm", ".installed"])
def test_a_file_beside_the_database_that_may_not_be_written_is_named(
    as_ordinary_user: Path, suffix: str
) -> None:
    (as_ordinary_user / "x.db").write_text("")
    companion, user = as_ordinary_user / f"x.db{suffix}", os.geteuid()
    companion.write_text("")
    companion.chmod(0)

    assert of_database(as_ordinary_user / "x.db") == (
        f"its x.db{suffix} may not be read and changed by user {user}: its mode is 0000,"
        f" its owner user {user}"
    )
