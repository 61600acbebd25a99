"""Eigenpairs nearest zero by a Chebyshev filter in H², for definite, indefinite and singular operators.

With eigenvalues of H² in [a², b²] unwanted, T_d((b² + a² - 2x²) / (b² - a²)) is at most one on them and
grows like cosh(2 d sqrt(a² - x²) / b) towards zero. A block of random vectors is filtered, made
orthonormal and rotated to Ritz vectors; the largest |H v| in it is the next cut a (Zhou, Saad, Tiago and
Chelikowsky, doi:10.1016/j.jcp.2006.03.017). No system is solved, so there is no inner tolerance, and null
directions pass the filter like all others, however many there are.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra import _tree
from spectra._blas import one_thread
from spectra._errors import SpectraError
from spectra._status import Status
from spectra.krylov import dense
from spectra.krylov.band import Band
from spectra.krylov.layout import Layout
from spectra.operators.base import LinearOperator
from spectra.operators.stepwise import outside_loops
from spectra.results import Eigenpairs

PyTree = Any
GROWTH = 1e4
"""How much one filter may amplify zero: it leaves the block half the digits of float32."""
MAX_DEGREE = 500
"""Of one filter; what is missing to GROWTH comes from the next round."""
NORM_STEPS = 20


def smallest_eigenpairs(
    op: LinearOperator,
    k: int,
    *,
    key: jax.Array,
    tol: float,
    max_matvecs: int | None = None,
    deflate: Eigenpairs | None = None,
) -> Eigenpairs:
    """k eigenpairs of smallest |λ|; see `spectra.eigsh`. Dense up to order 2000, where n products are cheaper
    than a filter at a condition number of 100.

    A pair has converged when its residual is below tol |λ|, or below the noise floor
    precision sqrt(n) |H|, where nothing can be said: null directions are carried down to it.

    Cost: a round multiplies a block of k + max(5, k/2) vectors 2 d times, with d about 5 |H| / a. Where
    eigenvalues lie as dense near zero as elsewhere, that is more than n products.
    """
    if dense.allowed(op, max_matvecs):
        return dense.dense_eigenpairs(op, k, "SM", tol, deflate)
    op = outside_loops(op.prepare())
    known = [] if deflate is None else split(deflate.vectors, len(deflate.values))
    width = min(k + max(5, k // 2), op.size - len(known))
    layout = Layout.of(op.like)
    budget = 4000 * width if max_matvecs is None else max_matvecs
    if budget <= width:
        raise SpectraError(
            f"max_matvecs={budget}: the smallest take a block of {width} vectors, {width + 1} products."
        )
    norm, products = _norm_bound(op, layout, key, min(NORM_STEPS, op.size, budget - width))
    floor = op.precision * np.sqrt(op.size) * norm
    block = [_tree.sphere_sample(jax.random.fold_in(key, i + 1), op.structure) for i in range(width)]
    cut, rounds = 0.9 * norm, 0
    while True:
        band = Band(op, layout, len(known) + width)
        for i, vector in enumerate([*known, *block]):
            band.append(vector, locked=i < len(known))
        values, sizes, residuals, vectors = _rayleigh_ritz(op, band.vectors(width))
        products += width
        # A block that lies far below the cut has come loose from all others: the filter fits.
        cut = cut if sizes.max() < cut / 30 else float(np.clip(sizes.max(), floor, cut))
        best = np.argsort(sizes, kind="stable")[:k]
        converged = residuals <= np.maximum(tol * np.abs(values), floor)
        degree = np.ceil(np.arccosh(GROWTH) * norm / (2 * max(cut, 1e-300)))
        degree = int(min(degree, MAX_DEGREE, (budget - products - width) // (2 * width)))
        if converged[best].all() or degree < 1:
            break
        block = split(_filter(op, vectors, cut, norm, degree), width)
        products += 2 * degree * width
        rounds += 1
    chosen = best[np.argsort(values[best])]
    null = np.abs(values[chosen]) <= floor
    done = Status.SINGULAR if null.any() else Status.CONVERGED
    return Eigenpairs(
        values=values[chosen],
        vectors=jax.tree.map(lambda x: x[chosen], vectors),
        residuals=residuals[chosen],
        converged=converged[chosen],
        which="SM",
        size=op.size,
        num_matvecs=products,
        num_restarts=rounds,
        missed=1.0,
        noise_floor=floor,
        status=done if converged[best].all() else Status.NOT_CONVERGED,
    )


def split(vectors: PyTree, count: int) -> list[PyTree]:
    """A stack of vectors as a list."""
    return [jax.tree.map(lambda x, i=i: x[i], vectors) for i in range(count)]


def _norm_bound(op: LinearOperator, layout: Layout, key: jax.Array, steps: int) -> tuple[float, int]:
    """An upper bound on |H|: the largest |Ritz value| of a short run plus the norm of its residual."""
    band = Band(op, layout, steps + 1)
    band.extend(band.append(_tree.sphere_sample(key, op.structure)), steps)
    theta, _, coupling, _ = band.ritz()
    tail = float(np.abs(band.coefficients[band.pending][:, band.processed]).sum()) if coupling.size else 0.0
    return float(np.abs(theta).max()) + tail, steps


def _rayleigh_ritz(op: LinearOperator, basis: PyTree):
    """Ritz values in an orthonormal block, |H v|, |H v - θ v|, and the Ritz vectors, still stacked."""
    images = _products(op, basis)
    square = np.asarray(_gram(basis, images), np.float64)
    with one_thread():
        theta, turn = np.linalg.eigh((square + square.T) / 2)
    vectors, images = _turn(basis, turn), _turn(images, turn)
    sizes, residuals = _sizes(vectors, images, jnp.asarray(theta, op.dtype))
    return theta, np.asarray(sizes, np.float64), np.asarray(residuals, np.float64), vectors


def _products(op: LinearOperator, block: PyTree) -> PyTree:
    return op.mv_batch(block) if op.on_host else _products_jit(op, block)


@jax.jit
def _products_jit(op, block):
    return op.mv_batch(block)


@jax.jit
def _gram(a: PyTree, b: PyTree) -> jax.Array:
    return jax.vmap(lambda x: jax.vmap(lambda y: _tree.vdot(x, y))(b))(a)


@jax.jit
def _turn(block: PyTree, turn) -> PyTree:
    def one(x):
        return jnp.tensordot(jnp.asarray(turn, x.dtype).T, x, 1, precision=lax.Precision.HIGHEST)

    return jax.tree.map(one, block)


@jax.jit
def _sizes(vectors: PyTree, images: PyTree, theta: jax.Array):
    def one(v, w, value):
        return _tree.norm(w), _tree.norm(_tree.axpy(-value, v, w))

    return jax.vmap(one)(vectors, images, theta)


def _filter(op: LinearOperator, block: PyTree, cut: float, norm: float, degree: int) -> PyTree:
    """T_degree of the map that sends [cut², norm²] to [-1, 1], on a stack of vectors."""
    bounds = jnp.asarray([cut / norm, 1 / norm], op.dtype)
    if not op.on_host:
        return _filter_jit(op, block, bounds, degree)
    before, now = block, _map_interval(op, block, bounds)
    for _ in range(degree - 1):
        before, now = now, _three_terms(_map_interval(op, now, bounds), before)
    return now


@jax.jit
def _filter_jit(op, block, bounds, degree):
    def step(_, pair):
        before, now = pair
        return now, _three_terms(_map_interval(op, now, bounds), before)

    return lax.fori_loop(1, degree, step, (block, _map_interval(op, block, bounds)))[1]


def _map_interval(op, block: PyTree, bounds: jax.Array) -> PyTree:
    """In units of the norm, whose square may be no number: `bounds` are the cut in it, and its inverse."""
    low, inverse = bounds[0] ** 2, bounds[1]
    squared = _tree.scale(inverse, op.mv_batch(_tree.scale(inverse, op.mv_batch(block))))
    shifted = _tree.axpy(-2 / (1 + low), squared, block)
    return _tree.scale((1 + low) / (1 - low), shifted)


def _three_terms(now: PyTree, before: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: 2 * x - y, now, before)
