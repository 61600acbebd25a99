"""Quadratic forms with random probes: Hutchinson's trace, leaf by leaf, with no vector kept."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays, meshes, programs, stacks
from spectra.base.trees import PyTree
from spectra.estimators import blocks
from spectra.estimators.run import Run, adaptive
from spectra.operators.base import LinearOperator
from spectra.results import Estimate


class Spread(NamedTuple):
    """What v ⊙ Hv of the probes so far says about the entries off the diagonal, see `off_diagonal`.

    Differences are taken from the first probe: they vanish exactly for a diagonal H.
    """

    origin: PyTree  # of the first probe
    total: PyTree  # sum of differences from it
    squares: Any  # (leaves,), sum of their squares


class Carried(NamedTuple):
    """What one batch of probes leaves to the next: the unit of all products, see `blocks.in_unit`."""

    unit: Any
    pairs: blocks.Pairs
    spread: Spread | None  # of Rademacher probes; None for others


def beginning(run: Run, kind: str, num_matvecs: int) -> tuple[Carried, int]:
    """What is there before the first probe, and the products that were taken from the budget for it."""
    aside = blocks.aside(run.op, kind, num_matvecs)
    unit, pairs = blocks.begin_pairs(run.op, run.key, aside)
    if kind != "rademacher":
        return Carried(unit, pairs, None), aside
    zeros = meshes.zeros(run.op.structure, run.op.like)
    leaves = len(jax.tree.leaves(zeros))
    return Carried(unit, pairs, Spread(zeros, zeros, jnp.zeros(leaves, run.op.dtype))), aside


def forms(
    run: Run, kind: str, start: int, stop: int, carried: Carried
) -> tuple[jax.Array, jax.Array, Carried]:
    """v_gᵀ(Hv)_g and |(Hv)_g|² of probes start..stop-1 for each group; two arrays (G, stop - start)."""
    if not run.op.on_host and run.journal is None:
        indices, batch = jnp.arange(start, stop), min(run.batch, stop - start)
        dots, squares, carried = _forms(run.op, run.key, indices, carried, kind, batch)
        return run.by_group(dots), run.by_group(squares), carried

    def step(carried: Carried, start: int, stop: int) -> tuple[Carried, tuple[jax.Array, jax.Array]]:
        indices = jnp.arange(start, stop)
        if not run.op.on_host:
            dots, squares, carried = _forms(run.op, run.key, indices, carried, kind, stop - start)
            return carried, (dots, squares)
        stack = blocks.draw(run.op, run.key, indices, kind)
        dots, squares, carried = _stack_forms(stack, run.op.mv_batch(stack), indices[0], carried)
        return carried, (dots, squares)

    vector = run.op.like
    spread = None if carried.spread is None else Spread(vector, vector, 0)
    looks = Carried(0, blocks.Pairs(vector, vector, 0, 0), spread)
    carried, parts = run.fold(step, carried, start, stop, carried=looks, out=(0, 0))
    dots, squares = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    return run.by_group(dots), run.by_group(squares), carried


@partial(programs.jit, static_argnames=("kind", "batch"))
def _forms(
    op: LinearOperator, key: jax.Array, indices: arrays.Indices, carried: Carried, kind: str, batch: int
) -> tuple[jax.Array, jax.Array, Carried]:
    def step(carried: Carried, part: arrays.Indices) -> tuple[Carried, tuple[jax.Array, jax.Array]]:
        v = blocks.draw(op, key, part, kind)
        dots, squares, carried = _stack_forms(v, stacks.mapped(op.mv, v), part[0], carried)
        return carried, (dots, squares)

    whole = len(indices) - len(indices) % batch
    carried, found = lax.scan(step, carried, indices[:whole].reshape(-1, batch))
    dots, squares = (jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1) for x in found)
    if whole < len(indices):
        carried, rest = step(carried, indices[whole:])
        dots, squares = (jnp.concatenate(x, axis=1) for x in zip((dots, squares), rest, strict=True))
    return dots, squares, carried


@programs.jit
def _stack_forms(
    vectors: PyTree, products: PyTree, first: int | jax.Array, carried: Carried
) -> tuple[jax.Array, jax.Array, Carried]:
    """Forms of a batch of which `first` is the number of the first probe."""
    (products, unit), spread = blocks.in_unit(products, carried.unit), carried.spread
    dots, squares = blocks.row_dots(vectors, products), blocks.row_dots(products, products)
    if spread is not None:
        samples = jax.tree.map(jnp.multiply, vectors, products)
        origin = jax.tree.map(lambda x, o: jnp.where(first == 0, x[0], o), samples, spread.origin)
        moved = jax.tree.map(jnp.subtract, samples, origin)
        total = jax.tree.map(lambda t, x: t + jnp.sum(x, axis=0), spread.total, moved)
        square = spread.squares + jnp.sum(blocks.row_dots(moved, moved), axis=1)
        spread = Spread(origin, total, square)
    return dots, squares, Carried(unit, blocks.with_products(carried.pairs, vectors, products), spread)


@partial(programs.jit, static_argnames="count")
def off_diagonal(spread: Spread, count: int) -> jax.Array:
    """Σ_a Σ_{b≠a} H_ab² for the rows a of each leaf, without bias from `count` Rademacher probes.

    Entry a of v ⊙ Hv is H_aa + Σ_{b≠a} H_ab v_a v_b: its variance is the sum of squares of row a off the
    diagonal.
    """
    total = jax.tree.map(lambda x: x[None], spread.total)
    return (spread.squares - blocks.row_dots(total, total)[:, 0] / count) / (count - 1)


EIGENVECTOR = 16
"""Order from which a vector of signs is no eigenvector by chance but of a multiple of the identity."""
LOST = 16
"""Roundings of |Hv|² and (vᵀHv)² / n, sums of n numbers of one sign, by which their difference may be off."""


def hutchinson(run: Run, kind: str, num_matvecs: int, reason: str) -> Estimate:
    """Mean of vᵀHv over probes, with the variance that the products themselves show.

    For normal probes Var vᵀHv = 2 |H|_F², and |Hv|² estimates |H|_F² without bias: with vᵀHv = Σ λ_i g_i² it
    is Σ λ_i² g_i², which has at least one degree of freedom a probe (Satterthwaite: (Σ λ²)² / Σ λ⁴ >= 1).
    So Student's t with k degrees of freedom; where one eigenvalue dominates, the spread of the samples
    has far fewer, and its intervals held for 85 instead of 95 % of 8 probes.

    Signs see nothing of the diagonal, Var vᵀHv = 2 Σ_{a≠b} H_ab², which has two estimates: `off_diagonal`,
    and the bound 2 (|Hv|² - (vᵀHv)² / n), which is the spread of v ⊙ Hv over entries in place of probes.
    The first fails where a few entries count and all k signs agree; it is taken as if the spread were
    about the truth, two standard errors off (the score interval), which leaves k - 4 degrees of k - 1.
    The smaller one counts, and by (k + 1) / k more: forms of few signs take few values, so that the least of
    them, seen k times, has its limit next to the truth. For three entries of (1, 1, 1)ᵀ(1, 1, 1) and 8
    probes the limit was 0.999 of it, and 10 % of keys missed.

    Four signs leave the bound alone, however small H is off its diagonal: on one pair of entries all of them
    agree for one key in eight, and every product is then that of a diagonal matrix. Five agree for one in 16.
    """
    signs = kind == "rademacher"
    xp, (carried, aside) = run.xp, beginning(run, kind, num_matvecs)
    parts: list[tuple[Any, Any]] = []

    def result() -> tuple[Any, Any]:
        samples, squares = (xp.concatenate([part[i] for part in parts], axis=-1) for i in range(2))
        k, values = samples.shape[-1], xp.mean(samples, axis=-1)
        second = xp.mean(squares, axis=-1)
        if signs:
            sizes = run.sizes
            few = sizes < EIGENVECTOR
            seen = np.where(few, 0, 1 / sizes) * values**2
            lost = np.where(few, 0, LOST * run.precision) * second  # where a diagonal is most of H
            second = (xp.maximum(second - seen, 0) + lost) / np.where(few, 1, 1 - 2 / sizes)
        if carried.spread is not None and k > 4:
            off = xp.maximum(run.by_group(off_diagonal(carried.spread, k)), 0)
            second = xp.minimum(second, off * (k - 1) / (k - 4))
        if signs:
            second = second * ((k + 1) / k)
        return values, arrays.root(2 * second / k + run.rounding(squares) ** 2, xp)

    def step(count: int) -> tuple[Any, Any]:
        nonlocal carried
        dots, squares, carried = forms(run, kind, num_probes(), count, carried)
        parts.append((dots, squares))
        values, stderr = result()
        return values[-1], stderr[-1]

    def num_probes() -> int:
        return sum(samples.shape[-1] for samples, _ in parts)

    ended = adaptive(run, step, num_matvecs - aside, signed=True)
    return run.estimate(
        *result(),
        unit=carried.unit,
        sound=run.check_pairs(carried.pairs),
        num_matvecs=num_probes() + aside,
        method="hutchinson",
        ended=ended,
        reason=reason,
        dof=float(num_probes()),
    )
