"""Products where they help: steps, probes or part of a Krylov space taken out, by what each should gain.

The first run ends when its next steps are not expected to save as much as they cost, and the cheapest plan is
carried out (`spectra.density.plans`); or all eigenvalues are computed, where that costs no more.

The space belongs to the first probe alone: all that is sampled then comes from other probes, which are
independent of it. Where it is not taken out, the first probe is one of the sample.
"""

import dataclasses

import jax
import numpy as np

from spectra.base import host
from spectra.base.errors import Status
from spectra.base.host import Progress
from spectra.density import deflation
from spectra.density.krylov_space import Space, outside, taken_out
from spectra.density.plans import LEAST, Error, Plan, at_full_length, best_plan
from spectra.density.run import ProbeRun
from spectra.krylov import dense, recurrence
from spectra.krylov.layout import Layout
from spectra.krylov.plan import estimate, place_basis, require_fit
from spectra.operators.base import LinearOperator
from spectra.operators.jaxprs import outside_loops
from spectra.results import Quadrature

ROUGH = 1.1
"""What plans of short runs may be off by."""
GAIN = 0.125
"""Of the steps between two looks, that the second has to promise at least where plans are known well."""
LONGER = 4
"""Steps of a space to take out, at most, over those of a probe that were asked for."""
EARLY = 2
"""Steps between two looks at a first probe that may be all: none that end in the first chunk are planned."""
PARTS = 4
"""Of the probes of one step: what is open is asked between them."""
BLOCK = 8
"""Probes of one step at a time."""


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
    setup = recurrence.Setup(outside_loops(op.prepare()), place)
    with Progress(False, budget) as bar:
        first = ProbeRun(setup, key, bar, size=op.size, keep_last=True)
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
            reachable = at_full_length(found, error) is not None
            steps = min(first.steps_done, num_steps)
            plan = Plan(budget, steps, num_probes if reachable else least, None)
            budget = budget if reachable else plan.steps * plan.probes  # no probe narrows a bracket
        if plan.taken is not None:
            space = taken_out(first, found, plan.taken)
            run = outside(op, space, place, key, bar)
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
