"""Engines by name, and whether a session of one can be resumed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.errors import UnknownEngine
from runrecovery_service.domain.run import Profile
from runrecovery_service.engines.catalog import Catalog, Engine, check_session


def engine(
    name: str = "demo", session_file: str | None = "{workspace}/session-{value}.json"
) -> Engine:
    return Engine(
        name=name,
        command=("agent",),
        profile=Profile.RESUMABLE,
        env_allow=(),
        max_concurrent=None,
        session_file=session_file,
    )


def test_finds_an_engine_by_name() -> None:
    catalog = Catalog([engine("b"), engine("a")])

    assert catalog.get("a") == engine("a")
    assert catalog.names == ("a", "b")


def test_an_unknown_engine_is_refused_with_the_known_names() -> None:
    with pytest.raises(UnknownEngine) as caught:
        Catalog([engine("b"), engine("a")]).get("c")

    assert caught.value.known == ("a", "b")


def test_fills_in_the_workspace_and_the_handle(tmp_path: Path) -> None:
    assert engine().session_path(tmp_path, "ab-1._") == tmp_path / "session-ab-1._.json"


def test_fills_in_each_placeholder_once() -> None:
    assert engine().session_path(Path("/w/{value}"), "x") == Path("/w/{value}/session-x.json")


def test_may_lie_outside_the_workspace() -> None:
    home = engine(session_file="/home/agent/.sessions/{value}")

    assert home.session_path(Path("/w"), "x") == Path("/home/agent/.sessions/x")


@pytest.mark.parametrize(
    "value", ["", ".", "..", "a/b", "../a", "/etc/passwd", "a\0", "a\n", "ä", "a b", "x" * 513]
)
def test_a_handle_that_could_lead_elsewhere_has_no_file(tmp_path: Path, value: str) -> None:
    bare = engine(session_file="{workspace}/{value}")

    assert bare.session_path(tmp_path, value) is None
    assert not check_session(bare, tmp_path, value)


@given(st.text(max_size=20))
def test_no_handle_leads_out_of_its_folder(value: str) -> None:
    path = engine(session_file="{workspace}/{value}").session_path(Path("/w/s"), value)

    assert path is None or Path(os.path.normpath(path)).parent == Path("/w/s")


def test_a_session_is_valid_while_its_file_holds_something(tmp_path: Path) -> None:
    (tmp_path / "session-x.json").write_text("{}")

    assert check_session(engine(), tmp_path, "x")


def test_a_session_without_its_file_is_invalid(tmp_path: Path) -> None:
    assert not check_session(engine(), tmp_path, "x")


def test_an_empty_file_is_no_session(tmp_path: Path) -> None:
    (tmp_path / "session-x.json").touch()

    assert not check_session(engine(), tmp_path, "x")


def test_a_directory_is_no_session(tmp_path: Path) -> None:
    (tmp_path / "session-x.json").mkdir()

    assert not check_session(engine(), tmp_path, "x")


def test_a_pipe_is_no_session(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "session-x.json")

    assert not check_session(engine(), tmp_path, "x")


def test_a_name_too_long_for_the_disk_is_no_session(tmp_path: Path) -> None:
    assert not check_session(engine(), tmp_path, "x" * 512)


def test_an_engine_without_a_session_file_is_taken_at_its_word(tmp_path: Path) -> None:
    assert check_session(engine(session_file=None), tmp_path, "../anything")
    assert not check_session(engine(session_file=None), tmp_path, "")
