"""The trace of an operator, by the method that fits the budget."""

import inspect
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spectra.base import host, trees
from spectra.base.errors import SpectraError
from spectra.base.meshes import automatic
from spectra.base.trees import PyTree
from spectra.estimators import blocks, exact
from spectra.estimators.hutchinson import hutchinson
from spectra.estimators.krylov_aware import krylov
from spectra.estimators.low_rank import hutchpp, xnystrace, xtrace
from spectra.estimators.run import Run, begin, check_probes
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
    checkpoint: Checkpoint | str | os.PathLike | None = None,
) -> Estimate:
    """Estimate the trace tr H = Σ_i H_ii, with a standard error and an interval that holds.

    "hutchinson" is the mean of vᵀHv over random probes. "hutch++" takes the trace on a sketched range
    exactly and samples the rest. "xtrace" does the same with every probe in both roles, leaving it out
    of its own sketch; "xnystrace" needs half the products, of a positive semi-definite operator. "krylov"
    takes the trace exactly on a Krylov space, whose products are known, and samples the rest; it decides
    as it goes how many of the products go to which (see `spectra.estimators.krylov_aware`). On thirteen
    spectra its error was 0.4 to 0.95 of that of XTrace from the same 64 products, or far less. "exact"
    sums n products with unit vectors; its error is that of rounding. Works inside `jit` and `vmap`, where
    `tol`, "krylov" and the checks of values are not available.

    The interval (`Estimate.interval`) rests on Student's t with the variance that the products show: that
    of vᵀHv is 2 |H|_F², which |Hv|² estimates with at least one degree of freedom a probe. "xtrace" has
    leave-one-out estimates of m probes instead, with their spread and their covariance, as "xnystrace" (see
    `spectra.estimators.leave_one_out`). The rounding of a product is part of the error; of a loss it is
    measured for "exact" (see `spectra.estimators.exact`), but inside `jit`, where it is the stated
    precision. Fewer than four Rademacher probes miss some matrices altogether: (1, -1)ᵀ(1, -1) is seen by
    every second of them. Use "normal" for so few.

    Symmetry is tested by uᵀHv = vᵀHu for the vectors at hand, and signs with a function of one's own have one
    of the products (of three or more) spent on a normal vector, since any odd function of each entry is
    linear on signs. A single product shows nothing.

    Args:
        op: symmetric operator of order n.
        key: JAX random key; probe i depends on the key and i alone. None for "exact".
        method: one of the above, or "auto": "exact" if the budget covers n products; "hutchinson" if
            2 num_matvecs vectors do not fit into half of the free memory; else "krylov", or "xtrace" inside
            `jit`, with `by`, signs or a checkpoint, on streams (whose products share passes) and with fewer
            than 16 products. The `reason` of the result says which and why.
        num_matvecs: budget of products. Where it covers n, sketches give way to "exact".
        tol: stop as soon as stderr <= tol |value|, looking at 12 probes (16 for "hutchinson") and then
            at half again as many each time; the status says whether it was reached. Behind the first look
            the error stated is the tolerance itself, up to 1.22 times the one that was found.
        probes: "rademacher" (default for "hutchinson": exact for a diagonal H) or "normal" (default
            for the others, which scale the projected probe to the length it has on average).
        by: "leaf" or "layer": value and stderr become dicts with the trace of each diagonal block, from
            the same products; `total` is the trace.
        probe_batch: products side by side; changes the result by rounding only. Those of a Krylov space
            follow from each other.
        progress: show the products.
        checkpoint: a folder, or a `Checkpoint`, to save the run in. The same call goes on from there, with
            the bits of one that was not ended; with other arguments it is refused.

    Returns:
        `Estimate` with value and stderr.

    Raises:
        SpectraError: an argument is out of range, or "xnystrace" meets an indefinite operator.
        NonFiniteError: a product is NaN or infinite.
        NotSymmetricError: the operator is not symmetric, or not linear; inside `jit` the value is NaN.
        MemoryLimitError: the sketch does not fit.
        CheckpointError: the folder holds the checkpoint of another run.
        PreemptedError: the process was asked to end (SIGTERM or Ctrl-C), and the run is saved.

    Cost: at most num_matvecs products (n if exact, one that tests symmetry, and 8 that measure rounding).
    Memory: probe_batch products and one or two, with signs two or four vectors for "exact" and
    "hutchinson"; 2 num_matvecs vectors for "krylov", "xtrace" and "hutch++", 4 for "xnystrace".

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
    method = chosen
    if method == "krylov" and checkpoint is not None:
        raise SpectraError(
            "checkpoint=: a Krylov space is not saved, method='krylov' starts anew each time. Use 'xtrace'."
        )
    kind = check_probes(probes, "rademacher" if method == "hutchinson" else "normal")
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
        return _exact(run, reason) if method == "exact" else _RUNNERS[method](run, kind, num_matvecs, reason)


def choose(op: LinearOperator, method: str, num_matvecs: int) -> tuple[str, str]:
    """The method that "auto" stands for, and the reason; sketches of all of the space give way too."""
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
        return "hutchinson", f"xtrace would hold {held}, {format_bytes(available)} are free"
    return "xtrace", f"n={op.size:,} exceeds num_matvecs={num_matvecs} and the sketch fits into memory"


def _for_krylov(op, key, by, probes, num_matvecs: int) -> bool:
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
    norms, unit = blocks.in_unit(norms, run.no_unit)
    values, squares = (
        run.by_group(run.xp.stack([run.xp.sum(run.host(leaf)) for leaf in jax.tree.leaves(tree)]))
        for tree in (trees.unravel(column, run.op.structure) for column in (entries, run.host(norms) ** 2))
    )
    stderr, dof = run.op.precision * run.host(unit) * run.xp.sqrt(squares), None
    if moved := exact.moved_products(run):
        forms = [run.by_group(exact.leaf_dots(v, change)) for v, _, change in moved]
        stderr, dof = np.hypot(stderr, exact.root_mean_square(forms)), float(len(moved))
    return run.estimate(
        values,
        stderr,
        num_matvecs=run.op.size,
        method="exact",
        sound=sound,
        reason=reason,
        dof=dof,
    )


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
        targets: the same for what the outputs are compared with.
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
        >>> spectra.model_trace(model_fn, loss_fn, jnp.ones(2), inputs, targets)
        10 ± 1.1e-06 (exact, 2 products)
    """
    own = {name: options.pop(name) for name in list(options) if name in _TRACE_OPTIONS}
    op = HessianOperator(ComposedLoss(model_fn, loss_fn), params, (inputs, targets), **options)
    return trace(op, key=jax.random.key(0) if key is None else key, **own)


_TRACE_OPTIONS = tuple(inspect.signature(trace).parameters)[2:]
