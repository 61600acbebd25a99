"""Traces of functions of an operator by quadrature, bracketed where the function allows it."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, trees
from spectra.base.calls import automatic, require_key
from spectra.base.errors import SpectraError, Status
from spectra.base.reals import RealFunction
from spectra.density.slq import slq
from spectra.density.spending import spend
from spectra.estimators.bracket import Bounds, Function
from spectra.estimators.of_quadrature import from_quadrature
from spectra.estimators.run import LOOSEST
from spectra.operators.base import LinearOperator, is_real_scalar, require_operator
from spectra.results import Estimate, Quadrature

Source = LinearOperator | Quadrature
PROBES = 8
"""Where a number of probes is not asked for."""
ONE_SIGNED = (
    "log",
    "log2",
    "log10",
    "log1p",
    "exp",
    "exp2",
    "expm1",
    "sqrt",
    "reciprocal",
    "square",
    "positive",
)
"""Of NumPy and of jax.numpy: every derivative of order two and more keeps one sign where f is defined."""


@automatic
def trace_of(
    source: Source,
    f: Callable[[np.ndarray], Any],
    *,
    key: jax.Array | None = None,
    num_steps: int | None = None,
    num_probes: int | None = None,
    tol: float | None = None,
    bounds: Bounds | None = None,
    one_signed: bool | None = None,
    probe_batch: int | None = None,
) -> Estimate:
    """Estimate tr f(H) = Σ_i f(λ_i) by stochastic Lanczos quadrature, with bracket and standard error.

    The value is n times the mean of Σ_j w_j f(θ_j) over probes. `lower` and `upper` bracket what the same
    probes would give with the exact f(H); more steps narrow them. If every derivative of f keeps one sign on
    an interval [a, b] that contains the spectrum, the exact vᵀf(H)v lies between the Gauss rule and the
    Gauss-Radau rules with a node at a and at b. This is so for log, 1/x, x/(x + δ), exp and real powers on a
    > 0. Such functions are recognised by name (`np.log`, not `lambda x: np.log(x)`); for others, pass
    `one_signed=True`. For any other f the bracket is wider: it uses that the distribution seen by a probe is
    bracketed and that polynomials of degree 2m - 1 are integrated exactly; the variation of f between the
    nodes is sampled. Brackets are certain if `bounds` are given and f has the stated property; otherwise a
    and b are the 99 % limits that the probes imply for the extreme eigenvalues. Where f ends between them, as
    log does at zero, all eigenvalues are taken to be where it is defined, and the bracket reaches to its end;
    it is wide until more steps, or `bounds`, exclude eigenvalues there. Where f is finite on both sides of a
    pole there is no bracket: the interval is an estimate, and what the last steps changed stands for the
    error of the quadrature.

    `stderr` is the spread over probes: for v uniform on the sphere Var vᵀf(H)v = 2 (mean f² - (mean f)²) / (n
    + 2), which the quadrature estimates; the interval uses Student's t with the degrees of freedom of that
    estimate, k (tr g²)² / tr g⁴ >= k with g = f - mean f. The effect of shifting the nodes by the noise floor
    is added.

    Args:
        source: symmetric operator of order n, or a `Quadrature` of it, which costs no product and has its
            steps and probes.
        f: vectorised function of eigenvalues, of NumPy or JAX, evaluated in float64. One that computes in
            float32 whatever it is given adds its own rounding to the interval.
        key: JAX random key; needed for an operator.
        num_steps: Lanczos steps per probe; default 100, or n for smaller operators.
        num_probes: number of probes, default 8; with `tol`, num_steps x num_probes is the maximum number of
            products.
        tol: spend products until stderr and half of the bracket together are below tol |value|: on steps, on
            probes, or on deflated Ritz vectors, whichever is predicted to gain most (see
            `spectra.density.spending`). The first probe may then take up to four times num_steps. Where f
            has both signs, as for `trace`, products are spent until 1/4 is reached, too.
        bounds: (a, b) known to contain the spectrum; None for an unknown end. (0, None) says that H is
            positive semi-definite; nodes that rounding puts below zero then count as zero.
        one_signed: whether every derivative of f keeps one sign on the interval; None: decided by the name of
            f.
        probe_batch: see `slq`.

    Returns:
        `Estimate` with lower and upper, None if there is no bracket; `reason` says what they rest on.

    Inside jit, vmap and grad the result has the value with its standard error but no bracket, and f must
    be a JAX function or one recognised by name; derivatives are those of the value. Nodes outside `bounds`
    are moved to them there, since their values cannot be checked.

    Raises:
        SpectraError: f is not finite at a Ritz value, or has a pole within the noise floor of one; a Ritz
            value lies outside `bounds`.
        SpectraError: as `slq`.

    Cost: num_probes x num_steps products, memory as `slq`.

    References:
        Golub and Meurant, Matrices, Moments and Quadrature, 2010, ch. 6; Ubaru, Chen and Saad,
        doi:10.1137/16M1104974.

    Examples:
        >>> import jax, jax.numpy as jnp, numpy as np, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(1.0, 2.0, 200)))
        >>> estimate = spectra.trace_of(op, np.log, key=jax.random.key(0), num_steps=10)
        >>> exact = np.log(np.linspace(1.0, 2.0, 200)).sum()
        >>> lower, _, upper = estimate.interval()
        >>> bool(lower < exact < upper)
        True
    """
    if tol is not None and not 0 < tol < 1:
        raise SpectraError(f"tol={tol} is relative to the value: use a number in (0, 1).")
    if not callable(f):  # pyright: ignore[reportUnnecessaryComparison]
        raise SpectraError(f"f={f!r}: pass a function of an array of eigenvalues, such as np.log.")
    if bounds is not None and not _are_ends(bounds):
        raise SpectraError(f"bounds={bounds!r}: use a pair of numbers, with None for an end that is unknown.")

    if isinstance(source, LinearOperator) and trees.is_traced((source, key)):
        options = {"num_probes": PROBES if num_probes is None else num_probes, "probe_batch": probe_batch}
        return _traced(source, f, key, num_steps, tol, bounds, options)
    signed = _is_known(f) if one_signed is None else one_signed
    real = RealFunction(f)

    def estimate(quadrature: Quadrature) -> Estimate:
        return from_quadrature(quadrature, real, bounds, signed)

    def open_share(found: Estimate, tol: float) -> float:
        """The error and half of the bracket, in units of what is asked for."""
        half = 0.0 if found.lower is None else (found.upper - found.lower) / 2
        goal = tol * abs(found.value)
        return (found.stderr + half) / goal if goal > 0 else np.inf if found.stderr + half > 0 else 0.0

    def error(quadrature: Quadrature) -> float:
        assert tol is not None
        try:
            early = min(tol, LOOSEST) if _has_both_signs(quadrature, real, bounds) else tol
            return open_share(estimate(quadrature), early)
        except SpectraError:  # f is not finite at a node that other probes may not have
            return np.inf

    stop = error if tol is not None else None
    found = estimate(quadrature_of(source, key, num_steps, num_probes, probe_batch, stop, short=True))
    if tol is None:
        return found
    if open_share(found, tol) > 1:
        return dataclasses.replace(found, status=Status.BUDGET_EXHAUSTED)
    noisy = found.status is Status.NOISY  # a tolerance that is reached makes products no more symmetric
    return found if noisy else dataclasses.replace(found, status=Status.CONVERGED)


def _has_both_signs(quadrature: Quadrature, f: Function, bounds: Bounds | None) -> bool:
    """Whether f of some nodes is positive and of others negative: then their sum may be zero."""
    nodes = np.asarray(quadrature.nodes, np.float64)[np.asarray(quadrature.weights) > 0]
    values = f(nodes if bounds is None else np.clip(nodes, *bounds))
    return bool(values.min() < 0 < values.max())


def _are_ends(bounds: Any) -> bool:
    given = isinstance(bounds, tuple | list | np.ndarray | jax.Array)
    pair: list[Any] = list(cast("Any", bounds)) if given else []
    return len(pair) == 2 and all(end is None or is_real_scalar(end) for end in pair)


def _traced(
    op: LinearOperator,
    f: Callable[[Any], Any],
    key: jax.Array | None,
    num_steps: int | None,
    tol: float | None,
    bounds: Bounds | None,
    options: dict[str, Any],
) -> Estimate:
    """The value and its standard error inside jit, vmap and grad; derivatives are those of the value."""
    if tol is not None:
        raise SpectraError("tol needs values: call trace_of outside jit, vmap and grad, or leave tol out.")
    key = require_key(key)
    f = next((getattr(jnp, name) for name in ONE_SIGNED if f is getattr(np, name)), f)
    steps = min(100, op.size) if num_steps is None else num_steps
    q = slq(op, key=key, num_steps=steps, **options)
    nodes = q.nodes if bounds is None else jnp.clip(q.nodes, *bounds)
    # Nodes of n steps are all eigenvalues, as outside of jit: their sum has no sampling error.
    whole = q.lengths[:, None] == op.size
    counted = (q.weights > 0) | whole
    # f may be infinite at the zeros behind an exhausted space, and its derivative, too.
    values = jnp.where(counted, f(jnp.where(counted, nodes, jnp.max(nodes, axis=1, keepdims=True))), 0)
    weights = q.weights / jnp.sum(q.weights, axis=1, keepdims=True)
    samples = jnp.sum(jnp.where(whole, values, op.size * weights * values), axis=1)
    # `error_of_powers`: the spread of few samples says too little where one eigenvalue dominates.
    values, weights = jax.lax.stop_gradient((values, weights))
    variance = jnp.sum(weights * (values - jnp.sum(weights * values) / q.num_probes) ** 2) / q.num_probes
    stderr = op.size * arrays.root(2 * variance / (op.size + 2) / q.num_probes)
    return Estimate(
        value=jnp.mean(samples),
        stderr=jnp.where(jnp.all(whole), 0.0, stderr),
        num_matvecs=q.num_matvecs,
        method="slq",
        status=Status.TRACED,
        reason="no bracket inside jit: it needs values",
        dof=float(q.num_probes),
    )


def _is_known(f: Callable[[Any], Any]) -> bool:
    """Whether f is one of the functions whose derivatives of order two and more each keep one sign."""
    return any(f is getattr(module, name) for module in (np, jnp) for name in ONE_SIGNED)


def quadrature_of(
    source: LinearOperator | Quadrature,
    key: jax.Array | None,
    num_steps: int | None = None,
    num_probes: int | None = None,
    probe_batch: int | None = None,
    error: Callable[[Quadrature], float] | None = None,
    short: bool = False,
    **spending: Any,
) -> Quadrature:
    """The quadrature given, or one of the operator; `error` and `spending` are those of `spend`."""
    source = getattr(source, "quadrature", source)  # a report stands for its quadrature
    if isinstance(source, Quadrature):
        if trees.is_traced(source):
            raise SpectraError("functions of an operator need values: call them outside jit, vmap and grad.")
        _require_no_run(source, num_steps=num_steps, num_probes=num_probes, probe_batch=probe_batch)
        return source
    require_operator(source)
    if trees.is_traced((source, key)):
        raise SpectraError("functions of an operator need values: call them outside jit, vmap and grad.")
    steps = min(100, source.size) if num_steps is None else num_steps
    probes = PROBES if num_probes is None else num_probes
    options: dict[str, Any] = {"key": require_key(key), "num_steps": steps, "num_probes": probes}
    options["probe_batch"] = probe_batch
    return spend(source, error, short=short, **options, **spending) if error else slq(source, **options)


def _require_no_run(q: Quadrature, **given: int | None) -> None:
    """Raise where arguments ask for a run of Lanczos that has been made already, and was another one."""
    of_run = {"num_steps": (None, q.num_steps), "num_probes": (None, q.num_probes), "probe_batch": (None,)}
    for name, value in given.items():
        if value not in of_run[name]:
            raise SpectraError(
                f"{name}={value} has no effect on a quadrature, which is a run of {q.num_steps} steps of "
                f"{q.num_probes} probes: leave it out, or pass the operator."
            )


def module_of(x: Any) -> Any:
    """NumPy or JAX, as x is of one or the other."""
    return jnp if isinstance(x, jax.Array) else np
