"""Estimators of a diagonal entry by entry: exact, Hutchinson, XDiag and XNysDiag, each with its error."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays, programs
from spectra.base import trees as _tree
from spectra.base.errors import Status
from spectra.base.trees import PyTree
from spectra.estimators import blocks, exact, leave_one_out
from spectra.estimators.hutchinson import EIGENVECTOR
from spectra.estimators.low_rank import nystrom
from spectra.estimators.run import Ended, Run, adaptive
from spectra.estimators.sketches import MIN_SKETCH, Held, SketchRun
from spectra.operators.base import LinearOperator
from spectra.operators.jaxprs import slow_in_loops

PAIRS = 64
"""Probes among which pairs are formed for the covariance; each pair costs a pass over four vectors here."""


_Found = tuple[PyTree, PyTree, dict[str, Any]]  # value, error, and fields of the result


_State = tuple[PyTree, PyTree, PyTree]  # mean, sum of squared deviations and mean of (Hv)²


_Carried = tuple[_State | None, jax.Array, blocks.Pairs]  # the unit of products, and their pairs


_Sums = tuple[jax.Array, jax.Array, jax.Array]


def _exact(run: Run, num_matvecs: int) -> _Found:
    del num_matvecs
    *columns, sound = exact.columns(run)
    columns[1] = exact.stated(run, columns[1])
    value, stderr = (_tree.unravel(sound * column, run.op.structure) for column in columns)
    dof = None
    if moved := exact.moved_products(run):
        changes, least = root_mean_square([x for *_, x in moved]), float(jnp.finfo(run.op.dtype).tiny)
        # Differences of entries near the least normal number are below it, where XLA has zero.
        stderr = jax.tree.map(lambda a, b: jnp.maximum(jnp.hypot(a, b), least), stderr, changes)
        dof = float(len(moved))
    return value, stderr, {"num_matvecs": run.op.size, "status": Status.COMPLETE, "dof": dof}


@programs.jit
def root_mean_square(trees: list[PyTree]) -> PyTree:
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
        if run.traced and not slow_in_loops(run.op):
            state, unit, pairs = _looped(run, kind, count, unit, pairs)
        else:
            carried = run.fold(accumulate, (state, unit, pairs), done, count, carried=looks)[0]
            state, unit, pairs = carried
        done = count
        return _relative(run, *result())

    def accumulate(carried: _Carried, start: int, stop: int) -> tuple[_Carried, None]:
        return _accumulate(run, kind, np.arange(start, stop), *carried), None

    def result() -> tuple[PyTree, PyTree]:
        assert state is not None
        mean, spread, square = state
        if kind == "normal":
            return _normal_result(mean, square, unit, float(done), run.precision)
        return _hutchinson_result(mean, spread, square, unit, float(done), run.precision, run.op.size)

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
    return _scale(sound, value), _scale(sound * ended.widen, stderr)


_scale = programs.jit(_tree.scale)


def _looped(run: Run, kind: str, count: int, unit: jax.Array, pairs: blocks.Pairs) -> _Carried:
    """All of `count` probes inside a caller's jit: one program for whole batches, however many there are. The
    first has no state before it, and what is left over is a smaller one."""

    def one(carried: _Carried, part: arrays.Indices) -> tuple[_Carried, None]:
        state, unit, pairs = carried
        return _step(run.op, run.key, part, state, unit, pairs, kind), None

    indices, batch = np.arange(count), min(run.batch, count)
    carried, _ = one((None, unit, pairs), indices[:batch])
    whole = count - count % batch
    if whole > batch:
        carried, _ = lax.scan(one, carried, indices[batch:whole].reshape(-1, batch))
    return one(carried, indices[whole:])[0] if whole < count else carried


def _accumulate(
    run: Run, kind: str, indices: np.ndarray, state: _State | None, unit: jax.Array, pairs: blocks.Pairs
) -> tuple[_State, jax.Array, blocks.Pairs]:
    if run.op.on_host:
        stack = blocks.draw(run.op, run.key, indices, kind)
        return _merge(stack, run.op.mv_batch(stack), indices[0], state, unit, pairs)
    return _step(run.op, run.key, indices, state, unit, pairs, kind)


@partial(programs.jit, static_argnames="kind")
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


@programs.jit
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


@programs.jit
def _hutchinson_result(
    mean: PyTree,
    spread: PyTree,
    square: PyTree,
    unit: jax.Array,
    count: float | jax.Array,
    precision: float | jax.Array,
    size: int,
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
    pooled = jnp.asarray(sum(jnp.sum(leaf) for leaf in leaves) / size)

    def error(s: jax.Array, q: jax.Array) -> jax.Array:
        s = jnp.where(count > AGREE, s, jnp.maximum(s, jnp.asarray(pooled, s.dtype)))
        return arrays.root(s + precision**2 * q)

    unit = blocks.some_unit(unit)
    return _tree.scale(unit, mean), jax.tree.map(
        lambda s, q: (unit * error(s, q)).astype(q.dtype), variances, square
    )


@programs.jit
def _normal_result(
    mean: PyTree, square: PyTree, unit: jax.Array, count: float | jax.Array, precision: float | jax.Array
) -> tuple[PyTree, PyTree]:
    """Value and error of k normal probes: Var v_i (Hv)_i = |row i|² + H_ii², at most 2 |row i|².

    (Hv)_i² is |row i|² χ²_1, so that the error has k degrees of freedom.
    """

    def error(q: jax.Array) -> jax.Array:
        return (unit * arrays.root((2 / count + precision**2) * q)).astype(q.dtype)

    unit = blocks.some_unit(unit)
    return _tree.scale(unit, mean), jax.tree.map(error, square)


def _xdiag(run: Run, num_matvecs: int) -> _Found:
    sketch = SketchRun(run, "rademacher")
    found: list[Any] = []

    def step(count: int) -> tuple[float, float]:
        sketch.extend(count)
        inner = sketch.inner_products()
        u = sketch.directions(inner)
        seconds = leave_one_out.seconds(u, min(count, PAIRS), run.xp)
        found[:] = _leave_one_out(
            sketch.held,
            jnp.asarray(u, run.op.dtype),
            jax.tree.map(lambda x: jnp.asarray(x, run.op.dtype), seconds),
            jnp.asarray(inner.qy[-1].T, run.op.dtype),
            sketch.unit,
            run.precision,
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
    is_noisy = False

    def step(count: int) -> tuple[float, float]:
        nonlocal is_noisy
        sketch.extend(count, project=False)
        made = nystrom(sketch, "xnysdiag", "xdiag")
        is_noisy = made.is_noisy
        u = leave_one_out.unit_rows(made.inverse_root, run.xp)
        seconds = leave_one_out.seconds(u, min(count, PAIRS), run.xp)
        held = Held(sketch.held.probes, sketch.held.images, made.factor, made.factor)
        value, stderr = _leave_one_out(
            held,
            jnp.asarray(u, run.op.dtype),
            jax.tree.map(lambda x: jnp.asarray(x, run.op.dtype), seconds),
            jnp.asarray(made.root, run.op.dtype),
            sketch.unit,
            sketch.precision,
        )
        # The shift is taken off; rounding of the core counts in units of the smallest eigenvalue of ΩΩᵀ.
        floor = run.rounding(made.squares, sketch.precision)[-1] / made.smallest + made.shift
        found[:] = _shifted(value, stderr, sketch.unit * made.shift, sketch.unit * floor)
        return _relative(run, *found)

    ended = adaptive(run, step, num_matvecs, least=MIN_SKETCH)
    if not run.traced:
        ended = sketch.remade(step, ended, *map(_tree.length, found), is_noisy=is_noisy)
    m = sketch.num_probes
    value, stderr = _scaled(found, sketch.sound, ended)
    return value, stderr, {"num_matvecs": m, "status": ended.status, "dof": float(m - 1)}


@programs.jit
def _shifted(value: PyTree, stderr: PyTree, shift: jax.Array, floor: jax.Array) -> tuple[PyTree, PyTree]:
    value = jax.tree.map(lambda x: (x - shift).astype(x.dtype), value)
    return value, jax.tree.map(lambda x: jnp.hypot(x, floor).astype(x.dtype), stderr)


@programs.jit
def _leave_one_out(
    held: Held,
    u: jax.Array,
    seconds: tuple[jax.Array, jax.Array, jax.Array],
    sketch: jax.Array,
    unit: jax.Array,
    precision: float | jax.Array,
) -> tuple[PyTree, PyTree]:
    """XDiag and its error: diag(P A) + ω ⊙ (1 - P) A ω with P the sketch without the probe ω.

    With a_j = Q u_j, b_j = Z u_j and r_j = Q y_j, estimate j is diag(Q Zᵀ) - a_j ⊙ b_j + (u_j·r_j) ω_j ⊙ a_j.
    Leaving out i as well adds the same terms for the second direction, x u_i - y u_j.

    The covariance is at most the variance of an estimate given its sketch, as in `mean_and_variance`, and
    that at most the mean square of (1 - P) A ω. Where the probes left span the range it is rounding, which a
    sketch without two of them magnifies: errors stated of a matrix of rank 6 were 41 times the true ones with
    8 probes, and 200 times by "xnysdiag".
    """
    (among, own, other), unit = seconds, blocks.some_unit(unit)
    m, d = len(u), len(among)
    own_weights = jnp.sum(u * sketch, axis=1)
    weights = jnp.sum(among * sketch[:d], axis=-1)

    def one(q: jax.Array, z: jax.Array, w: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        def rows(x: jax.Array) -> jax.Array:
            return x.reshape(-1, *[1] * (q.ndim - 1)).astype(q.dtype)

        a, b = blocks.combine(u, q), blocks.combine(u, z)
        samples = a * (rows(own_weights) * w - b)
        mean = jnp.mean(samples, axis=0)
        variance = jnp.sum((samples - mean) ** 2, axis=0) / (m * (m - 1))

        def pairs(i: jax.Array, sums: _Sums) -> _Sums:
            # Effect of i on estimate j, and of j on estimate i; they vanish for i = j. Images of second
            # directions are made of those of first ones: a pair costs no product of matrices.
            total, size, bound = sums
            x, y = rows(own[i]), rows(other[i])
            on_j = (x * a[i] - y * a[:d]) * (rows(weights[i]) * w[:d] - (x * b[i] - y * b[:d]))
            on_i = (x * a[:d] - y * a[i]) * (rows(weights[:, i]) * w[i] - (x * b[:d] - y * b[i]))
            row = jnp.sum(on_j * on_i, axis=0)
            return total + row, jnp.hypot(size, row), bound + jnp.sum(jnp.abs(on_j * on_i), axis=0)

        total, size, bound = lax.fori_loop(
            0, d, pairs, (jnp.zeros_like(mean), jnp.zeros_like(mean), jnp.zeros_like(mean))
        )
        most = leave_one_out.CHANCE * jnp.mean((rows(own_weights) * a) ** 2, axis=0)
        covariance = jnp.minimum(_covariance(total, size, bound, d), most)
        rounding = precision**2 * jnp.mean(y**2, axis=0)
        stderr = arrays.root(variance + covariance + rounding)
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
    spread = arrays.root(jnp.maximum(size - mean, 0)) * arrays.root(size + mean)
    error = 2 * (d - 1) ** 0.5 * spread / ((d - 1) * (d - 2))
    return jnp.minimum(jnp.maximum(total, 0) / (d * (d - 1)) + error, bound / (d * (d - 1)))


RUNNERS = {"exact": _exact, "hutchinson": _hutchinson, "xdiag": _xdiag, "xnysdiag": _xnysdiag}
