"""Products where they help: steps, probes or deflated eigenpairs, by what each is predicted to gain.

The run of one probe, in growing length, tells what any other run would leave open. Its nodes and weights
are a small operator: m steps on it are m steps of the run, and without its converged nodes it is the rest of
a run with these eigenpairs deflated. Rows made of it, k alike, stand for k probes. The error asked for, of
such a quadrature, has a part that steps decide and one that falls like 1 / √k; so the products that reach a
goal are known for each number of steps, with and without deflation. The first run ends when its next steps
are not expected to save as much as they cost, and the cheaper plan is carried out; or all eigenvalues are
computed, where that costs no more.

Converged eigenpairs cost nothing but the steps that found them. They belong to the first probe alone: all
that is sampled then comes from other probes, which are independent of it, in the complement of the
eigenvectors (see `spectra.density.deflation`). Without deflation the first probe is one of the sample.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base.errors import Status
from spectra.base.progress import Progress
from spectra.base.trees import PyTree
from spectra.density import deflation
from spectra.density.run import ProbeRun
from spectra.krylov import basis as _basis
from spectra.krylov import dense
from spectra.krylov.layout import Layout
from spectra.krylov.plan import estimate, require_fit
from spectra.operators.arithmetic import outside_loops
from spectra.operators.base import LinearOperator
from spectra.operators.composed import DeflatedOperator
from spectra.quadrature import rules
from spectra.results import Eigenpairs, Quadrature

Error = Callable[[Quadrature], float]
"""What a quadrature leaves open, in units of what is asked for: 1 is enough."""
CONVERGED = 1e-6
"""Residual of a pair to deflate, in units of |H|; eight roundings where that is more."""
PAIRED = 4, 16
"""Numbers of probes at which an error is predicted: between them lies its part that steps decide."""
LEAST = 4
"""Probes of a plan, at least: fewer say too little about their own spread."""
FINER = 1.5
"""Ratio of the numbers of steps that are tried."""


class Plan(NamedTuple):
    """What is still to be spent: products, steps of each probe, probes, and whether pairs are deflated."""

    products: float
    steps: int
    probes: int
    deflate: bool


def spend(
    op: LinearOperator,
    error: Error,
    *,
    key: jax.Array,
    num_steps: int,
    num_probes: int,
    probe_batch: int | None = None,
) -> Quadrature:
    """The quadrature of which `error` is at most 1, from at most num_steps x num_probes products or so."""
    budget = num_steps * num_probes
    memory = estimate(op, num_steps=num_steps, num_probes=num_probes, probe_batch=probe_batch)
    require_fit(memory)
    layout, batch = Layout.of(op.like), memory.probe_batch
    prepared = outside_loops(op.prepare())
    with Progress(False, budget) as bar:
        first = ProbeRun(prepared, layout, key, bar, size=op.size, keep_last=True)
        look = _Look(error, op.size, budget)
        first.add(range(1), num_steps, stop_when=look)
        found = first.result()
        plan = look.plan
        if (plan is None or plan.products >= op.size) and dense.allowed(op, budget - found.num_matvecs):
            first.forget()
            whole = deflation.eigenvalues(op)  # all columns of the matrix cost less, and leave nothing open
            return dataclasses.replace(whole, num_matvecs=op.size + found.num_matvecs)
        if plan is None or found.status is Status.INVARIANT:
            reachable = _at_full_length(found, error) is not None
            plan = Plan(budget, first.steps_done, num_probes if reachable else LEAST, False)
            budget = budget if reachable else plan.steps * plan.probes  # no probe narrows a bracket
        if plan.deflate:
            pairs = _pairs(first, layout, found)
            known, size = pairs.vectors, op.size - len(pairs.values)
            inner = outside_loops(DeflatedOperator(op, known).prepare())
            run = ProbeRun(inner, layout, key, bar, size=size, known=known)
            return _until(run, error, plan, 1, budget - found.num_matvecs, batch, pairs)
        first.forget()
        return _until(first, error, plan, 0, budget, batch, None)


def _until(
    run: ProbeRun, error: Error, plan: Plan, first: int, budget: int, batch: int, pairs: Eigenpairs | None
) -> Quadrature:
    """Probes as planned, and more as long as they are wanted and there are products left."""
    most = max(budget // plan.steps, run.num_probes + 1)
    goal = min(plan.probes, most)
    while True:
        while run.num_probes < goal:
            start, stop = run.num_probes, min(run.num_probes + batch, goal)
            run.add(range(first + start, first + stop), plan.steps)
        found = run.result()
        if pairs is not None:
            found = deflation.with_atoms(found, pairs)
            spent = found.num_matvecs + pairs.num_matvecs
            found = dataclasses.replace(found, num_matvecs=spent)
        left = error(found)
        if left <= 1 or run.num_probes >= most:
            return found
        # The part of sampling falls like 1 / √k: never more probes than that predicts, never twice as many.
        more = int(np.ceil(run.num_probes * (left**2 - 1)))
        goal = min(run.num_probes + int(np.clip(more, 1, run.num_probes)), most)


class _Look:
    """Called with the first probe after each chunk of steps: whether it has gone on for long enough."""

    def __init__(self, error: Error, size: int, budget: int):
        self.error, self.size, self.budget = error, size, budget
        self.plan: Plan | None = None
        self.steps, self.next = 0, 0

    def __call__(self, found: Quadrature) -> bool:
        if found.num_steps < self.next:
            return False
        plan = best_plan(found, self.error, self.budget)
        before, added = self.plan, found.num_steps - self.steps
        self.plan, self.steps, self.next = plan or before, found.num_steps, int(1.4 * found.num_steps)
        if plan is None:
            return False
        # What was saved last is what the next steps, of which there are more, may save at best.
        saved = np.inf if before is None else before.products - plan.products
        return plan.products <= added or saved <= added


def best_plan(found: Quadrature, error: Error, budget: int) -> Plan | None:
    """The cheapest way on from the run of one probe; None where none is predicted to reach the goal."""
    m = int(found.lengths[0])
    nodes, weights, residuals = (
        np.asarray(x[0][:m], np.float64) for x in (found.nodes, found.weights, found.residuals)
    )
    at = converged(found)
    best: Plan | None = None
    for deflate in (False, True)[: 1 + bool(at.any())]:
        keep = ~at if deflate else np.ones(m, bool)
        if keep.sum() < 2:
            continue
        for steps in _numbers(int(keep.sum())):
            rule = _shortened(nodes[keep], weights[keep], residuals[keep], steps)
            atoms = nodes[at] if deflate else nodes[_resolved(found, steps)]
            probes = _probes_wanted(found, rule, atoms, error, deflate)
            if probes is None:
                continue
            credit = 0 if deflate else min(m, steps)  # the first probe is one of the sample
            products = steps * probes - credit
            spent = m if deflate else max(m - steps, 0)
            if spent + steps * probes > budget:
                continue
            if best is None or products < best.products:
                best = Plan(products, steps, probes, deflate)
    return best


def _at_full_length(found: Quadrature, error: Error) -> int | None:
    """Probes that are wanted with as many steps as the first had; None where no number of them is enough."""
    m = int(found.lengths[0])
    rule = tuple(np.asarray(x[0][:m], np.float64) for x in (found.nodes, found.weights, found.residuals))
    return _probes_wanted(found, rule, rule[0][_resolved(found, m)], error, False)


def converged(found: Quadrature) -> np.ndarray:
    """Which Ritz pairs of the first probe are eigenpairs, to be deflated."""
    m = int(found.lengths[0])
    scale = max(map(abs, found.range))
    return np.asarray(found.residuals[0][:m]) <= max(CONVERGED, 8 * found.precision) * scale


def _resolved(found: Quadrature, steps: int) -> np.ndarray:
    """Converged pairs of a shorter run, roughly: as many of the largest."""
    at = np.flatnonzero(converged(found))
    sizes = np.abs(np.asarray(found.nodes[0])[at])
    count = int(len(at) * steps / found.lengths[0]) if steps < found.lengths[0] else len(at)
    return at[np.argsort(-sizes)[:count]]


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


def _probes_wanted(
    found: Quadrature, rule: rules.Rule, atoms: np.ndarray, error: Error, deflate: bool
) -> int | None:
    few, many = (error(_stand_in(found, rule, atoms, k, deflate)) for k in PAIRED)
    sampled = (few - many) / (PAIRED[0] ** -0.5 - PAIRED[1] ** -0.5)
    fixed = max(many - sampled * PAIRED[1] ** -0.5, 0.0)
    if not np.isfinite(sampled + fixed) or fixed >= 0.9:
        return None
    return max(LEAST, int(np.ceil((sampled / (1 - fixed)) ** 2)))


def _stand_in(
    found: Quadrature, rule: rules.Rule, atoms: np.ndarray, probes: int, deflate: bool
) -> Quadrature:
    """The quadrature that so many probes alike would give, with these eigenvalues known."""
    theta, w, r = rule
    if not deflate and len(atoms):
        keep = ~np.isin(np.arange(len(theta)), [int(np.argmin(np.abs(theta - x))) for x in atoms])
        keep[int(np.argmax(np.where(keep, w, -1)))] = True
        theta, w, r = theta[keep], w[keep] / w[keep].sum(), r[keep]
    rows = [np.tile(x, (probes, 1)) for x in (theta, w, np.abs(r))]
    scale = float(np.abs(theta).max())
    bulk = dataclasses.replace(
        found,
        nodes=rows[0],
        weights=rows[1],
        residuals=rows[2],
        lengths=np.full(probes, len(theta)),
        asymmetry=np.full(probes, found.noise_floor / scale if scale else 0.0),
        size=found.size - len(atoms),
        sketches=None,
    )
    if not len(atoms):
        return bulk
    return deflation.joined(bulk, np.sort(atoms), np.zeros(len(atoms)), found.size, 0.0)


def _pairs(run: ProbeRun, layout: Layout, found: Quadrature) -> Eigenpairs:
    """The converged Ritz pairs of the first probe, with their vectors."""
    row, m = run.rows[0], int(found.lengths[0])
    vectors = np.linalg.eigh(rules.dense(row["alpha"][:m], row["beta"][: m - 1], np))[1]
    at = np.flatnonzero(converged(found))
    assert run.last is not None
    rows = _basis.stack(run.last.basis, layout, 0, m)
    run.forget()
    return Eigenpairs(
        values=np.asarray(found.nodes[0])[at],
        vectors=_combined(jnp.asarray(vectors[:, at].T), rows),
        residuals=np.asarray(found.residuals[0])[at],
        converged=np.ones(len(at), bool),
        which="converged",
        size=found.size,
        num_matvecs=found.num_matvecs,
        num_restarts=0,
        missed=1.0,
        noise_floor=found.noise_floor,
        status=Status.CONVERGED,
    )


@jax.jit
def _combined(weights: jax.Array, rows: PyTree) -> PyTree:
    def one(x: jax.Array) -> jax.Array:
        return jnp.tensordot(weights.astype(x.dtype), x, axes=1, precision="highest")

    return jax.tree.map(one, rows)
