"""The list of seeded bugs fits the code."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants.seeded_bugs import MUTANTS, Mutant
from mutants.tree import ROOT, SERVICE


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_seeded_bug_changes_a_text_that_stands_once_in_its_file(mutant: Mutant) -> None:
    text = (ROOT / SERVICE / mutant.file).read_text("utf-8")

    assert text.count(mutant.old) == 1
    assert mutant.new != mutant.old
    assert Path(ROOT / mutant.test).exists()


def test_at_least_forty_bugs_are_seeded_under_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 40
