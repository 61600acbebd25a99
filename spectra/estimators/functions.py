"""Traces of functions of an operator by quadrature, bracketed where the function allows it."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import trees
from spectra.base.calls import automatic, require_key
from spectra.base.errors import SpectraError, Status
from spectra.density.extremes import sampled_ends, sampling_error, shows_fourth_powers
from spectra.density.slq import slq
from spectra.density.spending import spend
from spectra.estimators import levels
from spectra.estimators.bracket import (
    Bounds,
    Function,
    bracket,
    domain,
    evaluate,
    interval_of,
    linked,
    spread,
)
from spectra.operators.base import LinearOperator, is_real_scalar, require_operator
from spectra.quadrature.changes import last_change
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
    and b are the 99 % limits that the probes imply for the extreme eigenvalues, with a clipped to the domain
    of f. If f is not finite on [a, b] there is no bracket: in the interval, what the last step changed stands
    for the error of the quadrature.

    `stderr` is the spread over probes: for v uniform on the sphere Var vᵀf(H)v = 2 (mean f² - (mean f)²) / (n
    + 2), which the quadrature estimates; the interval uses Student's t with the degrees of freedom of that
    estimate, k (tr g²)² / tr g⁴ >= k with g = f - mean f. The effect of shifting the nodes by the noise floor
    is added.

    Args:
        source: symmetric operator of order n, or a `Quadrature` of it, which costs no product and has its
            steps and probes.
        f: vectorised NumPy function of eigenvalues.
        key: JAX random key; needed for an operator.
        num_steps: Lanczos steps per probe; default 100, or n for smaller operators.
        num_probes: number of probes, default 8; with `tol`, num_steps x num_probes is the maximum number of
            products.
        tol: spend products until stderr and half of the bracket together are below tol |value|: on steps, on
            probes, or on deflated Ritz vectors, whichever is predicted to gain most (see
            `spectra.density.spending`). The first probe may then take up to four times num_steps.
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
        SpectraError: f is not finite at a Ritz value, or a Ritz value lies outside `bounds`.
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

    def estimate(quadrature: Quadrature) -> Estimate:
        return _from_quadrature(quadrature, f, bounds, signed)

    def open_share(found: Estimate) -> float:
        """The error and half of the bracket, in units of what is asked for."""
        assert tol is not None
        half = 0.0 if found.lower is None else (found.upper - found.lower) / 2
        goal = tol * abs(found.value)
        return (found.stderr + half) / goal if goal > 0 else np.inf if found.stderr + half > 0 else 0.0

    def error(quadrature: Quadrature) -> float:
        try:
            return open_share(estimate(quadrature))
        except SpectraError:  # f is not finite at a node that other probes may not have
            return np.inf

    stop = error if tol is not None else None
    found = estimate(quadrature_of(source, key, num_steps, num_probes, probe_batch, stop, short=True))
    if tol is None:
        return found
    if open_share(found) > 1:
        return dataclasses.replace(found, status=Status.BUDGET_EXHAUSTED)
    noisy = found.status is Status.NOISY  # a tolerance that is reached makes products no more symmetric
    return found if noisy else dataclasses.replace(found, status=Status.CONVERGED)


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
    stderr = op.size * jnp.sqrt(2 * variance / (op.size + 2) / q.num_probes)
    return Estimate(
        value=jnp.mean(samples),
        stderr=jnp.where(jnp.all(whole), 0.0, stderr),
        num_matvecs=q.num_matvecs,
        method="slq",
        status=Status.TRACED,
        reason="no bracket inside jit: it needs values",
        dof=float(q.num_probes),
    )


def _is_known(f: Function) -> bool:
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
            raise SpectraError("functions of an operator need values: call them outside jit and vmap.")
        _require_no_run(source, num_steps=num_steps, num_probes=num_probes, probe_batch=probe_batch)
        return source
    require_operator(source)
    if trees.is_traced((source, key)):
        raise SpectraError("functions of an operator need values: call them outside jit and vmap.")
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


def _from_quadrature(q: Quadrature, f: Function, bounds: Bounds | None, one_signed: bool) -> Estimate:
    q, short = levels.split(q)
    sampled = sampled_ends(q)
    (a, b), excludes = interval_of(q, bounds, sampled)

    def at(x: np.ndarray) -> np.ndarray:
        return evaluate(f, np.clip(x, a, b))

    _check_finite(q, at)
    parts, floor = q.parts, q.noise_floor
    known = parts.total(at)
    fields: dict[str, Any] = {"num_matvecs": q.num_matvecs, "method": "slq", "status": q.status}
    off = _changes(at, parts.atoms, floor + parts.coupling)
    rounding, slack = float(np.sum(np.abs(off).max(axis=0))), off.sum(axis=1)
    rest = parts.rest
    if rest is None:
        return Estimate(known, rounding, **fields, reason="all eigenvalues are known")
    n, k = rest.size, rest.num_probes
    nodes, weights = np.asarray(rest.nodes, np.float64), np.asarray(rest.weights, np.float64)
    weights = weights / weights.sum(axis=1, keepdims=True)
    values = np.where(weights > 0, at(nodes), 0.0)
    mean = float(np.sum(weights * values) / k)
    ends, rests = domain(q, f, (a, b), excludes, bounds, one_signed)
    inner = _within(q, ends, sampled)
    stderr, dof = sampling_error(weights, values, n)
    moved = 0.0
    if inner is not None and short is not None:
        moved, stderr, dof, rounded = levels.combined(q, short, f, inner)
        rounding += rounded
    elif inner is not None:
        stderr, dof = spread(q, f, inner, mean)
    if dof is not None and not shows_fourth_powers(q):
        dof = float(k)
    moves = np.abs(_changes(at, nodes, floor)).max(axis=0)
    rounding += n * float(np.sum(np.where(weights > 0, weights * moves, 0.0)) / k)
    rounding += parts.spill(at, mean)
    lower, upper, reach, reason = bracket(q, f, inner, rests, one_signed)
    known += moved
    below, above = (0.0, 0.0)
    if parts.links is not None:
        known_ends = ends or (float(np.min(q.nodes)), float(np.max(q.nodes)))
        below, above = linked(f, parts.links, known_ends, one_signed)
    if lower is not None and upper is not None:  # sums in another order
        lower, upper = known + below + min(lower, n * mean), known + above + max(upper, n * mean)
    else:
        rounding += above - below + n * last_change(rest, at)
    least, most = (
        None if end is None or not excludes else known + off + more + pick(end, n * mean)
        for end, off, more, pick in zip(reach, slack, (below, above), (min, max), strict=True)
    )
    if short is not None:
        reason = f"{len(short)} more probes of one step each see a parabola; {reason}"
    if parts.links is not None:
        reason = f"{len(parts.links.theta)} Ritz vectors are taken out; {reason}"
    elif len(parts.atoms):
        reason = f"{len(parts.atoms)} eigenvalues are resolved; {reason}"
    return Estimate(
        value=known + n * mean,
        stderr=float(np.hypot(stderr, rounding)),
        **fields,
        reason=reason,
        dof=dof,
        lower=lower,
        upper=upper,
        least=least,
        most=most,
    )


def _within(
    q: Quadrature, ends: tuple[float, float] | None, sampled: tuple[float, float]
) -> tuple[float, float] | None:
    """The ends of what is sampled, where eigenpairs or a space were taken out, within those of all."""
    if ends is None or q.bulk is None:
        return ends
    floor, nodes = q.noise_floor, np.asarray(q.bulk.nodes)
    low = min(sampled[0], float(nodes.min()) - floor)
    high = max(sampled[1], float(nodes.max()) + floor)
    return max(ends[0], low), min(ends[1], high)


def _changes(f: Function, x: np.ndarray, shift: float) -> np.ndarray:
    """How far f falls (at most 0) and rises where x moves by `shift`, as far as it is defined there."""
    changes = np.asarray([f(x - shift), f(x + shift)]) - f(x)
    changes = np.where(np.isfinite(changes), changes, 0.0)
    return np.array([np.minimum(changes, 0.0).min(axis=0), np.maximum(changes, 0.0).max(axis=0)])


def _check_finite(q: Quadrature, f: Function) -> None:
    """Raise unless f is finite at the Ritz values."""
    nodes, weights = np.asarray(q.nodes, np.float64), np.asarray(q.weights)
    bad = ~np.isfinite(f(nodes)) & (weights > 0)
    if bad.any():
        raise SpectraError(
            f"f is not finite at the Ritz value {nodes[bad][0]:.6g} (the noise floor is "
            f"{q.noise_floor:.1e}): for log, inverse and powers shift the operator, op.shift(delta), by "
            "more than its most negative eigenvalue and the noise floor, or pass bounds=(0, None) if it is "
            "positive semi-definite."
        )


def module_of(x: Any) -> Any:
    """NumPy or JAX, as x is of one or the other."""
    return jnp if isinstance(x, jax.Array) else np
