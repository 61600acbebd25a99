"""A sketch: probes, their images, and an orthonormal basis of them, grown without loss.

What Hutch++, XTrace, XNysTrace and their kin for norms and diagonals have in common.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import meshes, programs, trees
from spectra.base.errors import Status
from spectra.base.trees import PyTree
from spectra.estimators import blocks, exact, leave_one_out
from spectra.estimators.leave_one_out import Sketch
from spectra.estimators.run import Ended, Run
from spectra.operators.base import LinearOperator

MIN_SKETCH = 12
"""Probes before an adaptive run with a sketch may stop."""
_BASIS = 2**31 - 1  # number of the key that fills a rank-deficient basis; no probe reaches it


class Held(NamedTuple):
    """Stacks of m vectors, the last two only where the sketch projects."""

    probes: PyTree  # Ω
    images: PyTree  # Y = H Ω, in the unit of the run, as all products
    basis: PyTree  # Q, orthonormal, of the range of Y
    basis_images: PyTree  # Z = H Q


class SketchRun:
    """Probes, their images and what is made of them; grows without loss.

    All inner products are those of H in units of `unit`, see `blocks.in_unit`.
    """

    def __init__(self, run: Run, kind: str):
        self.run, self.kind = run, kind
        self.precision = run.precision  # of products, as stated; `remade` measures it
        self.num_probes, self.unit = 0, run.no_unit
        self.sound: Any = 1.0  # what estimates are multiplied by, see `Run.check_symmetric`
        self.held: Any = None
        self._parts: Any = None

    def extend(self, count: int, *, project: bool = True) -> None:
        """Raise the number of probes to `count`: one product each, and another one with `project`."""
        run = self.run
        if count == self.num_probes:
            return
        grow = _grow_compiled
        if run.op.on_host or run.journal is not None:  # products come from the host
            grow = partial(_grow, keep=run.keep, multiply=run.products)
        self.held, self._parts, self.unit = grow(
            run.op,
            run.key,
            self.held,
            self.unit,
            start=self.num_probes,
            stop=count,
            kind=self.kind,
            batch=run.batch,
            project=project,
            grouped=run.by is not None,
            where=meshes.places(run.op.like),
        )
        self.num_probes = count

    def remade(
        self, step: Callable[[int], Any], ended: Ended, value: float, stderr: float, *, is_noisy: bool
    ) -> Ended:
        """Take the last step of a Nyström approximation again if it is finer than products are.

        With a shift below what rounding does to the core, it divides by that. Rounding is measured where the
        core shows more than is stated, as `is_noisy` says, and where hardly any other error is left.
        """
        run, stated = self.run, self.precision
        if run.traced or not (is_noisy or exact.is_sharp(run, value, stderr)):
            return ended
        self.precision = max(stated, exact.measured_precision(run))
        if self.precision == stated:
            return ended
        value, stderr = step(self.num_probes)
        missed = ended.status is Status.CONVERGED and stderr > (run.tol or 1) * abs(value)
        return ended._replace(status=Status.STAGNATED) if missed else ended

    def directions(self, inner: Sketch) -> Any:
        """Unit directions that leaving out a probe removes from the basis, shape (m, m).

        What products are off by does not count: the basis is that of the images as they are.
        """
        rounding = trees.roundoff(self.run.op.structure)
        return leave_one_out.directions(inner.qy[-1], rounding, self.run.xp)

    def inner_products(self) -> Sketch:
        """All that XTrace needs, for each group and for the whole."""
        run = self.run
        qz, qy, qo, oy, yy, oo, zo, *rest = [run.by_group(part) for part in run.fetch(self._parts)]
        self.check(qz[-1], qz[-1].T)
        self.check(qy[-1], zo[-1])
        qq = rest[0] if rest else run.xp.eye(self.num_probes)[None]
        return Sketch(qq, qz, qy, qo, zo, oy, yy, oo[-1])

    def check(self, form: Any, other: Any) -> None:
        """Compare uᵀHv with vᵀHu for all rows u of one set and v of another."""
        self.sound = self.sound * self.run.check_symmetric(form, other)

    def outside(self, inner: Sketch, directions: Any) -> Any:
        """|Π (1-P) H (1-P) ω_j|² for each group, with P the sketch without probe j; (G, m)."""
        dtype = self.run.op.dtype
        x, c = (jnp.asarray(a, dtype) for a in leave_one_out.outside_of(inner, directions, self.run.xp))
        return self.run.by_group(_outside(self.held, x, c))

    def squared(self, inner: Sketch) -> Sketch:
        """The same for H² in place of H, from the same products; for the whole only."""
        run, held = self.run, self.held
        zz = run.host(jnp.sum(blocks.gram(held.basis_images, held.basis_images), axis=0))[None]
        zy = run.host(jnp.sum(blocks.gram(held.basis_images, held.images), axis=0))[None]
        return inner._replace(qz=zz, qy=zy, zo=zy, oy=inner.yy)


def _grow(
    op: LinearOperator,
    key: jax.Array,
    held: Held | None,
    unit: jax.Array,
    *,
    start: int,
    stop: int,
    kind: str,
    batch: int,
    project: bool,
    grouped: bool,
    where: meshes.Places,
    keep: Callable[[PyTree], PyTree] | None = None,
    multiply: Callable[[PyTree], PyTree] | None = None,
) -> tuple[Held, list[jax.Array] | None, jax.Array]:
    """More probes and their images; with `project` also a basis of all images and its, and inner products.

    On a mesh all of them lie as the parameters do: what a program returns would be whole on every device.
    """
    placed = partial(blocks.placed, where=where)
    indices, basis, basis_images, noise = np.arange(start, stop), None, None, None
    if project:
        other = jax.random.fold_in(jax.random.fold_in(key, _BASIS), stop)
        probes, noise = map(placed, blocks.draw_with_noise(op, key, indices, kind, other))
    else:
        probes = placed(blocks.draw(op, key, indices, kind))
    multiply = multiply or partial(blocks.products, op, batch=batch)
    images, unit = blocks.in_unit(placed(multiply(probes)), unit)
    if project:
        basis = placed(blocks.orthonormalize(images, held and held.basis, noise))
        basis = keep(basis) if keep else basis
        basis_images, unit = blocks.in_unit(placed(multiply(basis)), unit)
    new = Held(probes, images, basis, basis_images)
    if held is not None:
        new = Held(
            *(None if y is None else blocks.concatenate([x, y]) for x, y in zip(held, new, strict=True))
        )
    return new, _inner_products(new, grouped) if project else None, unit


_grow_compiled = programs.jit(
    _grow,
    options=programs.FUSED,
    static_argnames=("start", "stop", "kind", "batch", "project", "grouped", "where"),
)


@partial(programs.jit, static_argnames="grouped")
def _inner_products(held: Held, grouped: bool) -> list[jax.Array]:
    """QZᵀ, QYᵀ, QΩᵀ, the diagonals of ΩYᵀ, YYᵀ and ΩΩᵀ, and ZΩᵀ, leaf by leaf; for groups QQᵀ, too."""
    o, y, q, z = held
    parts = [blocks.gram(q, z), blocks.gram(q, y), blocks.gram(q, o)]
    parts += [blocks.row_dots(o, y), blocks.row_dots(y, y), blocks.row_dots(o, o)]
    parts += [blocks.gram(z, o)]
    return [*parts, blocks.gram(q, q)] if grouped else parts


@programs.jit
def _outside(held: Held, x: jax.Array, c: jax.Array) -> jax.Array:
    """Squares of rows of Y - x Z - c Q, leaf by leaf."""
    rest = blocks.subtract(held.images, blocks.combine(x, held.basis_images))
    rest = blocks.subtract(rest, blocks.combine(c, held.basis))
    return blocks.row_dots(rest, rest)
