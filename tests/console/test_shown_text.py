"""Text of agents as HTML: nothing acts, and nothing is hidden."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.console.shown_text import MAX_NAMED, is_shown_whole, shown, shown_line


def test_markup_of_an_agent_is_text() -> None:
    assert shown("<script>alert('x')</script>&") == (
        "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;"
    )


@pytest.mark.parametrize(
    "sequence",
    [
        "\x1b[31m",
        "\x1b[38;5;196m",
        "\x1b[2J",
        "\x1b]0;title\x07",
        "\x1b]8;;https://evil.example\x1b\\",
        "\x1b(B",
        "\x1bPdata\x1b\\",
        "\x9b31m",
    ],
)
def test_sequences_of_terminals_are_removed(sequence: str) -> None:
    assert shown(f"a{sequence}b") == "ab"


@pytest.mark.parametrize(
    ("char", "name"),
    [
        ("\x00", "U+0000"),
        ("\x07", "U+0007"),
        ("\r", "U+000D"),
        ("\x7f", "U+007F"),
        ("\x85", "U+0085"),
        ("\u202e", "U+202E"),
        ("\u2066", "U+2066"),
        ("\u061c", "U+061C"),
        ("\u200b", "U+200B"),
        ("\ufeff", "U+FEFF"),
        ("\u2028", "U+2028"),
        ("\U000e0041", "U+E0041"),
        ("\ud800", "U+D800"),
    ],
)
def test_a_character_without_a_visible_form_is_named(char: str, name: str) -> None:
    html = shown(f"a{char}b")

    assert html == f'a<span class="ctl">{name}</span>b'
    html.encode()  # a lone surrogate could not be sent


def test_texts_of_every_script_stay_as_they_are() -> None:
    text = "שלום, مرحبا, 你好, नमस्ते, 👩\u200d👩\u200d👧, a\tb\nc"

    assert shown(text) == text


def test_a_long_text_ends_with_an_ellipsis() -> None:
    assert shown("abcdef", 3) == "abc…"
    assert shown("abc", 3) == "abc"


def test_a_text_for_one_line_has_no_newline() -> None:
    assert shown_line("a\nb\tc") == (
        'a<span class="ctl">U+000A</span>b<span class="ctl">U+0009</span>c'
    )


@given(st.text(alphabet=st.characters(), max_size=200))
def test_no_text_becomes_an_element_of_its_own(text: str) -> None:
    html = str(shown_line(text))

    rest = re.sub(r'<span class="ctl">U\+[0-9A-F]+(?: &times;[0-9]+)?</span>', "", html)
    assert not set(rest) & set("<>\"'\x00\r\n\x1b\u202e\u2066")


def test_equal_invisible_characters_in_a_row_are_named_once_with_their_number() -> None:
    assert shown("a" + "\0" * 4096 + "b") == 'a<span class="ctl">U+0000 &times;4096</span>b'


def test_a_text_with_very_many_invisible_characters_ends_early() -> None:
    text = "\x7f\x80" * 500_000

    html = shown(text)

    assert html.count("U+00") == MAX_NAMED
    assert html.endswith("U+0080</span>…")
    assert not is_shown_whole(text, len(text))
    assert is_shown_whole(text[:100], 100)
    assert not is_shown_whole(text[:101], 100)
