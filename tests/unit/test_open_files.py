"""How the limit on open files is divided among runs, the store and connections."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.process.open_files import TooFewOpenFiles, connections_within


def test_connections_get_the_files_that_runs_the_store_and_a_sweep_leave() -> None:
    assert connections_within(1024, runs=4) == 1024 - 144 - 4 * 20 - 256
    assert connections_within(1024, runs=20) == 1024 - 144 - 20 * 20 - 256
    assert connections_within(300, runs=2) == 41


def test_a_limit_that_is_too_low_is_refused_with_the_lowest_possible_one() -> None:
    assert connections_within(256, runs=4) == 32
    with pytest.raises(TooFewOpenFiles) as caught:
        connections_within(255, runs=4)

    assert (caught.value.limit, caught.value.needed) == (255, 256)


@given(st.integers(1, 10_000), st.integers(0, 1 << 20))
def test_from_the_lowest_possible_limit_on_runs_and_the_store_keep_their_share(
    runs: int, more: int
) -> None:
    least = 144 + 20 * runs + 32

    with pytest.raises(TooFewOpenFiles):
        connections_within(least - 1, runs=runs)
    assert 32 <= connections_within(least + more, runs=runs) <= 32 + more
