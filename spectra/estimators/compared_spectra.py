"""How far the spectra of two operators differ: their leading eigenvectors, and their distributions."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, trees
from spectra.base.errors import Status
from spectra.base.host import one_thread
from spectra.base.trees import PyTree
from spectra.density.slq import slq
from spectra.estimators.functions import trace_of
from spectra.krylov.dense import matrix_error
from spectra.krylov.eigsh import eigsh
from spectra.krylov.matrices import matrix_of
from spectra.operators.base import LinearOperator
from spectra.operators.factored import FactoredOperator
from spectra.results import Eigenpairs, Interval, Quadrature

EQUAL_CELLS = 4096
"""Points of the integral over the distance between two CDFs, beside the nodes."""


class ComparedSpectra(NamedTuple):
    """What the eigenvalues of two operators, and the vectors of the leading k, have in common."""

    overlap: Interval  # of the spaces of the vectors
    distance: Interval  # W₁, in units of the mean |λ| of B
    values: np.ndarray  # (2, k), of A and of B, largest modulus first
    residuals: np.ndarray  # (2, k)
    status: Status
    num_matvecs: int


def exactly(a: LinearOperator, b: LinearOperator, k: int) -> ComparedSpectra:
    """Everything from the matrices, with their rounding, by which no eigenvalue moves further (Weyl)."""
    found = [matrix_of(op) for op in (a, b)]
    with one_thread():
        pairs = [np.linalg.eigh(each.entries) for each in found]
    errors = [matrix_error(op, each, own[0]) for op, each, own in zip((a, b), found, pairs, strict=True)]
    order = [np.argsort(-np.abs(values)) for values, _ in pairs]
    ranked = [values[own] for (values, _), own in zip(pairs, order, strict=True)]
    first, second = (basis[:, own[:k]] for (_, basis), own in zip(pairs, order, strict=True))
    overlap = float(min(np.sum((first.T @ second) ** 2) / k, 1.0))
    reach = sum(_angle(own, k, math.sqrt(k) * e, e) for own, e in zip(ranked, errors, strict=True))
    distance, scale = float(np.abs(pairs[0][0] - pairs[1][0]).mean()), float(np.abs(ranked[1]).mean())
    lost, least = sum(errors), scale - errors[1]
    between = Interval(
        max(distance - lost, 0.0) / (scale + errors[1]) if scale else 0.0,
        distance / scale if scale else _of_nothing(ranked[0]),
        (distance + lost) / least if least > 0 else math.inf,
    )
    values = np.stack([own[:k] for own in ranked])
    return ComparedSpectra(
        _around(overlap, reach), between, values, np.zeros_like(values), Status.DENSE, 2 * a.size
    )


def _angle(values: np.ndarray, k: int, off: float, error: float) -> float:
    """The sine of the angle that the space of the first k may be off, where vectors are by `off` in all; the
    eigenvalues are known to `error`. All of them span everything."""
    if len(values) <= k:
        return 0.0
    gap = abs(values[k - 1]) - abs(values[k]) - error
    return min(off / gap, 1.0) if gap > 0 else 1.0


def _around(overlap: float, reach: float) -> Interval:
    return Interval(max(overlap - reach, 0.0), overlap, min(overlap + reach, 1.0))


def _of_nothing(values: np.ndarray) -> float:
    return math.inf if np.any(values) else 0.0


def by_krylov(
    a: LinearOperator,
    b: LinearOperator,
    keys: jax.Array,
    k: int,
    num_probes: int,
    num_steps: int,
    each: float,
    means: tuple[float, float],
) -> ComparedSpectra:
    """The same from eigenpairs and quadratures, each statement at the level `each`.

    `means` are bounds of the mean distance of the eigenvalues, both in order.
    """
    pairs = [eigsh(op, min(k + 1, op.size), which="LM", key=keys[0]) for op in (a, b)]
    tops = [_Top(own, k) for own in pairs]
    overlap = float(min(_overlap(tops[0].vectors, tops[1].vectors) / k, 1.0))
    band = _around(overlap, sum(top.angle for top in tops))
    curves = [_Curve(op, keys[1], num_probes, num_steps, each) for op in (a, b)]
    # No eigenvalue lies beyond the largest, where nodes of few steps may be far from it.
    norm = max(top.reach for top in tops)
    floor = 0.0 if a.semidefinite and b.semidefinite else -norm
    distance = _wasserstein(curves[0], curves[1], (floor, norm), means)
    spent = sum(own.num_matvecs for own in pairs) + sum(curve.num_matvecs for curve in curves)
    values, residuals = (np.stack([getattr(top, name) for top in tops]) for name in ("values", "residuals"))
    statuses = [own.status for own in pairs]
    status = next((own for own in statuses if not own.ok), Status.COMPLETE)
    return ComparedSpectra(band, distance, values, residuals, status, spent)


class _Top:
    """The k eigenpairs of largest modulus of k + 1, and the sine of the angle that their space may be off.

    All n of them have none beyond, and span everything.
    """

    def __init__(self, pairs: Eigenpairs, k: int):
        order = np.argsort(-np.abs(pairs.values))
        chosen = order[:k]
        self.values = np.asarray(pairs.values)[chosen]
        self.residuals = np.asarray(pairs.residuals)[chosen]
        self.vectors = jax.tree.map(lambda x: x[np.asarray(chosen)], pairs.vectors)
        self.reach = float(np.max(np.abs(self.values) + self.residuals) + pairs.noise_floor)
        noise = float(pairs.noise_floor)
        off = math.hypot(*self.residuals) + math.sqrt(k) * noise
        beyond = float(np.asarray(pairs.residuals)[order[k]]) if len(order) > k else 0.0
        self.angle = _angle(np.asarray(pairs.values)[order], k, off, beyond + noise)


@programs.jit
def _overlap(first: PyTree, second: PyTree) -> jax.Array:
    """|U_Aᵀ U_B|²_F of two stacks of vectors."""
    products = jax.vmap(lambda u: jax.vmap(lambda v: trees.vdot(u, v))(second))(first)
    return jnp.sum(products**2)


class _Curve:
    """The distribution of an operator's eigenvalues with its band: none where they are known."""

    def __init__(self, op: LinearOperator, key: jax.Array, num_probes: int, num_steps: int, level: float):
        self.quadrature: Quadrature | None = None
        self.num_matvecs = 0
        if isinstance(op, FactoredOperator):
            self.places = np.asarray(op.eigenvalues(), np.float64)
            self.scale = Interval(*[float(np.abs(self.places).mean())] * 3)
            return
        self._level, self.quadrature = level, slq(op, key=key, num_probes=num_probes, num_steps=num_steps)
        self.num_matvecs = int(self.quadrature.num_matvecs)
        self.places = np.sort(np.asarray(self.quadrature.nodes, np.float64).ravel())
        self.scale = Interval(*(x / op.size for x in trace_of(self.quadrature, np.abs).interval(level)))

    def cdf(self, x: np.ndarray) -> Interval:
        """Share of eigenvalues up to x."""
        if self.quadrature is not None:
            return self.quadrature.cdf(x, level=self._level)
        share = np.searchsorted(self.places, x, side="right") / len(self.places)
        return Interval(share, share, share)


def _wasserstein(a: _Curve, b: _Curve, ends: tuple[float, float], limits: tuple[float, float]) -> Interval:
    """∫ of the least, the estimated and the largest distance between the CDFs, over the mean |λ| of B.

    Its ends are over those of that mean. All eigenvalues lie between the `ends`, and the integral between
    the `limits`.
    """
    places = np.unique(np.concatenate([a.places, b.places, ends]))
    line = np.linspace(float(places[0]), float(places[-1]), EQUAL_CELLS)
    edges = np.unique(np.concatenate([line, places[:: max(1, len(places) // EQUAL_CELLS)]]))
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    first, second = a.cdf(middle), b.cdf(middle)
    near = np.maximum(first.lower - second.upper, second.lower - first.upper)
    far = np.maximum(first.upper - second.lower, second.upper - first.lower)
    parts = np.maximum(near, 0), np.abs(first.estimate - second.estimate), far
    if b.scale.estimate == 0:
        return Interval(0.0, _of_nothing(a.places), math.inf)
    low, value, high = (float(np.sum(part * width)) for part in parts)
    low, high = max(low, limits[0]), min(high, limits[1])
    value = min(max(value, low), high)
    least, scale, most = b.scale
    return Interval(low / most, value / scale, high / least if least > 0 else math.inf)
