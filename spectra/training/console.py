"""Quantities of a training run that are measured at intervals of their own, and warnings about them."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from spectra._errors import SpectraError

Measure = Callable[..., Any]  # (*state) -> what float() makes a number of


class Reading(NamedTuple):
    """One measurement."""

    step: int
    value: float
    seconds: float


class Console:
    """The measures of a run: when each is due, what it gave and what it cost.

    Args:
        measures: {name: (every, function of the state)}.
        warn_below: {name: number}: a warning where a reading falls below it, once until it is above again.
    """

    def __init__(
        self,
        measures: Mapping[str, tuple[int, Measure]] | None,
        warn_below: Mapping[str, float] | None,
    ):
        self.measures = dict(measures or {})
        self.warn_below = dict(warn_below or {})
        for name, measure in self.measures.items():
            if not (isinstance(measure, tuple) and len(measure) == 2 and callable(measure[1])):
                raise SpectraError(f"measures[{name!r}] is no pair (every, function of the state).")
            every = measure[0]
            if isinstance(every, bool) or not isinstance(every, int) or every < 1:
                raise SpectraError(f"measures[{name!r}]: every={every!r} is no positive number of steps.")
        if unknown := set(self.warn_below) - set(self.measures):
            raise SpectraError(f"warn_below names {sorted(unknown)}, which are not among the measures.")
        self.readings: dict[str, list[Reading]] = {name: [] for name in self.measures}
        self.left_out = dict.fromkeys(self.measures, 0)  # for the budget
        self.seconds = 0.0  # of all readings but the first of each, which compile
        self._below: set[str] = set()

    def due(self, step: int) -> list[str]:
        """The measures to take at a step that has none yet."""
        return [
            name
            for name, (every, _) in self.measures.items()
            if step % every == 0 and not (self.readings[name] and self.readings[name][-1].step >= step)
        ]

    def cost(self, name: str) -> float | None:
        """Seconds that the last reading took; None where it has compiled, or there is none."""
        return self.readings[name][-1].seconds if len(self.readings[name]) > 1 else None

    def take(self, name: str, step: int, state: tuple, clock: Callable[[], float]) -> Reading:
        """Measure, and warn where the reading asks for it."""
        began = clock()
        value = float(self.measures[name][1](*state))
        reading = Reading(step, value, clock() - began)
        if self.readings[name]:
            self.seconds += reading.seconds
        self.readings[name].append(reading)
        self._warn(name, reading)
        return reading

    def latest(self) -> dict[str, float]:
        """The last value of each measure."""
        return {name: readings[-1].value for name, readings in self.readings.items() if readings}

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a measure."""
        readings = self.readings[name]
        return np.array([r.step for r in readings], int), np.array([r.value for r in readings], float)

    def _warn(self, name: str, reading: Reading) -> None:
        limit = self.warn_below.get(name)
        if limit is None:
            return
        if not reading.value < limit:
            self._below.discard(name)
        elif name not in self._below:
            self._below.add(name)
            warnings.warn(
                f"step {reading.step}: {name} = {reading.value:.4g} has fallen below {limit:g}.", stacklevel=5
            )
