"""Leading eigenvalues and trace of the curvature of all examples that could be drawn, from those drawn.

Let H be the mean over the distribution, H_S that over the examples drawn, v the leading eigenvector of H.

Above: λ₁(H_S) >= vᵀ H_S v, and the right side is a mean over independent examples with the expectation
vᵀHv = λ₁(H). So λ₁(H) <= λ₁(H_S) + t se but for the probability of Student's t, with the standard error se
of vᵀ h v over examples. This is Jensen's inequality, E λ₁(H_S) >= λ₁(H), with the error it leaves. The j-th
eigenvalue of H_S is at least the smallest of the j x j matrix VᵀH_S V on the leading eigenvectors of H; that
one is no further below λ_j than the Frobenius norm of its error, for which the same t stands: of all normal
laws of one total variance, the one on a line has the heaviest tail.

Below: for an orthonormal V of j vectors fitted to other examples, λ_j(H) >= λ_min(VᵀHV), and VᵀHV is a mean
over the examples held out. Each part of the examples is held out once (cross-fitting).

The truth lies between the expectations of the two, so that only one end is at risk where they are apart
(`law.one_at_risk`).

Between: to second order the bias of λ(H_S) is c / m for m examples, and that of the held-out value -c / m'
for the m' that V was fitted to. The mean in which they cancel is the estimate.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, draws, programs, stacks, trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError, Status, StructureError
from spectra.base.trees import PyTree
from spectra.estimators import blocks
from spectra.estimators.batches import Batches, draw_batches
from spectra.estimators.law import Law, Seen
from spectra.krylov.eigsh import eigsh
from spectra.operators.batches import batch_size
from spectra.operators.data import DataOperator
from spectra.results import Eigenpairs, Interval, Population

LOOSER = 5.0
"""Tolerance of the vectors to hold out, in units of `tol`: any vector bounds from below, and an error of the
residual's size costs its square."""
ROUNDINGS = 4
"""By how many roundings of |H v| a form vᵀHv may be off, as that of a report."""
FRESH = 0.1
"""Random vector in the start from known vectors, whose invariant space may leave the leading one out."""


@automatic
def population(
    op: DataOperator,
    *,
    key: jax.Array,
    num_eigenvalues: int = 1,
    num_batches: int = 64,
    num_examples: int | None = None,
    of: str = "distribution",
    num_folds: int = 2,
    num_probes: int = 2,
    tol: float = 1e-2,
    level: float = 0.95,
) -> Population:
    """Estimate the leading eigenvalues and the trace for the whole distribution from a sample.

    On average, the largest eigenvalue of a batch is too large, by a factor of two for a small batch, and the
    curvature along its eigenvector on other examples is too small. Both, with their errors over examples,
    form the ends of an interval (docs/evidence.md explains why it holds). The trace of any batch is
    unbiased.

    Args:
        op: operator on data; its examples are the sample, assumed to be independent draws. A single batch is
            split in random order; the batches of a stream are used as they arrive, so shuffle them once.
        key: JAX random key of the order, the start vectors and the probes.
        num_eigenvalues: k, from the top.
        num_batches: b, the number of parts that a single batch is split into; errors are measured between
            parts. At least 8; strata are used from 32 parts on (see `num_examples`).
        num_examples: number of examples to draw from a single batch, without replacement; default all. They
            are drawn from strata of similar loss, more often from those of large loss, and weighted by the
            number of examples that they represent, unless there are too few examples or there is a
            `weight_fn`.
        of: the subject of the intervals: the "distribution" that the examples were drawn from, or the "data"
            of `op` itself, from which `num_examples` are drawn; the latter have a smaller uncertainty.
        num_folds: number of parts held out in turn; with more of them, vectors are fitted to more examples.
        num_probes: probes for the trace on each batch, at least 2.
        tol: residual of the eigenvectors of the sample in units of |H|; for those of the parts, five times
            as much.
        level: probability with which each interval holds.

    Returns:
        `Population`. Status NOT_CONVERGED: an eigenpair of the sample did not reach `tol`; its residual is in
        `upper`.

    Raises:
        StructureError: `op` has no data.
        DataError: fewer than eight examples or batches, or fewer than two per fold; a loss that is not a mean
            over examples.
        SpectraError: an argument is out of range.

    Cost, in products over the sample: num_folds - 1 times those of `eigsh` at `tol`, a few more for the whole
    sample, starting from those vectors, and 2 k + num_probes. `num_passes` is the actual number. With
    num_examples=, there is also one evaluation of the loss of each example of `op`.

    Fails if few examples carry the curvature for another reason than their large loss: no interval can
    account for examples that were never drawn. For a loss that couples examples, the distribution is not
    defined.

    References:
        Tatzel, Ekman, Hennig, arXiv:2410.14325 (curvature along vectors of another batch); Student's t with
        skewness after Johnson, doi:10.1080/01621459.1978.10480051; strata: Cochran, Sampling Techniques, 5.5
        and 12.2.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def loss_fn(w, x):
        ...     return 0.5 * jnp.mean((x @ w) ** 2)  # of all x: the identity
        >>> x = jax.random.normal(jax.random.key(0), (2000, 5))
        >>> op = spectra.HessianOperator(loss_fn, jnp.ones(5), x)
        >>> found = spectra.population(op, key=jax.random.key(1))
        >>> low, value, high = found.interval()
        >>> low < 1.0 < high, found.trace.lower < 5.0 < found.trace.upper
        (True, True)
    """
    if not isinstance(op, DataOperator):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise StructureError(f"op is a {type(op).__name__}: batches are drawn from an operator on data.")
    if getattr(op, "centered", False):
        raise StructureError(
            "a centred covariance is not a mean over examples: each batch subtracts its own mean gradient. "
            "Pass centered=False."
        )
    k = num_eigenvalues
    if not 1 <= k <= op.size:
        raise SpectraError(f"num_eigenvalues={k} is not between 1 and the order of the operator, {op.size}.")
    if num_folds < 2 or num_probes < 2 or num_batches < max(8, 2 * num_folds) or not 0 < level < 1:
        raise SpectraError(
            f"num_folds={num_folds}, num_probes={num_probes}, num_batches={num_batches}, level={level}: use "
            "at least 2 folds, 2 probes and 8 batches (two for each fold), and a level between 0 and 1."
        )
    if of not in ("distribution", "data") or (of == "data" and op.stream is not None):
        raise SpectraError(f"of={of!r}: use 'distribution', or 'data' for an operator on one batch.")
    order, starts, probes = jax.random.split(key, 3)
    batches = draw_batches(op, order, num_batches, num_examples, num_folds)
    folds = np.arange(len(batches.weights)) % num_folds
    fitted = _fit(batches, folds, k, starts, tol)
    seen, rounding = _look(batches, folds, fitted, probes, num_probes)
    return _summary(op, batches, _law(op, batches, folds, of, level), fitted, seen, rounding, level)


def _law(op: DataOperator, batches: Batches, folds: np.ndarray, of: str, level: float) -> Law:
    tail = (1 + level) / 2
    strata, sizes = batches.strata, batches.sizes
    if of == "data":
        return Law(batches.weights, folds, tail, strata, 1 - batches.drawn, sizes)
    if len(batches.drawn) == 1:  # draws from a distribution, all alike
        return Law(batches.weights, folds, tail, sizes=sizes)
    total = batch_size(op.data, op.shared)
    return Law(batches.weights, folds, tail, strata, 1 - batches.drawn, sizes, total)


class _Fits(NamedTuple):
    """Leading pairs of the complement of each fold, and of all batches; values descending."""

    parts: list[PyTree]
    whole: Eigenpairs
    num_matvecs: int
    examples: float  # products times examples


def _fit(batches: Batches, folds: np.ndarray, k: int, key: jax.Array, tol: float) -> _Fits:
    parts: list[PyTree] = []
    products, cost = 0, 0.0
    for fold in range(folds.max() + 1):
        chosen = np.flatnonzero(folds != fold)
        pairs = eigsh(
            batches.union(chosen),
            k,
            which="LA",
            key=jax.random.fold_in(key, fold),
            tol=min(LOOSER * tol, 0.1),
        )
        parts.append(pairs.vectors)
        products += pairs.num_matvecs
        cost += pairs.num_matvecs * batches.sizes[chosen].sum()
    everything = np.arange(len(folds))
    union = batches.union(everything)
    last = jax.random.fold_in(key, len(parts))
    whole = eigsh(union, k, which="LA", key=last, tol=tol, v0=_start(parts, draws.unit_vector(last, union)))
    cost += whole.num_matvecs * batches.sizes.sum()
    return _Fits(parts, whole, products + whole.num_matvecs, cost)


@programs.jit
def _start(parts: list[PyTree], fresh: PyTree) -> PyTree:
    """The sum of the leading vectors, turned alike, and a little of a random one."""
    total = trees.scale(FRESH, fresh)
    for vectors in parts:
        for i in range(blocks.length(vectors)):
            vector = jax.tree.map(lambda x, i=i: x[i], vectors)
            total = trees.axpy(jnp.where(trees.vdot(total, vector) < 0, -1, 1), vector, total)
    return total


def _look(
    batches: Batches, folds: np.ndarray, fitted: _Fits, key: jax.Array, num_probes: int
) -> tuple[Seen, float]:
    """What the batches show, and what rounding does to the trace of one, on average."""
    rows: list[tuple[np.ndarray, ...]] = []
    for b, op in enumerate(batches.each()):
        sets = (fitted.parts[folds[b]], fitted.whole.vectors)
        rows.append(jax.device_get(_of_batch(op, sets, jax.random.fold_in(key, b), num_probes)))
    held, inside, traces, sizes = (np.stack([row[i] for row in rows]).astype(np.float64) for i in range(4))
    return Seen(held[:, ::-1, ::-1], inside[:, ::-1, ::-1], traces), float(batches.weights @ sizes)


@partial(programs.jit, static_argnames="num_probes")
def _of_batch(
    op: DataOperator, sets: tuple[PyTree, PyTree], key: jax.Array, num_probes: int
) -> tuple[jax.Array, ...]:
    """VᵀHV of both sets of vectors, vᵀHv of random signs, and by how much rounding may move the latter."""
    probes = blocks.draw(op, key, jnp.arange(num_probes), "rademacher")
    parts = [*sets, probes]
    images = stacks.mapped(op.mv, blocks.concatenate(parts))
    found: list[jax.Array] = []
    start = 0
    for stack in parts:
        stop = start + blocks.length(stack)
        found.append(jnp.sum(blocks.gram(stack, blocks.rows(images, start, stop)), axis=0))
        start = stop
    first, second, last = found
    lengths = jax.vmap(trees.norm)(blocks.rows(images, start - num_probes, start))
    rounding = ROUNDINGS * op.precision * op.size**0.5 * jnp.mean(lengths)
    return (first + first.T) / 2, (second + second.T) / 2, arrays.diagonal(last), rounding


def _summary(
    op: DataOperator, batches: Batches, law: Law, fitted: _Fits, seen: Seen, rounding: float, level: float
) -> Population:
    num_folds, count = law.folds.max() + 1, len(law.folds)
    whole = np.asarray(fitted.whole.values, float)[::-1]
    most = whole + np.asarray(fitted.whole.residuals, float)[::-1]
    held, stderr, below, above = law.ends(seen, whole)
    # Rounding is no draw: examples that are all alike have no spread but this. That of a batch is relative
    # to its own curvature, which may be larger than that of all.
    own = float(np.max(law.weights @ np.abs(np.diagonal(seen.in_sample, axis1=1, axis2=2))))
    size = float(np.max(np.abs(whole)))
    floor = float(fitted.whole.noise_floor) * max(own / size if size > 0 else 1.0, 1.0)
    lower, upper = held - below - floor, most + above + floor
    # To second order biases are +c/m in the sample and -c/m' of vectors fitted to m' = (1 - 1/f) m.
    value = np.clip((num_folds * whole + (num_folds - 1) * held) / (2 * num_folds - 1), lower, upper)
    trace, trace_error, probe_error = law.trace(seen.traces)
    trace = Interval(trace.lower - rounding, trace.estimate, trace.upper + rounding)
    m = int(batches.sizes.sum())
    k, num_probes = len(whole), seen.traces.shape[1]
    extra = (2 * k + num_probes) * m
    return Population(
        eigenvalues=value,
        lower=lower,
        upper=upper,
        held_out=held,
        in_sample=whole,
        stderr=stderr,
        trace=trace,
        trace_stderr=trace_error,
        trace_probe_stderr=probe_error,
        shares=_possible(op, _with_rounding(law.shares(seen, most, value), trace.estimate, floor, rounding)),
        size=op.size,
        num_examples=m,
        num_batches=count,
        num_to_halve=_for_half(m, below[0] + above[0], upper[0] - lower[0]),
        num_matvecs=fitted.num_matvecs + (2 * k + num_probes) * count,
        num_passes=float((fitted.examples + extra) / m),
        level=level,
        status=Status.COMPLETE if np.all(fitted.whole.converged) else Status.NOT_CONVERGED,
    )


def _with_rounding(shares: Interval, trace: float, floor: float, rounding: float) -> Interval:
    """Shares of the j largest eigenvalues, j = 1 ... k, with what rounding does to these and to the trace."""
    if not trace > 0:
        return shares
    reach = (floor * np.arange(1, len(shares.estimate) + 1) + rounding * np.abs(shares.estimate)) / trace
    return Interval(shares.lower - reach, shares.estimate, shares.upper + reach)


def _possible(op: DataOperator, shares: Interval) -> Interval:
    """Of a trace that no eigenvalue takes from, all of it at most."""
    return Interval(*(np.clip(x, 0.0, 1.0) for x in shares)) if op.semidefinite else shares


def _for_half(count: int, error: float, width: float) -> int:
    """Examples with which error / sqrt(c) + bias / c is half of width = error + bias, c times as many."""
    bias = max(width - error, 0.0)
    if not width > 0:
        return count
    root = (math.sqrt(error**2 + 2 * bias * width) - error) / (2 * bias) if bias > 0 else width / (2 * error)
    return math.ceil(count / root**2)
