"""How far the traces of several operators lie apart, with an interval.

All operators see the same probes v, uniform on the sphere |v|² = n. With Δ_j = H_j - mean H the form vᵀΔ_j
v has the mean τ_j = tr Δ_j, and errors with the covariance

    Cov(vᵀΔ_i v, vᵀΔ_j v) = 2 E r_i·r_j,    r_j = Δ_j v - v (vᵀΔ_j v) / n,

an identity on the sphere (see docs/guarantees.md), so that the products show it. What all operators have in
common costs nothing, and neither does a multiple of the identity.

The standard deviation of the traces is σ = |τ| / sqrt(s - 1). The mean d of the forms over k probes is τ +
e with e of covariance C = (2 / k) mean r_i·r_j, so |d|² is |τ|² + tr C on average: that much is taken off
for the estimate. If C is c times a projection on p dimensions, |d|² / c has the noncentral χ² law with p
degrees of freedom and noncentrality |τ|² / c, whose quantiles at |d|² / c give the interval. Else the
largest eigenvalue stands for c and tr C / c for p: the mean is right then and the variance no smaller than
it is. C is known from k probes, so that c is taken larger by the square of the ratio of Student's t to the
normal law.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra import _tree
from spectra.estimators import blocks
from spectra.operators.base import LinearOperator
from spectra.operators.stepwise import outside_loops
from spectra.results import Interval

PyTree = Any
FAR = 50.0
"""|d| in units of sqrt(c) from which |d| is normal, to one part in 2 FAR² of it."""


def spread_of_traces(
    ops: list[LinearOperator], key: jax.Array, num_probes: int, together: int, level: float = 0.95
) -> Interval:
    """The standard deviation (with s - 1) of tr H_j over s operators of one structure, and its interval.

    The interval is about the probes alone: the operators are those given. Up to n = `num_probes` unit vectors
    take the place of probes, and all that is left is rounding.

    Cost: min(num_probes, n) products with each operator, `together` at a time.
    """
    exact = ops[0].size <= num_probes
    samples = _samples(ops, key, min(num_probes, ops[0].size), together, exact)
    return summary(samples, ops[0].size, max(op.precision for op in ops), exact=exact, level=level)


class Samples(NamedTuple):
    """What each probe has given; k probes, s operators."""

    forms: Any  # (k, s), vᵀΔ_j v
    rests: Any  # (k, s, s), r_i·r_j
    squares: Any  # (k, s), |H_j v|²


def _samples(ops: list[LinearOperator], key: jax.Array, count: int, together: int, exact: bool) -> Samples:
    """Of `count` probes, or unit vectors if `exact`."""
    prepared, found = [outside_loops(op.prepare()) for op in ops], []
    for start in range(0, count, together):
        indices = np.arange(start, min(start + together, count))
        vectors = _vectors(ops[0], key, indices, exact)
        images = [blocks.products(op, vectors, len(indices)) for op in prepared]
        *parts, unit = (np.asarray(x, np.float64) for x in jax.device_get(_inner_products(vectors, images)))
        unit = unit or 1.0
        found.append([part * unit**power for part, power in zip(parts, (1, 2, 2), strict=True)])
    return Samples(*map(np.concatenate, zip(*found, strict=True)))


def summary(samples: Samples, size: int, precision: float, *, exact: bool, level: float) -> Interval:
    """The standard deviation of the traces and its interval."""
    forms, rests, squares = samples
    k, s = forms.shape
    d = np.sum(forms, axis=0) if exact else np.mean(forms, axis=0)
    covariance = np.zeros((s, s)) if exact else 2 / k * np.mean(rests, axis=0)
    # A form is off by precision |v| |Hv|; of unit vectors the errors add up.
    largest = np.max(np.sqrt(np.sum(squares, axis=0) if exact else size * np.mean(squares, axis=0)))
    rounding = precision * float(largest) * np.sqrt(s / (s - 1))
    low, middle, high = map(float, _interval(d - d.mean(), covariance, k, level) / np.sqrt(s - 1))
    return Interval(max(low - rounding, 0.0), middle, high + rounding)


@partial(jax.jit, static_argnames="exact")
def _vectors(op: LinearOperator, key: jax.Array, indices: jax.Array, exact: bool) -> PyTree:
    """Probes of length sqrt(n), or unit vectors."""

    def one(i):
        if exact:
            return _tree.unravel(jnp.zeros(op.size, op.dtype).at[i].set(1), op.structure)
        return _tree.scale(op.size**0.5, _tree.sphere_sample(jax.random.fold_in(key, i), op.structure))

    return jax.vmap(one)(indices)


@jax.jit
def _inner_products(vectors: PyTree, images: list[PyTree]):
    """vᵀΔ_j v (k, s), r_i·r_j (k, s, s) and |H_j v|² (k, s), in a unit that is returned as well."""
    images, unit = blocks.in_unit(images, jnp.zeros((), _tree.scalar_dtype(vectors)))
    stacks = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *images)  # (k, s, ...)

    def one(v, stack):
        squares = jnp.sum(blocks.row_dots(stack, stack), axis=0)
        centred = jax.tree.map(lambda x: x - jnp.mean(x, axis=0), stack)
        v = jax.tree.map(lambda x: x[None], v)
        forms = jnp.sum(blocks.gram(centred, v), axis=0)
        along = forms / jnp.sum(blocks.row_dots(v, v), axis=0)
        rest = blocks.subtract(centred, blocks.combine(along, v))
        return forms[:, 0], jnp.sum(blocks.gram(rest, rest), axis=0), squares

    return *jax.vmap(one)(vectors, stacks), unit


def _interval(d: np.ndarray, covariance: np.ndarray, num_probes: int, level: float) -> np.ndarray:
    """Lower end, estimate and upper end of |τ|."""
    from scipy.special import chndtr, chndtrinc, ndtri, stdtrit

    size, tail = float(np.linalg.norm(d)), (1 - level) / 2
    largest, total = float(np.linalg.eigvalsh(covariance)[-1]), float(np.trace(covariance))
    if not largest > 0:
        return np.full(3, size)
    normal = -float(ndtri(tail))
    unit = largest * (-float(stdtrit(num_probes, tail)) / normal) ** 2
    x, freedom = size / np.sqrt(unit), total / largest
    if x > FAR:
        ends = np.array([x - normal, x + normal])
    else:
        # As the noncentrality grows the law moves up: the quantile at x falls.
        ends = [
            np.sqrt(chndtrinc(x**2, freedom, p)) if chndtr(x**2, freedom, 0.0) > p else 0.0
            for p in (1 - tail, tail)
        ]
    low, high = np.sqrt(unit) * np.asarray(ends)
    return np.array([low, np.clip(np.sqrt(max(size**2 - total, 0.0)), low, high), high])
