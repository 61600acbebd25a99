"""The cheapest plan from the run of one probe: how many steps and probes more, and what is taken out.

The run of one probe, in growing length, tells what any other run would leave open. Its nodes and weights
are a small operator: m steps on it are m steps of the run. Its Ritz vectors may be taken out, converged or
not (see `spectra.quadrature.links`): then their Ritz values are known, and others are sampled outside of
them. What is coupled is Σ r_j² of those taken out, so that the smallest residuals go first, up to a share
`COUPLED` of all: a Ritz vector in the middle of a bulk has the largest, and the least to gain. What the
others will see is in the weights: a node of weight w stands for n w eigenvalues, of which one was taken
out, or all where a single one has converged there. Rows made of it, k alike, stand for k probes. The error
asked for, of such a quadrature, has a part that steps decide and one that falls like 1 / √k; so the
products that reach a goal are known for each number of steps, with and without the space. Outside of a space
an error may make use of probes with a single step beside the others (`spectra.estimators.levels`): they cost
one product each.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from spectra.base import host
from spectra.density import deflation
from spectra.quadrature import rules
from spectra.results import Quadrature

Error = Callable[[Quadrature], float]
"""What a quadrature leaves open, in units of what is asked for: 1 is enough."""
SETTLED = 0.1
"""Residual of a Ritz value that is an eigenvalue nearly, in gaps to its neighbours ..."""
SINGLE = 11.0
"""... of which there is one: n |vᵀu|² has the law χ²_1, and is above this once in a thousand times."""
COUPLED = 0.0, 1e-3, 0.03, 1.0
"""Of the squares of the residuals, in the Ritz vectors that are taken out; 0: none are."""
OUTSIDE = 12
"""Steps of probes outside of a space, at most: what is left there is narrow."""
PAIRED = 4, 16
"""Numbers of probes at which an error is predicted: between them lies its part that steps decide."""
LEAST = 4
"""Probes of a plan, at least: fewer say too little about their own spread."""
FINER = 1.5
"""Ratio of the numbers of steps that are tried."""


class Plan(NamedTuple):
    """What is still to be spent: products, steps of each probe, probes, and what is taken out."""

    products: float
    steps: int
    probes: int
    taken: np.ndarray | None  # (m,) which Ritz vectors of the first probe are taken out
    short: int = 0  # probes of one step beside the others


@host.one_thread()
def best_plan(
    found: Quadrature, error: Error, budget: int, least: int = LEAST, short: bool = False
) -> Plan | None:
    """The cheapest way on from the run of one probe; None where none is predicted to reach the goal.

    Ways are asked for their number of probes in the order of what they cost with the fewest, and only as far
    as they can be the cheapest: of equal ones the first.
    """
    best, place = None, 0

    def behind(way: _Way, products: int) -> bool:
        if way.spent + products > budget:
            return True
        return best is not None and (products - way.credit, way.place) > (best.products, place)

    for way in sorted(_ways(found), key=lambda way: way.steps * least - way.credit):
        both, fewest = short and way.taken is not None and way.steps > 1, way.steps * least
        if behind(way, fewest):
            continue

        def too_many(probes: int, way: _Way = way, fewest: int = fewest if both else 0) -> bool:
            return behind(way, fewest + probes - least if fewest else way.steps * probes)

        nodes, weights, residuals = way.measure
        rule = _shortened(nodes, weights, residuals, way.steps)
        parts = _parts(found, rule, way.taken, error, too_many, both)
        if parts is None:
            continue
        probes, ones = parts.split(way.steps, least)
        products = way.steps * probes + ones
        if not behind(way, products):
            best = Plan(products - way.credit, way.steps, probes, way.taken, ones)
            place = way.place
    return best


class _Way(NamedTuple):
    """Steps of each probe, outside of what is taken out, or with the first probe as one of the sample."""

    place: int
    measure: rules.Rule  # what probes will see
    steps: int
    taken: np.ndarray | None
    spent: int  # products of the first probe that no probe of the sample has
    credit: int  # and those that one has


class Parts(NamedTuple):
    """The error of k probes and s of one step: fixed + √(ends / (k + s) + middle / k)."""

    fixed: float
    middle: float
    ends: float = 0.0

    def split(self, steps: int, least: int) -> tuple[int, int]:
        """Probes, and those of one step, that reach the goal with the fewest products."""
        room = (1 - self.fixed) ** 2
        most = max(least, int(np.ceil((self.middle + self.ends) / room)))
        k = np.arange(max(least, int(self.middle / room) + 1), most)
        ones = np.maximum(np.ceil(self.ends / (room - self.middle / k)) - k, 0.0)
        k, ones = np.append(k, most), np.append(ones, 0.0)
        best = int(np.argmin(steps * k + ones))
        return int(k[best]), int(ones[best])


def _ways(found: Quadrature) -> Iterator[_Way]:
    m, place = int(found.lengths[0]), itertools.count()
    theta, w, r = (x[0][:m] for x in _arrays(found))
    for share in COUPLED:
        taken = _smallest(r, share) if share else None
        if taken is not None and not taken.any():
            continue
        weights = w if taken is None else _left(found, taken)
        measure = tuple(x[weights > 0] for x in (theta, weights, r))
        if len(measure[0]) < 2:
            continue
        for steps in _numbers(len(measure[0]) if taken is None else min(len(measure[0]), OUTSIDE)):
            credit = min(m, steps) if taken is None else 0
            yield _Way(next(place), measure, steps, taken, max(m - steps, 0) if taken is None else m, credit)


def _arrays(found: Quadrature) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(x, np.float64) for x in (found.nodes, found.weights, found.residuals))


def _smallest(residuals: np.ndarray, share: float) -> np.ndarray:
    """Which residuals are the smallest ones whose squares are this share of all, at most."""
    order = np.argsort(residuals)
    squares = np.cumsum(residuals[order] ** 2)
    taken = np.zeros(len(residuals), bool)
    taken[order] = squares <= share * squares[-1]
    return taken


def _left(found: Quadrature, taken: np.ndarray) -> np.ndarray:
    """(m,) share of the eigenvalues about each node of the first probe that is left there, see above."""
    nodes, weights, residuals = (x[0][: len(taken)] for x in _arrays(found))
    single = (residuals <= SETTLED * _gaps(nodes)) & (weights * found.size <= SINGLE)
    left = np.where(single, 0.0, np.maximum(weights - 1 / found.size, 0.0))
    return np.where(taken, left, weights)


def _gaps(nodes: np.ndarray) -> np.ndarray:
    apart = np.concatenate([[np.inf], np.diff(nodes), [np.inf]])
    return np.minimum(apart[:-1], apart[1:])


def at_full_length(found: Quadrature, error: Error) -> Parts | None:
    """The error with as many steps as the first probe had; None where no number of probes is enough."""
    m = int(found.lengths[0])
    return _parts(found, tuple(x[0][:m] for x in _arrays(found)), None, error)


def _resolved(found: Quadrature, steps: int) -> np.ndarray:
    """The eigenvalues that runs of so many steps resolve, roughly: as many of the largest converged ones."""
    m = int(found.lengths[0])
    nodes, weights, residuals = (x[0][:m] for x in _arrays(found))
    scale = max(map(abs, found.range))
    good = residuals <= max(deflation.CONVERGED, 8 * found.precision) * scale
    at = np.flatnonzero(good & (weights * found.size <= SINGLE))
    count = int(len(at) * steps / m) if steps < m else len(at)
    return nodes[at[np.argsort(-np.abs(nodes[at]))[:count]]]


def _numbers(most: int) -> list[int]:
    """Numbers of steps that are tried, from the most on down."""
    found = [most]
    while found[-1] > 3:
        found.append(max(int(found[-1] / FINER), 2))
    return found


def _shortened(nodes: np.ndarray, weights: np.ndarray, residuals: np.ndarray, steps: int) -> rules.Rule:
    """Nodes, weights and residuals of `steps` Lanczos steps on a discrete measure."""
    weights = weights / weights.sum()
    if steps >= len(nodes):
        return nodes, weights, residuals
    rows, alpha, beta = np.zeros((steps + 1, len(nodes))), np.zeros(steps), np.zeros(steps)
    rows[0] = np.sqrt(weights)
    for i in range(steps):
        w = nodes * rows[i]
        alpha[i] = rows[i] @ w
        for _ in range(2):
            w = w - rows[: i + 1].T @ (rows[: i + 1] @ w)
        beta[i] = np.linalg.norm(w)
        if beta[i] <= 1e-14 * np.abs(nodes).max():
            return rules.gauss_rule(alpha[: i + 1], np.append(beta[:i], 0.0), i + 1)
        rows[i + 1] = w / beta[i]
    return rules.gauss_rule(alpha, beta, steps)


def _parts(
    found: Quadrature,
    rule: rules.Rule,
    taken: np.ndarray | None,
    error: Error,
    too_many: Callable[[int], bool] = lambda _: False,
    short: bool = False,
) -> Parts | None:
    """The error with this rule; None where no number of probes reaches the goal, or `too_many`."""
    few, many = PAIRED
    last = error(_stand_in(found, rule, taken, many))
    # No error falls faster than 1 / √k: above 1 it takes last² times as many at least.
    if not np.isfinite(last) or (last > 1 and too_many(int(many * last**2))):
        return None
    first = error(_stand_in(found, rule, taken, few))
    sampled = (first - last) / (few**-0.5 - many**-0.5)
    fixed = max(last - sampled * many**-0.5, 0.0)
    if not np.isfinite(sampled + fixed) or fixed >= 0.9:
        return None
    if not short:
        return Parts(fixed, sampled**2)
    both = max(error(_stand_in(found, rule, taken, few, many - few)) - fixed, 0.0) ** 2
    middle = float(np.clip((both - sampled**2 / many) / (1 / few - 1 / many), 0.0, sampled**2))
    return Parts(fixed, middle, sampled**2 - middle)


def _stand_in(
    found: Quadrature, rule: rules.Rule, taken: np.ndarray | None, probes: int, short: int = 0
) -> Quadrature:
    """The quadrature that so many probes alike would give, with what was taken out, or is resolved, known.

    Probes of one step, beside what was taken out, see the same measure.
    """
    theta, w, r = rule
    if taken is not None:
        values, _, residuals = (x[0][: len(taken)][taken] for x in _arrays(found))
        bulk = _alike(found, rule, probes, found.size - len(values), short)
        return deflation.with_space(bulk, values, residuals, found.size)
    atoms = _resolved(found, len(theta))
    if not len(atoms):
        return _alike(found, rule, probes, found.size)
    keep = ~np.isin(np.arange(len(theta)), [int(np.argmin(np.abs(theta - x))) for x in atoms])
    keep[int(np.argmax(np.where(keep, w, -1)))] = True
    rest = theta[keep], w[keep] / w[keep].sum(), r[keep]
    bulk = _alike(found, rest, probes, found.size - len(atoms))
    return deflation.joined(bulk, np.sort(atoms), np.zeros(len(atoms)), found.size, 0.0)


def _alike(found: Quadrature, rule: rules.Rule, probes: int, size: int, short: int = 0) -> Quadrature:
    """The quadrature of so many probes with the same rule, and of some with one step alone."""
    theta, w, r = rule
    rows = [np.tile(x, (probes, 1)) for x in (theta, w, np.abs(r))]
    if short:
        mean, first = float(w @ theta), np.eye(1, len(theta))
        spread = np.sqrt(w @ (theta - mean) ** 2)
        ones = np.full((1, len(theta)), mean), first, spread * first
        rows = [np.concatenate([x, np.tile(one, (short, 1))]) for x, one in zip(rows, ones, strict=True)]
    scale = float(np.abs(theta).max())
    return dataclasses.replace(
        found,
        nodes=rows[0],
        weights=rows[1],
        residuals=rows[2],
        lengths=np.repeat([len(theta), 1], [probes, short]),
        asymmetry=np.full(probes + short, found.noise_floor / scale if scale else 0.0),
        size=size,
        sketches=None,
    )
