"""The list of planted faults is up to date: each one still finds its place in the code, and its
tests are there.
"""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from tests.mutants.run import ROOT, Mutant, mutants


@pytest.mark.parametrize("mutant", mutants(), ids=lambda mutant: mutant.name)
def test_a_fault_can_be_planted(mutant: Mutant) -> None:
    code = (ROOT / mutant.file).read_text()
    planted = mutant.planted(code)
    assert planted != code
    ast.parse(planted)
    for test in mutant.tests:
        if test.startswith("tests/"):
            assert (ROOT / test.partition("::")[0]).exists(), test


def test_faults_have_names_of_their_own() -> None:
    assert all(count == 1 for count in Counter(mutant.name for mutant in mutants()).values())


def test_a_fault_that_lost_its_place_is_named() -> None:
    mutant = Mutant("gone", "a.py", "x = 1", "x = 2", ())
    with pytest.raises(ValueError, match="mutant 'gone': `old` stands 2 times in a.py"):
        mutant.planted("x = 1\nx = 1\n")
