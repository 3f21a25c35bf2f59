"""The configuration file: where it is, its size, its encoding, its syntax."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
from runrecovery_service.config import reading
from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.settings import Settings

Load: TypeAlias = Callable[..., Settings]


def test_an_endless_file_is_refused_at_the_size_limit() -> None:
    with pytest.raises(ConfigError) as caught:
        reading.load(path=Path("/dev/zero"), flags={}, environ={})

    assert caught.value.problems == ("/dev/zero: has more than 1048576 bytes",)


def test_a_pipe_is_not_waited_for_at_a_reload(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    with pytest.raises(ConfigError) as refused:
        reading.load(path=pipe, flags={}, environ={}, waits=False)

    assert refused.value.problems == (f"{pipe}: is a pipe, which cannot be read again",)


@pytest.mark.parametrize(("spaces", "refused"), [(1_048_576, False), (1_048_577, True)])
def test_a_file_may_have_one_mebibyte_and_no_byte_more(
    load: Load, *, spaces: int, refused: bool
) -> None:
    try:
        load(" " * spaces)
        was_refused = False
    except ConfigError:
        was_refused = True

    assert was_refused is refused


@pytest.mark.parametrize("path_from", ["flag", "environment"])
def test_a_file_that_was_named_must_exist(tmp_path: Path, path_from: str) -> None:
    path = tmp_path / "none.toml"
    environ = {"RUNRECOVERY_CONFIG": str(path)} if path_from == "environment" else {}

    with pytest.raises(ConfigError) as caught:
        reading.load(path=path if path_from == "flag" else None, flags={}, environ=environ)

    assert (f"{path}: No such file or directory",) == caught.value.problems


def test_the_file_in_the_working_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runrecovery.toml").write_text("instance = 'here'", encoding="utf-8")

    assert reading.load(path=None, flags={}, environ={}).instance == "here"


def write_config(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "runrecovery.toml"
    path.write_bytes(data)
    return path


def test_a_utf8_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = write_config(tmp_path, b"\xef\xbb\xbfmax_queued = 7\r\ninstance = 'a'\r\n")

    settings = reading.load(path=path, flags={}, environ={})

    assert (settings.max_queued, settings.instance) == (7, "a")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("max_queued = 7".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"\xfe\xff" + "max_queued = 7".encode("utf-16-be"), "is UTF-16; save it as UTF-8"),
        (b"instance = '\xe4'", "is not valid UTF-8; save it as UTF-8"),
        (b"\xef\xbb\xbf\xef\xbb\xbfmax_queued = 7", "not valid TOML: "),
        ("max_queued = 7".encode("utf-16-le"), "not valid TOML: "),
        (b"max_queued = " + b"[" * 100_000, "is nested too deeply"),
        (b"max_queued = " + b"9" * 10_000, "not valid TOML: "),
    ],
    ids=["utf-16", "utf-16 be", "latin-1", "two BOMs", "utf-16 without BOM", "nested", "digits"],
)
def test_a_file_that_cannot_be_parsed_is_reported_with_the_cause(
    tmp_path: Path, data: bytes, problem: str
) -> None:
    path = write_config(tmp_path, data)

    with pytest.raises(ConfigError) as refused:
        reading.load(path=path, flags={}, environ={})

    assert refused.value.problems[0].startswith(f"{path}: {problem}")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a = ", "not valid TOML"), (b"\xff", "not valid UTF-8"), (b"a = " + b"9" * 5000, "TOML")],
)
def test_a_file_that_cannot_be_parsed_does_not_hide_other_problems(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)

    with pytest.raises(ConfigError) as caught:
        reading.load(path=path, flags={"instance": "-"}, environ={})

    of_file, of_flag = caught.value.problems
    assert message in of_file
    assert of_flag.startswith("flag --instance: ")
