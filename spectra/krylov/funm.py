"""Functions of an operator applied to vectors, by Lanczos, with a bound on the error."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import stacks, trees
from spectra.base.errors import NonFiniteError, SpectraError, Status
from spectra.base.host import one_thread
from spectra.base.meshes import automatic
from spectra.base.trees import PyTree
from spectra.krylov import basis as _basis
from spectra.krylov import function_error
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
RANGE_STEPS = 40
"""Of the random run for the ends of the spectrum: they are then known to 8 % of it at n = 1e6."""


@dataclasses.dataclass(frozen=True)
class Named:
    """A function by name: in NumPy and in JAX, and where it is defined."""

    numpy: Callable[[Any], Any]
    jax: Callable[[Any], Any]
    least: float = -np.inf  # defined above
    closed: bool = False  # and at `least` itself


NAMED = {
    "exp": Named(np.exp, jnp.exp),
    "log": Named(np.log, jnp.log, 0.0),
    "sqrt": Named(np.sqrt, jnp.sqrt, 0.0, closed=True),
    "inv_sqrt": Named(lambda x: 1 / np.sqrt(x), lambda x: 1 / jnp.sqrt(x), 0.0),
    "inv": Named(lambda x: 1 / x, lambda x: 1 / x),
    "sign": Named(np.sign, jnp.sign),
    "abs": Named(np.abs, jnp.abs),
}


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
    β g(H) q with a known function g (`spectra.krylov.function_error`), so it is at most |v| β max |g| over
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
    named, name = _function(f)
    if not 0 <= tol < 1:
        raise SpectraError(f"tol={tol} is relative to |f(H) v|: use a number in [0, 1).")
    traced = trees.is_traced((op, v))
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
    known = _Range.of(run, bounds, key)
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


def _function(f: Any) -> tuple[Named, str]:
    if isinstance(f, str):
        if f not in NAMED:
            raise SpectraError(f"f={f!r}: use one of {tuple(NAMED)}, or a function of real numbers.")
        return NAMED[f], f
    if not callable(f):
        raise SpectraError(f"f is a {type(f).__name__}: pass a function of real numbers, or its name.")
    return Named(f, f), getattr(f, "__name__", type(f).__name__)


@dataclasses.dataclass(frozen=True)
class _Range:
    """Intervals that hold the spectrum, and what they rest on."""

    intervals: tuple[tuple[float, float], ...]
    low: float  # given ends; Ritz values beyond them are an error
    high: float
    norm: float
    reason: str
    products: int

    @classmethod
    def of(cls, op: LinearOperator, bounds: Any, key: jax.Array | None) -> "_Range":
        given = _pairs(bounds)
        low, high = given[0][0], given[-1][1]
        if op.semidefinite:
            low = max(low, 0.0)
        if np.isfinite([low, high]).all():
            intervals = ((max(given[0][0], low), given[0][1]), *given[1:])
            norm = max(abs(low), abs(high))
            return cls(intervals, low, high, norm, "the given bounds of the spectrum", 0)
        key = jax.random.key(0) if key is None else key
        count = min(RANGE_STEPS, op.size)
        found = lanczos(op, trees.sphere_sample(key, op.structure), count)
        theta = _eigh(found.alpha, found.beta, int(found.length))[0]
        exact = found.status is Status.INVARIANT or count == op.size
        beyond = 0.0 if exact else function_error.margin(op.size, count) * (theta[-1] - theta[0])
        noise = breakdown_noise(op.size, op.precision) * float(np.abs(theta).max())
        a = low if np.isfinite(low) else theta[0] - beyond - noise
        b = high if np.isfinite(high) else theta[-1] + beyond + noise
        edges = [(x if np.isfinite(x) else a, y if np.isfinite(y) else b) for x, y in given]
        edges[0], edges[-1] = (a, edges[0][1]), (edges[-1][0], b)
        reason = "the ends of the spectrum, which a random run leaves out with probability 1e-6"
        return cls(tuple(edges), low, high, max(abs(a), abs(b)), reason, int(found.length))


def _pairs(bounds: Any) -> list[tuple[float, float]]:
    """Intervals in ascending order, with infinite ends where nothing is known."""
    if bounds is None:
        return [(-np.inf, np.inf)]
    pairs = [bounds] if bounds[0] is None or np.ndim(bounds[0]) == 0 else list(bounds)
    made = [(-np.inf if a is None else float(a), np.inf if b is None else float(b)) for a, b in pairs]
    ends = [end for pair in made for end in pair]
    if ends != sorted(ends):
        raise SpectraError(f"bounds={bounds!r}: use (a, b) with a <= b, or several such pairs, ascending.")
    return made


@dataclasses.dataclass(frozen=True)
class _Found:
    value: PyTree
    error: float
    steps: int
    status: Status


def _one(op, named: Named, name: str, v: PyTree, steps: int, tol: float, known: _Range) -> _Found:
    """f(H) v of one vector."""
    size, layout = trees.length(v), Layout.of(op.like)
    if size == 0:
        return _Found(v, 0.0, 0, Status.INVARIANT)
    state = _start(layout, v, steps)
    noise = breakdown_noise(op.size, op.precision)
    for start in range(0, steps, CHUNK):
        stop = min(start + CHUNK, steps)
        state = advance(op, layout, state, start, stop, batched=False)
        alpha, beta, length = jax.device_get((state.alpha, state.beta, state.length))
        ended = invariant_length(alpha, beta, int(length), op.size, op.precision)
        length = int(length) if ended is None else ended
        theta, vectors = _eigh(alpha, beta, length)
        theta = _inside(theta, named, name, known, noise * known.norm, op)
        f = _on_reals(named.numpy)
        values = f(theta)
        if not np.isfinite(values).all():
            raise _undefined(name, float(theta[~np.isfinite(values)][0]), noise * known.norm)
        if size * np.abs(values).max() > float(jnp.finfo(op.dtype).max):
            raise SpectraError(
                f"{name} reaches {np.abs(values).max():.1e} on the spectrum, beyond {op.dtype}."
            )
        coefficients = vectors @ (values * vectors[0])
        norm = float(np.linalg.norm(coefficients))
        last = 0.0 if ended is not None else float(beta[length - 1])
        intervals = _with(known.intervals, theta)
        error = function_error.truncation(f, theta, vectors, last, intervals)
        if ended is not None or error <= tol * norm:
            break
    moved = function_error.rounding(f, intervals, noise * known.norm) + noise * norm
    status = Status.INVARIANT if ended is not None else Status.CONVERGED
    if ended is None and error > tol * norm:
        status = Status.BUDGET_EXHAUSTED
    padded = np.zeros(_rows(state.basis))
    padded[:length] = size * coefficients
    value = _combined(layout, state.basis, jnp.asarray(padded, op.dtype), length)
    return _Found(value, size * (error + moved), stop, status)


def _on_reals(f: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], np.ndarray]:
    def values(x: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            found = np.asarray(f(np.asarray(x, np.float64)))
        if found.shape != np.shape(x):
            found = np.broadcast_to(found, np.shape(x))
        if np.iscomplexobj(found):
            found = np.where(np.imag(found) == 0, np.real(found), np.nan)
        return np.asarray(found, np.float64)

    return values


def _inside(theta, named: Named, name: str, known: _Range, noise: float, op) -> np.ndarray:
    """Ritz values within the given bounds, and where f is defined, up to rounding."""
    low, high = max(known.low, named.least if named.closed else -np.inf), known.high
    beyond = theta[(theta < known.low - noise) | (theta > known.high + noise)]
    if len(beyond):
        raise SpectraError(
            f"the Ritz value {beyond[0]:.6g} lies outside of the bounds given, [{known.low:g}, "
            f"{known.high:g}]: H has an eigenvalue there or beyond."
        )
    if theta[0] < named.least - noise:
        raise _undefined(name, float(theta[0]), noise)
    return np.clip(theta, low, high)


def _undefined(name: str, at: float, noise: float) -> SpectraError:
    what = f"an eigenvalue at or below {at:.6g}" if at < -noise else f"an eigenvalue near {at:.6g}"
    return SpectraError(
        f"{name} is not finite at the Ritz value {at:.6g}: H has {what} (the noise floor is {noise:.1e}). "
        "Shift the operator, op.shift(delta), by more than its most negative eigenvalue and the noise floor."
    )


def _with(intervals, theta: np.ndarray) -> list[tuple[float, float]]:
    """The intervals, the outer ends no further in than the Ritz values."""
    pairs = list(intervals)
    pairs[0] = (min(pairs[0][0], float(theta[0])), pairs[0][1])
    pairs[-1] = (pairs[-1][0], max(pairs[-1][1], float(theta[-1])))
    return pairs


@one_thread()
def _eigh(alpha, beta, length: int) -> tuple[np.ndarray, np.ndarray]:
    alpha, beta = np.asarray(alpha, np.float64)[:length], np.asarray(beta, np.float64)[: length - 1]
    from scipy.linalg import eigh_tridiagonal

    values, vectors = eigh_tridiagonal(alpha, beta)
    return values, vectors


def _rows(basis) -> int:
    return sum(segment[0].shape[1] for segment in basis)


_start = jax.jit(init, static_argnames=("layout", "num_steps"))


@jax.jit
def _sum_of_rows(basis, coefficients, filled):
    panels = basis[0]
    zeros = [jnp.zeros(x[:, 0].shape, jnp.promote_types(x.dtype, jnp.float32)) for x in panels]
    return _basis.subtract(basis, -coefficients, zeros, filled)


def _combined(layout: Layout, basis, coefficients, filled: int) -> PyTree:
    return layout.unpack(_sum_of_rows(basis, coefficients, filled))


def _traced(op: LinearOperator, f: Callable[[Any], Any], v: PyTree, steps: int) -> PyTree:
    found = lanczos(op, v, steps)
    theta, vectors = jnp.linalg.eigh(found.matrix())
    # Steps behind an exhausted space have zero rows: f there counts for nothing.
    values = jnp.where(vectors[0] != 0, f(theta), 0)
    coefficients = trees.norm(v) * (vectors @ (values * vectors[0]))
    return stacks.combine(coefficients, found.basis)
