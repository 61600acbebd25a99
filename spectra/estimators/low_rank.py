"""Traces that take out what a sketch of the range explains: Hutch++, XTrace and XNysTrace."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from spectra.base import arrays, programs, trees
from spectra.base.errors import SpectraError
from spectra.base.trees import PyTree
from spectra.estimators import blocks, leave_one_out
from spectra.estimators.hutchinson import LOST
from spectra.estimators.leave_one_out import Nystrom, Sketch
from spectra.estimators.run import Run, adaptive
from spectra.estimators.sketches import MIN_SKETCH, SketchRun
from spectra.results import Estimate


def xtrace(run: Run, kind: str, num_matvecs: int, reason: str) -> Estimate:
    """XTrace of m probes from 2 m products; see `leave_one_out`."""
    sketch = SketchRun(run, kind)
    found: list[Any] = []

    def step(count: int) -> tuple[Any, Any]:
        sketch.extend(count)
        inner = sketch.inner_products()
        u = sketch.directions(inner)
        values, pairs, known = leave_one_out.xtrace_values(
            inner,
            u,
            run.op.size,
            run.op.precision,
            resphere=kind == "normal",
            xp=run.xp,
            outside=sketch.outside(inner, u) if run.by and kind == "normal" else None,
            sizes=run.sizes,
        )
        rounding = arrays.root(run.rounding(inner.yy) ** 2 + lost_in_basis(run, inner), run.xp)
        found[:] = with_rounding(run, values, pairs, rounding, known=known)
        return found[0][-1], found[1][-1]

    ended = adaptive(run, step, num_matvecs // 2, least=MIN_SKETCH, signed=True)
    return run.estimate(
        *found,
        unit=sketch.unit,
        sound=sketch.sound,
        num_matvecs=2 * sketch.num_probes,
        method="xtrace",
        ended=ended,
        reason=reason,
        dof=float(sketch.num_probes - 1),
    )


def lost_in_basis(run: Run, inner: Sketch) -> Any:
    """Variance by rounding of what the sketch takes out of each group's trace, from the core Q H Qᵀ.

    A group without curvature has no part in products, but one in the rows of a basis, which are orthonormal
    to rounding: with it the core cancels to eps |QHQᵀ| |Q_g Q_gᵀ|, spread over the rows.
    """
    core, shares = inner.qz[-1], inner.qq
    return run.precision**2 * run.xp.sum(core**2) * run.xp.sum(shares**2, axis=(-2, -1)) / core.shape[-1]


def with_rounding(run: Run, values: Any, pairs: Any, rounding: Any, **known: Any) -> tuple[Any, Any]:
    """Mean of leave-one-out estimates, and its error with that of rounding; see `mean_and_variance`."""
    mean, variance = leave_one_out.mean_and_variance(values, pairs, run.xp, **known)
    return mean, arrays.root(variance + rounding**2, run.xp)


def xnystrace(run: Run, kind: str, num_matvecs: int, reason: str) -> Estimate:
    """XNysTrace of m probes from m products, for positive semi-definite operators.

    The operator is shifted by ν, the rounding of its products, and n ν is taken off the trace: of the
    shifted core ΩᵀAΩ no eigenvalue is below ν times the smallest of ΩᵀΩ but for rounding, and there it
    is raised to that.
    """
    xp, sketch = run.xp, SketchRun(run, kind)
    found: list[Any] = []
    is_noisy = False

    def step(count: int) -> tuple[Any, Any]:
        nonlocal is_noisy
        sketch.extend(count, project=False)
        made = nystrom(sketch, "xnystrace", "xtrace")
        is_noisy = made.is_noisy
        estimates, pairs, own = leave_one_out.xnystrace_values(
            made.inner(run, sketch), run.op.size, sketch.precision, resphere=kind == "normal", xp=xp
        )
        taken = (made.shift * xp.asarray(run.sizes))[:, None]
        estimates, pairs = estimates - taken, pairs - taken
        # Rounding of the core counts in units of the smallest eigenvalue of ΩΩᵀ.
        floor = run.rounding(made.squares, sketch.precision) * run.op.size / made.smallest
        found[:] = with_rounding(run, estimates, pairs, floor, own=own)
        return found[0][-1], found[1][-1]

    ended = adaptive(run, step, num_matvecs, least=MIN_SKETCH)
    ended = sketch.remade(step, ended, found[0][-1], found[1][-1], is_noisy=is_noisy)
    return run.estimate(
        *found,
        unit=sketch.unit,
        sound=sketch.sound,
        num_matvecs=sketch.num_probes,
        method="xnystrace",
        ended=ended,
        reason=reason,
        dof=float(sketch.num_probes),
    )


@programs.jit
def _shift(factor: ArrayLike, vectors: PyTree, products: PyTree) -> PyTree:
    return trees.axpy(factor, vectors, products)


class Factored(NamedTuple):
    """The Nyström approximation Bᵀ B of H + ν from the probes, B = C^{-1/2} (Y + ν Ω), C = Ω (Y + ν Ω)ᵀ."""

    factor: PyTree  # B, a stack of m vectors
    root: Any  # (m, m), row j is C^{1/2} e_j
    inverse_root: Any  # (m, m), row j is C^{-1/2} e_j
    inverse_gram: Any  # (m, m), (Ω Ωᵀ)^{-1}
    shift: Any  # ν
    smallest: Any  # eigenvalue of Ω Ωᵀ
    squares: Any  # (G, m) |(Hω)_g|²
    is_noisy: bool  # the core shows more rounding than is stated of products

    def inner(self, run: Run, sketch: SketchRun) -> Nystrom:
        """Its inner products, for each group and for the whole."""
        return Nystrom(
            bb=run.by_group(blocks.gram(self.factor, self.factor)),
            ob=run.by_group(blocks.gram(sketch.held.probes, self.factor)),
            root=self.root,
            inverse_root=self.inverse_root,
            inverse_gram=self.inverse_gram,
        )


def nystrom(sketch: SketchRun, method: str, other: str) -> Factored:
    """The approximation from all probes so far, `extend`ed without a basis; shifted, see `xnystrace`.

    The shift is the rounding of products, spread over n entries, or more where the probes are a good part of
    all directions: ΩΩᵀ has a small eigenvalue s then, and the core needs ν s above the rounding of its
    entries, eps |Hω| each and 2 √m times that as a matrix.
    """
    run, xp = sketch.run, sketch.run.xp
    (probes, images, *_), m = sketch.held, sketch.num_probes
    squares = run.by_group(blocks.row_dots(images, images))
    gram = run.host(jnp.sum(blocks.gram(probes, probes), axis=0))
    with leave_one_out.careful():
        eigh: Any = np.linalg.eigh if xp is np else arrays.eigh
        weights, axes = eigh(gram)
        smallest = xp.maximum(weights[0], sketch.precision * weights[-1])
        inverse_gram = (axes / xp.maximum(weights, smallest)) @ axes.T
        shift = sketch.precision * arrays.root(xp.mean(squares[-1]), xp)
        shift = shift * xp.maximum(run.op.size**-0.5, 2 * m**0.5 / smallest)
        images = _shift(shift, probes, images)
        core = run.host(jnp.sum(blocks.gram(probes, images), axis=0))
        sketch.check(core, core.T)
        values, vectors = eigh((core + core.T) / 2)
    negative = values[0] < -(sketch.precision**0.5) * xp.max(xp.abs(values))  # beyond rounding
    if run.traced:
        sketch.sound = sketch.sound * jnp.where(negative, jnp.nan, 1.0).astype(run.op.dtype)
    elif negative:
        sizes = np.sum(vectors * (gram @ vectors), axis=0)  # |v|² of the vectors that have these forms
        raise _indefinite(float(sketch.unit) * values / sizes, method, other)
    is_noisy = not run.traced and bool(values[0] < shift * weights[0] / 2)
    values = xp.maximum(values, xp.maximum(shift * weights[0], m * sketch.precision**2 * values[-1]))
    root = xp.sqrt(xp.where(values > 0, values, 1))
    factor = blocks.combine(jnp.asarray((vectors / root).T), images)
    return Factored(factor, vectors * root, vectors / root, inverse_gram, shift, smallest, squares, is_noisy)


def _indefinite(quotients: np.ndarray, method: str, other: str) -> SpectraError:
    """For forms vᵀHv / |v|², of which each bounds an eigenvalue."""
    return SpectraError(
        f"{method} needs a positive semi-definite operator, and this one has an eigenvalue at or below "
        f"{quotients[0]:.2e} and one at or above {max(quotients):.2e}. Use method='{other}', or shift it."
    )


def hutchpp(run: Run, kind: str, num_matvecs: int, reason: str) -> Estimate:
    """Hutch++: the trace on a sketched range, and Hutchinson on its complement, a third of products each.

    Given the range Q the samples are independent. For v uniform on the sphere |v|² = n - r in its complement,
    with w = (1 - QQᵀ) H v, Var vᵀw = 2 E |w - v (vᵀw) / |v|²|²: the residual shows the variance, with at
    least one degree of freedom a probe as in `hutchinson`, and the interval rests on Student's t. For
    signs 2 E |w|² is a bound, and for a group of parameters 2 E |(1 - QQᵀ) Π w|²: of one that the sketch all
    but spans there is little of v.

    References:
        Meyer, Musco, Musco and Woodruff, arXiv:2010.09649.
    """
    xp, rank = run.xp, max(1, num_matvecs // 3)
    rest = run.op.size - rank
    sketch = SketchRun(run, kind)
    sketch.extend(rank)
    q, inner = sketch.held.basis, sketch.inner_products()
    qz, qq = inner.qz, inner.qq
    with leave_one_out.careful():
        fixed = xp.trace(2 * qz - qz[-1] @ qq, axis1=-2, axis2=-1)
    lost = lost_in_basis(run, inner)
    parts: list[Any] = []

    def step(count: int) -> tuple[Any, Any]:
        done = num_samples()
        probes = blocks.draw(run.op, run.key, jnp.arange(rank + done, rank + count), kind)
        complement, square = project(q, probes)
        complement = run.keep(complement)
        images, sketch.unit = blocks.in_unit(run.products(complement), sketch.unit)
        samples, squares, residuals = map(run.by_group, complement_forms(q, complement, images))
        if run.by is not None:  # of vᵀΠw only v's complement counts, |(1-QQᵀ)Πw|²; a difference
            inside = run.by_group(_within(q, images))[:-1]
            whole = squares[:-1]
            less = xp.maximum(whole - xp.sum(inside**2, axis=-1), 0)
            squares = xp.concatenate([xp.minimum(less + LOST * run.precision * whole, whole), squares[-1:]])
        if kind == "normal":
            scale = rest / run.host(square)
            squares = scale * xp.concatenate([squares[:-1], residuals[-1:]])
            samples = scale * samples
        parts.append((samples, squares))
        values, stderr = result()
        return values[-1], stderr[-1]

    def result() -> tuple[Any, Any]:
        samples, squares = (xp.concatenate(x, axis=-1) for x in zip(*parts, strict=True))
        variance = 2 * xp.mean(squares, axis=-1) / num_samples() + run.rounding(inner.yy) ** 2 + lost
        return xp.mean(samples, axis=-1) + fixed, arrays.root(variance, xp)

    def num_samples() -> int:
        return sum(samples.shape[-1] for samples, _ in parts)

    ended = adaptive(run, step, num_matvecs - 2 * rank, least=MIN_SKETCH, signed=True)
    return run.estimate(
        *result(),
        unit=sketch.unit,
        sound=sketch.sound,
        num_matvecs=2 * rank + num_samples(),
        method="hutch++",
        ended=ended,
        reason=reason,
        dof=float(num_samples()),
    )


@programs.jit
def _within(basis: PyTree, images: PyTree) -> jax.Array:
    """Q Π w, w = (1 - QQᵀ) H v, for each leaf; (leaves, k, r)."""
    return blocks.gram(project(basis, images)[0], basis)


@programs.jit
def project(basis: PyTree, vectors: PyTree) -> tuple[PyTree, jax.Array]:
    """The part of vectors orthogonal to the basis, and its squared lengths."""
    rest = blocks.subtract(vectors, blocks.combine(jnp.sum(blocks.gram(vectors, basis), axis=0), basis))
    return rest, jnp.sum(blocks.row_dots(rest, rest), axis=0)


@programs.jit
def complement_forms(
    basis: PyTree, vectors: PyTree, images: PyTree
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """v · w, |w|² and |w - v (vᵀw) / |v|²|² with w = (1 - QQᵀ) H v, for each leaf."""
    rest = project(basis, images)[0]
    dots, lengths = blocks.row_dots(vectors, rest), jnp.sum(blocks.row_dots(vectors, vectors), axis=0)
    share = jnp.sum(dots, axis=0) / jnp.where(lengths > 0, lengths, 1)
    along = jax.tree.map(lambda v: v * share.reshape(-1, *[1] * (v.ndim - 1)).astype(v.dtype), vectors)
    residual = blocks.subtract(rest, along)
    return dots, blocks.row_dots(rest, rest), blocks.row_dots(residual, residual)
