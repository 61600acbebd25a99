"""Diagonal entries one by one, and what rounding does to the products that they are made of."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, programs, stacks, trees
from spectra.base.trees import PyTree
from spectra.estimators import blocks
from spectra.estimators.run import Run
from spectra.krylov.packed import unpacked
from spectra.krylov.product_rounding import KEY, SAMPLES, is_measured
from spectra.operators.base import LinearOperator
from spectra.operators.doubled import doubled
from spectra.operators.jaxprs import outside_loops
from spectra.results import Estimate

_Columns = tuple[jax.Array, jax.Array, jax.Array]  # entries, norms, and products with a vector
SHARP = 2.5e4
"""Roundings of its value within which an estimate from samples is stated where rounding is measured, 0.3 % in
float32. It costs eight products; what rounding does to a loss is hidden by a spread that is larger."""


def columns(run: Run) -> tuple[jax.Array, jax.Array, Any]:
    """e_iᵀ H e_i and |H e_i| for all i, in the order of `ravel`, two arrays (n,), and what
    `Run.check_columns` says of them: the same z is multiplied by H, and by the n columns from the left."""
    op, n = run.op, run.op.size
    vector = blocks.normal_vector(op, jax.random.key(0))
    z, image = (jax.tree.map(lambda x: x[0], stack) for stack in (vector, blocks.products(op, vector, 1)))
    if not op.on_host and run.journal is None:
        entries, norms, across = _columns(op, z, run.batch)
    else:

        def step(state: None, start: int, stop: int) -> tuple[None, _Columns]:
            indices = np.arange(start, stop)
            return state, _entries(op.mv_batch(_units(op, indices)), indices, z)

        parts = run.fold(step, None, 0, n, out=(0, 0, 0))[1]
        entries, norms, across = (jnp.concatenate(x) for x in zip(*parts, strict=True))
    return entries, norms, run.check_columns(across, trees.ravel(image))


def stated(run: Run, norms: jax.Array) -> jax.Array:
    """What an entry of each column is off by, as its norm says, or where parts cancel that of all."""
    size = norms
    if not run.traced and run.column_precision > run.op.precision:
        unit = jnp.max(norms)
        mean = unit * arrays.root(jnp.mean((norms / jnp.where(unit > 0, unit, 1)) ** 2))
        size = jnp.maximum(norms, mean)
    return run.column_precision * size


def _unit(op: LinearOperator, i: int | jax.Array) -> PyTree:
    return trees.unravel(jnp.zeros(op.size, op.dtype).at[i].set(1), op.structure)


@programs.jit
def _units(op: LinearOperator, indices: arrays.Indices) -> PyTree:
    return jax.vmap(lambda i: _unit(op, i))(indices)


@programs.jit
def _entries(products: PyTree, indices: arrays.Indices, z: PyTree) -> _Columns:
    def one(product: PyTree, i: jax.Array) -> _Columns:
        return trees.ravel(product)[i], trees.norm(product), trees.vdot(z, product)

    return jax.vmap(one)(products, indices)


@partial(programs.jit, static_argnames="batch")
def _columns(op: LinearOperator, z: PyTree, batch: int) -> _Columns:
    def one(i: jax.Array) -> _Columns:
        product = op.mv(_unit(op, i))
        return trees.ravel(product)[i], trees.norm(product), trees.vdot(z, product)

    return stacks.mapped(one, jnp.arange(op.size), batch)


def moved_products(run: Run, moved: bool = False) -> list[tuple[PyTree, PyTree, PyTree]]:
    """`changes_of_products` of a run; empty inside a caller's jit, where it would double the program."""
    return [] if run.traced else changes_of_products(unpacked(run.op), run.source, moved)


def changes_of_products(
    op: LinearOperator, source: LinearOperator, moved: bool = False
) -> list[tuple[PyTree, PyTree, PyTree]]:
    """(v, H v, (H' - H) v) for `SAMPLES` vectors of random signs v and H' in float64, or moved operators H'.

    `op` is the prepared form of `source`. Empty where an operator does not say what it depends on, as a
    matrix does not: its entries are what is asked for, and the rounding of its products is their stated
    precision.
    """
    key = jax.random.key(KEY)
    if not is_measured(source, moved):
        return []
    exact = None if moved else doubled(source)
    found: list[tuple[PyTree, PyTree, PyTree]] = []
    for i in range(SAMPLES):
        one = jax.random.fold_in(key, i)
        vectors = blocks.draw(op, one, np.arange(1), "rademacher")
        other = exact or source.moved(one)
        assert other is not None
        here, there = (blocks.products(x, vectors, 1) for x in (op, outside_loops(other.prepare())))
        vectors, here, there = (jax.tree.map(lambda x: x[0], tree) for tree in (vectors, here, there))
        found.append((vectors, here, trees.difference(there, here)))
    return found


def of_nothing(run: Run, found: Estimate, measure: Callable[[PyTree, PyTree], PyTree]) -> Estimate:
    """The estimate, or where all products vanished that of H' - H as its error, H' in float64 or moved.

    Samples that are all zero have no spread, and no rounding that would be a share of them. `measure` makes
    of v and (H' - H) v what the estimate would be of H' - H. As in `product_rounding.vanished` both H' count.
    """
    if run.traced or any(map(np.any, jax.tree.leaves((found.value, found.stderr)))):
        return found
    both = [moved_products(run, moved) for moved in ((True, False) if is_measured(run.source, True) else ())]
    if not both:
        return found
    tiny = float(jnp.finfo(run.op.dtype).tiny)

    def error(*changes: Any) -> Any:
        by_kind = [root_mean_square([*kind]) for kind in np.split(np.asarray(changes, float), len(both))]
        found = np.maximum(np.max(by_kind, axis=0), tiny)
        return float(found) if np.ndim(found) == 0 else jnp.asarray(found, run.op.dtype)

    stderr = jax.tree.map(error, *(measure(v, change) for kind in both for v, _, change in kind))
    return dataclasses.replace(found, stderr=stderr, dof=float(SAMPLES))


def of_little(run: Run, found: Estimate, measure: Callable[[PyTree, PyTree, PyTree], PyTree]) -> Estimate:
    """The estimate with rounding as measured, where samples leave hardly any other error.

    The stated precision is that of products; a loss that is nearly saturated loses more. `measure` makes of
    v, H v and (H' - H) v what the estimate is off by. Degrees of freedom are those of both (Satterthwaite).
    """
    if run.traced or found.method == "exact":
        return found
    values, errors = (np.asarray(jax.tree.leaves(x), float) for x in (found.value, found.stderr))
    sharp = is_sharp(run, values, errors)
    samples = [measure(*moved) for moved in moved_products(run)] if sharp.any() else []
    if not samples:
        return found
    measured = jax.tree.map(lambda *x: float(root_mean_square([*x])), *samples)
    stderr = jax.tree.map(lambda a, b: float(np.hypot(a, b)), found.stderr, measured)
    spread, rounding = (np.square(jax.tree.leaves(x)) for x in (found.stderr, measured))
    terms = spread**2 / (found.dof or np.inf) + rounding**2 / len(samples)
    with np.errstate(divide="ignore", invalid="ignore"):
        dof = float(np.nanmin((spread + rounding) ** 2 / terms, initial=np.inf))
    return dataclasses.replace(found, stderr=stderr, dof=dof if np.isfinite(dof) else None)


def is_sharp(run: Run, value: Any, stderr: Any) -> Any:
    """Whether what samples leave open is so little that rounding is measured; of numbers, or of arrays."""
    return np.asarray(stderr) < SHARP * run.op.precision * np.abs(value)


def measured_precision(run: Run) -> float:
    """|H' - H| / |H| in the Frobenius norm, from the moved products; 0 where there are none."""
    moved = moved_products(run)
    sizes = np.square([[trees.length(x) for x in images] for _, *images in moved]).mean(0) if moved else None
    return 0.0 if sizes is None or not sizes[0] else float(np.sqrt(sizes[1] / sizes[0]))


def root_mean_square(samples: list[Any]) -> Any:
    """Of numbers or arrays, one for each moved operator."""
    return np.sqrt(np.mean(np.square(samples), axis=0))


def leaf_dots(a: PyTree, b: PyTree) -> jax.Array:
    """a · b restricted to each leaf."""
    a, b = (jax.tree.map(lambda x: x[None], tree) for tree in (a, b))
    return blocks.row_dots(a, b)[:, 0]


def form(product: PyTree, change: PyTree, unit: jax.Array) -> float:
    """a · b on the host, in the square of a unit for products."""
    images, _ = blocks.in_unit((product, change), unit)
    return float(trees.vdot(*images))
