"""The diagonal of an operator, entry by entry with its error."""

import dataclasses
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs
from spectra.base import trees as _tree
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError, Status
from spectra.base.paths import leaf_paths
from spectra.base.trees import PyTree
from spectra.estimators import exact
from spectra.estimators.entrywise import RUNNERS, root_mean_square
from spectra.estimators.run import Run, begin
from spectra.estimators.trace import choose
from spectra.krylov.packed import as_trees
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.doubled import flat
from spectra.operators.layer_diagonal import LayerDiagonal, layer_diagonal
from spectra.results import Estimate
from spectra.runs.checkpoint import Checkpoint
from spectra.runs.watch import watched

METHODS = ("auto", "exact", "hutchinson", "xdiag", "xnysdiag")
LEAST = 8
"""Probes of XDiag. Two entries have the same signs in all m of them, but for one factor, with 2^(1-m): what
the large one leaves in the small one is the same in all samples then, and no spread shows it. With four
probes that is 12 % of the entries, with eight 1 %."""


@automatic
def diagonal(
    op: LinearOperator,
    *,
    key: jax.Array | None,
    method: str = "auto",
    num_matvecs: int = 64,
    tol: float | None = None,
    by: str | None = None,
    probe_batch: int | None = None,
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> Estimate:
    """Estimate the diagonal H_ii, each entry with a standard error.

    The methods are:

    * "hutchinson": the mean of v ⊙ Hv over Rademacher probes, exact for a diagonal H. A single probe, and up
      to four where n < 16, are normal, since so few signs reveal too little of the error.
    * "xdiag": first computes the part within a sketched range, leaving each probe out of its own sketch. It
      is best if few eigenvalues dominate.
    * "xnysdiag": the same with the Nyström approximation from the probes and their products. It takes half
      the products of "xdiag" for as many probes, but requires a positive semi-definite operator.
    * "exact": n products with unit vectors; its only error is rounding, which is measured outside `jit` (see
      `spectra.estimators.exact`).

    `diagonal` works inside `jit` and `vmap`.

    **If no eigenvalue is negative**, "xnysdiag" is the better sketch. With eigenvalues 0.9^i, 1/i, 1/i²,
    flat, flat with five spikes, of a Wishart matrix and of two Gauss-Newton matrices (n = 256, 128 keys each)
    its error is 0.44 to 0.96 of that of "xdiag" after 16 products, 0.30 to 0.95 after 32 and
    at most 0.80 after 128, and its intervals are narrower. "auto" chooses it if the operator is known to be
    positive semi-definite. A `GGNOperator` is so if its loss is convex in the outputs, which is not known in
    advance: pass the method there.

    **Gauss-Newton matrices** (`GGNOperator`; `FisherOperator` but for "mc") have their exact diagonal from
    one backward pass for each output of an example, Σ_k G_k² with the gradients G_k of the outputs along the
    roots of the loss's Hessian: for a dense layer Σ a² ⊗ g². "exact" does so if this takes fewer passes than
    n, and "auto" if it takes at most `num_matvecs`; `num_matvecs` of the result is the number of passes.
    Layers are found as for `KFACOperator`. `reason` names the leaves outside layers, for which gradients of
    single examples are formed, or says why products were used instead: a loss that is not convex in the
    outputs or couples examples, a model with batch statistics, gradients that do not fit, a checkpoint, or
    `jit`.

    Standard errors are computed from the spread of the samples and from rounding. For "xdiag" and "xnysdiag"
    the samples are leave-one-out estimates, whose covariance and its own error are added (see
    `spectra.estimators.leave_one_out`). Errors hold for each entry, not simultaneously for all.

    Args:
        op: symmetric operator of order n.
        key: JAX random key; probe i depends on the key and i alone. None for "exact".
        method: one of the above, or "auto": "exact" if the budget covers n products, or the outputs of an
            example of a Gauss-Newton matrix; else "xnysdiag" from 16 products on if the operator is positive
            semi-definite by construction; else "xdiag", or "hutchinson" if 2 num_matvecs vectors do not fit
            into half of the free memory.
        num_matvecs: budget of products. If it covers n, "exact" replaces "xdiag" and "xnysdiag". "hutchinson"
            replaces "xdiag" below 16 products and "xnysdiag" below 8, because fewer than 8 Rademacher probes
            cannot tell entries apart; "xdiag" requires at least 4.
        tol: stop as soon as |stderr| <= tol |value| in the Euclidean norm over all entries. "exact" takes
            all of its products.
        by: "leaf" or "layer": value and stderr become dicts {path: array}, or {layer: {path: array}}; `total`
            has the pytree.
        probe_batch: products computed side by side; changes the result by rounding only.
        progress: show the number of products.
        checkpoint: a folder, or a `Checkpoint`, to save the run in. The same call resumes from there, bit for
            bit as if uninterrupted; a call with other arguments is refused.

    Returns:
        `Estimate` whose value and stderr are pytrees like the parameters, with the same placement.

    Raises:
        SpectraError: an argument is out of range, or "xnysdiag" meets an indefinite operator (inside
            `jit` the values are NaN then).
        NonFiniteError: a product is NaN or infinite.
        NotSymmetricError: the operator is not symmetric, or not linear, see `trace`; NaN inside `jit`.
        MemoryLimitError: the sketch does not fit.
        CheckpointError: the folder holds the checkpoint of another run.
        PreemptedError: the process was asked to end (SIGTERM or Ctrl-C), and the run is saved.

    Cost: at most num_matvecs products ("exact": n + 1, and 8 to measure rounding). Memory: 6 vectors and the
    batch for "hutchinson", about 4 num_matvecs vectors for "xdiag" and "xnysdiag"; from layers the
    activations of a microbatch, the gradients of 16 outputs at a time, and a few gradients of examples.

    References:
        Bekas, Kokiopoulou and Saad, doi:10.1016/j.apnum.2007.01.003; Dangel, Kunstner and Hennig,
        arXiv:1912.10985 (Gauss-Newton diagonals from layers); Epperly, Tropp and Webber,
        arXiv:2301.07825, section 2.4.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.arange(1.0, 101.0)))
        >>> estimate = spectra.diagonal(op, key=jax.random.key(0), method="hutchinson", num_matvecs=4)
        >>> estimate.value[:3]
        Array([1., 2., 3.], dtype=float32)
    """
    if method not in METHODS:
        raise SpectraError(f"method={method!r}: use one of {METHODS}.")
    require_operator(op)
    layers = _layers(op, method, num_matvecs)
    if isinstance(layers, LayerDiagonal):
        if checkpoint is None:
            return _from_layers(op, layers, by, tol, num_matvecs, probe_batch)
        layers = "a checkpoint holds products"
    method, reason = _chosen(op, method, num_matvecs)
    if method == "xdiag" and num_matvecs < 4:
        raise SpectraError(f"num_matvecs={num_matvecs}: xdiag needs at least 4 products.")
    probes = {"xdiag": num_matvecs // 2, "xnysdiag": num_matvecs}.get(method, LEAST)
    if probes < LEAST:
        reason = f"num_matvecs={num_matvecs} leaves {method} fewer than {LEAST} probes of signs"
        method = "hutchinson"
    if layers:
        reason = "; ".join(filter(None, (reason, f"not from its layers: {layers}")))
    count = op.size if method == "exact" else num_matvecs
    options = {"method": method, "num_matvecs": num_matvecs, "tol": tol}
    with (
        watched("diagonal", progress, checkpoint, count, options) as watch,
        watch.journal(op, key) as journal,
    ):
        run = begin(
            op,
            key=key,
            by=by,
            tol=tol,
            num_matvecs=num_matvecs,
            probe_batch=probe_batch,
            count=count,
            stacks={"xdiag": 4 * num_matvecs, "xnysdiag": 4 * num_matvecs, "hutchinson": 4}.get(method, 0),
            needs_key=method != "exact",
            journal=journal,
        )
        inner = run if method == "exact" else run.packed
        found = RUNNERS[method](inner, num_matvecs)
    value, stderr = as_trees(inner.op, [*found[:2]])
    fields: dict[str, Any] = found[2]
    if not run.traced:
        run.host(_sums((value, stderr)))
    fields |= {"method": method, "reason": reason}
    if run.traced:
        fields["status"] = Status.TRACED
    total = exact.of_nothing(run, Estimate(value, stderr, **fields), lambda _, change: change)
    if by is None:
        return total
    stderr = _grouped(run, total.stderr)
    return dataclasses.replace(total, value=_grouped(run, value), stderr=stderr, total=total)


def _chosen(op: LinearOperator, method: str, num_matvecs: int) -> tuple[str, str]:
    """The method that is taken, and the reason; of a positive semi-definite operator "auto" uses that."""
    definite = op.semidefinite and num_matvecs >= 2 * LEAST
    found, reason = choose(op, method, num_matvecs, "xnysdiag" if definite else "xdiag")
    return found, f"{reason}, and no eigenvalue is negative" if reason and found == "xnysdiag" else reason


def _layers(op: LinearOperator, method: str, num_matvecs: int) -> LayerDiagonal | str:
    """The diagonal from the layers of a model, where that costs less; "" or why not."""
    if method not in ("auto", "exact") or not isinstance(num_matvecs, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        return ""
    return layer_diagonal(op, op.size - 1 if method == "exact" else min(num_matvecs, op.size - 1))


def _from_layers(
    op: LinearOperator,
    layers: LayerDiagonal,
    by: str | None,
    tol: float | None,
    num_matvecs: int,
    probe_batch: int | None,
) -> Estimate:
    """The exact diagonal; its error is that of rounding, see `_of_both` where there is one in float64.

    Elsewhere it has three parts: what one of a product is, |H e_i|² = Σ_j H_ij² being at most H_ii tr H of a
    semidefinite matrix; what sums of squares lose, half a rounding with each addition; and what rounding does
    to the loss, which is measured as for columns.
    """
    options: dict[str, Any] = {"by": by, "tol": tol, "num_matvecs": num_matvecs, "probe_batch": probe_batch}
    run = begin(op, key=None, count=1, needs_key=False, **options)
    value = layers.value()
    run.host(_sums(value))
    if layers.in_double:
        value, stderr = _of_both(op, flat(value), layers.unrounded())
        dof = None
    else:
        bounds = _norm_bounds(value, op.precision), _sum_bounds(value, layers.chain, layers.terms)
        stderr, dof = jax.tree.map(jnp.hypot, *bounds), None
        if moved := exact.moved_products(run):
            changes = root_mean_square([x for *_, x in moved])
            stderr, dof = jax.tree.map(jnp.hypot, stderr, changes), float(len(moved))
    fields: dict[str, Any] = {"num_matvecs": layers.passes, "method": "exact"}
    fields |= {"reason": layers.reason, "dof": dof}
    total = Estimate(value, stderr, **fields)
    if by is None:
        return total
    return Estimate(_grouped(run, value), _grouped(run, stderr), total=total, **fields)


def _of_both(op: LinearOperator, rounded: np.ndarray, unrounded: np.ndarray) -> tuple[PyTree, PyTree]:
    """A diagonal in float64 as one in the operator's type, and its error, from what it is in that type.

    One rounding, and of what float64 itself is off by no more than this: as many digits as the other one has
    right, twice. If that has 7, 4 or 2, float64 has 16, 13 or 11, and 14, 8 or 4 are stated. If it has none,
    as where a probability rounds to one, those of float64 may be few. An entry counts as no better than all
    are together: of those without digits some are right by chance.
    """
    info, size, change = jnp.finfo(op.dtype), np.abs(unrounded), np.abs(rounded - unrounded)
    norm = float(np.linalg.norm(unrounded))
    change = np.maximum(change, size * min(float(np.linalg.norm(change)) / (norm or 1.0), 1.0))
    share = np.where(size > change, change / np.where(size > 0, size, 1), 1)
    stderr = np.hypot(share * change, float(info.eps) / 2 * size) + float(info.tiny)

    def as_vector(numbers: Any) -> PyTree:
        return jax.tree.map(jnp.asarray, _tree.unravel(numbers, op.structure))

    return as_vector(unrounded), as_vector(stderr)


@programs.jit
def _norm_bounds(value: PyTree, precision: float) -> PyTree:
    """eps sqrt(H_ii tr H)."""
    root = jax.tree.map(jnp.sqrt, value)
    return _tree.scale(precision * _tree.norm(root), root)


@partial(programs.jit, static_argnames=("chain", "terms"))
def _sum_bounds(value: PyTree, chain: int, terms: int) -> PyTree:
    """Half a rounding of each entry for every addition in a row, and no less than what so many squares are
    that underflow one by one."""

    def one(x: jax.Array) -> jax.Array:
        info = jnp.finfo(x.dtype)
        return jnp.maximum(chain * float(info.eps) / 2 * x, terms * float(info.tiny))

    return jax.tree.map(one, value)


@programs.jit
def _sums(tree: PyTree) -> jax.Array:
    """The sum of each leaf: not finite where the leaf is not."""
    return jnp.stack([jnp.sum(leaf) for leaf in jax.tree.leaves(tree)])


def _grouped(run: Run, tree: PyTree) -> dict[str, Any]:
    """{path: leaf}, or {layer: {path: leaf}}."""
    leaves, names = jax.tree.leaves(tree), leaf_paths(run.op.like)
    if run.by == "leaf":
        return dict(zip(names, leaves, strict=True))
    return {group: {names[i]: leaves[i] for i in members} for group, members in run.groups.items()}
