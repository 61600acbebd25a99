"""The trace of an operator, by the method that fits the budget."""

import dataclasses
import inspect
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spectra.base import arrays, host, trees
from spectra.base.calls import automatic, checked
from spectra.base.errors import SpectraError, Status
from spectra.base.trees import PyTree
from spectra.estimators import blocks, exact
from spectra.estimators.hutchinson import hutchinson
from spectra.estimators.krylov_aware import krylov
from spectra.estimators.low_rank import hutchpp, xnystrace, xtrace
from spectra.estimators.run import Run, begin, check_probes
from spectra.operators.arguments import check_functions
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.ggn import ComposedLoss
from spectra.operators.hessian import HessianOperator
from spectra.results import Estimate, format_bytes
from spectra.runs.checkpoint import Checkpoint
from spectra.runs.watch import watched

_RUNNERS = {
    "hutchinson": hutchinson,
    "hutch++": hutchpp,
    "krylov": krylov,
    "xtrace": xtrace,
    "xnystrace": xnystrace,
}
METHODS = ("auto", "exact", *_RUNNERS)
STACKS = {"hutchinson": 0.0, "hutch++": 2.0, "krylov": 2.0, "xtrace": 2.0, "xnystrace": 4.0}
"""Vectors held at the peak, for each product of the budget."""
_LEAST = {"hutchinson": 1, "hutch++": 4, "krylov": 8, "xtrace": 4, "xnystrace": 2}
"""Products that leave two samples or probes, without which there is no error; see `hutchinson` for one."""
SIGNS = 4
"""Rademacher probes from which their interval covers every matrix: fewer agree too often, see `trace`."""
KRYLOV = 16
"""Products from which a Krylov space is worth its decisions: fewer go to XTrace."""


@automatic
def trace(
    op: LinearOperator,
    *,
    key: jax.Array | None,
    method: str = "auto",
    num_matvecs: int = 64,
    tol: float | None = None,
    probes: str | None = None,
    by: str | None = None,
    probe_batch: int | None = None,
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> Estimate:
    """Estimate the trace tr H = Σ_i H_ii, with a standard error and a 95 % interval.

    The methods are:

    * "krylov", the default, computes the trace on a Krylov space exactly, from the products that built it,
      and samples the complement; it decides as it runs how to split the products between the two (see
      `spectra.estimators.krylov_aware`). On thirteen spectra its error was 0.4 to 0.95 times that of XTrace
      from the same 64 products, or far less.
    * "hutchinson" is the mean of vᵀHv over random probes.
    * "hutch++" computes the trace on a sketched range exactly and samples the rest.
    * "xtrace" does the same with every probe in both roles, leaving each out of its own sketch.
    * "xnystrace" needs half the products of "xtrace", but a positive semi-definite operator.
    * "exact" sums n products with unit vectors; its only error is rounding.

    `trace` works inside `jit` and `vmap`, where `tol`, "krylov" and checks of values are not available.

    The interval (`Estimate.interval`) uses Student's t with a variance computed from the products: that of
    vᵀHv is 2 |H|_F², which |Hv|² estimates with at least one degree of freedom per probe. "xtrace" and
    "xnystrace" instead have leave-one-out estimates of m probes, with their spread and covariance (see
    `spectra.estimators.leave_one_out`). The error includes the rounding of products; with "exact", and where
    samples leave less than 0.3 % in float32, the rounding of a loss is measured (see
    `spectra.estimators.exact`), except inside `jit`, where the stated precision is used. Fewer than four
    Rademacher probes miss some matrices altogether (only every second probe sees (1, -1)ᵀ(1, -1)), so fewer
    than four probes are normal by default.

    Symmetry is tested by uᵀHv = vᵀHu for the vectors at hand. With Rademacher probes and a function supplied
    by the user, one product (of three or more) is spent on a normal vector, since an odd function applied to
    each entry looks linear on signs. A single product cannot reveal asymmetry.

    Args:
        op: symmetric operator of order n.
        key: JAX random key; probe i depends on the key and i alone. None for "exact".
        method: one of the above, or "auto": "exact" if the budget covers n products; "hutchinson" if
            2 num_matvecs vectors do not fit into half of the free memory; else "krylov", or "xtrace" inside
            `jit`, with `by`, Rademacher probes or a checkpoint, on streams (whose products share passes) and
            with fewer than 16 products. `Estimate.reason` says why.
        num_matvecs: budget of products. If it covers n, "exact" replaces the sketching methods.
        tol: stop as soon as stderr <= tol |value|, checking after 12 probes (16 for "hutchinson") and then
            whenever their number has grown by half; the status says whether it was reached. After the first
            check, the error stated is the tolerance itself, but at most 1.22 times the error found. A
            tolerance above 1/4 ends no run before the budget does, unless 1/4 is reached, too: a trace of
            zero looks like two standard errors by luck. "exact" always takes all of its products.
        probes: "rademacher" (default for "hutchinson" from four probes on: exact for a diagonal H) or
            "normal" (default for fewer, and for the other methods, which scale the projected probe to the
            length it has on average). Not for method="exact".
        by: "leaf" or "layer": value and stderr become dicts with the trace of each diagonal block, from
            the same products; `total` is the trace of the whole.
        probe_batch: products computed side by side; changes the result by rounding only. The products of a
            Krylov space are sequential.
        progress: show the number of products.
        checkpoint: a folder, or a `Checkpoint`, to save the run in. The same call resumes from there, bit for
            bit as if uninterrupted; a call with other arguments is refused.

    Returns:
        `Estimate` with value and stderr.

    Raises:
        SpectraError: an argument is out of range, or "xnystrace" meets an indefinite operator (inside
            `jit` the value is NaN then).
        NonFiniteError: a product is NaN or infinite.
        NotSymmetricError: the operator is not symmetric, or not linear; inside `jit` the value is NaN.
        MemoryLimitError: the sketch does not fit.
        CheckpointError: the folder holds the checkpoint of another run.
        PreemptedError: the process was asked to end (SIGTERM or Ctrl-C), and the run is saved.

    Cost: at most num_matvecs products ("exact": n, and one to test symmetry), and 8 where rounding is
    measured. Memory: for "exact" and "hutchinson", probe_batch products plus one or two vectors (two or four
    with Rademacher probes); for "krylov", "xtrace" and "hutch++" 2 num_matvecs vectors, for "xnystrace" 4
    num_matvecs.

    References:
        Hutchinson, doi:10.1080/03610918908812806; Meyer, Musco, Musco and Woodruff, arXiv:2010.09649;
        Epperly, Tropp and Webber, arXiv:2301.07825; Chen and Hallman, arXiv:2205.01736.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(1.0 / jnp.arange(1.0, 201.0) ** 2))
        >>> estimate = spectra.trace(op, key=jax.random.key(0))
        >>> estimate.method, estimate.num_matvecs
        ('krylov', 64)
        >>> lower, _, upper = estimate.interval()
        >>> bool(lower < 1.6399 < upper)
        True
    """
    if method not in METHODS:
        raise SpectraError(f"method={method!r}: use one of {METHODS}.")
    chosen, reason = choose(op, method, num_matvecs)
    free = method == "auto" and checkpoint is None
    if free and chosen == "xtrace" and _for_krylov(op, key, by, probes, num_matvecs):
        chosen = "krylov"
        reason = f"n={op.size:,} exceeds num_matvecs={num_matvecs} and the basis fits into memory"
    asked, method = method, chosen
    if method == "krylov" and checkpoint is not None:
        raise SpectraError("checkpoint=: method='krylov' does not save its Krylov space. Use 'xtrace'.")
    if asked == "exact" and probes is not None:
        raise SpectraError(f"probes={probes!r} has no effect with method='exact', which draws none.")
    kind = check_probes(probes, _default_probes(op, method, num_matvecs))
    count = op.size if method == "exact" else num_matvecs
    if method != "exact" and num_matvecs < _LEAST[method]:
        raise SpectraError(f"num_matvecs={num_matvecs}: {method} needs at least {_LEAST[method]} products.")
    options = {"method": method, "num_matvecs": num_matvecs, "tol": tol, "probes": kind, "by": by}
    with watched("trace", progress, checkpoint, count, options) as watch, watch.journal(op, key) as journal:
        run = begin(
            op,
            key=key,
            by=by,
            tol=tol,
            num_matvecs=num_matvecs,
            probe_batch=probe_batch,
            count=count,
            stacks=math.ceil(STACKS.get(method, 0) * num_matvecs),
            needs_key=method != "exact",
            journal=journal,
        )
        if method == "exact":
            found = _exact(run, reason)
        else:
            found = _RUNNERS[method](run.packed, kind, num_matvecs, reason)
        return _rounded(run, found)


def _rounded(run: Run, found: Estimate) -> Estimate:
    """The estimate with the error of its rounding as measured, where products leave hardly any other or are
    all zero."""

    def whole(v: PyTree, change: PyTree) -> float:
        return float(run.by_group(exact.leaf_dots(v, change))[-1])

    def parts(v: PyTree, change: PyTree) -> dict[str, float]:
        return dict(zip(run.groups, run.by_group(exact.leaf_dots(v, change)).tolist(), strict=False))

    def both(found: Estimate, measure: Callable[[PyTree, PyTree], PyTree]) -> Estimate:
        little = exact.of_little(run, found, lambda v, _, change: measure(v, change))
        return exact.of_nothing(run, little, measure)

    total = both(found.total or found, whole)
    if total.status is Status.CONVERGED and total.stderr > (run.tol or 1) * abs(total.value):
        total = dataclasses.replace(total, status=Status.STAGNATED)
    if found.total is None:
        return total
    return dataclasses.replace(both(found, parts), total=total, status=total.status)


def choose(op: LinearOperator, method: str, num_matvecs: int, sketch: str = "xtrace") -> tuple[str, str]:
    """The method that "auto" stands for, `sketch` where it fits, and the reason.

    Sketches of all of the space give way too.
    """
    require_operator(op)
    if method in ("exact", "hutchinson"):
        return method, ""
    if op.size <= num_matvecs:
        return "exact", f"num_matvecs={num_matvecs} covers the n={op.size} products that give it exactly"
    if method != "auto":
        return method, ""
    needed = STACKS["xtrace"] * num_matvecs * trees.tree_bytes(op.structure)
    available = host.available_bytes()
    if num_matvecs < _LEAST["xtrace"]:
        return "hutchinson", f"num_matvecs={num_matvecs} is too few for a sketch"
    if available is not None and needed > available // 2:
        held = f"{format_bytes(int(needed))} of vectors"
        return "hutchinson", f"{sketch} would hold {held}, {format_bytes(available)} are free"
    return sketch, f"n={op.size:,} exceeds num_matvecs={num_matvecs} and the sketch fits into memory"


def _default_probes(op: LinearOperator, method: str, num_matvecs: int) -> str:
    """Signs for Hutchinson's method, which know a diagonal at once, but for too few of them."""
    if method != "hutchinson":
        return "normal"
    return "rademacher" if num_matvecs - blocks.aside(op, "rademacher", num_matvecs) >= SIGNS else "normal"


def _for_krylov(
    op: LinearOperator, key: jax.Array | None, by: str | None, probes: str | None, num_matvecs: int
) -> bool:
    """Whether nothing asks for more than a Krylov space can give; on a stream, products share a pass."""
    return (
        num_matvecs >= KRYLOV
        and by is None
        and probes in (None, "normal")
        and not trees.is_traced((op, key))
        and key is not None
        and not op.on_host
    )


def _exact(run: Run, reason: str) -> Estimate:
    # Summed on the host in float64: n roundings of a float32 sum are none of the operator's.
    entries, norms, sound = exact.columns(run)
    errors, unit = blocks.in_unit(exact.stated(run, norms), run.no_unit)
    values, squares = (
        run.by_group(run.xp.stack([run.xp.sum(run.host(leaf)) for leaf in jax.tree.leaves(tree)]))
        for tree in (trees.unravel(column, run.op.structure) for column in (entries, run.host(errors) ** 2))
    )
    stderr, dof = run.host(unit) * arrays.root(squares, run.xp), None
    if moved := exact.moved_products(run):
        forms = [run.by_group(exact.leaf_dots(v, change)) for v, _, change in moved]
        stderr, dof = np.hypot(stderr, exact.root_mean_square(forms)), float(len(moved))
        stderr = np.maximum(stderr, run.sizes * float(np.finfo(run.op.dtype).tiny))
    return run.estimate(
        values,
        stderr,
        num_matvecs=run.op.size,
        method="exact",
        sound=sound,
        reason=reason,
        dof=dof,
    )


@checked
def model_trace(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    inputs: PyTree,
    targets: PyTree,
    *,
    key: jax.Array | None = None,
    **options: Any,
) -> Estimate:
    """Estimate the trace of the Hessian of loss_fn(model_fn(params, inputs), targets) in the parameters.

    Args:
        model_fn: pure function (params, inputs) -> outputs.
        loss_fn: pure function (outputs, targets) -> scalar, the mean over the examples.
        params: pytree of real floating arrays.
        inputs: array or pytree with a leading axis of examples.
        targets: the same, for the targets that the outputs are compared with.
        key: JAX random key; None stands for jax.random.key(0).
        options: keyword arguments of `trace` and of `HessianOperator`.

    Returns:
        `Estimate` with value and stderr.

    Raises:
        SpectraError: as `HessianOperator` and `trace`.

    Cost: as `trace`.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> def model_fn(params, inputs):
        ...     return inputs @ params
        >>> def loss_fn(outputs, targets):
        ...     return jnp.mean((outputs - targets) ** 2)
        >>> inputs, targets = jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros(2)
        >>> found = spectra.model_trace(model_fn, loss_fn, jnp.ones(2), inputs, targets)
        >>> f"{float(found):.4f}, {found.method}, {found.num_matvecs} products"
        '10.0000, exact, 2 products'
    """
    own = {name: options.pop(name) for name in list(options) if name in _TRACE_OPTIONS}
    check_functions({"model_fn": model_fn, "loss_fn": loss_fn})
    op = HessianOperator(ComposedLoss(model_fn, loss_fn), params, (inputs, targets), **options)
    return trace(op, key=jax.random.key(0) if key is None else key, **own)


_TRACE_OPTIONS = tuple(inspect.signature(trace).parameters)[2:]
