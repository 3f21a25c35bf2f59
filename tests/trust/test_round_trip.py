"""An entry can be added and removed again, and nothing else of the file changes."""

from __future__ import annotations

import itertools

import pytest
from runrecovery_service.trust.entry import Added, Outcome
from trust import corpus
from trust.cases import FILES, KINDS

W = corpus.W


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_after_add_and_remove_the_file_is_the_same_byte_for_byte(kind: str, name: str) -> None:
    editor, before = KINDS[kind].editor, KINDS[kind].files[name]

    edit = editor.add(before, W)
    removal = editor.remove(edit.text, W, edit.added)

    assert removal.text == before
    assert removal.outcome in {Outcome.REMOVED, Outcome.RESTORED}


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_add_changes_the_parsed_file_by_its_entry_alone(kind: str, name: str) -> None:
    cli = KINDS[kind]

    edit = cli.editor.add(cli.files[name], W)

    assert cli.means(edit.text) == cli.with_entry(cli.files[name], W)


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_add_changes_bytes_in_one_place_only(kind: str, name: str) -> None:
    cli = KINDS[kind]
    before = cli.files[name] or b""

    after = cli.editor.add(before, W).text or b""
    same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
    head = len(before) if same is None else same
    tail = before[head:]
    replaced = cli.at(before, W) != "absent"

    # An entry that replaces a value ends after it; any other one is put between two bytes.
    assert after.startswith(before[:head])
    assert any(after.endswith(tail[cut:]) for cut in range(30 if replaced else 1))


def _crlf(text: bytes) -> bytes:
    return text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_lines_added_to_a_crlf_file_end_with_crlf(kind: str, name: str) -> None:
    editor, before = KINDS[kind].editor, _crlf(KINDS[kind].files[name] or b"")
    has_lines = b"\r\n" in before
    added = []

    text: bytes | None = before
    for each in (W, f"{W}/2", f"{W}/3"):
        edit = editor.add(text, each)
        text = edit.text
        added.append((each, edit.added))

    if has_lines:
        assert _crlf(text or b"") == text
    for each, told in reversed(added):
        text = editor.remove(text, each, told).text
    assert text == before


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("codex", b"a = 1\r\n",
         b'a = 1\r\n\r\n[projects."/w"]\r\ntrust_level = "trusted"\r\n'),
        ("codex", b"a = 1\r\nb = 2",
         b'a = 1\r\nb = 2\r\n\r\n[projects."/w"]\r\ntrust_level = "trusted"'),
        ("codex", b"[projects.'/w']\r\n",
         b"[projects.'/w']\r\ntrust_level = \"trusted\"\r\n"),
        ("codex", b"[projects.'/w']\r\na = 1",
         b"[projects.'/w']\r\ntrust_level = \"trusted\"\r\na = 1"),
        ("gemini", b'{\r\n  "/x": "TRUST_FOLDER"\r\n}\r\n',
         b'{\r\n  "/x": "TRUST_FOLDER",\r\n  "/w": "TRUST_FOLDER"\r\n}\r\n'),
        ("gemini", b"\r\n", b'\r\n{\r\n  "/w": "TRUST_FOLDER"\r\n}\r\n'),
        ("gemini", b"{\r\n}\r\n", b'{\r\n  "/w": "TRUST_FOLDER"\r\n}\r\n'),
        ("claude", b'{\r\n "n": 3\r\n}',
         (b'{\r\n "n": 3,\r\n "projects": {\r\n  "/w": {\r\n   "hasTrustDialogAccepted": true'
          b"\r\n  }\r\n }\r\n}")),
    ],
)  # fmt: skip
def test_an_entry_in_a_crlf_file_is_written_like_this(
    kind: str, before: bytes, after: bytes
) -> None:
    assert KINDS[kind].editor.add(before, "/w").text == after


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_any_folder_name_can_be_added_and_removed(kind: str, name: str) -> None:
    cli = KINDS[kind]

    for folder in corpus.FOLDERS.values():
        edit = cli.editor.add(cli.files[name], folder)

        assert cli.at(edit.text, folder) == cli.value, folder
        assert cli.editor.remove(edit.text, folder, edit.added).text == cli.files[name], folder


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_three_entries_can_be_removed_in_any_order(kind: str, name: str) -> None:
    cli = KINDS[kind]
    folders = [W, "/runs/b", '/runs/"c']
    text, standing = cli.files[name], dict[str, Added]()

    for folder in folders:
        edit = cli.editor.add(text, folder, standing)
        text, standing[folder] = edit.text, edit.added
    left = {}
    for order in itertools.permutations(folders):
        left[order] = text
        for folder in order:
            left[order] = cli.editor.remove(left[order], folder, standing[folder]).text

    assert left == dict.fromkeys(itertools.permutations(folders), cli.files[name])


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_adding_an_entry_again_changes_nothing_and_it_stays_owned(kind: str, name: str) -> None:
    editor = KINDS[kind].editor

    first = editor.add(KINDS[kind].files[name], W)
    second = editor.add(first.text, W, {W: first.added})

    assert second == first


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_removing_an_entry_again_changes_nothing(kind: str, name: str) -> None:
    editor, before = KINDS[kind].editor, KINDS[kind].files[name]
    edit = editor.add(before, W)

    again = editor.remove(before, W, edit.added)

    assert again.text == before
    assert again.outcome in {Outcome.GONE, Outcome.CHANGED}


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_an_entry_of_the_user_is_neither_owned_nor_removed(kind: str, name: str) -> None:
    editor = KINDS[kind].editor
    by_user = editor.add(KINDS[kind].files[name], W).text

    edit = editor.add(by_user, W)

    assert (edit.text, edit.added) == (by_user, Added(owned=False))
    assert editor.remove(by_user, W, edit.added).text == by_user
    assert editor.remove(by_user, W, edit.added).outcome is Outcome.NOT_OURS


@pytest.mark.parametrize(("kind", "name"), FILES)
def test_the_record_of_an_added_entry_survives_json(kind: str, name: str) -> None:
    added = KINDS[kind].editor.add(KINDS[kind].files[name], W).added

    assert Added.from_json(added.to_json()) == added


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("codex", "a = 1\n", 'a = 1\n\n[projects."/w"]\ntrust_level = "trusted"\n'),
        ("codex", "projects.'/x'.a = 1\nb = 2\n[t]\n",
         "projects.'/x'.a = 1\nprojects.\"/w\".trust_level = \"trusted\"\nb = 2\n[t]\n"),
        ("codex", "projects . '/w' . a = 1",
         "projects . '/w' . a = 1\nprojects . '/w'.trust_level = \"trusted\""),
        ("codex", "projects = { '/x' = { } }\n",
         "projects = { '/x' = { }, \"/w\" = { trust_level = \"trusted\" } }\n"),
        ("codex", "[projects.'/w']\r\n  a = 1\r\n",
         "[projects.'/w']\r\n  trust_level = \"trusted\"\r\n  a = 1\r\n"),
        ("gemini", '{\n    "/x" : 1\n}', '{\n    "/x" : 1,\n    "/w" : "TRUST_FOLDER"\n}'),
        ("gemini", '{"/x":1}', '{"/x":1,"/w":"TRUST_FOLDER"}'),
        ("claude", '{\n\t"a": 1\n}', ('{\n\t"a": 1,\n\t"projects": {\n\t\t"/w": {\n'
         '\t\t\t"hasTrustDialogAccepted": true\n\t\t}\n\t}\n}')),
    ],
)  # fmt: skip
def test_an_entry_is_written_in_the_style_of_its_neighbours(
    kind: str, before: str, after: str
) -> None:
    assert KINDS[kind].editor.add(before.encode(), "/w").text == after.encode()
