"""Traces that take out what a sketch of the range explains: Hutch++, XTrace and XNysTrace.

All use a rank-revealing decomposition where the published algorithms invert a triangular factor: a
Hessian nearly always is rank-deficient.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectra import _tree
from spectra._errors import SpectraError
from spectra.estimators import blocks, leave_one_out
from spectra.estimators.hutchinson import mean_and_error
from spectra.estimators.leave_one_out import Nystrom, Sketch
from spectra.estimators.run import Run, adaptive
from spectra.results import Estimate

PyTree = Any
_BASIS = 2**31 - 1  # number of the key that fills a rank-deficient basis; no probe reaches it


class Held(NamedTuple):
    """Stacks of m vectors, the last two only where the sketch projects."""

    probes: PyTree  # Ω
    images: PyTree  # Y = H Ω
    basis: PyTree  # Q, orthonormal, of the range of Y
    basis_images: PyTree  # Z = H Q


class SketchRun:
    """Probes, their images and what is made of them; grows without loss."""

    def __init__(self, run: Run, kind: str):
        self.run, self.kind = run, kind
        self.num_probes = 0
        self.held: Any = None
        self._parts: Any = None

    def extend(self, count: int, *, project: bool = True) -> None:
        """Raise the number of probes to `count`: one product each, and another one with `project`."""
        run = self.run
        grow = _grow if run.op.on_host else _grow_compiled
        self.held, self._parts = grow(
            run.op,
            run.key,
            self.held,
            start=self.num_probes,
            stop=count,
            kind=self.kind,
            batch=run.batch,
            project=project,
            grouped=run.by is not None,
        )
        self.num_probes = count

    def directions(self, sketch: Any) -> Any:
        """Unit directions that leaving out a probe removes from the basis, shape (m, m); R = Q Yᵀ."""
        return leave_one_out.directions(sketch, self.run.op.precision, self.run.xp)

    def inner_products(self) -> Sketch:
        """All that XTrace needs, for each group and for the whole."""
        run = self.run
        qz, qy, qo, oy, yy, oo, *rest = [run.by_group(part) for part in run.fetch(self._parts)]
        run.check_symmetric(qz[-1])
        qq, zo = rest or (run.xp.eye(self.num_probes)[None], qy)
        return Sketch(qq, qz, qy, qo, zo, oy, yy, oo[-1])

    def squared(self, inner: Sketch) -> Sketch:
        """The same for H² in the place of H, from the same products; for the whole only."""
        run, held = self.run, self.held
        zz = run.host(jnp.sum(_gram(held.basis_images, held.basis_images), axis=0))[None]
        zy = run.host(jnp.sum(_gram(held.basis_images, held.images), axis=0))[None]
        return inner._replace(qz=zz, qy=zy, zo=zy, oy=inner.yy)


def _grow(op, key, held: Held | None, *, start, stop, kind, batch, project, grouped):
    """More probes and their images; with `project` also a basis of all images and its, and inner products."""
    probes = blocks.draw(key, jnp.arange(start, stop), op.structure, kind)
    images = blocks.products(op, probes, batch)
    basis = basis_images = None
    if project:
        noise = jax.random.fold_in(jax.random.fold_in(key, _BASIS), stop)
        basis = blocks.orthonormalize(images, held and held.basis, noise)
        basis_images = blocks.products(op, basis, batch)
    new = Held(probes, images, basis, basis_images)
    if held is not None:
        new = Held(
            *(None if y is None else blocks.concatenate([x, y]) for x, y in zip(held, new, strict=True))
        )
    return new, _inner_products(new, grouped) if project else None


_grow_compiled = jax.jit(_grow, static_argnames=("start", "stop", "kind", "batch", "project", "grouped"))


@partial(jax.jit, static_argnames="grouped")
def _inner_products(held: Held, grouped: bool):
    """QZᵀ, QYᵀ, QΩᵀ, and the diagonals of ΩYᵀ, YYᵀ and ΩΩᵀ, leaf by leaf; for groups QQᵀ and ZΩᵀ, too."""
    o, y, q, z = held
    parts = [blocks.gram(q, z), blocks.gram(q, y), blocks.gram(q, o)]
    parts += [blocks.row_dots(o, y), blocks.row_dots(y, y), blocks.row_dots(o, o)]
    return [*parts, blocks.gram(q, q), blocks.gram(z, o)] if grouped else parts


_gram = jax.jit(blocks.gram)
_row_dots = jax.jit(blocks.row_dots)
_draw = jax.jit(
    lambda op, key, indices, kind: blocks.draw(key, indices, op.structure, kind), static_argnames="kind"
)


def xtrace(run: Run, kind: str, num_matvecs: int, reason: str) -> Estimate:
    """XTrace of m probes from 2 m products; see `leave_one_out`."""
    sketch = SketchRun(run, kind)
    found: list[Any] = []

    def step(count):
        sketch.extend(count)
        inner = sketch.inner_products()
        values, pairs = leave_one_out.xtrace_values(
            inner,
            sketch.directions(inner.qy[-1]),
            run.op.size,
            resphere=kind == "normal",
            xp=run.xp,
        )
        found[:] = with_rounding(run, values, pairs, run.rounding(inner.yy))
        return found[0][-1], found[1][-1]

    status = adaptive(run, step, num_matvecs // 2, least=MIN_SKETCH)
    return run.estimate(
        *found,
        num_matvecs=2 * sketch.num_probes,
        method="xtrace",
        status=status,
        reason=reason,
        dof=float(sketch.num_probes - 1),
    )


MIN_SKETCH = 12
"""Probes before an adaptive run with a sketch may stop."""


def with_rounding(run: Run, values, pairs, rounding) -> tuple[Any, Any]:
    """Mean of leave-one-out estimates, and its error with that of rounding."""
    mean, variance = leave_one_out.mean_and_variance(values, pairs, run.xp)
    return mean, run.xp.sqrt(variance + rounding**2)


def xnystrace(run: Run, kind: str, num_matvecs: int, reason: str) -> Estimate:
    """XNysTrace of m probes from m products, for positive semi-definite operators.

    The operator is shifted by ν, the rounding of its products, and n ν is taken off the trace: of the
    shifted core ΩᵀAΩ no eigenvalue is below ν times the smallest of ΩᵀΩ but for rounding, and there it
    is raised to that.
    """
    xp, sketch = run.xp, SketchRun(run, kind)
    found: list[Any] = []

    def step(count):
        sketch.extend(count, project=False)
        (probes, images, *_), m = sketch.held, sketch.num_probes
        squares = run.by_group(_row_dots(images, images))
        shift = run.op.precision * xp.sqrt(xp.sum(squares[-1]) / (m * run.op.size))
        images = _shift(shift, probes, images)
        core = run.host(jnp.sum(_gram(probes, images), axis=0))
        gram = run.host(jnp.sum(_gram(probes, probes), axis=0))
        with leave_one_out.careful():
            values, vectors = xp.linalg.eigh((core + core.T) / 2)
            weights, axes = xp.linalg.eigh(gram)
            inverse_gram = (axes / xp.maximum(weights, run.op.precision * weights[-1])) @ axes.T
        if not run.traced:
            _require_positive(values, run)
        values = xp.maximum(values, xp.maximum(shift * weights[0], m * run.op.precision**2 * values[-1]))
        root = xp.sqrt(xp.where(values > 0, values, 1))
        factor = _combine(jnp.asarray((vectors / root).T), images)
        core = Nystrom(
            bb=run.by_group(_gram(factor, factor)),
            ob=run.by_group(_gram(probes, factor)),
            root=vectors * root,
            inverse_root=vectors / root,
            inverse_gram=inverse_gram,
        )
        estimates, pairs = leave_one_out.xnystrace_values(core, run.op.size, resphere=kind == "normal", xp=xp)
        taken = (shift * xp.asarray(run.sizes))[:, None]
        estimates, pairs = estimates - taken, pairs - taken
        # Rounding of the core counts in units of the smallest eigenvalue of ΩΩᵀ, and the shift is no larger.
        floor = run.rounding(squares) * run.op.size / weights[0]
        found[:] = with_rounding(run, estimates, pairs, floor)
        return found[0][-1], found[1][-1]

    status = adaptive(run, step, num_matvecs, least=MIN_SKETCH)
    return run.estimate(
        *found,
        num_matvecs=sketch.num_probes,
        method="xnystrace",
        status=status,
        reason=reason,
        dof=float(sketch.num_probes - 1),
    )


@jax.jit
def _shift(factor, vectors, products):
    return _tree.axpy(factor, vectors, products)


_combine = jax.jit(blocks.combine)


def _require_positive(values, run: Run) -> None:
    if values[0] < -(run.op.precision**0.5) * abs(values).max():
        raise SpectraError(
            f"xnystrace needs a positive semi-definite operator: on the span of the probes it has the "
            f"eigenvalue {values[0]:.2e} beside {values[-1]:.2e}. Use method='xtrace', or shift the operator."
        )


def hutchpp(run: Run, kind: str, num_matvecs: int, reason: str) -> Estimate:
    """Hutch++: the trace on a sketched range, and Hutchinson on its complement, a third of products each.

    Given the range Q the samples are independent: the interval rests on Student's t.

    References:
        Meyer, Musco, Musco and Woodruff, arXiv:2010.09649.
    """
    xp, rank = run.xp, max(1, num_matvecs // 3)
    sketch = SketchRun(run, kind)
    sketch.extend(rank)
    q, inner = sketch.held.basis, sketch.inner_products()
    qz, qq = inner.qz, inner.qq
    with leave_one_out.careful():
        fixed = xp.trace(2 * qz - qz[-1] @ qq, axis1=-2, axis2=-1)
    parts: list[Any] = []

    def step(count):
        done = sum(x.shape[-1] for x in parts)
        probes = _draw(run.op, run.key, jnp.arange(rank + done, rank + count), kind)
        complement, square = _project(q, probes)
        images = blocks.products(run.op, complement, run.batch)
        samples = run.by_group(_complement_forms(q, complement, images))
        if kind == "normal":
            samples = samples * (run.op.size - rank) / run.host(square)
        parts.append(samples)
        values, stderr = result()
        return values[-1], stderr[-1]

    def result():
        mean, stderr = mean_and_error(run, xp.concatenate(parts, axis=-1))
        return mean + fixed, xp.hypot(stderr, run.rounding(inner.yy))

    status = adaptive(run, step, num_matvecs - 2 * rank, least=MIN_SKETCH)
    samples = sum(x.shape[-1] for x in parts)
    return run.estimate(
        *result(),
        num_matvecs=2 * rank + samples,
        method="hutch++",
        status=status,
        reason=reason,
        dof=float(samples - 1),
    )


@jax.jit
def _project(basis: PyTree, vectors: PyTree):
    """The part of vectors orthogonal to the basis, and its squared lengths."""
    rest = blocks.subtract(vectors, blocks.combine(jnp.sum(blocks.gram(vectors, basis), axis=0), basis))
    return rest, jnp.sum(blocks.row_dots(rest, rest), axis=0)


@jax.jit
def _complement_forms(basis: PyTree, vectors: PyTree, images: PyTree):
    """v · (1 - QQᵀ) H v for each leaf."""
    return blocks.row_dots(vectors, _project(basis, images)[0])
