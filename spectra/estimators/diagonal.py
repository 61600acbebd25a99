"""The diagonal of an operator, entry by entry with its error."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays
from spectra.base import trees as _tree
from spectra.base.errors import SpectraError, Status
from spectra.base.meshes import automatic
from spectra.base.paths import leaf_paths
from spectra.base.trees import PyTree
from spectra.estimators import blocks, exact, leave_one_out
from spectra.estimators.hutchinson import EIGENVECTOR
from spectra.estimators.low_rank import MIN_SKETCH, Held, SketchRun, nystrom
from spectra.estimators.run import Ended, Run, adaptive, begin
from spectra.estimators.trace import choose
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.layer_diagonal import LayerDiagonal, layer_diagonal
from spectra.results import Estimate
from spectra.runs.checkpoint import Checkpoint
from spectra.runs.watch import watched

METHODS = ("auto", "exact", "hutchinson", "xdiag", "xnysdiag")
LEAST = 8
"""Probes of XDiag. Two entries have the same signs in all m of them, but for one factor, with 2^(1-m): what
the large one leaves in the small one is the same in all samples then, and no spread shows it. With four
probes that is 12 % of the entries, with eight 1 %."""
PAIRS = 16
"""Probes among which pairs are formed for the covariance; each pair costs vectors here."""


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

    "hutchinson" is the mean of v ⊙ Hv over Rademacher probes, exact for a diagonal H; a single probe, and up
    to four where n < 16, are normal, since so few signs show too little of the error. "xdiag" first computes
    the part within a sketched range, leaving each probe out of its own sketch: best if few eigenvalues
    dominate. "xnysdiag" does the same with the Nyström approximation from the probes and their products: half
    the products of "xdiag" for as many probes, but of a positive semi-definite operator. "exact" uses n
    products with unit vectors; its only error is rounding, which is measured outside `jit` (see
    `spectra.estimators.exact`). `diagonal` works inside `jit` and `vmap`.

    **Gauss-Newton matrices** (`GGNOperator`; `FisherOperator` but for "mc") have their exact diagonal from
    one backward pass for each output of an example, Σ_k G_k² with the gradients G_k of the outputs along the
    roots of the loss's Hessian: for a dense layer Σ a² ⊗ g². "exact" does so where that is less than n, and
    "auto" where it is within `num_matvecs`; `num_matvecs` of the result is the number of passes. Layers are
    found as for `KFACOperator`, and `reason` names the leaves outside layers, for which gradients of single
    examples are formed, or says why products were taken: a loss that is not convex in the outputs or
    couples examples, a model with batch statistics, gradients that do not fit, a checkpoint, `jit`.

    The errors rest on the spread of the samples, which for "xdiag" and "xnysdiag" are leave-one-out estimates
    whose covariance and its own error are added (see `spectra.estimators.leave_one_out`), and on rounding.
    They hold for each entry, not simultaneously for all.

    Args:
        op: symmetric operator of order n.
        key: JAX random key; probe i depends on the key and i alone. None for "exact".
        method: one of the above, or "auto": "exact" if the budget covers n products, or the outputs of an
            example of a Gauss-Newton matrix, else "xdiag", or
            "hutchinson" if 2 num_matvecs vectors do not fit into half of the free memory.
        num_matvecs: budget of products. If it covers n, "exact" replaces the others but "hutchinson", which
            replaces "xdiag" below 16 (which takes at least 4) and "xnysdiag" below 8: fewer than 8
            Rademacher probes cannot tell entries apart.
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
        SpectraError: an argument is out of range, or "xnysdiag" meets an indefinite operator.
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
    method, reason = choose(op, {"xdiag": "xtrace"}.get(method, method), num_matvecs)
    method = {"xtrace": "xdiag"}.get(method, method)
    reason = reason.replace("xtrace", "xdiag")
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
        found = _RUNNERS[method](run, num_matvecs)
    value, stderr = found[:2]
    fields: dict[str, Any] = found[2]
    if not run.traced:
        run.host(_sums((value, stderr)))
    fields |= {"method": method, "reason": reason}
    if run.traced:
        fields["status"] = Status.TRACED
    total = Estimate(value, stderr, **fields)
    if by is None:
        return total
    return Estimate(_grouped(run, value), _grouped(run, stderr), total=total, **fields)


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
    """The exact diagonal; its error is that of rounding.

    |H e_i|² = Σ_j H_ij² is at most H_ii tr H of a semidefinite matrix, which stands for the rounding of
    sums; what the rounding of the loss does is measured, as for columns.
    """
    options: dict[str, Any] = {"by": by, "tol": tol, "num_matvecs": num_matvecs, "probe_batch": probe_batch}
    run = begin(op, key=None, count=1, needs_key=False, **options)
    value = layers.value()
    run.host(_sums(value))
    stderr, dof = _norm_bounds(value, op.precision), None
    if moved := exact.moved_products(run):
        changes = _root_mean_square([x for *_, x in moved])
        stderr, dof = jax.tree.map(jnp.hypot, stderr, changes), float(len(moved))
    fields: dict[str, Any] = {"num_matvecs": layers.passes, "method": "exact"}
    fields |= {"reason": layers.reason, "dof": dof}
    total = Estimate(value, stderr, **fields)
    if by is None:
        return total
    return Estimate(_grouped(run, value), _grouped(run, stderr), total=total, **fields)


@jax.jit
def _norm_bounds(value: PyTree, precision: float) -> PyTree:
    """eps sqrt(H_ii tr H)."""
    root = jax.tree.map(jnp.sqrt, value)
    return _tree.scale(precision * _tree.norm(root), root)


@jax.jit
def _sums(tree: PyTree) -> jax.Array:
    """The sum of each leaf: not finite where the leaf is not."""
    return jnp.stack([jnp.sum(leaf) for leaf in jax.tree.leaves(tree)])


def _grouped(run: Run, tree: PyTree) -> dict[str, Any]:
    """{path: leaf}, or {layer: {path: leaf}}."""
    leaves, names = jax.tree.leaves(tree), leaf_paths(run.op.like)
    if run.by == "leaf":
        return dict(zip(names, leaves, strict=True))
    return {group: {names[i]: leaves[i] for i in members} for group, members in run.groups.items()}


_Found = tuple[PyTree, PyTree, dict[str, Any]]  # value, error, and fields of the result
_State = tuple[PyTree, PyTree, PyTree]  # mean, sum of squared deviations and mean of (Hv)²
_Sums = tuple[jax.Array, jax.Array, jax.Array]


def _exact(run: Run, num_matvecs: int) -> _Found:
    del num_matvecs
    *columns, sound = exact.columns(run)
    value, norms = (_tree.unravel(sound * column, run.op.structure) for column in columns)
    stderr, dof = jax.tree.map(lambda x: run.op.precision * x, norms), None
    if moved := exact.moved_products(run):
        changes = _root_mean_square([x for *_, x in moved])
        stderr, dof = jax.tree.map(jnp.hypot, stderr, changes), float(len(moved))
    return value, stderr, {"num_matvecs": run.op.size, "status": Status.COMPLETE, "dof": dof}


@jax.jit
def _root_mean_square(trees: list[PyTree]) -> PyTree:
    """Entry by entry, over several pytrees."""
    stack, unit = blocks.in_unit(jax.tree.map(lambda *xs: jnp.stack(xs), *trees), jnp.zeros(()))
    return jax.tree.map(lambda x: (unit * jnp.sqrt(jnp.mean(x**2, axis=0))).astype(x.dtype), stack)


def _relative(run: Run, value: PyTree, stderr: PyTree) -> tuple[float, float]:
    """Norms of value and error, which `tol` compares."""
    return (0.0, 0.0) if run.tol is None else (float(_tree.norm(value)), float(_tree.norm(stderr)))


def _hutchinson(run: Run, num_matvecs: int) -> _Found:
    """Mean and spread of v ⊙ Hv, updated batch by batch without cancellation."""
    state: _State | None = None
    done, kind = 0, _kind(run.op.size, num_matvecs)
    aside = blocks.aside(run.op, kind, num_matvecs)
    unit, pairs = blocks.begin_pairs(run.op, run.key, aside)
    vector = run.op.like
    looks = (vector, vector, vector), 0, blocks.Pairs(vector, vector, 0, 0)

    def step(count: int) -> tuple[float, float]:
        nonlocal state, unit, pairs, done
        carried = run.fold(accumulate, (state, unit, pairs), done, count, carried=looks)[0]
        state, unit, pairs = carried
        done = count
        return _relative(run, *result())

    def accumulate(
        carried: tuple[_State | None, jax.Array, blocks.Pairs], start: int, stop: int
    ) -> tuple[tuple[_State, jax.Array, blocks.Pairs], None]:
        return _accumulate(run, kind, np.arange(start, stop), *carried), None

    def result() -> tuple[PyTree, PyTree]:
        assert state is not None
        mean, spread, square = state
        if kind == "normal":
            return _normal_result(mean, square, unit, float(done), run.op.precision)
        return _hutchinson_result(mean, spread, square, unit, float(done), run.op.precision)

    ended = adaptive(run, step, num_matvecs - aside)
    value, stderr = _scaled(result(), run.check_pairs(pairs), ended)
    dof = float(done if kind == "normal" else max(done - 1, 1))
    return value, stderr, {"num_matvecs": done + aside, "status": ended.status, "dof": dof}


def _kind(size: int, num_matvecs: int) -> str:
    """Signs, but for a product alone and for a few of a small operator.

    Signs leave v ⊙ Hv without the variance of its diagonal, but some matrices cannot be told apart by few of
    them: (1, -1)ᵀ sees nothing of (1, 1)ᵀ(1, 1), and samples that agree are no evidence unless there are
    many rows. With 2 products, intervals held for 49 % of the keys at n = 2, 73 % at 3 and 89 % at 5.
    """
    return "normal" if num_matvecs == 1 or (num_matvecs <= AGREE and size < EIGENVECTOR) else "rademacher"


def _scaled(found: Sequence[PyTree], sound: Any, ended: Ended) -> tuple[PyTree, PyTree]:
    """Value and error, not numbers if the products are not sound; the error of a run that stopped early."""
    value, stderr = found
    return _tree.scale(sound, value), _tree.scale(sound * ended.widen, stderr)


def _accumulate(
    run: Run, kind: str, indices: np.ndarray, state: _State | None, unit: jax.Array, pairs: blocks.Pairs
) -> tuple[_State, jax.Array, blocks.Pairs]:
    if run.op.on_host:
        stack = blocks.draw(run.op, run.key, indices, kind)
        return _merge(stack, run.op.mv_batch(stack), indices[0], state, unit, pairs)
    return _step(run.op, run.key, indices, state, unit, pairs, kind)


@partial(jax.jit, static_argnames="kind")
def _step(
    op: LinearOperator,
    key: jax.Array,
    indices: arrays.Indices,
    state: _State | None,
    unit: jax.Array,
    pairs: blocks.Pairs,
    kind: str,
) -> tuple[_State, jax.Array, blocks.Pairs]:
    stack = blocks.draw(op, key, indices, kind)
    return _merge(stack, op.mv_batch(stack), indices[0], state, unit, pairs)


@jax.jit
def _merge(
    stack: PyTree, products: PyTree, done: Any, state: _State | None, unit: jax.Array, pairs: blocks.Pairs
) -> tuple[_State, jax.Array, blocks.Pairs]:
    """Mean, sum of squared deviations and mean of (Hv)², with a batch taken in (Chan, Golub, LeVeque), their
    unit, and the pairs of neighbours."""
    k, (products, unit) = blocks.length(stack), blocks.in_unit(products, unit)
    pairs = blocks.with_products(pairs, stack, products)
    samples = jax.tree.map(jnp.multiply, stack, products)
    mean = jax.tree.map(lambda x: jnp.mean(x, axis=0), samples)
    spread = jax.tree.map(lambda x, m: jnp.sum((x - m) ** 2, axis=0), samples, mean)
    square = jax.tree.map(lambda x: jnp.mean(x**2, axis=0), products)
    if state is None:
        return (mean, spread, square), unit, pairs
    share = (k / (done + k)).astype(_tree.scalar_dtype(mean))
    old_mean, old_spread, old_square = state
    shift = jax.tree.map(jnp.subtract, mean, old_mean)
    between = jax.tree.map(lambda x: x**2, shift)
    merged = (
        _tree.axpy(share, shift, old_mean),
        _tree.axpy(done * share, between, jax.tree.map(jnp.add, old_spread, spread)),
        _tree.axpy(share, jax.tree.map(jnp.subtract, square, old_square), old_square),
    )
    return merged, unit, pairs


AGREE = 4
"""Probes up to which the samples of an entry often agree by chance: with two entries in a row all k do for
2^(1-k) of the keys. Their own spread says nothing then, and that of all entries stands in."""


@jax.jit
def _hutchinson_result(
    mean: PyTree,
    spread: PyTree,
    square: PyTree,
    unit: jax.Array,
    count: float | jax.Array,
    precision: float | jax.Array,
) -> tuple[PyTree, PyTree]:
    """Value and error of k probes of signs.

    Samples of signs lie on a lattice, and their spread is least where their mean is farthest off: for rows
    with one entry off the diagonal, Student's interval held for 88 % of keys with 7 probes, 91 % with 13 and
    92 % with 16. So the spread is taken as if it were about the truth, two standard errors off (the score
    interval), which leaves k - 4 degrees of k - 1, as in `hutchinson`; up to `AGREE` probes, where it leaves
    none, an entry's variance is at least the mean over entries.
    """

    def variance(s: jax.Array, q: jax.Array) -> jax.Array:
        least = jnp.where(count > AGREE, count - 4, count - 1)
        return jnp.where(count > 1, s / jnp.maximum(count * least, 1), q)

    variances = jax.tree.map(variance, spread, square)
    leaves = jax.tree.leaves(variances)
    pooled = jnp.asarray(sum(jnp.sum(leaf) for leaf in leaves) / sum(leaf.size for leaf in leaves))

    def error(s: jax.Array, q: jax.Array) -> jax.Array:
        s = jnp.where(count > AGREE, s, jnp.maximum(s, jnp.asarray(pooled, s.dtype)))
        return jnp.sqrt(s + precision**2 * q)

    return _tree.scale(unit, mean), jax.tree.map(
        lambda s, q: (unit * error(s, q)).astype(q.dtype), variances, square
    )


@jax.jit
def _normal_result(
    mean: PyTree, square: PyTree, unit: jax.Array, count: float | jax.Array, precision: float | jax.Array
) -> tuple[PyTree, PyTree]:
    """Value and error of k normal probes: Var v_i (Hv)_i = |row i|² + H_ii², at most 2 |row i|².

    (Hv)_i² is |row i|² χ²_1, so that the error has k degrees of freedom.
    """

    def error(q: jax.Array) -> jax.Array:
        return (unit * jnp.sqrt((2 / count + precision**2) * q)).astype(q.dtype)

    return _tree.scale(unit, mean), jax.tree.map(error, square)


def _xdiag(run: Run, num_matvecs: int) -> _Found:
    sketch = SketchRun(run, "rademacher")
    found: list[Any] = []

    def step(count: int) -> tuple[float, float]:
        sketch.extend(count)
        inner = sketch.inner_products()
        u = sketch.directions(inner)
        among = leave_one_out.seconds(u, min(count, PAIRS), run.xp)
        found[:] = _leave_one_out(
            sketch.held,
            jnp.asarray(u, run.op.dtype),
            jnp.asarray(among, run.op.dtype),
            jnp.asarray(inner.qy[-1].T, run.op.dtype),
            sketch.unit,
            run.op.precision,
        )
        return _relative(run, *found)

    ended = adaptive(run, step, num_matvecs // 2, least=MIN_SKETCH)
    m = sketch.num_probes
    value, stderr = _scaled(found, sketch.sound, ended)
    return value, stderr, {"num_matvecs": 2 * m, "status": ended.status, "dof": float(m - 1)}


def _xnysdiag(run: Run, num_matvecs: int) -> _Found:
    """XDiag with the Nyström approximation Bᵀ B in place of P A: the algebra is that of Q = Z = B.

    Without the probe ω_j it is Bᵀ(1 - u_j u_jᵀ)B, of which (A - ...) ω_j = Bᵀu_j (u_j · B ω_j) is left.
    """
    sketch = SketchRun(run, "rademacher")
    found: list[Any] = []

    def step(count: int) -> tuple[float, float]:
        sketch.extend(count, project=False)
        made = nystrom(sketch, "xnysdiag", "xdiag")
        u = leave_one_out.unit_rows(made.inverse_root, run.xp)
        among = leave_one_out.seconds(u, min(count, PAIRS), run.xp)
        held = Held(sketch.held.probes, sketch.held.images, made.factor, made.factor)
        value, stderr = _leave_one_out(
            held,
            jnp.asarray(u, run.op.dtype),
            jnp.asarray(among, run.op.dtype),
            jnp.asarray(made.root, run.op.dtype),
            sketch.unit,
            run.op.precision,
        )
        # The shift is taken off; rounding of the core counts in units of the smallest eigenvalue of ΩΩᵀ.
        floor = made.shift * run.op.size / made.smallest
        found[:] = _shifted(value, stderr, sketch.unit * made.shift, sketch.unit * floor)
        return _relative(run, *found)

    ended = adaptive(run, step, num_matvecs, least=MIN_SKETCH)
    m = sketch.num_probes
    value, stderr = _scaled(found, sketch.sound, ended)
    return value, stderr, {"num_matvecs": m, "status": ended.status, "dof": float(m - 1)}


@jax.jit
def _shifted(value: PyTree, stderr: PyTree, shift: jax.Array, floor: jax.Array) -> tuple[PyTree, PyTree]:
    value = jax.tree.map(lambda x: (x - shift).astype(x.dtype), value)
    return value, jax.tree.map(lambda x: jnp.hypot(x, floor).astype(x.dtype), stderr)


@jax.jit
def _leave_one_out(
    held: Held,
    u: jax.Array,
    among: jax.Array,
    sketch: jax.Array,
    unit: jax.Array,
    precision: float | jax.Array,
) -> tuple[PyTree, PyTree]:
    """XDiag and its error: diag(P A) + ω ⊙ (1 - P) A ω with P the sketch without the probe ω.

    With a_j = Q u_j, b_j = Z u_j and r_j = Q y_j, estimate j is diag(Q Zᵀ) - a_j ⊙ b_j + (u_j·r_j) ω_j ⊙ a_j.
    Leaving out i as well adds the same terms for the second direction.
    """
    m, d = len(u), len(among)

    def terms(
        directions: jax.Array, weights: jax.Array, q: jax.Array, z: jax.Array, w: jax.Array
    ) -> jax.Array:
        a, b = blocks.combine(directions, q), blocks.combine(directions, z)
        weights = weights.reshape(-1, *[1] * (q.ndim - 1)).astype(q.dtype)
        return a * (weights * w - b)

    def one(q: jax.Array, z: jax.Array, w: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        samples = terms(u, jnp.sum(u * sketch, axis=1), q, z, w)
        mean = jnp.mean(samples, axis=0)
        variance = jnp.sum((samples - mean) ** 2, axis=0) / (m * (m - 1))

        def pairs(i: jax.Array, sums: _Sums) -> _Sums:
            # Effect of i on estimate j, and of j on estimate i; they vanish for i = j.
            total, size, bound = sums
            on_j = terms(among[i], jnp.sum(among[i] * sketch[:d], axis=1), q, z, w[:d])
            on_i = terms(among[:, i], jnp.sum(among[:, i] * sketch[i], axis=1), q, z, w[i])
            row = jnp.sum(on_j * on_i, axis=0)
            return total + row, jnp.hypot(size, row), bound + jnp.sum(jnp.abs(on_j * on_i), axis=0)

        total, size, bound = lax.fori_loop(
            0, d, pairs, (jnp.zeros_like(mean), jnp.zeros_like(mean), jnp.zeros_like(mean))
        )
        covariance = _covariance(total, size, bound, d)
        rounding = precision**2 * jnp.mean(y**2, axis=0)
        stderr = jnp.sqrt(variance + covariance + rounding)
        return _tree.scale(unit, (mean + jnp.sum(q * z, axis=0), stderr))

    stacks = zip(
        *map(jax.tree.leaves, (held.basis, held.basis_images, held.probes, held.images)), strict=True
    )
    means, errors = zip(*(one(*leaves) for leaves in stacks), strict=True)
    treedef = jax.tree.structure(held.basis)
    return treedef.unflatten(means), treedef.unflatten(errors)


def _covariance(total: jax.Array, size: jax.Array, bound: jax.Array, d: int) -> jax.Array:
    """`leave_one_out._covariance` entry by entry, from sums over pairs, the norm of the d sums over j, and a
    bound."""
    mean, size = jnp.abs(total) / d, size / d**0.5
    spread = jnp.sqrt(jnp.maximum(size - mean, 0)) * jnp.sqrt(size + mean)
    error = 2 * (d - 1) ** 0.5 * spread / ((d - 1) * (d - 2))
    return jnp.minimum(jnp.maximum(total, 0) / (d * (d - 1)) + error, bound / (d * (d - 1)))


_RUNNERS = {"exact": _exact, "hutchinson": _hutchinson, "xdiag": _xdiag, "xnysdiag": _xnysdiag}
