from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery.v1 import recovery_service_pb2, run_pb2, run_service_pb2
from runrecovery_service.domain.errors import PageTokenInvalid, PageTokenMismatch
from runrecovery_service.rpc import paging

SCOPE = paging.token_scope(
    run_service_pb2.ListRunsRequest(filter=run_service_pb2.RunFilter(engine="demo")), width=2
)
KEYS = st.integers(min_value=-(2**63), max_value=2**63 - 1)


@given(st.tuples(KEYS, KEYS))
def test_a_token_decodes_to_its_keys(after: tuple[int, ...]) -> None:
    assert paging.decode(SCOPE, paging.encode(SCOPE, after)) == after


@given(st.tuples(KEYS, KEYS), st.data())
def test_altered_token_is_refused(after: tuple[int, ...], data: st.DataObject) -> None:
    token = paging.encode(SCOPE, after)
    at = data.draw(st.integers(0, len(token) - 1))
    char = data.draw(st.characters(exclude_characters=token[at]))

    for altered in (
        token[:at] + char + token[at + 1 :],
        token[:at] + token[at + 1 :],
        token[:at] + char + token[at:],
    ):
        if altered != token:
            with pytest.raises(PageTokenInvalid):
                paging.decode(SCOPE, altered)


@given(st.text(min_size=1))
def test_any_text_is_refused_as_a_token(text: str) -> None:
    with pytest.raises(PageTokenInvalid):
        paging.decode(SCOPE, text)


def test_another_filter_refuses_the_token() -> None:
    other = paging.token_scope(
        run_service_pb2.ListRunsRequest(filter=run_service_pb2.RunFilter(engine="other")), width=2
    )

    with pytest.raises(PageTokenMismatch):
        paging.decode(other, paging.encode(SCOPE, (1, 2)))


def test_another_method_refuses_the_token() -> None:
    first = paging.token_scope(run_service_pb2.ListRunsRequest(), width=1)
    second = paging.token_scope(recovery_service_pb2.ListReconciliationsRequest(), width=1)

    with pytest.raises(PageTokenMismatch):
        paging.decode(second, paging.encode(first, (1,)))


def test_page_size_and_token_do_not_belong_to_the_filter() -> None:
    wanted = run_service_pb2.RunFilter(statuses=[run_pb2.RUN_STATUS_QUEUED])
    first = run_service_pb2.ListRunsRequest(filter=wanted, page_size=7)
    second = run_service_pb2.ListRunsRequest(filter=wanted, page_size=9)
    second.page_token = paging.encode(paging.token_scope(first, width=1), (1,))

    assert paging.token_scope(first, width=1) == paging.token_scope(second, width=1)


def test_last_page_has_no_token_and_no_token_is_the_first_page() -> None:
    assert paging.encode(SCOPE, None) == ""
    assert paging.decode(SCOPE, "") is None


def test_a_wrong_number_of_keys_is_a_defect() -> None:
    with pytest.raises(ValueError, match="1 keys for a scope of 2"):
        paging.encode(SCOPE, (1,))


@pytest.mark.parametrize(("asked", "given"), [(0, 50), (1, 1), (1000, 1000), (1001, 1000)])
def test_page_size_has_a_default_and_a_limit(asked: int, given: int) -> None:
    assert paging.page_size(asked) == given


def test_another_encoding_of_the_same_token_is_refused() -> None:
    scope = paging.token_scope(run_service_pb2.ListRunsRequest(), width=1)
    token = paging.encode(scope, (7,))
    # The last character of 25 bytes carries four bits that base64 readers ignore.
    spelling = token[:-1] + chr(ord(token[-1]) + 1)

    assert base64.urlsafe_b64decode(token + "==") == base64.urlsafe_b64decode(spelling + "==")
    with pytest.raises(PageTokenInvalid):
        paging.decode(scope, spelling)
