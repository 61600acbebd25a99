"""What every estimator shares: arguments and their checks, groups of leaves, adaptive runs, results."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import arrays, paths, trees
from spectra.base import host as _memory
from spectra.base.calls import require_key
from spectra.base.errors import MemoryLimitError, NonFiniteError, NotSymmetricError, SpectraError, Status
from spectra.base.trees import PyTree
from spectra.estimators import blocks
from spectra.estimators.blocks import PROBES
from spectra.krylov.cancelled import relative_precision, rounds_columns
from spectra.krylov.packed import layout_of, packed
from spectra.krylov.plan import VECTORS, choose_batch
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.jaxprs import outside_loops
from spectra.results import Estimate, format_bytes
from spectra.runs.watch import Journal

Array = Any
MIN_PROBES = 16
"""Probes before an adaptive run may stop: an error estimated from fewer is too often far too small."""


FEW = 8
"""Leaves up to which vectors are not packed: to pack a product takes time in every call, to compile for many
leaves in the first. With 19 of them (983,400 parameters, 64 examples, where products cost least) the first
XTrace takes 11.9 s of an EPYC's time for 16.3 and the next ones 2.6 for 2.1, `diagonal` 13.7 for 25.9 and
then 2.6 for 1.9."""


class Ended(NamedTuple):
    """How a run of growing numbers of probes came to its end."""

    status: Status
    widen: float  # what its error is multiplied by


ALL_DONE = Ended(Status.COMPLETE, 1.0)


@dataclasses.dataclass(frozen=True)
class Run:
    """A prepared operator with everything that one estimate was asked with."""

    op: LinearOperator  # prepared
    source: LinearOperator  # as it was given
    key: Any
    groups: dict[str, tuple[int, ...]]  # leaves of each group; empty for a single number
    by: str | None
    tol: float | None
    batch: int
    traced: bool
    precision: float  # relative error of a product, also where terms cancel
    journal: Journal | None = None  # where somebody watches the run, or it is saved

    @property
    def packed(self) -> "Run":
        """The same on packed vectors where that is worth it (see `FEW`): for one number, or for entries."""
        if self.traced or self.by is not None or len(jax.tree.leaves(self.op.structure)) <= FEW:
            return self
        return dataclasses.replace(self, op=packed(layout_of(self.op, self.journal), self.op))

    @property
    def column_precision(self) -> float:
        """The same of columns H e_i."""
        return self.precision if rounds_columns(self.source) else self.op.precision

    @property
    def xp(self) -> Any:
        """NumPy in float64 on the host, JAX inside a caller's jit."""
        return jnp if self.traced else np

    def fetch(self, parts: Array) -> Array:
        """A tree of arrays on the host, in one transfer; as it is under tracing."""
        return parts if self.traced else jax.device_get(parts)

    def host(self, x: Array) -> Array:
        """Float64 on the host, as it is under tracing; raises for NaN and infinity."""
        if self.traced:
            return x
        x = np.asarray(x, np.float64)
        if not np.isfinite(x).all():
            raise NonFiniteError(f"a product is NaN or infinite. {self.op.explain_non_finite()}")
        return x

    @property
    def leaf_sets(self) -> list[tuple[int, ...]]:
        """Leaves of each group, and all leaves last."""
        return [*self.groups.values(), tuple(range(len(jax.tree.leaves(self.op.structure))))]

    @property
    def sizes(self) -> np.ndarray:
        """Number of parameters of each group, and of all."""
        if not self.groups:
            return np.array([self.op.size], float)
        leaves = [math.prod(leaf.shape) for leaf in jax.tree.leaves(self.op.structure)]
        return np.array([sum(leaves[i] for i in group) for group in self.leaf_sets], float)

    @property
    def no_unit(self) -> Any:
        """Where no product was seen yet, see `blocks.in_unit`."""
        return jnp.zeros((), self.op.dtype)

    def fold(
        self,
        step: Callable[[Any, int, int], tuple[Any, Any]],
        state: PyTree,
        start: int,
        stop: int,
        **looks: PyTree,
    ) -> tuple[PyTree, list[PyTree]]:
        """state, out = step(state, a, b) for each batch a..b-1 of start..stop-1; see `Journal.fold`."""
        parts = list(itertools.pairwise([*range(start, stop, self.batch), stop]))
        if self.journal is not None:
            return self.journal.fold(step, state, parts, **looks)
        outs: list[PyTree] = []
        for part in parts:
            state, out = step(state, *part)
            outs.append(out)
        return state, outs

    def keep(self, stack: PyTree) -> PyTree:
        """A stack that was computed and is to be multiplied, or the one that was; see `Journal.keep`."""
        return stack if self.journal is None else self.journal.keep(lambda: stack, self.op.like)

    def products(self, stack: PyTree) -> PyTree:
        """H v for each vector of a stack, `batch` at a time."""
        if self.journal is None:
            return blocks.products(self.op, stack, self.batch)

        def step(state: None, start: int, stop: int) -> tuple[None, PyTree]:
            return state, blocks.products(self.op, blocks.rows(stack, start, stop), self.batch)

        return blocks.concatenate(self.fold(step, None, 0, blocks.length(stack), out=self.op.like)[1])

    def by_group(self, leafwise: Array) -> Array:
        """An array with a leading axis of leaves, summed over each group, and over all in the last row."""
        parts = self.host(leafwise)
        return self.xp.stack([sum(parts[i] for i in leaves) for leaves in self.leaf_sets])

    def rounding(self, squares: Array, precision: float | None = None) -> Array:
        """Error of vᵀHv by rounding, eps |v| |Hv|, for each group; `squares` (G, k) holds |(Hv)_g|²."""
        error = arrays.root(self.sizes * self.xp.mean(squares, axis=-1), self.xp)
        return (precision or self.precision) * error

    def check_symmetric(self, form: Array, other: Array) -> Array:
        """What estimates are multiplied by: 1, and NaN inside `jit` where uᵀHv contradicts vᵀHu.

        Outside `jit` that raises. Both are matrices (m, m) of these numbers for two orthonormal sets of rows.
        """
        worst, size = self.xp.max(self.xp.abs(form - other)), self.xp.sqrt(self.xp.sum(form**2))
        return self._sound(worst, size, float(np.sqrt(self.precision)), "reaches")

    def check_pairs(self, pairs: blocks.Pairs) -> Array:
        """The same for neighbouring probes."""
        count, square = self.host(pairs.count), self.host(pairs.square)
        worst = self.xp.sqrt(square / self.xp.maximum(count, 1))
        return self._sound(
            worst, 1.0, blocks.limit(self.op, self.precision), "of probes has the root mean square"
        )

    def check_columns(self, across: Array, image: Array) -> Array:
        """The same for (zᵀH e_i) and H z, which agree if the columns H e_i make a symmetric matrix."""
        worst, size = map(self.host, _disagreement(across, image))
        return self._sound(
            worst, size, blocks.limit(self.op, self.precision), "of a vector and all columns amounts to"
        )

    def _sound(self, worst: Array, size: Array, limit: float, what: str) -> Array:
        if self.traced:
            return jnp.where(worst > limit * size, jnp.nan, 1.0).astype(self.op.dtype)
        if worst > limit * size:
            found = f"{worst / size:.1e} |H|" if size else "more than zero, though products are zero"
            raise NotSymmetricError(
                f"the operator is not symmetric, or not linear: |uᵀHv - vᵀHu| {what} {found}, "
                f"and the precision of its products explains {limit:.1e}. {self.op.explain_asymmetry()}"
            )
        return 1.0

    def estimate(
        self,
        values: Array,
        stderr: Array,
        *,
        ended: Ended = ALL_DONE,
        unit: Array = 1.0,
        sound: Array = 1.0,
        **fields: Any,
    ) -> Estimate:
        """The result for values and errors of each group and, last, of the whole, in the given unit.

        `sound` is what `check_symmetric` and `check_pairs` return.
        """
        unit = sound * (blocks.some_unit(unit) if self.traced else self.host(unit))
        values, stderr = unit * values, ended.widen * unit * stderr
        fields["status"] = Status.TRACED if self.traced else ended.status
        if not self.traced:
            values, stderr = values.tolist(), stderr.tolist()
        total = Estimate(values[-1], stderr[-1], **fields)
        if self.by is None:
            return total
        named = [dict(zip(self.groups, x, strict=False)) for x in (values, stderr)]
        return Estimate(named[0], named[1], total=total, **fields)


def begin(
    op: LinearOperator,
    *,
    key: Any,
    by: str | None,
    tol: float | None,
    num_matvecs: Any,
    probe_batch: Any,
    count: int,
    stacks: int = 0,
    needs_key: bool = True,
    journal: Journal | None = None,
) -> Run:
    """Check the arguments, choose the batch, and prepare the operator.

    `count` products run side by side at most; `stacks` vectors are held besides. With a `journal` products
    come batch by batch.
    """
    require_operator(op)
    if needs_key:
        key = require_key(key)
    traced = trees.is_traced((op, key))
    if tol is not None:
        if traced:
            raise SpectraError("tol= needs values, which do not exist inside jit or vmap.")
        if not 0 < tol < 1:
            raise SpectraError(f"tol={tol} is relative to the value: use a number in (0, 1).")
    if not isinstance(num_matvecs, int) or num_matvecs < 1:
        raise SpectraError(f"num_matvecs={num_matvecs}: use a positive number of products.")
    if probe_batch is not None and not (isinstance(probe_batch, int) and probe_batch >= 1):
        raise SpectraError(f"probe_batch={probe_batch}: use a positive number of probes.")
    groups = {} if by is None else paths.group_leaves(op.like, by)
    vector = trees.tree_bytes(op.structure)
    available = _memory.available_bytes()
    needed = op.prepared_bytes() + (stacks + VECTORS) * vector
    if available is not None and needed > available:
        raise MemoryLimitError(
            f"{stacks} vectors of {format_bytes(vector)} besides the product need {format_bytes(needed)}, "
            f"and {format_bytes(available)} are free. Use method='hutchinson', which holds none, or fewer "
            "num_matvecs."
        )
    shared = needed - VECTORS * vector
    # A caller's own vmap multiplies the batch.
    batch = probe_batch or choose_batch(op, VECTORS * vector, shared, available, count, bare=not traced)
    source, op = op, op.prepare() if traced else outside_loops(op.prepare())
    batch = min(batch, count)
    precision = op.precision if traced else relative_precision(source)
    batch = journal.batch(batch) if journal else batch
    return Run(op, source, key, groups, by, tol, batch, traced, precision, journal)


def check_probes(probes: str | None, default: str) -> str:
    """The kind of probes, `default` for None."""
    if probes is not None and probes not in PROBES:
        raise SpectraError(f"probes={probes!r}: use one of {PROBES}.")
    return probes or default


@trees.one_program
def _disagreement(across: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    """|across - image| and |image|, in a unit of their size."""
    largest = jnp.maximum(jnp.max(jnp.abs(image)), jnp.max(jnp.abs(across)))
    unit = jnp.where(largest > 0, largest, 1)
    return trees.norm((across - image) / unit), trees.norm(image / unit)


GROWTH = 1.5
"""Of the number of probes between two looks; the same numbers each time, so that compiled code is shared."""

LOOSEST = 0.25
"""Tolerance at which a value is four standard errors from zero. Where the truth is zero, one look in 10⁴
finds that, but at 0.45 one in 30 does, and states an interval without zero."""

WITHIN = 1 - 1e-6
"""Keeps an error that is stated as the tolerance within it, once it has been rounded to float32."""


def adaptive(
    run: Run, step: Callable[[int], Any], most: int, least: int = MIN_PROBES, *, signed: bool = False
) -> Ended:
    """Call `step` with growing numbers of probes until stderr <= tol |value|; all at once without tol.

    Every look is a chance to stop on an error that is too small by luck. What a rule of this kind controls is
    the tolerance, not the error it happens to stop at (Chow and Robbins, doi:10.1214/aoms/1177700156): where
    there was a look before, the error stated is the tolerance, or sqrt(`GROWTH`) times its own where that is
    less, which is what one look more takes off without luck.

    A value that may be zero, as `signed` says, is also large by luck, and more so the more often it is asked:
    before the budget is spent, no tolerance above `LOOSEST` ends a run.
    """
    if run.tol is None:
        step(most)
        return ALL_DONE
    count = first = min(least, most)
    early = min(run.tol, LOOSEST) if signed else run.tol
    while True:
        value, stderr = step(count)
        goal = run.tol * abs(value)
        if stderr <= (goal if count == most else early * abs(value)):
            lucky = count > first and stderr > 0
            widen = max(1.0, min(WITHIN * goal / stderr, GROWTH**0.5)) if lucky else 1.0
            return Ended(Status.CONVERGED, float(widen))
        if count == most:
            return Ended(Status.BUDGET_EXHAUSTED, 1.0)
        count = min(most, int(GROWTH * count))
