"""Functions of an operator applied to vectors, by Lanczos, with a bound on the error."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, stacks, trees
from spectra.base.errors import NonFiniteError, SpectraError, Status
from spectra.base.meshes import automatic
from spectra.base.trees import PyTree
from spectra.krylov import basis as _basis
from spectra.krylov.function_bounds import (
    Named,
    Range,
    eigh,
    extended,
    inside,
    named_function,
    on_reals,
    rounding,
    truncation,
    undefined,
)
from spectra.krylov.lanczos import lanczos
from spectra.krylov.layout import Layout, stacked
from spectra.krylov.recurrence import CHUNK, advance, check_steps, init
from spectra.operators.arithmetic import outside_loops
from spectra.operators.base import LinearOperator, require_operator
from spectra.quadrature.copies import breakdown_noise, invariant_length
from spectra.results import FunctionProduct

STEPS = 128
"""Lanczos steps at most where num_steps is not given."""
TRACED_STEPS = 64


@automatic
def funm(
    op: LinearOperator,
    f: str | Callable[[np.ndarray], Any],
    v: PyTree,
    *,
    num_steps: int | None = None,
    tol: float = 1e-5,
    bounds: Any = None,
    key: jax.Array | None = None,
) -> FunctionProduct:
    """Compute f(H) v by Lanczos, with a bound on the error.

    The value is |v| Q f(T) e_1 after m steps from v, exact for polynomials of degree m - 1. The error is |v|
    β g(H) q with a known function g (`spectra.krylov.function_bounds`), so it is at most |v| β max |g| over
    the spectrum; steps are taken until that is below tol |value|.

    **What the bound rests on.** It needs a set that contains the spectrum. With both ends in `bounds` it is
    certain, up to the variation of g between 1,500 samples. Ends that are not given are found by 40 Lanczos
    steps from a random vector, and hold with probability 1 - 1e-6 each (Kuczynski and Wozniakowski); an
    operator that is positive semi-definite by construction needs none below zero. The lower end matters where
    f has a pole or a branch point there: 1/x, log and 1/sqrt are bounded only if the spectrum is known to
    stay away from zero, so pass `bounds=(shift, None)` for a damped operator. For "sign" and "abs" pass two
    intervals, on both sides of zero: between them f needs no approximation. The effect of rounding in the
    products is added.

    Args:
        op: symmetric operator of order n.
        f: "exp", "log", "sqrt", "inv_sqrt", "inv", "sign", "abs", or a vectorised NumPy function of real
            numbers; inside jit, of JAX.
        v: a vector, a pytree like the parameters or a flat array (n,); or several, as the columns of an (n,
            k) array or with a leading axis.
        num_steps: maximum number of Lanczos steps; default 128, or n.
        tol: accepted error relative to |f(H) v|; 0 takes all steps.
        bounds: (a, b) that contain the spectrum, None for an unknown end; or several such intervals.
        key: JAX random key for the ends of the spectrum; default jax.random.key(0).

    Returns:
        `FunctionProduct` with value and error_bound. `status` is CONVERGED, INVARIANT where the Krylov space
        is exhausted and the value exact to rounding, BUDGET_EXHAUSTED, or TRACED inside jit, where the bound
        is infinite.

    Raises:
        SpectraError: f is not finite at a Ritz value, as for the root of an operator with a negative
            eigenvalue, which the message names; a Ritz value lies outside `bounds`.
        NonFiniteError: a product is NaN or infinite.

    Cost: one product per step for each vector, and 40 for the ends of the spectrum; num_steps vectors of
        memory.

    References:
        Saad, doi:10.1137/0729014; Chen, Greenbaum, Musco and Musco, arXiv:2106.09806.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, 4.0, 9.0])))
        >>> result = spectra.funm(op, "sqrt", jnp.ones(3))
        >>> [round(float(x), 4) for x in result.value]
        [1.0, 2.0, 3.0]
    """
    require_operator(op)
    named, name = named_function(f)
    if not 0 <= tol < 1:
        raise SpectraError(f"tol={tol} is relative to |f(H) v|: use a number in [0, 1).")
    traced = trees.is_traced((op, v, bounds, key))
    most = TRACED_STEPS if traced else STEPS
    steps = min(most, op.size) if num_steps is None else num_steps
    check_steps(steps, op.size)
    rows, several, back = stacked(op, v, "v")
    if traced:
        value = jax.vmap(lambda row: _traced(op, named.jax, row, steps))(rows)
        return FunctionProduct(back(value), jnp.inf, 0, steps, name, "nothing inside jit", Status.TRACED)
    if not trees.all_finite(rows):
        raise NonFiniteError("v is NaN or infinite somewhere.")
    run = outside_loops(op.prepare())
    known = Range.of(run, bounds, key)
    found = [_one(run, named, name, vector, steps, tol, known) for vector in stacks.split(rows)]
    errors = np.array([one.error for one in found])
    worst = [Status.BUDGET_EXHAUSTED, Status.CONVERGED, Status.INVARIANT]
    return FunctionProduct(
        value=back(stacks.stacked([one.value for one in found])),
        error_bound=errors if several else float(errors[0]),
        num_matvecs=known.products + sum(one.steps for one in found),
        num_steps=max(one.steps for one in found),
        function=name,
        bound=known.reason,
        status=min((one.status for one in found), key=worst.index),
    )


@dataclasses.dataclass(frozen=True)
class _Found:
    value: PyTree
    error: float
    steps: int
    status: Status


def _one(
    op: LinearOperator, named: Named, name: str, v: PyTree, steps: int, tol: float, known: Range
) -> _Found:
    """f(H) v of one vector."""
    size, layout = trees.length(v), Layout.of(op.like)
    if size == 0:
        return _Found(v, 0.0, 0, Status.INVARIANT)
    state = _start(layout, v, steps)
    noise = breakdown_noise(op.size, op.precision)
    stop = 0
    while True:
        start, stop = stop, min(stop + CHUNK, steps)
        state = advance(op, layout, state, start, stop, batched=False)
        alpha, beta, length = jax.device_get((state.alpha, state.beta, state.length))
        ended = invariant_length(alpha, beta, int(length), op.size, op.precision)
        length = int(length) if ended is None else ended
        theta, vectors = eigh(alpha, beta, length)
        theta = inside(theta, named, name, known, noise * known.norm, op)
        f = on_reals(named.numpy)
        values = f(theta)
        if not np.isfinite(values).all():
            raise undefined(name, float(theta[~np.isfinite(values)][0]), noise * known.norm)
        if size * np.abs(values).max() > float(jnp.finfo(op.dtype).max):
            raise SpectraError(
                f"{name} reaches {np.abs(values).max():.1e} on the spectrum, beyond {op.dtype}."
            )
        coefficients = vectors @ (values * vectors[0])
        norm = float(np.linalg.norm(coefficients))
        last = 0.0 if ended is not None else float(beta[length - 1])
        intervals = extended(known.intervals, theta)
        error = truncation(f, theta, vectors, last, intervals)
        if ended is not None or error <= tol * norm or stop == steps:
            break
    moved = rounding(f, intervals, noise * known.norm) + noise * norm
    status = Status.INVARIANT if ended is not None else Status.CONVERGED
    if ended is None and error > tol * norm:
        status = Status.BUDGET_EXHAUSTED
    padded = np.zeros(_rows(state.basis))
    padded[:length] = size * coefficients
    value = _combined(layout, state.basis, jnp.asarray(padded, op.dtype), length)
    return _Found(value, size * (error + moved), stop, status)


def _rows(basis: _basis.Basis) -> int:
    return sum(segment[0].shape[1] for segment in basis)


_start = jax.jit(init, static_argnames=("layout", "num_steps"))


@jax.jit
def _sum_of_rows(basis: _basis.Basis, coefficients: jax.Array, filled: int | jax.Array) -> _basis.Panels:
    panels = basis[0]
    zeros = [jnp.zeros(x[:, 0].shape, jnp.promote_types(x.dtype, jnp.float32)) for x in panels]
    return _basis.subtract(basis, -coefficients, zeros, filled)


def _combined(layout: Layout, basis: _basis.Basis, coefficients: jax.Array, filled: int) -> PyTree:
    return layout.unpack(_sum_of_rows(basis, coefficients, filled))


def _traced(op: LinearOperator, f: Callable[[Any], Any], v: PyTree, steps: int) -> PyTree:
    found = lanczos(op, v, steps)
    theta, vectors = arrays.eigh(found.matrix())
    # Steps behind an exhausted space have zero rows: f there counts for nothing.
    values = jnp.where(vectors[0] != 0, f(theta), 0)
    coefficients = trees.norm(v) * jnp.matmul(vectors, values * vectors[0], precision="highest")
    return stacks.combine(coefficients, found.basis)
