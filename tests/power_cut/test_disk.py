"""What a power cut may leave of files, by the model that the campaign uses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from random import Random

import pytest
from power_cut.disk import Disk
from power_cut.trace import Call, read_calls

ROOT = "/r"


def call(name: str, arguments: str, *, result: int = 0, opened: str = "", after: int = 99) -> Call:
    return Call(
        name=name,
        begun_s=0.0,
        begun_after=after,
        arguments=arguments,
        result=result,
        opened=opened,
    )


def hexed(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def create(name: str) -> Call:
    path = f"{ROOT}/{name}"
    return call("openat", f'AT_FDCWD, "{hexed(path)}", O_WRONLY|O_CREAT', opened=path)


def write(name: str, data: str, offset: int) -> Call:
    file = f"3<{hexed(f'{ROOT}/{name}')}>"
    return call("pwrite64", f'{file}, "{hexed(data)}", {len(data)}, {offset}', result=len(data))


def sync(path: str, *, after: int = 99) -> Call:
    return call("fsync", f"3<{hexed(path)}>", after=after)


def rename(before: str, after: str) -> Call:
    return call("rename", f'"{hexed(f"{ROOT}/{before}")}", "{hexed(f"{ROOT}/{after}")}"')


def states(calls: Iterable[Call], target: Path, *, file: str) -> set[str | None]:
    """Return the contents of a file after many power cuts; None where it is not there."""
    disk = Disk(ROOT, {"d/old": b"old"})
    for each in calls:
        disk.apply(each)
    found = set()
    for seed in range(200):
        folder = target / str(seed)
        folder.mkdir(parents=True)
        disk.cut(folder, Random(seed))  # noqa: S311 - a choice, no secret
        path = folder / file
        found.add(path.read_text() if path.exists() else None)
    return found


def test_a_synced_write_is_kept_and_a_later_one_may_be_missing(tmp_path: Path) -> None:
    calls = [write("d/old", "new", 0), sync("/r/d/old"), write("d/old", "N", 0)]

    assert states(calls, tmp_path, file="d/old") == {"new", "New"}


def test_writes_that_were_not_synced_may_be_kept_in_any_order(tmp_path: Path) -> None:
    calls = [write("d/old", "x" * 512, 0), write("d/old", "y", 512)]

    assert states(calls, tmp_path, file="d/old") == {
        "old",
        "x" * 512,
        "x" * 512 + "y",
        "old" + "\0" * 509 + "y",
    }


def test_a_write_that_ends_during_a_sync_is_not_synced(tmp_path: Path) -> None:
    calls = [write("d/old", "new", 0), sync("/r/d/old", after=0)]

    assert states(calls, tmp_path, file="d/old") == {"old", "new"}


def test_a_new_file_is_lost_with_its_name_unless_the_directory_is_synced(tmp_path: Path) -> None:
    calls = [create("d/new"), write("d/new", "n", 0), sync("/r/d/new")]

    assert states(calls, tmp_path / "1", file="d/new") == {None, "n"}
    assert states([*calls, sync("/r/d")], tmp_path / "2", file="d/new") == {"n"}


def test_a_rename_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    calls = [
        create("d/new"),
        write("d/new", "n", 0),
        sync("/r/d/new"),
        sync("/r/d"),
        rename("d/new", "d/old"),
    ]

    assert states(calls, tmp_path, file="d/old") == {"old", "n"}


def test_interrupted_lines_of_strace_are_put_together(tmp_path: Path) -> None:
    file = f"3<{hexed('/r/f')}>"
    trace = tmp_path / "trace"
    trace.write_text(
        f"7  1.000000 fsync({file} <unfinished ...>\n"
        f'8  1.100000 pwrite64({file}, "{hexed("ab")}", 2, 5) = 2 <0.000010>\n'
        "7  1.200000 <... fsync resumed>) = 0 <0.200000>\n"
        f"7  1.300000 fsync({file}) = -1 EIO (Input/output error) <0.000001>\n"
        "7  1.400000 +++ exited with 0 +++\n"
    )

    calls = read_calls([trace], below=Path("/r"))

    assert [(each.name, each.begun_after) for each in calls] == [("pwrite64", 0), ("fsync", 0)]
    assert calls[0].strings() == [b"ab"]
    assert calls[0].numbers() == [2, 5]


def test_a_call_that_strace_could_not_read_is_not_left_out(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("7  1.000000 mkdir(0x7f66013d8dd0, 0700) = 0 <0.000010>\n")

    with pytest.raises(PermissionError, match="run it as root"):
        read_calls([trace], below=Path("/r"))
