"""Which end of the spectrum is asked for: an order among Ritz values, and what may still be missing."""

import dataclasses
import math

import numpy as np

WHICH = ("LA", "SA", "LM", "BE", "SM")


def order(values: np.ndarray, which: str) -> np.ndarray:
    """Indices of ascending `values`, most wanted first."""
    if which == "LA":
        return np.argsort(-values, kind="stable")
    if which == "SA":
        return np.argsort(values, kind="stable")
    if which == "LM":
        return np.argsort(-np.abs(values), kind="stable")
    if which == "SM":
        return np.argsort(np.abs(values), kind="stable")
    up, down = np.argsort(-values, kind="stable"), np.argsort(values, kind="stable")
    mixed = np.stack([up, down], axis=1).ravel()  # the top first: it has the odd one, as in ARPACK
    return mixed[np.sort(np.unique(mixed, return_index=True)[1])]


@dataclasses.dataclass(frozen=True)
class End:
    """One end of the spectrum: eigenvalues with sign * λ > worst are wanted.

    A missed eigenvalue is a copy of a found one. A copy of the worst would change nothing, so it is
    the next better value, `second`, that must be excluded from the rest of the space.
    """

    sign: float
    worst: float
    second: float


def ends(values: np.ndarray, which: str, margin: float) -> list[End]:
    """The ends at which k wanted eigenvalues could hide a copy; none where all are equal within `margin`."""
    k = len(values)
    if which == "BE":
        parts = [(1.0, np.sort(values)[::-1][: math.ceil(k / 2)]), (-1.0, np.sort(-values)[::-1][: k // 2])]
    elif which == "LM":
        size = np.sort(np.abs(values))[::-1]
        parts = [(1.0, size), (-1.0, size)]
    else:
        sign = 1.0 if which == "LA" else -1.0
        parts = [(sign, np.sort(sign * values)[::-1])]
    better = [(sign, part[-1], part[part > part[-1] + margin]) for sign, part in parts if len(part)]
    return [End(sign, float(worst), float(rest[-1])) for sign, worst, rest in better if len(rest)]


def missed_probability(
    limits: list[End], theta: np.ndarray, steps: int, low: float, high: float, size: int
) -> float:
    """Bound on the probability that Lanczos from a random vector has overlooked a wanted eigenvalue.

    Kuczynski and Wozniakowski (doi:10.1137/0613066): after j steps from a uniform start, with
    probability at least 1 - 1.648 sqrt(n) exp(-sqrt(ε) (2j - 1)), the largest Ritz value is within
    ε (λ_max - λ_min) of the largest eigenvalue. With ε the distance from the largest of `theta` up to
    a wanted value, in units of the range down to the other end, this is the probability of a miss.
    """
    total = 0.0
    for end in limits:
        top = float(np.max(end.sign * theta))
        bottom = -high if end.sign < 0 else low
        share = (end.second - top) / max(end.second - bottom, np.finfo(float).tiny)
        total += 1.648 * math.sqrt(size) * math.exp(-math.sqrt(max(share, 0.0)) * (2 * steps - 1))
    return min(total, 1.0)


def beats(limits: list[End], theta: np.ndarray, margin: float) -> bool:
    """Whether one of `theta` is better than the worst eigenvalue found at its end."""
    return any(bool(np.any(end.sign * theta > end.worst + margin)) for end in limits)
