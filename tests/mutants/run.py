"""Tries seeded bugs: each must be caught by its own test.

python tests/mutants/run.py [--part K/N] [NAME …]

Exit code 0: every mutant was caught. `--part 3/10` tries every tenth mutant, from the third on;
`--part auto/10` takes the part from the commit, so that CI comes round to all of them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Final

sys.path.insert(0, str(Path(__file__).parents[1]))

from mutants.seeded_bugs import MUTANTS, Mutant
from mutants.tree import FAILED, ROOT, CopiedTree

TREES: Final = 2
_FAILED_TEST: Final = re.compile(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", re.MULTILINE)


def main() -> int:
    """Try the chosen mutants; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--part", default="1/1", metavar="K/N")
    chosen = parser.parse_args()
    mutants = [m for m in _part(chosen.part) if not chosen.names or m.name in chosen.names]
    with tempfile.TemporaryDirectory(prefix="runrecovery-mutants-") as folder:
        missed = _count_missed(mutants, Path(folder))
    print(f"{len(mutants) - missed} of {len(mutants)} mutants caught")
    return 1 if missed or not mutants else 0


def _part(text: str) -> list[Mutant]:
    part, _, of = text.partition("/")
    number = _commit_number() if part == "auto" else int(part) - 1
    return list(MUTANTS[number % int(of) :: int(of)])


def _commit_number() -> int:
    head = subprocess.run(
        ["git", "rev-parse", "--short=8", "HEAD"], cwd=ROOT, check=True, capture_output=True
    )
    return int(head.stdout, 16)


def _count_missed(mutants: list[Mutant], folder: Path) -> int:
    """Try mutants, print what came of each, and return how many were not caught."""
    trees: SimpleQueue[CopiedTree] = SimpleQueue()
    for number in range(TREES):
        (folder / str(number)).mkdir()
        trees.put(CopiedTree(folder / str(number)))

    def attempt(mutant: Mutant) -> bool:
        tree = trees.get()
        try:
            problem = _why_not_caught(mutant, tree)
        finally:
            trees.put(tree)
        print(f"{'not caught' if problem else 'caught':10}  {mutant.name}  {problem}", flush=True)
        return bool(problem)

    with ThreadPoolExecutor(TREES) as pool:
        return sum(pool.map(attempt, mutants))


def _why_not_caught(mutant: Mutant, tree: CopiedTree) -> str:
    with tree.changed(mutant.file, mutant.old, mutant.new):
        code, output = tree.run_tests(mutant.test)
    if code == 0:
        return f"{mutant.test} passes"
    if code != FAILED:
        return f"its test cannot run:\n{output}"
    # The suite passes without a mutant, but a test may need something that the copy does not have.
    tests = sorted(set(_FAILED_TEST.findall(output)))
    code, output = tree.run_tests(*tests) if tests else (0, "")
    return f"its test fails without it too:\n{output}" if code else ""


if __name__ == "__main__":
    sys.exit(main())
