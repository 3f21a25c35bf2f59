"""The crash points of `make campaign-crash-points` are complete, and name what exists."""

from __future__ import annotations

import pytest
from crash_points.known import COMMITS, UNREACHED
from crash_points.points import EFFECTS, Effect, find
from crash_points.use_cases import changing_use_cases


@pytest.mark.parametrize("effect", EFFECTS, ids=lambda effect: effect.name)
def test_an_effect_with_crash_points_is_a_function_of_the_service(effect: Effect) -> None:
    _, _, function = find(effect.module, effect.attribute)

    assert callable(function)


def test_every_use_case_that_changes_rows_is_a_known_crash_point_or_says_why_it_is_not() -> None:
    assert changing_use_cases() == COMMITS | UNREACHED.keys()
    assert not COMMITS & UNREACHED.keys()
