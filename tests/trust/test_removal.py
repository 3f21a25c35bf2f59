"""Removing an entry from a file that the user or the CLI has changed since."""

from __future__ import annotations

import json

import pytest
from runrecovery_service.trust import claude, codex, gemini
from runrecovery_service.trust.entry import Added, Outcome
from trust.cases import KINDS
from trust.corpus import W


def _codex(before: bytes | None, *changes: tuple[bytes, bytes]) -> tuple[bytes | None, Outcome]:
    """Add an entry, change the text as a user might, and remove the entry."""
    edit = codex.EDITOR.add(before, W)
    text = edit.text or b""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    removal = codex.EDITOR.remove(text, W, edit.added)
    return removal.text, removal.outcome


HEADER = b'[projects."/runs/a project"]\n'
ENTRY = b'trust_level = "trusted"\n'


def test_a_comment_after_the_added_table_is_kept_when_the_table_is_removed() -> None:
    after, _ = _codex(b"a = 1\n", (ENTRY, ENTRY + b"# mine\n\n# of t\n[t]\n"))

    assert after == b"a = 1\n# mine\n\n# of t\n[t]\n"


@pytest.mark.parametrize(
    ("old", "new", "left"),
    [
        (HEADER, HEADER[:-1] + b" # mine\n", HEADER[:-1] + b" # mine\n"),
        (HEADER, HEADER + b"# mine\n", HEADER + b"# mine\n"),
        (ENTRY, ENTRY[:-1] + b" # mine\n", HEADER + b" # mine\n"),
        (ENTRY, ENTRY + b"other = 1\n", HEADER + b"other = 1\n"),
        (ENTRY, b"other = 1\n" + ENTRY, HEADER + b"other = 1\n"),
        (ENTRY, b"other = 1\n  " + ENTRY + b"x = 1", HEADER + b"other = 1\nx = 1"),
    ],
)
def test_an_added_table_is_kept_if_the_user_wrote_into_it(
    old: bytes, new: bytes, left: bytes
) -> None:
    after, outcome = _codex(None, (old, new))

    assert (after, outcome) == (left, Outcome.REMOVED)


def test_a_sub_table_is_kept_when_the_added_table_is_removed() -> None:
    sub = b'[projects."/runs/a project".sub]\nb = 1\n'

    after, _ = _codex(None, (ENTRY, ENTRY + sub))

    assert after == sub


@pytest.mark.parametrize(
    "rewritten",
    [
        b'projects = { "/runs/a project" = { trust_level = "trusted" } }\n',
        b"projects.'/runs/a project' = {trust_level = 'trusted'}\n",
        b'projects."/runs/a project".trust_level = "trusted"\n',
        b'[projects]\n\'/runs/a project\'.trust_level = """trusted"""\n',
        b'[projects]\r\n[projects."/runs/a project"]\r\n\r\ntrust_level = "trusted"\r\n\r\n',
    ],
)
def test_an_entry_is_removed_in_whatever_notation_the_user_rewrote_it(rewritten: bytes) -> None:
    added = codex.EDITOR.add(b"a = 1\n", W).added

    removal = codex.EDITOR.remove(b"a = 1\n" + rewritten, W, added)

    cli = KINDS["codex"]
    assert removal.outcome is Outcome.REMOVED
    assert cli.means(removal.text).get("projects", {}) == {}
    assert cli.means(removal.text)["a"] == 1


def test_a_line_end_that_the_user_added_at_the_end_is_kept() -> None:
    after, _ = _codex(b"a = 1", (ENTRY[:-1], ENTRY))

    assert after == b"a = 1\n"


def test_a_stripped_last_line_end_does_no_harm() -> None:
    after, _ = _codex(b"a = 1\n", (ENTRY, ENTRY[:-1]))

    assert after == b"a = 1\n\n"


@pytest.mark.parametrize(
    ("kind", "added", "changed"),
    [
        ("codex", b'"trusted"', b'"untrusted"'),
        ("codex", b'"trusted"', b"7"),
        ("gemini", b'"TRUST_FOLDER"', b'"TRUST_PARENT"'),
        ("gemini", b'"TRUST_FOLDER"', b'{"by": "hand"}'),
        ("claude", b"true", b"false"),
        ("claude", b"true", b"1"),
    ],
)
def test_a_value_that_the_user_has_changed_is_kept(kind: str, added: bytes, changed: bytes) -> None:
    edit = KINDS[kind].editor.add(None, W)
    text = (edit.text or b"").replace(added, changed)

    removal = KINDS[kind].editor.remove(text, W, edit.added)

    assert (removal.text, removal.outcome) == (text, Outcome.CHANGED)


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_that_is_already_gone_changes_nothing(kind: str) -> None:
    editor = KINDS[kind].editor
    added = editor.add(None, W).added

    for text in (None, b"", b" \n"):
        removal = editor.remove(text, W, added)
        assert (removal.text, removal.outcome) == (text, Outcome.GONE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_created_file_is_kept_if_it_has_entries_of_others(kind: str) -> None:
    editor = KINDS[kind].editor
    edit = editor.add(None, W)
    with_another = editor.add(edit.text, "/somebody/else").text

    removal = editor.remove(with_another, W, edit.added)

    assert removal.text is not None
    assert KINDS[kind].at(removal.text, "/somebody/else") == KINDS[kind].value


@pytest.mark.parametrize("kind", ["gemini", "claude"])
def test_a_created_file_that_was_reformatted_is_left_without_entries(kind: str) -> None:
    editor = KINDS[kind].editor
    edit = editor.add(None, W)
    again = json.dumps(json.loads(edit.text or b""), indent=4).encode()

    removal = editor.remove(again, W, edit.added)

    assert removal.text is not None
    assert json.loads(removal.text) == {}


def test_a_project_is_kept_if_the_cli_added_keys_to_it() -> None:
    edit = claude.EDITOR.add(b"{}", W)
    project = {"allowedTools": [], "hasTrustDialogAccepted": True, "cost": 0.50}
    text = json.dumps({"projects": {W: project}}, indent=2).encode()

    removal = claude.EDITOR.remove(text, W, edit.added)

    assert json.loads(removal.text or b"") == {"projects": {W: {"allowedTools": [], "cost": 0.5}}}


def test_an_empty_projects_object_of_the_user_is_kept() -> None:
    before = b'{"projects": {}}'
    edit = claude.EDITOR.add(before, W)

    assert claude.EDITOR.remove(edit.text, W, edit.added).text == before


def test_a_duplicated_entry_is_left_because_the_other_one_would_count() -> None:
    edit = gemini.EDITOR.add(b"{}", W)
    entry = json.dumps(W).encode()
    text = b"{" + entry + b': "DO_NOT_TRUST", ' + entry + b': "TRUST_FOLDER"}'

    removal = gemini.EDITOR.remove(text, W, edit.added)

    assert (removal.text, removal.outcome) == (text, Outcome.CHANGED)


def test_a_trust_parent_entry_of_gemini_makes_an_entry_unnecessary() -> None:
    before = json.dumps({W: "TRUST_PARENT"}).encode()

    edit = gemini.EDITOR.add(before, W)

    assert (edit.text, edit.added) == (before, Added(owned=False))


def test_containers_are_removed_with_the_last_entry_even_if_an_earlier_entry_created_them() -> None:
    first = claude.EDITOR.add(b"{}", "/a")
    second = claude.EDITOR.add(first.text, "/b", {"/a": first.added})
    alone = claude.EDITOR.remove(second.text, "/a", first.added)

    assert claude.EDITOR.remove(alone.text, "/b", second.added).text == b"{}"
