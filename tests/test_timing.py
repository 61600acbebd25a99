"""Which of several turns a benchmark takes for its figure."""

import itertools

import pytest

from benchmarks import timing


@pytest.mark.parametrize(
    ("lost", "taken", "turns"),
    [([0], 0, 1), ([1], 0, 1), ([30, 0], 1, 2), ([30, 20, 40], 1, 3)],
    ids=["quiet", "a hundredth", "the second is quiet", "none is quiet"],
)
def test_a_turn_that_lost_processor_time_is_measured_again(monkeypatch, lost, taken, turns):
    """`lost` of 100 ticks are taken away in each turn; what was measured does not matter."""
    shares = iter(lost)
    ticks = itertools.accumulate(
        (step for share in shares for step in ((0, 0), (100 - share, share))),
        lambda total, step: (total[0] + step[0], total[1] + step[1]),
    )
    monkeypatch.setattr(timing, "_processor_time", lambda: next(ticks))
    monkeypatch.setattr(timing, "stolen", [])
    count = itertools.count()
    assert timing.quietest(lambda: next(count), tries=len(lost)) == taken
    assert next(count) == turns
    assert timing.stolen == [lost[taken] / 100]
