from __future__ import annotations

import base64
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery.v1 import recovery_service_pb2, run_pb2, run_service_pb2
from runrecovery_service.domain.errors import (
    PageTokenInvalid,
    PageTokenMismatch,
    WatchCursorInvalid,
)
from runrecovery_service.rpc import paging
from runrecovery_service.storage.decision_feed import FeedCursor

SCOPE = paging.token_scope(
    run_service_pb2.ListRunsRequest(filter=run_service_pb2.RunFilter(engine="demo")), width=2
)
TOKENS = paging.PageTokens(key=b"of one store")
OTHERS = paging.PageTokens(key=b"of another store")
KEYS = st.integers(min_value=-(2**63), max_value=2**63 - 1)


@given(st.tuples(KEYS, KEYS))
def test_a_token_decodes_to_its_keys(after: tuple[int, ...]) -> None:
    assert TOKENS.decode(SCOPE, TOKENS.encode(SCOPE, after)) == after


@given(st.tuples(KEYS, KEYS), st.data())
def test_altered_token_is_refused(after: tuple[int, ...], data: st.DataObject) -> None:
    token = replace(TOKENS, random=bytes).encode(SCOPE, after)
    at = data.draw(st.integers(0, len(token) - 1))
    char = data.draw(st.characters(exclude_characters=token[at]))

    for altered in (
        token[:at] + char + token[at + 1 :],
        token[:at] + token[at + 1 :],
        token[:at] + char + token[at:],
    ):
        if altered != token:
            with pytest.raises(PageTokenInvalid):
                TOKENS.decode(SCOPE, altered)


@given(st.text(min_size=1))
def test_any_text_is_refused_as_a_token(text: str) -> None:
    with pytest.raises(PageTokenInvalid):
        TOKENS.decode(SCOPE, text)


def test_another_filter_refuses_the_token() -> None:
    other = paging.token_scope(
        run_service_pb2.ListRunsRequest(filter=run_service_pb2.RunFilter(engine="other")), width=2
    )

    with pytest.raises(PageTokenMismatch):
        TOKENS.decode(other, TOKENS.encode(SCOPE, (1, 2)))


def test_another_method_refuses_the_token() -> None:
    first = paging.token_scope(run_service_pb2.ListRunsRequest(), width=1)
    second = paging.token_scope(recovery_service_pb2.ListReconciliationsRequest(), width=1)

    with pytest.raises(PageTokenMismatch):
        TOKENS.decode(second, TOKENS.encode(first, (1,)))


def test_page_size_and_token_do_not_belong_to_the_filter() -> None:
    wanted = run_service_pb2.RunFilter(statuses=[run_pb2.RUN_STATUS_QUEUED])
    first = run_service_pb2.ListRunsRequest(filter=wanted, page_size=7)
    second = run_service_pb2.ListRunsRequest(filter=wanted, page_size=9)
    second.page_token = TOKENS.encode(paging.token_scope(first, width=1), (1,))

    assert paging.token_scope(first, width=1) == paging.token_scope(second, width=1)


def test_last_page_has_no_token_and_no_token_is_the_first_page() -> None:
    assert TOKENS.encode(SCOPE, None) == ""
    assert TOKENS.decode(SCOPE, "") is None


def test_a_wrong_number_of_keys_is_a_defect() -> None:
    with pytest.raises(ValueError, match="1 keys for a scope of 2"):
        TOKENS.encode(SCOPE, (1,))


@pytest.mark.parametrize(("asked", "given"), [(0, 50), (1, 1), (1000, 1000), (1001, 1000)])
def test_page_size_has_a_default_and_a_limit(asked: int, given: int) -> None:
    assert paging.page_size(asked) == given


def test_a_token_shows_no_keys_and_differs_each_time() -> None:
    keys = (7, 8)
    texts = [TOKENS.encode(SCOPE, keys) for _ in range(8)]
    shown = [base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)) for text in texts]

    assert {TOKENS.decode(SCOPE, text) for text in texts} == {keys}
    for at in range(1, len(shown[0])):  # the first byte is the version
        assert len({raw[at] for raw in shown}) > 1


def test_the_cursor_of_a_decision_is_always_the_same_and_a_bookmark_never() -> None:
    place = FeedCursor(3, 4, 5)

    assert TOKENS.encode_cursor(place) == TOKENS.encode_cursor(place)
    assert TOKENS.encode_bookmark(place) != TOKENS.encode_bookmark(place)


def test_a_token_of_another_store_is_refused() -> None:
    with pytest.raises(PageTokenInvalid):
        TOKENS.decode(SCOPE, OTHERS.encode(SCOPE, (1, 2)))


def test_a_key_is_not_in_what_an_object_shows_of_itself() -> None:
    assert repr(TOKENS) == "PageTokens()"


def test_a_cursor_decodes_to_its_place_and_a_page_token_is_none() -> None:
    place = FeedCursor(3, 4, 2**63 - 1)

    for cursor in (TOKENS.encode_cursor(place), TOKENS.encode_bookmark(place)):
        found = TOKENS.decode_cursor(cursor)
        assert found is not None
        assert (found.report, found.run, found.stamp) == (3, 4, 2**63 - 1)
    assert TOKENS.decode_cursor("") is None
    for refused in (TOKENS.encode(SCOPE, (3, 4)), OTHERS.encode_cursor(place), "x"):
        with pytest.raises(WatchCursorInvalid):
            TOKENS.decode_cursor(refused)


def test_another_encoding_of_the_same_token_is_refused() -> None:
    scope = paging.token_scope(run_service_pb2.ListRunsRequest(), width=1)
    token = TOKENS.encode(scope, (7,))
    # The last character of 41 bytes carries two bits that base64 readers ignore.
    spelling = token[:-1] + chr(ord(token[-1]) + 1)

    assert base64.urlsafe_b64decode(token + "=") == base64.urlsafe_b64decode(spelling + "=")
    with pytest.raises(PageTokenInvalid):
        TOKENS.decode(scope, spelling)
