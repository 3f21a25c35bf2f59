"""In any document of any layout, entries can be added and removed, and nothing else changes."""

from __future__ import annotations

import json

from hypothesis import example, given, settings
from hypothesis import strategies as st
from runrecovery_service.trust import claude, codex, gemini
from runrecovery_service.trust.entry import Added, Editor, Outcome
from trust.cases import KINDS, Kind
from trust.corpus import FOLDERS, W

blanks = st.text(" \t\r\n", max_size=3)
folders = st.one_of(
    st.sampled_from(list(FOLDERS.values())),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8).map(
        lambda name: f"/{name}"
    ),
)
names = st.one_of(st.sampled_from([W, "projects", "hasTrustDialogAccepted", "a", ""]), folders)


@st.composite
def json_values(draw: st.DrawFn, depth: int = 3) -> str:
    """Draw a JSON value, with white space anywhere."""
    kind = draw(st.sampled_from(["object", "array", "scalar"] if depth else ["scalar"]))
    if kind == "object":
        return draw(json_objects(depth - 1))
    if kind == "array":
        parts = draw(st.lists(json_values(depth - 1), max_size=3))
        return f"[{','.join(draw(blanks) + part + draw(blanks) for part in parts)}{draw(blanks)}]"
    numbers = st.sampled_from(["0", "-1.50", "1e400", "true", "false", "null"])
    texts = st.builds(json.dumps, names, ensure_ascii=st.booleans())
    return draw(st.one_of(numbers, texts, st.just('"\\ud800"')))


@st.composite
def json_objects(draw: st.DrawFn, depth: int = 3) -> str:
    """Draw a JSON object, in which names may come twice."""
    members = draw(st.lists(st.tuples(names, json_values(depth)), max_size=4))
    inside = ",".join(
        f"{draw(blanks)}{json.dumps(name)}{draw(blanks)}:{draw(blanks)}{value}{draw(blanks)}"
        for name, value in members
    )
    return f"{{{inside or draw(blanks)}}}"


@st.composite
def json_files(draw: st.DrawFn) -> bytes:
    """Draw a file with a JSON object."""
    bom = draw(st.sampled_from(["", "\ufeff"]))
    return f"{bom}{draw(blanks)}{draw(json_objects())}{draw(blanks)}".encode()


newlines = st.sampled_from(["\n", "\r\n", "\n\n", " \n", " # c [x] = '\n"])
toml_scalars = st.sampled_from(
    ["1", "1.50", "nan", "true", '"a # b"', "'\\'", '"""\n[projects]\n\\"""""', "'''a\n''b'''",
     "1979-05-27 07:32:00", "[1, [2],\n # ]\n]", "{ a = 1, 'b'.c = {} }", "{}", '"trusted"']
)  # fmt: skip


def _key(name: str, *, literal: bool) -> str:
    if literal and name.isprintable() and "'" not in name:
        return f"'{name}'"
    return json.dumps(name, ensure_ascii=True) if name.isascii() else f'"{_escaped(name)}"'


def _escaped(name: str) -> str:
    return "".join(f"\\U{ord(char):08X}" for char in name)


@st.composite
def toml_keys(draw: st.DrawFn, *start: str) -> str:
    """Draw a dotted TOML key that begins with these parts, with any spaces and quotes."""
    dot = draw(st.sampled_from([".", " . "]))
    parts = [_key(part, literal=draw(st.booleans())) for part in start]
    return dot.join(parts)


@st.composite
def toml_entries(draw: st.DrawFn, folder: str, form: str) -> tuple[str, str]:
    """Draw a project in one notation: lines for the root, and lines for the end of the file."""
    level = draw(st.sampled_from(['"untrusted"', "'untrusted'", '"""untrusted"""', ""]))
    other = draw(toml_scalars)
    newline = draw(newlines)
    key = draw(toml_keys("projects", folder))
    lines = [f"trust_level = {level}"] if level else []
    lines += [f"other = {other}"] if draw(st.booleans()) else []
    if form == "dotted":
        return "".join(f"{key}.{line}{newline}" for line in lines), ""
    if form == "inline":
        return (
            f"{key} = {{ {', '.join(line for line in lines if chr(10) not in line)} }}{newline}",
            "",
        )
    if form == "sub":
        return "", f"[{key}.sub]{newline}x = {other}{newline}"
    return "", f"[{key}]{newline}" + "".join(f"\t{line}{newline}" for line in lines)


@st.composite
def toml_files(draw: st.DrawFn) -> bytes:
    """Draw a TOML file with projects in several notations, and other content."""
    used = draw(st.lists(folders, max_size=3, unique=True).map(lambda some: sorted({*some, W})))
    forms = st.sampled_from(["dotted", "inline", "sub", "header", "none"])
    head = draw(st.sampled_from(["", "# top\n", "model = 'm'\r\n", "\n\n"]))
    root, tail = "", ""
    for folder in used:
        form = draw(forms)
        if form != "none":
            above, below = draw(toml_entries(folder, form))
            root, tail = root + above, tail + below
    tables = draw(st.lists(toml_scalars, max_size=2))
    tail += "".join(f"[[t]]{draw(newlines)}a = {value}{draw(newlines)}" for value in tables)
    text = draw(st.sampled_from(["", "\ufeff"])) + head + root + tail
    return (text.rstrip("\r\n") if draw(st.booleans()) else text).encode()


def _there_and_back(
    editor: Editor, before: bytes | None, some: list[str], order: list[str]
) -> None:
    text, standing = before, dict[str, Added]()
    for folder in some:
        edit = editor.add(text, folder, standing)
        text, standing[folder] = edit.text, edit.added
    full, states = text, {0: (text, dict[str, Outcome]())}
    for at, folder in enumerate(order, 1):
        removal = editor.remove(text, folder, standing[folder])
        text = removal.text
        states[at] = (text, {**states[at - 1][1], folder: removal.outcome})

    assert text == before
    for at, state in states.items():  # and any number of them at one time
        together = editor.remove_all(full, {folder: standing[folder] for folder in order[:at]})
        assert (together.text, together.outcomes) == state


def _means(cli: Kind, before: bytes, folder: str) -> None:
    after = cli.editor.add(before, folder).text

    assert cli.means(after) == cli.with_entry(before, folder)


several = st.lists(folders, min_size=1, max_size=5, unique=True).flatmap(
    lambda some: st.tuples(st.just(some), st.permutations(some))
)


def _is_open(text: bytes, path: tuple[str, ...]) -> bool:
    """Return whether there are objects, or nothing, along the path, and no object at its end."""
    found = KINDS["claude"].means(text)
    for key in path:
        if not isinstance(found, dict):
            return False
        found = found.get(key, {} if key != path[-1] else None)
    return not isinstance(found, dict | list)


@settings(max_examples=100)
@given(json_files(), several)
def test_entries_in_any_gemini_file_can_be_added_and_removed(
    before: bytes, some: tuple[list[str], list[str]]
) -> None:
    if all(_is_open(before, (folder,)) for folder in some[0]):
        _there_and_back(gemini.EDITOR, before, *some)
        _means(KINDS["gemini"], before, some[0][0])


@settings(max_examples=100)
@given(json_files(), several)
def test_entries_in_any_claude_file_can_be_added_and_removed(
    before: bytes, some: tuple[list[str], list[str]]
) -> None:
    paths = (("projects", folder, "hasTrustDialogAccepted") for folder in some[0])
    if all(_is_open(before, path) for path in paths):
        _there_and_back(claude.EDITOR, before, *some)
        _means(KINDS["claude"], before, some[0][0])


@example(before=b'[projects."/0"]', some=(["/", "/0"], ["/", "/0"]))
@example(before=b'x = 1\r\n[projects."/0"]', some=(["/", "/0"], ["/", "/0"]))
@example(before=b'[projects."/0"]', some=(["/", "/0", "/1"], ["/1", "/", "/0"]))
@settings(max_examples=150)
@given(toml_files(), several)
def test_entries_in_any_codex_file_can_be_added_and_removed(
    before: bytes, some: tuple[list[str], list[str]]
) -> None:
    _there_and_back(codex.EDITOR, before, *some)
    _means(KINDS["codex"], before, some[0][0])


@settings(max_examples=150)
@given(toml_files())
def test_an_entry_in_any_codex_file_that_has_the_folder_can_be_added_and_removed(
    before: bytes,
) -> None:
    _there_and_back(codex.EDITOR, before, [W], [W])
    _means(KINDS["codex"], before, W)
