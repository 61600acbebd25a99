"""The gradient noise scale: how many examples a batch needs before its gradient is mostly signal."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import DataError, NonFiniteError, StructureError
from spectra.base.trees import PyTree
from spectra.operators.covariance import GradientCovarianceOperator
from spectra.results import NoiseScale
from spectra.results.estimates import skewness

CHUNK_BYTES = 2**26
"""Gradients of single examples that are held at once, where `microbatch` does not say how many."""

SPARE = 1e3
"""How far norms stay below the fourth root of the largest float64: sums of fourth powers need room."""

ROUNDINGS = 8
"""Roundings that separate Σ p |g_i|² from |ḡ|² at most where all gradients are equal, in units of both."""


@automatic
def gradient_noise_scale(covariance_op: GradientCovarianceOperator) -> NoiseScale:
    """Estimate tr Σ / |g|², the batch size at which a gradient's noise has the same norm as the gradient.

    With the gradients g_i of N examples and their mean ḡ,

        tr Σ = Σ |g_i - ḡ|² / (N - 1),    |g|² = |ḡ|² - tr Σ / N,

    both unbiased. The error comes from leaving out each example in turn, for which |g_i|² and ḡ·g_i are
    enough. With weights w_i (`weight_fn`), p_i = w_i / Σ w takes the place of 1 / N: tr Σ is Σ p_i |g_i - ḡ|²
    / (1 - Σ p²), and the correction of |ḡ|² is Σ p_i² |g_i - ḡ|² / (1 - Σ p²). Examples with weight zero do
    not count.

    Args:
        covariance_op: `GradientCovarianceOperator`, centred or not, on one batch or a stream. Its examples
            are assumed to be independent draws.

    Returns:
        `NoiseScale`, an `Estimate` with value, stderr, `.interval()` (by Fieller's theorem, corrected for
        skewness), `.noise` and `.signal`. The value is infinite if |g|² is not positive.

    Raises:
        StructureError: another operator.
        DataError: fewer than three examples of positive weight, or one that has all of it; a gradient whose
            norm's fourth power float64 cannot hold (below 1e-73, above 1e74).
        NonFiniteError: a gradient is NaN or infinite.

    Cost: three gradients of every example. Memory: the gradients of `microbatch` single examples, by default
    as many as fill 64 MiB.

    Fails if few examples carry most of the gradient, because those drawn say too little of them: with a heavy
    tail the interval covers less often than stated at any number (docs/evidence.md has figures).

    References:
        McCandlish, Kaplan, Amodei et al., arXiv:1812.06162; Fieller, doi:10.1111/j.2517-6161.1954.tb00159.x;
        Johnson, doi:10.1080/01621459.1978.10480051.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> def loss_fn(w, x):
        ...     return jnp.mean(x @ w)  # g_i = x_i
        >>> x = jnp.array([[1.0, 0.0], [3.0, 2.0], [2.0, 1.0], [2.0, 1.0]])
        >>> found = spectra.gradient_noise_scale(spectra.GradientCovarianceOperator(loss_fn, jnp.ones(2), x))
        >>> round(found.noise, 4), round(found.signal, 4), round(float(found.value), 4)
        (1.3333, 4.6667, 0.2857)
    """
    op = covariance_op
    if not isinstance(op, GradientCovarianceOperator):
        raise StructureError(
            f"covariance_op is a {type(op).__name__}: pass a GradientCovarianceOperator of the loss."
        )
    trees.require_values("gradient_noise_scale", (op.params, op.data))
    chunk = op.microbatch or max(1, CHUNK_BYTES // trees.tree_bytes(op.structure))
    return _estimate(_statistics(op, chunk), ROUNDINGS * op.precision)


class _Statistics(NamedTuple):
    """Of each example (N,), in float64: p sums to one, m = Σ p² g."""

    share: np.ndarray  # p_i
    square: np.ndarray  # |g_i|²
    mean: np.ndarray  # ḡ·g_i
    second: np.ndarray  # m·g_i


def _statistics(op: GradientCovarianceOperator, chunk: int) -> _Statistics:
    """Two passes over the data: the mean gradients, then each example's products with them."""
    total, squared, mean, second = 0.0, 0.0, None, None
    for piece in _pieces(op):
        unit, weight, square, *vectors = _sums(piece, chunk)
        weight, square = float(unit) * float(weight), float(unit) ** 2 * float(square)
        total, squared = total + weight, squared + square
        # Running means, so that no sum is larger than what is summed.
        mean = _blend(mean, vectors[0], weight / total)
        second = _blend(second, vectors[1], square / squared if squared else 0.0)
    if not trees.all_finite((mean, second)):
        raise NonFiniteError(f"a gradient is NaN or infinite. {op.explain_non_finite()}")
    lengths = [trees.length(mean), trees.length(second)]
    units = [
        trees.scale(1 / size if size else 0.0, v) for size, v in zip(lengths, (mean, second), strict=True)
    ]
    parts = [jax.device_get(_of_examples(piece, units, chunk)) for piece in _pieces(op)]
    weights, norms, *along = (np.concatenate(x).astype(np.float64) for x in zip(*parts, strict=True))
    used = weights > 0
    _require_fourth_powers(float(np.max(norms, initial=0.0, where=used)))
    share = weights[used] / weights.sum()
    along = [size * x[used] for size, x in zip(lengths, along, strict=True)]
    return _Statistics(share, norms[used] ** 2, along[0], along[1] * float(np.sum(share**2)))


def _require_fourth_powers(norm: float) -> None:
    """Raise where float64 cannot hold |g|⁴ to its precision: `covariance` is made of that."""
    info = np.finfo(float)
    if norm > 0 and not (info.tiny / info.eps) ** 0.25 < norm < float(info.max) ** 0.25 / SPARE:
        raise DataError(
            f"the longest gradient of an example has the norm {norm:.1e}, whose fourth power float64 cannot "
            "hold. Multiply the loss by a constant: the noise scale stays what it is."
        )


def _pieces(op: GradientCovarianceOperator):
    return [op] if op.stream is None else (piece for _, piece in op._pieces())


def _blend(old: PyTree, new: PyTree, share: float) -> PyTree:
    return new if old is None else _mix(old, new, share)


@programs.jit
def _mix(old: PyTree, new: PyTree, share) -> PyTree:
    return jax.tree.map(lambda a, b: (a + share * (b - a)).astype(a.dtype), old, new)


@partial(programs.jit, static_argnames="chunk")
def _sums(op: GradientCovarianceOperator, chunk: int):
    """The largest weight, Σ w and Σ w² in its units, and the means of the gradients with weights w and w²."""
    with jax.default_matmul_precision(op.matmul_precision):
        weights, owned, one = op._examples(op.data)
        unit = jnp.max(weights)  # squares of weights of any size
        relative = weights / jnp.where(unit > 0, unit, 1)
        totals = [jnp.sum(relative), jnp.sum(relative**2)]
        shares = [x / jnp.where(t > 0, t, 1) for x, t in zip((relative, relative**2), totals, strict=True)]
        variables = op._variables()

        def add(sums, item):
            weight, example, first, second = item
            gradient = jax.vmap(jax.grad(one), (None, 0, 0))(variables, weight, example)

            def plus(total, g, share):
                return total + jnp.tensordot(share.astype(g.dtype), g, 1, precision="highest")

            return [
                jax.tree.map(partial(plus, share=s), t, gradient)
                for t, s in zip(sums, (first, second), strict=True)
            ], None

        zero = [jax.tree.map(jnp.zeros_like, variables)] * 2
        means, _ = _scan(add, zero, (weights, owned, *shares), chunk)
        return unit, *totals, *means


def _scan(body, carry, items, chunk: int):
    """`lax.scan` over chunks of the leading axis; what is left over is a smaller one."""
    count = len(jax.tree.leaves(items)[0])
    whole = count // chunk * chunk
    outputs = []
    if whole:
        chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), items)
        carry, found = lax.scan(body, carry, chunks)
        outputs.append(jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), found))
    if whole < count:
        carry, found = body(carry, jax.tree.map(lambda x: x[whole:], items))
        outputs.append(found)
    return carry, jax.tree.map(lambda *xs: jnp.concatenate(xs), *outputs)


@partial(programs.jit, static_argnames="chunk")
def _of_examples(op: GradientCovarianceOperator, units: list[PyTree], chunk: int):
    """Weight, |g_i|, and u·g_i for both unit vectors u, of each example; no squares, which may overflow."""
    with jax.default_matmul_precision(op.matmul_precision):
        weights, owned, one = op._examples(op.data)
        variables = op._variables()

        def each(weight, example):
            gradient = jax.grad(one)(variables, weight, example)
            return trees.norm(gradient), *(trees.vdot(unit, gradient) for unit in units)

        _, found = _scan(lambda _, item: (None, jax.vmap(each)(*item)), None, (weights, owned), chunk)
        return weights, *found


def _estimate(x: _Statistics, rounding: float) -> NoiseScale:
    """The ratio and its error, from the estimates with one example left out in turn, and from the rounding
    of the squares, relative to their mean."""
    count = len(x.share)
    if count < 3:
        raise DataError(f"{count} examples of positive weight: an error takes at least three.")
    apart = 1 - float(np.sum(x.share**2))
    if apart <= count * float(np.finfo(float).eps):
        raise DataError("one example has all of the weight: an error takes three examples that have some.")
    scale = float(np.max(x.square)) or 1.0  # squares of squares are within reach in this unit
    x = x._replace(square=x.square / scale, mean=x.mean / scale, second=x.second / scale)
    noise, signal = _noise_and_signal(x)
    noise = max(noise, 0.0)  # below zero by rounding only
    rounding *= float(x.share @ x.square) / apart  # by which differences of the squares are divided
    left_out = np.stack(_without_each(x))
    influence = -(count - 1) * (left_out - left_out.mean(axis=1, keepdims=True))
    covariance = influence @ influence.T / (count * (count - 1)) + rounding**2 * np.eye(2)
    value = noise / signal if signal > 0 else math.inf
    along = influence[0] - (value * influence[1] if math.isfinite(value) else 0.0)
    spread = math.hypot(math.sqrt(np.mean(along**2) / (count - 1)), rounding * math.hypot(1, value))
    return NoiseScale(
        value=float(value),
        stderr=float(spread / signal) if signal > 0 else math.inf,
        num_matvecs=0,
        method="jackknife",
        reason=""
        if signal > 0
        else "the mean gradient is not longer than its noise: there is only a lower end",
        dof=float(1 / np.sum(x.share**2) - 1),
        noise=float(scale * noise),
        signal=float(scale * signal),
        covariance=scale**2 * covariance,
        skewness=skewness(along),
        num_examples=count,
        noise_dof=_freedom(influence[0], 1 / float(np.sum(x.share**2)) - 1),
    )


def _freedom(influence: np.ndarray, most: float) -> float:
    """Degrees of freedom of the mean of the squares of these numbers, from its own variance."""
    squares = influence**2
    variance = float(np.var(squares))
    return min(most, 2 * len(squares) * float(np.mean(squares)) ** 2 / variance) if variance > 0 else most


def _noise_and_signal(x: _Statistics) -> tuple[float, float]:
    p, squares = x.share, x.share**2
    size, second, trace, own = p @ x.mean, squares @ x.mean, p @ x.square, squares @ x.square
    return _unbiased(size, second, trace, own, squares.sum())


def _without_each(x: _Statistics) -> tuple[np.ndarray, np.ndarray]:
    """The same without example i, for every i: sums over the others in closed form."""
    p, squares = x.share, x.share**2
    rest = 1 - p
    size = (p @ x.mean - 2 * p * x.mean + squares * x.square) / rest**2
    # (m - p² g)·(ḡ - p g)
    second = (squares @ x.mean - p * x.second - squares * x.mean + p**3 * x.square) / rest**3
    trace = (p @ x.square - p * x.square) / rest
    own = (squares @ x.square - squares * x.square) / rest**2
    return _unbiased(size, second, trace, own, (squares.sum() - squares) / rest**2)


def _unbiased(size, second, trace, own, share):
    """(tr Σ, |g|²) from |ḡ|², m·ḡ, Σ p |g_i|², Σ p² |g_i|² and Σ p²."""
    noise = (trace - size) / (1 - share)
    of_mean = (own - 2 * second + share * size) / (1 - share)
    return noise, size - of_mean
