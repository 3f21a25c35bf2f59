"""What happens to an entry when others have written the file since."""

from __future__ import annotations

import json

import pytest
from runrecovery_service.trust import claude, codex, gemini
from runrecovery_service.trust.entry import Added, Outcome
from trust.cases import KINDS
from trust.corpus import W


def _codex(before: bytes | None, *changes: tuple[bytes, bytes]) -> tuple[bytes | None, Outcome]:
    """Add, change the text as somebody else might, remove."""
    edit = codex.EDITOR.add(before, W)
    text = edit.text or b""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    removal = codex.EDITOR.remove(text, W, edit.added)
    return removal.text, removal.outcome


HEADER = b'[projects."/runs/a project"]\n'
ENTRY = b'trust_level = "trusted"\n'


def test_a_comment_behind_our_table_stays_when_it_goes() -> None:
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
def test_what_somebody_put_into_our_table_keeps_it(old: bytes, new: bytes, left: bytes) -> None:
    after, outcome = _codex(None, (old, new))

    assert (after, outcome) == (left, Outcome.REMOVED)


def test_a_sub_table_keeps_its_own_header_without_ours() -> None:
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
def test_an_entry_is_found_in_whatever_way_somebody_has_rewritten_it(rewritten: bytes) -> None:
    added = codex.EDITOR.add(b"a = 1\n", W).added

    removal = codex.EDITOR.remove(b"a = 1\n" + rewritten, W, added)

    cli = KINDS["codex"]
    assert removal.outcome is Outcome.REMOVED
    assert cli.means(removal.text).get("projects", {}) == {}
    assert cli.means(removal.text)["a"] == 1


def test_a_new_line_end_at_the_end_is_not_taken_away() -> None:
    after, _ = _codex(b"a = 1", (ENTRY[:-1], ENTRY))

    assert after == b"a = 1\n"


def test_an_editor_that_strips_the_last_line_end_does_no_harm() -> None:
    after, _ = _codex(b"a = 1\n", (ENTRY, ENTRY[:-1]))

    assert after == b"a = 1\n\n"


@pytest.mark.parametrize(
    ("kind", "ours", "theirs"),
    [
        ("codex", b'"trusted"', b'"untrusted"'),
        ("codex", b'"trusted"', b"7"),
        ("gemini", b'"TRUST_FOLDER"', b'"TRUST_PARENT"'),
        ("gemini", b'"TRUST_FOLDER"', b'{"by": "hand"}'),
        ("claude", b"true", b"false"),
        ("claude", b"true", b"1"),
    ],
)
def test_a_value_that_somebody_has_changed_is_theirs(kind: str, ours: bytes, theirs: bytes) -> None:
    edit = KINDS[kind].editor.add(None, W)
    text = (edit.text or b"").replace(ours, theirs)

    removal = KINDS[kind].editor.remove(text, W, edit.added)

    assert (removal.text, removal.outcome) == (text, Outcome.CHANGED)


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_that_is_gone_needs_nothing(kind: str) -> None:
    editor = KINDS[kind].editor
    added = editor.add(None, W).added

    for text in (None, b"", b" \n"):
        removal = editor.remove(text, W, added)
        assert (removal.text, removal.outcome) == (text, Outcome.GONE)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_our_making_stays_when_somebody_else_uses_it(kind: str) -> None:
    editor = KINDS[kind].editor
    edit = editor.add(None, W)
    theirs = editor.add(edit.text, "/somebody/else").text

    removal = editor.remove(theirs, W, edit.added)

    assert removal.text is not None
    assert KINDS[kind].at(removal.text, "/somebody/else") == KINDS[kind].value


@pytest.mark.parametrize("kind", ["gemini", "claude"])
def test_a_file_of_our_making_that_was_laid_out_anew_is_left_empty(kind: str) -> None:
    editor = KINDS[kind].editor
    edit = editor.add(None, W)
    again = json.dumps(json.loads(edit.text or b""), indent=4).encode()

    removal = editor.remove(again, W, edit.added)

    assert removal.text is not None
    assert json.loads(removal.text) == {}


def test_keys_that_the_cli_put_beside_ours_keep_the_project() -> None:
    edit = claude.EDITOR.add(b"{}", W)
    project = {"allowedTools": [], "hasTrustDialogAccepted": True, "cost": 0.50}
    text = json.dumps({"projects": {W: project}}, indent=2).encode()

    removal = claude.EDITOR.remove(text, W, edit.added)

    assert json.loads(removal.text or b"") == {"projects": {W: {"allowedTools": [], "cost": 0.5}}}


def test_projects_of_the_user_stay_when_they_are_empty_again() -> None:
    before = b'{"projects": {}}'
    edit = claude.EDITOR.add(before, W)

    assert claude.EDITOR.remove(edit.text, W, edit.added).text == before


def test_an_entry_that_came_twice_is_left_because_the_other_would_count() -> None:
    edit = gemini.EDITOR.add(b"{}", W)
    entry = json.dumps(W).encode()
    text = b"{" + entry + b': "DO_NOT_TRUST", ' + entry + b': "TRUST_FOLDER"}'

    removal = gemini.EDITOR.remove(text, W, edit.added)

    assert (removal.text, removal.outcome) == (text, Outcome.CHANGED)


def test_a_trusted_parent_rule_of_gemini_needs_no_entry_of_ours() -> None:
    before = json.dumps({W: "TRUST_PARENT"}).encode()

    edit = gemini.EDITOR.add(before, W)

    assert (edit.text, edit.added) == (before, Added(owned=False))


def test_containers_go_with_the_last_entry_even_if_an_earlier_one_made_them() -> None:
    first = claude.EDITOR.add(b"{}", "/a")
    second = claude.EDITOR.add(first.text, "/b", {"/a": first.added})
    alone = claude.EDITOR.remove(second.text, "/a", first.added)

    assert claude.EDITOR.remove(alone.text, "/b", second.added).text == b"{}"
