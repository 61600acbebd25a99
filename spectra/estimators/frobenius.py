"""The Frobenius norm of an operator, from the products that a trace takes."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays, programs, stacks, trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError
from spectra.base.trees import PyTree
from spectra.estimators import blocks, exact, leave_one_out
from spectra.estimators.low_rank import with_rounding
from spectra.estimators.run import ALL_DONE, Ended, Run, adaptive, begin
from spectra.estimators.sketches import MIN_SKETCH, SketchRun
from spectra.estimators.trace import STACKS, choose
from spectra.operators.base import LinearOperator
from spectra.results import Estimate

LARGEST = math.nextafter(1.0, 0.0)
"""A run takes tolerances below one."""


@automatic
def frobenius_norm(
    op: LinearOperator,
    *,
    key: jax.Array | None,
    num_matvecs: int = 64,
    tol: float | None = None,
    probe_batch: int | None = None,
) -> Estimate:
    """Estimate the Frobenius norm ‖H‖_F = sqrt(Σ_ij H_ij²), the root of the sum of squared eigenvalues.

    ‖H‖_F² = tr H² needs only products with H: XTrace of H² uses the sketch of H, with |Hv|² in place of vᵀHv.
    If 2 num_matvecs vectors do not fit into half of the free memory, or for fewer than four products, it is
    the mean of |Hv|² over normal probes. The error is propagated through the square root to first order.
    Rounding is measured where it is for `trace`.

    Args:
        op: symmetric operator of order n.
        key: JAX random key.
        num_matvecs: budget of products; exact if it covers n.
        tol: stop as soon as stderr <= tol value.
        probe_batch: products computed side by side; changes the result by rounding only.

    Returns:
        `Estimate` with value and stderr.

    Raises:
        SpectraError: as `trace`.

    Cost: at most num_matvecs products, and 8 where rounding is measured; memory as `trace`.

    References:
        Epperly, Tropp and Webber, arXiv:2301.07825.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.array([[3.0, 0.0], [0.0, -4.0]]))
        >>> spectra.frobenius_norm(op, key=jax.random.key(0)).value
        5.0
    """
    method, reason = choose(op, "auto", num_matvecs)
    if tol is not None and not 0 < tol < 1:
        raise SpectraError(f"tol={tol} is relative to the value: use a number in (0, 1).")
    run = begin(
        op,
        key=key,
        by=None,
        tol=tol if tol is None else min(2 * tol, LARGEST),  # of the square
        num_matvecs=num_matvecs,
        probe_batch=probe_batch,
        count=op.size if method == "exact" else num_matvecs,
        stacks=math.ceil(STACKS.get(method, 0) * num_matvecs),
        needs_key=method != "exact",
    )
    if method == "exact":
        found = _exact(run)
    elif method == "hutchinson":
        found = _sampled(run.packed, num_matvecs)
    else:
        found = _sketched(run.packed, num_matvecs)
    value = arrays.root(run.xp.maximum(found.square, 0), run.xp)
    stderr = found.error / run.xp.where(value > 0, 2 * value, 1)
    estimate = run.estimate(
        run.xp.asarray([value]),
        run.xp.asarray([stderr]),
        unit=found.unit,
        num_matvecs=found.num_matvecs,
        method=method,
        ended=found.ended,
        sound=found.sound,
        reason=reason,
        dof=found.dof,
    )

    def off_by(v: PyTree, product: PyTree, change: PyTree) -> float:
        """tr H (H' - H) / |H|, to first order what the norm is off by."""
        return exact.form(product, change, found.unit) / float(value) * float(found.unit)

    estimate = exact.of_little(run, estimate, off_by)
    return exact.of_nothing(run, estimate, lambda _, change: float(trees.norm(change)))


class _Squared(NamedTuple):
    """|H|_F² and its standard error, in the unit squared, and what they are known from."""

    square: Any
    error: Any
    unit: Any
    num_matvecs: int
    ended: Ended
    sound: Any  # whether the products are finite and symmetric
    dof: float | None


def _exact(run: Run) -> _Squared:
    """The sum of |H e_i|²."""
    _, norms, sound = exact.columns(run)
    norms, unit = blocks.in_unit(norms, run.no_unit)
    square = run.xp.sum(run.host(norms) ** 2)
    error, dof = 2 * run.op.precision * square, None
    if moved := exact.moved_products(run):
        forms = [2 * exact.form(product, change, unit) for _, product, change in moved]
        error, dof = np.hypot(error, exact.root_mean_square(forms)), float(len(moved))
    return _Squared(square, error, unit, run.op.size, ALL_DONE, sound, dof)


def _sketched(run: Run, num_matvecs: int) -> _Squared:
    """XTrace of H²."""
    sketch = SketchRun(run, "normal")
    found: list[Any] = []

    def step(count: int) -> list[Any]:
        sketch.extend(count)
        inner = sketch.inner_products()
        squared, directions = sketch.squared(inner), sketch.directions(inner)
        values, pairs, known = leave_one_out.xtrace_values(
            squared, directions, run.op.size, run.op.precision, resphere=True, xp=run.xp
        )
        mean, error = with_rounding(run, values, pairs, 0.0, known=known)
        found[:] = [mean[-1], arrays.root(error[-1] ** 2 + (2 * run.precision * mean[-1]) ** 2, run.xp)]
        return found

    ended = adaptive(run, step, num_matvecs // 2, least=MIN_SKETCH)
    square, error = found
    probes = sketch.num_probes
    return _Squared(square, error, sketch.unit, 2 * probes, ended, sketch.sound, float(probes - 1))


def _sampled(run: Run, num_matvecs: int) -> _Squared:
    """Mean of |Hv|² over normal probes.

    |Hv|² has the law Σ λ_i² χ²_1, so that k of them are close to χ² with ν = k |H|_F⁴ / tr H⁴ >= k degrees of
    freedom (Satterthwaite), and the root has the standard error |H|_F / sqrt(2 ν). Both the spread of |Hv|²
    and (w_i · w_{i-1})² for products w = Hv estimate tr H⁴ without bias; the larger one is taken, at most
    |H|_F⁴. The root of χ² is skewed: Student's t with k / 2 degrees of freedom has its quantiles to 3 %.
    """
    xp = run.xp
    parts: list[tuple[Any, Any]] = []
    unit, pairs = blocks.begin_pairs(run.op, run.key, 0)

    def result() -> tuple[Any, Any]:
        squares, crosses = (xp.concatenate([part[i] for part in parts]) for i in range(2))
        k, mean = len(squares), xp.mean(squares)
        fourth = mean**2
        if k > 1:
            crossed = xp.sum(crosses[1:] ** 2) / (k - 1)
            fourth = xp.minimum(xp.maximum(xp.var(squares, ddof=1) / 2, crossed), mean**2)
        return mean, arrays.root(2 * fourth / k + (2 * run.precision * mean) ** 2, xp)

    def num_probes() -> int:
        return sum(len(squares) for squares, _ in parts)

    def step(count: int) -> tuple[Any, Any]:
        nonlocal pairs, unit
        squares, crosses, pairs, unit = _norms(run, num_probes(), count, pairs, unit)
        parts.append((squares, crosses))
        return result()

    ended = adaptive(run, step, num_matvecs)
    square, error = result()
    return _Squared(square, error, unit, num_probes(), ended, run.check_pairs(pairs), num_probes() / 2)


def _norms(
    run: Run, start: int, stop: int, pairs: blocks.Pairs, unit: jax.Array
) -> tuple[Any, Any, blocks.Pairs, Any]:
    """|w_i|², w_i · w_{i-1} (first of all with zero), and the pairs so far, for w = Hv of probes
    start..stop-1.

    All in the unit that is returned as well, see `blocks.in_unit`.
    """
    op, indices = run.op, jnp.arange(start, stop)
    batch = min(run.batch, stop - start)
    if not op.on_host:
        *found, pairs, unit = _norms_compiled(op, run.key, indices, pairs, unit, batch)
    else:
        parts: list[list[jax.Array]] = []
        for part in np.split(indices, range(batch, stop - start, batch)):
            probes = blocks.draw(op, run.key, part, "normal")
            images, unit = blocks.in_unit(op.mv_batch(probes), unit)
            *dots, pairs = _stack_norms(probes, images, pairs)
            parts.append(dots)
        found = [jnp.concatenate([dots[i] for dots in parts]) for i in range(2)]
    return run.host(found[0]), run.host(found[1]), pairs, unit


@partial(programs.jit, static_argnames="batch")
def _norms_compiled(
    op: LinearOperator,
    key: jax.Array,
    indices: arrays.Indices,
    pairs: blocks.Pairs,
    unit: jax.Array,
    batch: int,
) -> Any:
    def step(
        carried: tuple[blocks.Pairs, jax.Array], part: arrays.Indices
    ) -> tuple[tuple[blocks.Pairs, jax.Array], list[jax.Array]]:
        pairs, unit = carried
        probes = blocks.draw(op, key, part, "normal")
        images, unit = blocks.in_unit(stacks.mapped(op.mv, probes), unit)
        *dots, pairs = _stack_norms(probes, images, pairs)
        return (pairs, unit), dots

    whole = len(indices) - len(indices) % batch
    carried, found = lax.scan(step, (pairs, unit), indices[:whole].reshape(-1, batch))
    found = [x.ravel() for x in found]
    if whole < len(indices):
        carried, rest = step(carried, indices[whole:])
        found = [jnp.concatenate(x) for x in zip(found, rest, strict=True)]
    return *found, *carried


@programs.jit
def _stack_norms(
    probes: PyTree, images: PyTree, pairs: blocks.Pairs
) -> tuple[jax.Array, jax.Array, blocks.Pairs]:
    before = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y[:-1]]), pairs.image, images)
    squares, crosses = (jnp.sum(blocks.row_dots(images, x), axis=0) for x in (images, before))
    return squares, crosses, blocks.with_products(pairs, probes, images)
