"""Quantities of a training run that are measured at intervals of their own, and warnings about them."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spectra.base.errors import SpectraError, warn_user
from spectra.results.text import directed

Measure = Callable[..., Any]  # (*state) -> what float() makes a number of
COURSE = 8
"""Readings that a forecast is made from, half as many at least."""
DOUBT = 0.9
"""Probability with which a forecast is below its limit where it warns, by Student's t over those readings."""


def number(what: str, x: Any) -> float:
    """One number of any kind as a float: of Python, NumPy, JAX or PyTorch, or what has a `__float__`.

    Raises:
        SpectraError: it is none, or several.
    """
    try:
        return float(x.item() if hasattr(x, "item") else x)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = getattr(x, "shape", ())
        kind = f"an array of shape {tuple(shape)}" if shape else f"{x!r:.60}"
        raise SpectraError(f"{what} is {kind}: it has to be one number.") from error


def steps_of(what: str, every: Any) -> int:
    """A positive number of steps."""
    try:
        found = 0 if isinstance(every, bool) else operator.index(every)
    except TypeError:
        found = 0
    if found < 1:
        raise SpectraError(f"{what}={every!r}: use a positive number of steps.")
    return found


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
        warn_ahead: steps; a warning also where the course of the readings falls below within so many.
    """

    def __init__(
        self,
        measures: Mapping[str, tuple[int, Measure]] | None,
        warn_below: Mapping[str, float] | None,
        warn_ahead: int = 0,
    ):
        for what, given in {"measures": measures, "warn_below": warn_below}.items():
            if given is not None and not isinstance(given, Mapping):
                raise SpectraError(f"{what}={given!r:.80}: pass a dict by the name of a measure.")
        self.measures: dict[str, tuple[int, Measure]] = {}
        self.warn_below = dict(warn_below or {})
        for name, measure in dict(measures or {}).items():
            if not (isinstance(measure, tuple | list) and len(measure) == 2 and callable(measure[1])):
                raise SpectraError(f"measures[{name!r}] is not a pair (every, function of the state).")
            self.measures[name] = steps_of(f"measures[{name!r}]: every", measure[0]), measure[1]
        if unknown := set(self.warn_below) - set(self.measures):
            raise SpectraError(f"warn_below names {sorted(unknown)}, which are not among the measures.")
        if isinstance(warn_ahead, bool) or not isinstance(warn_ahead, int) or warn_ahead < 0:
            raise SpectraError(f"warn_ahead={warn_ahead!r} is not a number of steps.")
        self.warn_ahead = warn_ahead
        self.readings: dict[str, list[Reading]] = {name: [] for name in self.measures}
        self.left_out = dict.fromkeys(self.measures, 0)  # for the budget
        self.seconds = 0.0  # of all readings but the first of each, which compile
        self._alarms: dict[str, int] = {}  # the last step at which each was below its limit, or about to be

    def due(self, step: int) -> list[str]:
        """The measures to take at a step that has none yet."""
        return [
            name
            for name, (every, _) in self.measures.items()
            if step % every == 0 and not (self.readings[name] and self.readings[name][-1].step >= step)
        ]

    def cost(self, name: str) -> float | None:
        """Seconds that the last reading took; 0 where it has compiled, which says nothing; None without."""
        readings = self.readings[name]
        return None if not readings else readings[-1].seconds if len(readings) > 1 else 0.0

    def take(self, name: str, step: int, state: tuple, clock: Callable[[], float]) -> Reading:
        """Measure, and warn where the reading asks for it."""
        began = clock()
        value = number(f"what the measure {name!r} returned", self.measures[name][1](*state))
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
        below = not reading.value >= limit
        ahead = None if below else steps_until(self.readings[name][-COURSE:], limit, self.warn_ahead)
        if not below and ahead is None:
            # What hovers about its limit is one alarm: it ends when all has been well for as long as one
            # looks ahead.
            if reading.step - self._alarms.get(name, reading.step) >= self.warn_ahead:
                self._alarms.pop(name, None)
            return
        known = name in self._alarms
        self._alarms[name] = reading.step
        if known:
            return
        shown = directed(reading.value, up=not below, digits=4)  # on its own side of the limit
        what = f"step {reading.step}: {name} = {shown} "
        if math.isnan(reading.value):
            what += "is no number."
        elif below:
            what += f"has fallen below {limit:g}."
        else:
            what += f"will fall below {limit:g} in about {ahead:.0f} steps, as its last readings go."
        warn_user(what)


def steps_until(readings: Sequence[Reading], limit: float, most: int) -> float | None:
    """Steps until readings will be below a limit; None where that is not clear, or more than `most`.

    A line through them, through their logarithms where all and the limit are positive (learning rates and
    curvature change by factors); it counts where the upper end of its forecast is below the limit. A course
    that levels out lies badly on a line, and has a wide forecast.
    """
    steps = np.array([r.step for r in readings], float)
    values = np.array([r.value for r in readings], float)
    if most <= 0 or len(values) < COURSE // 2 or not np.isfinite(values).all():
        return None
    if limit > 0 and (values > 0).all():
        values, limit = np.log(values), math.log(limit)
    from scipy.special import stdtrit

    at = steps - steps[-1]
    middle, mean = at.mean(), values.mean()
    spread = np.sum((at - middle) ** 2)
    slope = (at - middle) @ (values - mean) / spread
    if not slope < 0:
        return None
    left = values - mean - slope * (at - middle)
    doubt = math.sqrt(left @ left / (len(at) - 2) * (1 + 1 / len(at) + (most - middle) ** 2 / spread))
    if not mean + slope * (most - middle) + stdtrit(len(at) - 2, DOUBT) * doubt < limit:
        return None
    return max(float(middle + (limit - mean) / slope), 0.0)
