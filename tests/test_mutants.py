"""The list of planted faults is up to date; what tests say to them, `python -m tests.mutants` finds out."""

import ast
import functools

import pytest

from tests.mutants.__main__ import ROOT, mutated
from tests.mutants.faults import FAULTS


@functools.cache
def _as_it_is(file):
    return ast.dump(ast.parse((ROOT / "spectra" / file).read_text()))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted_and_is_one(fault):
    assert ast.dump(ast.parse(mutated(fault, ROOT))) != _as_it_is(fault.file)


def test_the_tests_that_faults_name_exist():
    for file, _, function in {test.partition("::") for fault in FAULTS for test in fault.paths}:
        functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")}
        assert not function or function in functions, f"{file} has no {function}: see tests/mutants/faults.py"


def test_there_are_as_many_faults_as_are_asked_for_and_each_is_another():
    assert len(FAULTS) >= 44
    assert (
        len({fault.name for fault in FAULTS}) == len({(f.file, f.old, f.new) for f in FAULTS}) == len(FAULTS)
    )
