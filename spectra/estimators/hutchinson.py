"""Quadratic forms with random probes: Hutchinson's trace, leaf by leaf, with no vector kept."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.estimators import blocks
from spectra.estimators.run import Run, adaptive
from spectra.operators.base import LinearOperator
from spectra.results import Estimate

PyTree = Any


def forms(run: Run, kind: str, start: int, stop: int) -> tuple[Any, Any]:
    """v_gᵀ(Hv)_g and |(Hv)_g|² of probes start..stop-1 for each group; two arrays (G, stop - start)."""
    indices = jnp.arange(start, stop)
    batch = min(run.batch, stop - start)
    if run.op.on_host:
        parts = [
            _stack_forms(stack := blocks.draw(run.op, run.key, part, kind), run.op.mv_batch(stack))
            for part in np.split(indices, range(batch, stop - start, batch))
        ]
        dots, squares = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    else:
        dots, squares = _forms(run.op, run.key, indices, kind, batch)
    return run.by_group(dots), run.by_group(squares)


@partial(jax.jit, static_argnames=("kind", "batch"))
def _forms(op: LinearOperator, key, indices, kind: str, batch: int):
    def one(i):
        v = blocks.draw(op, key, i[None], kind)
        product = jax.tree.map(lambda x: x[None], op.mv(jax.tree.map(lambda x: x[0], v)))
        return tuple(x[:, 0] for x in _stack_forms(v, product))

    return tuple(x.T for x in lax.map(one, indices, batch_size=batch))


@jax.jit
def _stack_forms(vectors: PyTree, products: PyTree):
    return blocks.row_dots(vectors, products), blocks.row_dots(products, products)


def mean_and_error(run: Run, samples: Any) -> tuple[Any, Any]:
    """Mean of independent samples (G, k) and its standard error; k > 1."""
    return run.xp.mean(samples, axis=-1), run.xp.std(samples, axis=-1, ddof=1) / samples.shape[-1] ** 0.5


def hutchinson(run: Run, kind: str, num_matvecs: int, reason: str) -> Estimate:
    """Mean of vᵀHv over probes; the interval rests on Student's t for k independent samples.

    A single probe has no spread. Its error comes from 2 |Hv|², an unbiased estimate of twice the
    squared Frobenius norm, which is the variance for normal probes; Rademacher probes do not see the
    squared diagonal, of which (vᵀHv)² / n is at most the average.
    """
    xp, parts = run.xp, []

    def result():
        samples, squares = (xp.concatenate(x, axis=-1) for x in zip(*parts, strict=True))
        if samples.shape[-1] > 1:
            values, stderr = mean_and_error(run, samples)
        else:
            values = samples[:, 0]
            seen = values**2 / run.op.size if kind == "rademacher" else 0
            stderr = xp.sqrt(2 * xp.maximum(squares[:, 0] - seen, 0))
        return values, xp.hypot(stderr, run.rounding(squares))

    def step(count):
        parts.append(forms(run, kind, num_probes(), count))
        values, stderr = result()
        return values[-1], stderr[-1]

    def num_probes():
        return sum(samples.shape[-1] for samples, _ in parts)

    status = adaptive(run, step, num_matvecs)
    return run.estimate(
        *result(),
        num_matvecs=num_probes(),
        method="hutchinson",
        status=status,
        reason=reason,
        dof=float(max(num_probes() - 1, 1)),
    )


def sample_norms(run: Run, num_matvecs: int) -> tuple[Any, Any, Any, int]:
    """Mean of |Hv|², its standard error, the status, and the number of probes."""
    parts: list[Any] = []

    def result():
        squares = run.xp.concatenate(parts, axis=-1)
        if squares.shape[-1] == 1:  # the variance is at most twice the square, reached for rank one
            return squares[-1, 0], 2**0.5 * squares[-1, 0]
        mean, stderr = mean_and_error(run, squares)
        return mean[-1], run.xp.hypot(stderr[-1], 2 * run.op.precision * mean[-1])

    def step(count):
        parts.append(forms(run, "rademacher", sum(x.shape[-1] for x in parts), count)[1])
        return result()

    status = adaptive(run, step, num_matvecs)
    square, error = result()
    return square, error, status, sum(x.shape[-1] for x in parts)
