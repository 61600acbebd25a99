"""Products where they help: steps, probes or part of a Krylov space taken out, by what each should gain.

The run of one probe, in growing length, tells what any other run would leave open. Its nodes and weights
are a small operator: m steps on it are m steps of the run. Its Ritz vectors may be taken out, converged or
not (see `spectra.quadrature.links`): then their Ritz values are known, and others are sampled outside of
them. What is coupled is Σ r_j² of those taken out, so that the smallest residuals go first, up to a share
`COUPLED` of all: a Ritz vector in the middle of a bulk has the largest, and the least to gain. What the
others will see is in the weights: a node of weight w stands for n w eigenvalues, of which one was taken
out, or all where a single one has converged there. Rows made of it, k alike, stand for k probes. The error
asked for, of such a quadrature, has a part that steps decide and one that falls like 1 / √k; so the
products that reach a goal are known for each number of steps, with and without the space. The first run
ends when its next steps are not expected to save as much as they cost, and the cheaper plan is carried out;
or all eigenvalues are computed, where that costs no more. Outside of a space an error may make use of probes
with a single step beside the others (`spectra.estimators.levels`): they cost one product each.

The space belongs to the first probe alone: all that is sampled then comes from other probes, which are
independent of it. Where it is not taken out, the first probe is one of the sample.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from spectra.base import host
from spectra.base.errors import Status
from spectra.base.host import Progress
from spectra.density import deflation
from spectra.density.krylov_space import Space, outside, taken_out
from spectra.density.run import ProbeRun
from spectra.krylov import dense, recurrence
from spectra.krylov.layout import Layout
from spectra.krylov.plan import estimate, place_basis, require_fit
from spectra.operators.base import LinearOperator
from spectra.operators.jaxprs import outside_loops
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
ROUGH = 1.1
"""What plans of short runs may be off by."""
GAIN = 0.125
"""Of the steps between two looks, that the second has to promise at least where plans are known well."""
LONGER = 4
"""Steps of a space to take out, at most, over those of a probe that were asked for."""
PAIRED = 4, 16
"""Numbers of probes at which an error is predicted: between them lies its part that steps decide."""
LEAST = 4
"""Probes of a plan, at least: fewer say too little about their own spread."""
EARLY = 2
"""Steps between two looks at a first probe that may be all: none that end in the first chunk are planned."""
PARTS = 4
"""Of the probes of one step: what is open is asked between them."""
BLOCK = 8
"""Probes of one step at a time."""
FINER = 1.5
"""Ratio of the numbers of steps that are tried."""


class Plan(NamedTuple):
    """What is still to be spent: products, steps of each probe, probes, and what is taken out."""

    products: float
    steps: int
    probes: int
    taken: np.ndarray | None  # (m,) which Ritz vectors of the first probe are taken out
    short: int = 0  # probes of one step beside the others


def spend(
    op: LinearOperator,
    error: Error,
    *,
    key: jax.Array,
    num_steps: int,
    num_probes: int,
    probe_batch: int | None = None,
    least: int = LEAST,
    short: bool = False,
) -> Quadrature:
    """The quadrature of which `error` is at most 1, from at most num_steps x num_probes products or so.

    Plans have `least` probes at least. One may be enough where the law of what a probe sees is known; then
    its first steps are looked at closely. With `short`, `error` knows what to do with rows of one step.
    """
    budget = num_steps * num_probes
    place = place_basis(op)
    memory = estimate(op, place, num_steps=num_steps, num_probes=num_probes, probe_batch=probe_batch)
    require_fit(memory)
    layout, batch = place.layout, memory.probe_batch
    prepared = outside_loops(op.prepare())
    with Progress(False, budget) as bar:
        first = ProbeRun(prepared, layout, key, bar, size=op.size, keep_last=True)
        look = _Look(error, num_steps, budget, least, short)
        early = EARLY if least == 1 else recurrence.CHUNK
        first.add(range(1), _longest(op, layout, num_steps, budget), stop_when=look, early=early)
        found = first.result()
        plan = look.plan
        if (plan is None or plan.products >= op.size) and dense.allowed(op, budget - found.num_matvecs):
            first.forget()
            whole = deflation.eigenvalues(op)  # all columns of the matrix cost less, and leave nothing open
            return dataclasses.replace(whole, num_matvecs=op.size + found.num_matvecs)
        if plan is None or found.status is Status.INVARIANT:
            reachable = _at_full_length(found, error) is not None
            steps = min(first.steps_done, num_steps)
            plan = Plan(budget, steps, num_probes if reachable else least, None)
            budget = budget if reachable else plan.steps * plan.probes  # no probe narrows a bracket
        if plan.taken is not None:
            space = taken_out(first, layout, found, plan.taken)
            run = outside(op, space, layout, key, bar)
            return _until(run, error, plan, 1, budget - found.num_matvecs, batch, space)
        first.forget()
        return _until(first, error, plan, 0, budget, batch, None)


def _longest(op: LinearOperator, layout: Layout, num_steps: int, budget: int) -> int:
    """Steps of the first probe: more than asked for where its space may be taken out and fits into memory.

    Fewer steps than a chunk end before the first look at them, which could tell that more are wanted.
    """
    if num_steps < recurrence.CHUNK:
        return num_steps
    most = min(LONGER * num_steps, budget // 2, op.size // 2)
    available = host.available_bytes(op.device)
    if available is not None:  # the space and a copy of it, in half of what is free
        most = min(most, available // (4 * layout.device_bytes()))
    return max(num_steps, most)


def _until(
    run: ProbeRun, error: Error, plan: Plan, first: int, budget: int, batch: int, space: Space | None
) -> Quadrature:
    """Probes as planned, and more as long as they are wanted and there are products left."""

    def add(count: int, steps: int) -> int:
        while count > 0:
            start, some = first + run.num_probes, min(batch, count)
            if steps == 1:  # of one size or one by one: two compiled programs whatever their number
                some = min(batch, BLOCK) if count >= min(batch, BLOCK) else 1
            run.add(range(start, start + some), steps)
            count -= some
        return run.num_probes

    # What is open depends on how many made one step, not on what they saw: they end as soon as they can.
    parts = {-(-plan.short * i // PARTS) for i in range(1, PARTS + 1)}
    goals, done, found = [(plan.probes, some) for some in sorted(parts)], (run.num_probes, 0), None
    while True:
        wanted = goals.pop(0)
        most = max(done[0] + (budget - run.num_matvecs) // plan.steps, 1)
        long = add(min(wanted[0], most) - done[0], plan.steps) - done[1]
        short = add(min(wanted[1] - done[1], budget - run.num_matvecs), 1) - long
        if found is not None and (long, short) == done:
            return found
        done = long, short
        found = run.result() if space is None else space.joined(run.result())
        left = error(found)
        if left <= 1:
            return found
        if not goals:
            # Sampling's part falls like 1 / √k: never more probes than that predicts, never twice as many.
            growth = min(left, 2.0) ** 2 - 1
            goals = [tuple(k + min(max(int(np.ceil(k * growth)), 1), k) for k in done)]


class _Look:
    """Called with the first probe after each chunk of steps: whether it has gone on for long enough."""

    def __init__(self, error: Error, asked: int, budget: int, least: int, short: bool):
        self.error, self.asked, self.budget, self.fewest, self.short = error, asked, budget, least, short
        self.plan: Plan | None = None
        self.steps, self.next, self.least = 0, min(recurrence.CHUNK, asked), np.inf

    def __call__(self, found: Quadrature) -> bool:
        if self.fewest == 1 and self.error(found) <= 1:
            self.plan = Plan(0, found.num_steps, 1, None)
            return True
        if found.num_steps < self.next:
            return False
        plan = best_plan(found, self.error, self.budget, self.fewest, self.short)
        added = found.num_steps - self.steps
        self.steps, self.next = found.num_steps, int(1.25 * found.num_steps)
        if plan is None:
            return found.num_steps >= self.asked
        self.plan, before = plan, self.least
        whole = found.num_steps + plan.products
        self.least = min(before, whole)
        # Beyond the best length of the run the whole grows again. While it is short it costs little, and its
        # plan is known roughly: then it has to grow by more than that. Later, steps that have gained little
        # are the last: the next ones gain less.
        most = ROUGH * before if plan.products > found.num_steps else before - GAIN * added
        return plan.products <= added or whole > most


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


class _Parts(NamedTuple):
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


def _at_full_length(found: Quadrature, error: Error) -> _Parts | None:
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
) -> _Parts | None:
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
        return _Parts(fixed, sampled**2)
    both = max(error(_stand_in(found, rule, taken, few, many - few)) - fixed, 0.0) ** 2
    middle = float(np.clip((both - sampled**2 / many) / (1 / few - 1 / many), 0.0, sampled**2))
    return _Parts(fixed, middle, sampled**2 - middle)


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
