"""How this run compiles: what is chosen, and what of the user's own flags is left."""

import os

import programs
import pytest

QUICK = " ".join(programs.as_flags(programs.QUICK))
LEVEL = programs.as_flags({"xla_backend_optimization_level": 2})[0]


@pytest.mark.parametrize(("said", "chosen"), [("", "quick"), ("quick", "quick"), ("optimised", "optimised")])
def test_programs_are_compiled_quickly_unless_the_environment_says_otherwise(said, chosen, monkeypatch):
    monkeypatch.setenv(programs.SWITCH, said)
    assert programs.choose() == chosen


def test_a_form_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv(programs.SWITCH, "fast")
    with pytest.raises(ValueError, match="SPECTRA_TEST_PROGRAMS=fast"):
        programs.choose()


@pytest.mark.parametrize("own", ["", "--xla_cpu_max_isa=AVX2", LEVEL])
def test_flags_of_the_user_come_last_and_a_worker_adds_none(own, monkeypatch):
    """XLA takes the later of two values."""
    monkeypatch.setenv(programs.SWITCH, "")
    monkeypatch.setenv("XLA_FLAGS", own)
    for _ in range(2):
        programs.set_flags("quick")
        assert os.environ["XLA_FLAGS"] == f"{QUICK} {own}".strip()
    monkeypatch.setenv("XLA_FLAGS", own)
    programs.set_flags("optimised")
    assert os.environ["XLA_FLAGS"] == own
