"""Files that cannot be edited safely are refused with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from runrecovery_service.trust import codex, json_entry, json_text, toml_text
from runrecovery_service.trust.entry import RESERVE, Added, Made, Outcome
from runrecovery_service.trust.errors import FolderUnusable, TrustFileUnusable, UnusableReason
from runrecovery_service.trust.text import Splice, Text
from trust.cases import KINDS
from trust.corpus import W

R = UnusableReason
REFUSED: list[tuple[str, str, bytes, UnusableReason]] = [
    ("codex", "broken", b"a = \n", R.NOT_PARSABLE),
    ("codex", "key twice", b"a = 1\na = 2\n", R.NOT_PARSABLE),
    ("codex", "table twice", b"[projects.'/x']\n[projects.'/x']\n", R.NOT_PARSABLE),
    ("codex", "string not ended", b'a = """\n[projects]\n', R.NOT_PARSABLE),
    ("codex", "bare carriage returns", b"a = 1\rb = 2\r", R.NOT_PARSABLE),
    ("codex", "no toml at all", b'{"a": 1}', R.NOT_PARSABLE),
    ("codex", "merge conflict", b"<<<<<<< ours\na = 1\n", R.NOT_PARSABLE),
    ("codex", "key with a bad escape", b'"\\q" = 1\n', R.NOT_PARSABLE),
    ("codex", "inline table in lines", b"projects = {\n}\n", R.NOT_PARSABLE),
    ("codex", "utf-16", "a = 1".encode("utf-16"), R.NOT_UTF8),
    ("codex", "latin-1", b"# \xe9\n", R.NOT_UTF8),
    ("codex", "two byte-order marks", b"\xef\xbb\xbf" * 2, R.NOT_PARSABLE),
    ("codex", "projects is a value", b"projects = 1\n", R.UNEXPECTED_SHAPE),
    ("codex", "projects is an array", b"[[projects]]\n", R.UNEXPECTED_SHAPE),
    ("codex", "folder is a value", b'projects."/runs/a project" = "trusted"', R.UNEXPECTED_SHAPE),
    ("codex", "folder is an array", b'[[projects."/runs/a project"]]', R.UNEXPECTED_SHAPE),
    ("codex", "level: number", b'projects."/runs/a project".trust_level = 1', R.UNEXPECTED_SHAPE),
    ("codex", "deep arrays", b"a = " + b"[" * 5000 + b"]" * 5000, R.TOO_DEEP),
    ("codex", "long dotted key", b"a" + b".a" * 200_000 + b" = 1", R.TOO_DEEP),
    ("codex", "long dotted header", b"[a" + b".a" * 200_000 + b"]", R.TOO_DEEP),
    ("codex", "long inline key", b"a = {a" + b".'a'" * 200_000 + b" = 1}", R.TOO_DEEP),
    ("codex", "huge number", b"a = " + b"9" * 5000, R.NOT_PARSABLE),
    ("codex", "too large", b"#" * ((8 << 20) + 1), R.TOO_LARGE),
    ("gemini", "broken", b'{"a": ', R.NOT_PARSABLE),
    ("gemini", "comments", b'{\n  // c\n  "a": 1\n}', R.NOT_PARSABLE),
    ("gemini", "trailing comma", b'{"a": 1,}', R.NOT_PARSABLE),
    ("gemini", "single quotes", b"{'a': 1}", R.NOT_PARSABLE),
    ("gemini", "trailing data", b'{"a": 1} {}', R.NOT_PARSABLE),
    ("gemini", "trailing nul", b'{"a": 1}\0', R.NOT_PARSABLE),
    ("gemini", "nan", b'{"a": NaN}', R.NOT_PARSABLE),
    ("gemini", "infinity", b'{"a": [-Infinity]}', R.NOT_PARSABLE),
    ("gemini", "line end in a string", b'{"a": "\n"}', R.NOT_PARSABLE),
    ("gemini", "other white space", '{\u00a0"a": 1}'.encode(), R.NOT_PARSABLE),
    ("gemini", "form feed", b'\x0c{"a": 1}', R.NOT_PARSABLE),
    ("gemini", "utf-16", '{"a": 1}'.encode("utf-16"), R.NOT_UTF8),
    ("gemini", "raw surrogate", b'{"\xed\xa0\x80": 1}', R.NOT_UTF8),
    ("gemini", "two byte-order marks", b"\xef\xbb\xbf\xef\xbb\xbf{}", R.NOT_PARSABLE),
    ("gemini", "an array", b"[]", R.UNEXPECTED_SHAPE),
    ("gemini", "a string", b'"x"', R.UNEXPECTED_SHAPE),
    ("gemini", "null", b"null", R.UNEXPECTED_SHAPE),
    ("gemini", "the entry is an object", b'{"/runs/a project": {}}', R.UNEXPECTED_SHAPE),
    ("gemini", "huge nesting", b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", R.TOO_DEEP),
    ("gemini", "too large", b" " * ((16 << 20) + 1), R.TOO_LARGE),
    ("claude", "projects is null", b'{"projects": null}', R.UNEXPECTED_SHAPE),
    ("claude", "projects is an array", b'{"projects": []}', R.UNEXPECTED_SHAPE),
    ("claude", "folder is a value", b'{"projects": {"/runs/a project": true}}', R.UNEXPECTED_SHAPE),
]  # fmt: skip
OURS = Added(owned=True, made=frozenset(Made))


@pytest.mark.parametrize(
    ("kind", "data", "reason"),
    [(kind, data, reason) for kind, _, data, reason in REFUSED],
    ids=[f"{kind}: {name}" for kind, name, _, _ in REFUSED],
)
def test_add_refuses_a_file_that_it_cannot_edit_safely_with_the_reason(
    kind: str, data: bytes, reason: UnusableReason
) -> None:
    with pytest.raises(TrustFileUnusable) as refused:
        KINDS[kind].editor.add(data, W)

    assert refused.value.reason is reason


@pytest.mark.parametrize(
    ("kind", "data", "reason"),
    [each for each in ((k, d, r) for k, _, d, r in REFUSED) if each[2] is not R.UNEXPECTED_SHAPE],
)
def test_remove_refuses_a_file_that_it_cannot_parse_with_the_reason(
    kind: str, data: bytes, reason: UnusableReason
) -> None:
    data = (
        data * 2 if reason is R.TOO_LARGE else data
    )  # an entry can still be removed from a file of this size
    with pytest.raises(TrustFileUnusable) as refused:
        KINDS[kind].editor.remove(data, W, OURS)

    assert refused.value.reason is reason


@pytest.mark.parametrize(
    ("kind", "data"), [(k, d) for k, _, d, reason in REFUSED if reason is R.UNEXPECTED_SHAPE]
)
def test_remove_leaves_a_file_of_another_shape_unchanged(kind: str, data: bytes) -> None:
    removal = KINDS[kind].editor.remove(data, W, OURS)

    assert removal.text == data
    assert removal.outcome in {Outcome.GONE, Outcome.CHANGED}


@pytest.mark.parametrize("folder", ["", "relative", "./x", "~/x", "/a\0b", "/a\ud800", "/\udcff"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_name_that_no_entry_can_have_is_refused(kind: str, folder: str) -> None:
    with pytest.raises(FolderUnusable):
        KINDS[kind].editor.add(None, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_message_contains_nothing_of_the_file(kind: str) -> None:
    secret = b'api_key = "sk-secret-1234" sk-secret-1234 = }\n{"sk-secret-1234": }'

    with pytest.raises(TrustFileUnusable) as refused:
        KINDS[kind].editor.add(secret, W)

    assert "secret" not in str(refused.value)


def _json_of_5_mib() -> bytes:
    projects = {f"/p/{i}": {"history": ["x" * 330] * 3, "cost": i / 7} for i in range(5_000)}
    return json.dumps({"projects": projects}, indent=2).encode()


def _many_names() -> bytes:
    return json.dumps({f"/p/{i}/{'x' * 260}": "TRUST_FOLDER" for i in range(20_000)}).encode()


def _many_tables() -> bytes:
    tables = (f"[projects.'/p/{i}']\ntrust_level = 'trusted' # c\nx = [1, {{a = 2.5}}]\n\n"
              for i in range(3_000))  # fmt: skip
    return "".join(tables).encode()


def _toml_of_5_mib() -> bytes:
    """Mostly comments: 5 MiB of tables take half a minute."""
    return _many_tables() + b"\n" + (b"# " + b"x" * 597 + b"\n") * 8_500


@pytest.mark.parametrize(
    ("kind", "make", "least"),
    [("claude", _json_of_5_mib, 5 << 20), ("gemini", _many_names, 5 << 20),
     ("codex", _toml_of_5_mib, 5 << 20)],
)  # fmt: skip
def test_a_large_file_is_edited_like_a_small_one(
    kind: str, make: Callable[[], bytes], least: int
) -> None:
    editor, before = KINDS[kind].editor, make()
    assert len(before) >= least

    edit = editor.add(before, W)

    assert editor.remove(edit.text, W, edit.added).text == before


@pytest.mark.parametrize("stray", [(0, 1, "b"), (0, 5, "")], ids=["another key", "a line gone"])
def test_a_toml_edit_that_would_change_more_than_the_entry_is_refused(
    stray: tuple[int, int, str],
) -> None:
    body = f'a = 1\n[projects."{W}"]\ntrust_level = "trusted"\n'

    with pytest.raises(TrustFileUnusable) as refused:
        codex._proved(Text(body), [Splice(*stray)], toml_text.parse(body), {W: "trusted"})

    assert refused.value.reason is R.NOT_PROVED


@pytest.mark.parametrize("stray", [(6, 7, "2"), (2, 3, "b"), (0, 1, "")])
def test_a_json_edit_that_would_change_more_than_the_entry_is_refused(
    stray: tuple[int, int, str],
) -> None:
    body = '{"a": 1}'

    with pytest.raises(TrustFileUnusable) as refused:
        json_entry._proved(Text(body), [Splice(*stray)], json_text.parse(body))

    assert refused.value.reason is R.NOT_PROVED


MOST_OF = {"codex": codex.MOST_BYTES, "gemini": json_entry.MOST_BYTES}


def _filled(kind: str, size: int) -> bytes:
    """Return a file of this size that is quickly parsed."""
    if kind == "codex":
        return b"#" * size
    return b'{"mine": "' + b"x" * (size - 12) + b'"}'


@pytest.mark.parametrize("kind", MOST_OF)
def test_an_entry_is_removed_from_a_file_that_grew_over_the_size_limit(kind: str) -> None:
    editor, most = KINDS[kind].editor, MOST_OF[kind]
    before = _filled(kind, most - RESERVE - 1000)

    edit = editor.add(before, W)

    assert edit.text is not None
    grown = edit.text + b"\n" * most
    removal = editor.remove(grown, W, edit.added)
    assert removal.outcome is Outcome.REMOVED
    assert removal.text is not None
    assert removal.text.rstrip(b"\n") == before


@pytest.mark.parametrize("kind", MOST_OF)
def test_no_entry_is_added_to_a_file_that_could_not_grow_any_more(kind: str) -> None:
    with pytest.raises(TrustFileUnusable) as refused:
        KINDS[kind].editor.add(_filled(kind, MOST_OF[kind] - RESERVE), "/w")
    assert refused.value.reason is R.TOO_LARGE


@pytest.mark.parametrize(
    "value", ['"""a"b"""', '""""a""b"""""', "'''a'b'''", '"""a\\"""b"""', '["""a"b""", 1]']
)
def test_quotes_inside_a_multi_line_string_do_not_end_it(value: str) -> None:
    (field,) = toml_text.parse(f"a = {value} # c\n").statements

    assert isinstance(field, toml_text.Field)
    assert (field.value_start, field.value_end) == (4, 4 + len(value))
