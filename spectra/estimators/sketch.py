"""A sketch of the range: probes, their images, and an orthonormal basis of them, grown without loss."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra.estimators import blocks, leave_one_out
from spectra.estimators.leave_one_out import Sketch
from spectra.estimators.run import Run

PyTree = Any
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
        self.num_probes, self.unit = 0, run.no_unit
        self.sound: Any = 1.0  # what estimates are multiplied by, see `Run.check_symmetric`
        self.held: Any = None
        self._parts: Any = None

    def extend(self, count: int, *, project: bool = True) -> None:
        """Raise the number of probes to `count`: one product each, and another one with `project`."""
        run = self.run
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
        )
        self.num_probes = count

    def directions(self, inner: Sketch) -> Any:
        """Unit directions that leaving out a probe removes from the basis, shape (m, m)."""
        return leave_one_out.directions(inner.qy[-1], self.run.op.precision, self.run.xp)

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

    def squared(self, inner: Sketch) -> Sketch:
        """The same for H² in the place of H, from the same products; for the whole only."""
        run, held = self.run, self.held
        zz = run.host(jnp.sum(blocks.gram(held.basis_images, held.basis_images), axis=0))[None]
        zy = run.host(jnp.sum(blocks.gram(held.basis_images, held.images), axis=0))[None]
        return inner._replace(qz=zz, qy=zy, zo=zy, oy=inner.yy)


def _grow(
    op, key, held: Held | None, unit, *, start, stop, kind, batch, project, grouped, keep=None, multiply=None
):
    """More probes and their images; with `project` also a basis of all images and its, and inner products."""
    indices, basis, basis_images, noise = np.arange(start, stop), None, None, None
    if project:
        other = jax.random.fold_in(jax.random.fold_in(key, _BASIS), stop)
        probes, noise = blocks.draw_with_noise(op, key, indices, kind, other)
    else:
        probes = blocks.draw(op, key, indices, kind)
    multiply = multiply or partial(blocks.products, op, batch=batch)
    images, unit = blocks.in_unit(multiply(probes), unit)
    if project:
        basis = blocks.orthonormalize(images, held and held.basis, noise)
        basis = keep(basis) if keep else basis
        basis_images, unit = blocks.in_unit(multiply(basis), unit)
    new = Held(probes, images, basis, basis_images)
    if held is not None:
        new = Held(
            *(None if y is None else blocks.concatenate([x, y]) for x, y in zip(held, new, strict=True))
        )
    return new, _inner_products(new, grouped) if project else None, unit


_grow_compiled = jax.jit(_grow, static_argnames=("start", "stop", "kind", "batch", "project", "grouped"))


@partial(jax.jit, static_argnames="grouped")
def _inner_products(held: Held, grouped: bool):
    """QZᵀ, QYᵀ, QΩᵀ, the diagonals of ΩYᵀ, YYᵀ and ΩΩᵀ, and ZΩᵀ, leaf by leaf; for groups QQᵀ, too."""
    o, y, q, z = held
    parts = [blocks.gram(q, z), blocks.gram(q, y), blocks.gram(q, o)]
    parts += [blocks.row_dots(o, y), blocks.row_dots(y, y), blocks.row_dots(o, o)]
    parts += [blocks.gram(z, o)]
    return [*parts, blocks.gram(q, q)] if grouped else parts
