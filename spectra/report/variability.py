"""How much a spectrum depends on which data were used, apart from how much it depends on the probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import draws, meshes, programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError, Status
from spectra.base.trees import PyTree
from spectra.density.extremes import extreme
from spectra.density.slq import slq
from spectra.estimators import blocks
from spectra.estimators.batches import Batches, in_order, listed
from spectra.estimators.exact import SHARP, changes_of_products, form
from spectra.estimators.law import Law
from spectra.krylov.product_rounding import SAMPLES
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.batches import batch_size
from spectra.operators.data import DataOperator
from spectra.operators.jaxprs import outside_loops
from spectra.report.spectrum import trace_estimate
from spectra.results import Array, Estimate, Interval, Quadrature, Result, result, text_table, worst
from spectra.results.text import directed, span

if TYPE_CHECKING:
    from jaxtyping import Float

FAR = 50.0
"""|d| in units of sqrt(c) from which |d| is normal, to one part in 2 FAR² of it."""


def spread_of_traces(
    ops: list[LinearOperator], key: jax.Array, num_probes: int, together: int, level: float = 0.95
) -> Interval:
    """The standard deviation (with s - 1) of tr H_j over s operators of one structure, and its interval.

    The interval is about the probes alone: the operators are those given. Up to n = `num_probes` unit vectors
    take the place of probes, and all that is left is rounding: it is measured, as where probes leave hardly
    any other error.

    Cost: min(num_probes, n) products with each operator, `together` at a time, and eight more with each where
    rounding is measured.
    """
    from scipy.special import stdtrit

    exact, n = ops[0].size <= num_probes, ops[0].size
    prepared = [outside_loops(op.prepare()) for op in ops]
    samples = _samples(prepared, key, min(num_probes, n), together, exact)
    precision = max(op.precision for op in ops)
    found = summary(samples, n, precision, exact=exact, level=level)
    low, middle, high = found
    resolution = precision * _largest_form(samples, n, exact)
    if high - low > 2 * SHARP * resolution:
        return found
    reach = -float(stdtrit(SAMPLES, (1 - level) / 2)) * _rounding_of_spread(prepared, ops)
    return Interval(max(low - reach, 0.0), middle, high + reach)


def _rounding_of_spread(prepared: list[LinearOperator], ops: list[LinearOperator]) -> float:
    """The root mean square, over random signs v, of the spread of vᵀ(H'_j - H_j)v; H' is H as in float64, or
    moved. All operators have the same v, so that what rounding does to all alike makes no spread."""
    each = [changes_of_products(op, source) for op, source in zip(prepared, ops, strict=True)]
    if not all(each):
        return 0.0
    unit = jnp.zeros((), ops[0].dtype)
    forms = np.array([[form(v, change, unit) for v, _, change in own] for own in each])
    return float(np.sqrt(np.mean(np.var(forms, axis=0, ddof=1))))


class Samples(NamedTuple):
    """What each probe has given; k probes, s operators."""

    forms: Any  # (k, s), vᵀΔ_j v
    rests: Any  # (k, s, s), r_i·r_j
    squares: Any  # (k, s), |H_j v|²


def _samples(ops: list[LinearOperator], key: jax.Array, count: int, together: int, exact: bool) -> Samples:
    """Of `count` probes, or unit vectors if `exact`, with prepared operators."""
    found = []
    for start in range(0, count, together):
        indices = np.arange(start, min(start + together, count))
        vectors = _vectors(ops[0], key, indices, exact, meshes.places(ops[0].like))
        images = [blocks.products(op, vectors, len(indices)) for op in ops]
        *parts, unit = (np.asarray(x, np.float64) for x in jax.device_get(_inner_products(vectors, images)))
        unit = unit or 1.0
        found.append([part * unit**power for part, power in zip(parts, (1, 2, 2), strict=True)])
    return Samples(*map(np.concatenate, zip(*found, strict=True)))


def _largest_form(samples: Samples, size: int, exact: bool) -> float:
    """The largest |v| |H_j v| of an operator, in the mean; of unit vectors the root of the sum of squares."""
    squares = samples.squares
    return float(np.max(np.sqrt(np.sum(squares, axis=0) if exact else size * np.mean(squares, axis=0))))


def summary(samples: Samples, size: int, precision: float, *, exact: bool, level: float) -> Interval:
    """The standard deviation of the traces and its interval."""
    forms, rests, _ = samples
    k, s = forms.shape
    d = np.sum(forms, axis=0) if exact else np.mean(forms, axis=0)
    covariance = np.zeros((s, s)) if exact else 2 / k * np.mean(rests, axis=0)
    # A form is off by precision |v| |Hv|; of unit vectors the errors add up.
    rounding = precision * _largest_form(samples, size, exact) * np.sqrt(s / (s - 1))
    low, middle, high = map(float, _interval(d - d.mean(), covariance, k, level) / np.sqrt(s - 1))
    return Interval(max(low - rounding, 0.0), middle, high + rounding)


@partial(programs.jit, static_argnames=("exact", "where"))
def _vectors(
    op: LinearOperator, key: jax.Array, indices: jax.Array | np.ndarray, exact: bool, where: meshes.Places
) -> PyTree:
    """Probes of length sqrt(n), or unit vectors."""

    def one(i):
        if exact:
            return trees.unravel(jnp.zeros(op.size, op.dtype).at[i].set(1), op.structure)
        drawn = draws.sphere_sample(jax.random.fold_in(key, i), op.structure, where=where)
        return trees.scale(op.size**0.5, drawn)

    return jax.vmap(one)(indices)


@programs.jit
def _inner_products(vectors: PyTree, images: list[PyTree]):
    """vᵀΔ_j v (k, s), r_i·r_j (k, s, s) and |H_j v|² (k, s), in a unit that is returned as well."""
    images, unit = blocks.in_unit(images, jnp.zeros((), trees.scalar_dtype(vectors)))
    stacks = jax.tree.map(lambda *xs: jnp.stack(xs, axis=1), *images)  # (k, s, ...)

    def one(v, stack):
        squares = jnp.sum(blocks.row_dots(stack, stack), axis=0)
        centred = jax.tree.map(lambda x: x - jnp.mean(x, axis=0), stack)
        v = jax.tree.map(lambda x: x[None], v)
        forms = jnp.sum(blocks.gram(centred, v), axis=0)
        along = forms / jnp.sum(blocks.row_dots(v, v), axis=0)
        rest = blocks.subtract(centred, blocks.combine(along, v))
        return forms[:, 0], jnp.sum(blocks.gram(rest, rest), axis=0), squares

    return *jax.vmap(one)(vectors, stacks), unit


def _interval(d: np.ndarray, covariance: np.ndarray, num_probes: int, level: float) -> np.ndarray:
    """Lower end, estimate and upper end of |τ|."""
    from scipy.special import chndtr, chndtrinc, ndtri, stdtrit

    size, tail = float(np.linalg.norm(d)), (1 - level) / 2
    largest, total = float(np.linalg.eigvalsh(covariance)[-1]), float(np.trace(covariance))
    if not largest > 0:
        return np.full(3, size)
    normal = -float(ndtri(tail))
    unit = largest * (-float(stdtrit(num_probes, tail)) / normal) ** 2
    x, freedom = size / np.sqrt(unit), total / largest
    if x > FAR:
        ends = np.array([x - normal, x + normal])
    else:
        # As the noncentrality grows the law moves up: the quantile at x falls.
        ends = [
            np.sqrt(chndtrinc(x**2, freedom, p)) if chndtr(x**2, freedom, 0.0) > p else 0.0
            for p in (1 - tail, tail)
        ]
    low, high = np.sqrt(unit) * np.asarray(ends)
    return np.array([low, np.clip(np.sqrt(max(size**2 - total, 0.0)), low, high), high])


TAIL = 0.975
SEEN = 0.999
"""Probability that probes would have shown an eigenvalue further out; the rest of 1 - TAIL is Student's."""
FEWEST = 3
"""Probes of the spread of traces where there are fewer steps: by simulation of ten families of matrices 1,500
times each, its interval would hold for 57 to 99 % of one probe, 92.5 to 99.7 % of two and 94 % of three."""
OPEN = 0.01
"""Residual, relative to the eigenvalue, from which a Ritz value is stated as a bound alone."""


@result("num_matvecs", "status")
class DataVariability(Result):
    """Leading eigenvalues and trace on disjoint subsets of the data.

    By convexity, the largest eigenvalue of a mean of matrices is at most the mean of their largest
    eigenvalues, and the smallest is at least the mean of their smallest, with the same weights in both. The
    gap between the whole and the subsets is the curvature that cancels in the average. Printed means have the
    weights of the subsets in the whole, spreads have none.

    Eigenvalues are Ritz values: but for rounding, the largest are never above the true eigenvalue of the same
    rank and the smallest never below it, and each is within its residual of *some* eigenvalue. If the
    residual is more than 1 %, the printed result says "at least" and "at most".
    """

    largest: Float[Array, "subsets eigenvalues"]  # of each subset, descending
    smallest: Float[Array, "subsets eigenvalues"]  # of each subset, ascending
    trace: Float[Array, " subsets"]
    trace_probe_stderr: Float[Array, " subsets"]  # from the probes alone
    whole_largest: Float[Array, " eigenvalues"]  # of all data
    whole_smallest: Float[Array, " eigenvalues"]
    whole_trace: float
    num_matvecs: int
    trace_spread: Interval | None = None  # of the trace between these subsets, 95 % over the probes
    trace_population: Interval | None = None  # of the distribution that the subsets are drawn from, 95 %
    limits: Float[Array, " 2"] | None = None  # below the smallest, above the largest eigenvalue, 97.5 % each
    largest_residuals: Float[Array, "subsets eigenvalues"] | None = None
    smallest_residuals: Float[Array, "subsets eigenvalues"] | None = None
    status: Status = Status.COMPLETE  # the first of the quadratures' that is something to be wary of
    whole_largest_residuals: Float[Array, " eigenvalues"] | None = None  # None in older files
    whole_smallest_residuals: Float[Array, " eigenvalues"] | None = None
    weights: Float[Array, " subsets"] | None = None  # of each subset in the whole; None in older files: equal

    @property
    def trace_data_std(self) -> float:
        """Standard deviation of the trace between these subsets: the estimate of `trace_spread`.

        All subsets see the same probes, so the probes cause an error only in the differences between subsets,
        and its variance is subtracted. It is not subtracted in files from older versions, which had no
        interval.
        """
        if self.trace_spread is not None:
            return float(self.trace_spread.estimate)
        return float(np.std(self.trace, ddof=1))

    @property
    def trace_probe_std(self) -> float:
        """Standard error that the probes cause in a subset's trace."""
        return float(np.sqrt(np.mean(np.square(self.trace_probe_stderr))))

    def __repr__(self) -> str:
        spread = [("subsets", f"{len(self.trace)}")]
        for name, side in (("largest", "at least"), ("smallest", "at most")):
            values, whole = getattr(self, name), getattr(self, f"whole_{name}")
            residuals = getattr(self, f"{name}_residuals")
            of_whole = getattr(self, f"whole_{name}_residuals")
            for i in range(values.shape[1]):
                mean, all_data = np.average(values[:, i], weights=self.weights), f"{whole[i]:.5g}"
                text, note = f"{mean:.5g}", ""
                if residuals is not None and (residuals[:, i] > OPEN * np.abs(values[:, i])).any():
                    text, note = f"{side} {directed(float(mean), name == 'smallest', 5)}", "; not converged"
                # Files of versions that kept no residuals of the whole: they may be what those of parts are.
                if (of_whole is None and note) or (
                    of_whole is not None and of_whole[i] > OPEN * abs(whole[i])
                ):
                    all_data = f"{side} {directed(float(whole[i]), name == 'smallest', 5)}"
                    note = "; not converged"
                text += f" ± {values[:, i].std(ddof=1):.2g}; all data {all_data}{note}"
                spread.append((f"{name} eigenvalue" if i == 0 else f"  no. {i + 1}", text))
        text = (
            f"{np.average(self.trace, weights=self.weights):.5g}; between subsets ± {self.trace_data_std:.2g}"
        )
        if self.trace_spread is not None:
            low, _, high = self.trace_spread
            text += f" {span(low, high, 2)} (95 %)"
        spread.append(("trace", f"{text}, from probes ± {self.trace_probe_std:.2g}"))
        if self.trace_population is not None and self.limits is not None:
            low, value, high = self.trace_population
            text = f"trace {value:.5g} {span(low, high, 2)}"
            low, high = (directed(float(x), up=bool(i)) for i, x in enumerate(self.limits))
            spread.append(("population", f"{text}; eigenvalues from {low} to {high}"))
        return text_table("Data variability", spread)


@automatic
def data_variability(
    operator: DataOperator | Callable[[PyTree], LinearOperator],
    batches: Sequence[PyTree] | None = None,
    *,
    key: jax.Array,
    num_subsets: int = 4,
    num_eigenvalues: int = 1,
    num_steps: int = 60,
    num_probes: int = 4,
) -> DataVariability:
    """Measure the spread of the leading eigenvalues and of the trace over disjoint subsets of the data.

    If the subsets are draws from one distribution, as for `population`, `trace_population` is an interval for
    its trace, and `limits` enclose its eigenvalues, by Jensen's inequality and Student's t over subsets. They
    are infinite where so few steps and probes leave open how far the spectrum of a subset goes.
    `population` gives both ends of its largest eigenvalue from fewer products; this function shows the
    spectra of the subsets.

    Args:
        operator: an operator on data, whose data are split into `num_subsets` parts in order
            (a stream: every `num_subsets`-th batch); or a function from a batch to an operator, together
            with `batches`, one for each subset.
        batches: the subsets for a function.
        key: JAX random key of the probes, the same for every subset.
        num_subsets: s, at least 2.
        num_eigenvalues: k, eigenvalues reported at each end.
        num_steps: Lanczos steps per probe.
        num_probes: probes per subset.

    Returns:
        `DataVariability`; print it.

    `trace_spread` is a 95 % interval over the probes for the standard deviation of the trace between the
    given subsets; it says nothing about other subsets. It takes num_steps more products with each subset, at
    least three; up to n = num_steps it is exact.

    Raises:
        SpectraError: fewer than two subsets, or more eigenvalues than steps.
        DataError: fewer examples or batches than subsets; one subset has all of the weight.

    Cost: (s + 1) num_steps num_probes + s max(num_steps, 3) products; those with a subset use only its share
    of the data.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def loss_fn(w, x):
        ...     return 0.5 * jnp.mean((x @ w) ** 2)
        >>> x = jax.random.normal(jax.random.key(0), (80, 5))
        >>> op = spectra.HessianOperator(loss_fn, jnp.ones(5), x)
        >>> spread = spectra.data_variability(op, key=jax.random.key(1), num_steps=5)
        >>> bool(spread.whole_largest[0] <= spread.largest.mean())
        True
    """
    trees.require_values("data_variability", (operator, key))
    drawn = _subsets(operator, batches, num_subsets)
    subsets, whole = list(drawn.each()), drawn.union(range(len(drawn.weights)))
    steps = min(num_steps, whole.size)
    if not 1 <= num_eigenvalues <= steps:
        raise SpectraError(f"num_eigenvalues={num_eigenvalues} is not between 1 and the {steps} steps.")
    results = [slq(op, key=key, num_steps=steps, num_probes=num_probes) for op in [*subsets, whole]]
    traces = [trace_estimate(q) for q in results]
    ends = [_ends(q, num_eigenvalues) for q in results]
    s, of_spread = len(subsets), max(num_steps, FEWEST)
    spread = spread_of_traces(list(subsets), jax.random.fold_in(key, 2**31 - 1), of_spread, num_probes)
    each = np.array([t.value for t in traces[:s]])
    law = Law(drawn.weights, np.zeros(s, int), TAIL, sizes=drawn.sizes)
    return DataVariability(
        largest=np.array([high for _, high, *_ in ends[:s]]),
        smallest=np.array([low for low, *_ in ends[:s]]),
        trace=each,
        trace_probe_stderr=np.array([t.stderr for t in traces[:s]]),
        whole_largest=ends[-1][1],
        whole_smallest=ends[-1][0],
        whole_trace=traces[-1].value,
        num_matvecs=sum(q.num_matvecs for q in results) + s * min(of_spread, whole.size),
        trace_spread=spread,
        trace_population=_of_distribution(law, each, traces[-1]),
        limits=_limits(law, results[:s]),
        largest_residuals=np.array([residuals for *_, residuals in ends[:s]]),
        smallest_residuals=np.array([residuals for _, _, residuals, _ in ends[:s]]),
        status=worst(q.judged for q in results),
        whole_largest_residuals=ends[-1][3],
        whole_smallest_residuals=ends[-1][2],
        weights=drawn.weights,
    )


def _of_distribution(law: Law, traces: np.ndarray, whole: Estimate) -> Interval:
    """The trace of all data, with the error of their draw, from traces of subsets, and that of the probes.

    The mean of the subsets' traces is that of all data, whose own interval says how far the probes are off:
    few of them have few degrees of freedom, and what all data resolve is not sampled.
    """
    value, errors = float(whole.value), law.errors(traces)
    of_probes = float(whole.interval(2 * TAIL - 1).upper) - value
    below, above = (math.hypot(errors.reach(TAIL, up) * errors.stderr, of_probes) for up in (False, True))
    return Interval(value - below, value, value + above)


def _limits(law: Law, quadratures: list[Quadrature]) -> np.ndarray:
    """The mean over subsets of limits of their extreme eigenvalues, further out by its error; infinite where
    the steps leave open how far a spectrum goes."""
    outer = [(extreme(q, 0, level=SEEN).lower, extreme(q, -1, level=SEEN).upper) for q in quadratures]
    found: list[float] = []
    for values, sign in zip(np.array(outer).T, (-1, 1), strict=True):
        if not np.isfinite(values).all():
            found.append(sign * math.inf)
            continue
        errors = law.errors(values)
        reach = errors.reach(TAIL + 1 - SEEN, sign > 0)
        found.append(float(law.weights @ values) + sign * reach * errors.stderr)
    return np.array(found)


def _subsets(operator, batches, count: int) -> Batches:
    """The operators of the subsets, and the one of all data."""
    if isinstance(operator, DataOperator):
        if batches is not None:
            raise SpectraError(
                "this operator has its data; batches belong to a function that makes operators."
            )
        if count < 2:
            raise SpectraError(f"num_subsets={count}: a spread needs at least two subsets.")
        return in_order(operator, count)
    if not callable(operator) or batches is None:
        raise SpectraError(
            "pass an operator on data, or a function from a batch to an operator, and batches."
        )
    batches = list(batches)  # an iterator is read once, here
    if len(batches) < 2:
        raise SpectraError(f"{len(batches)} batches: a spread needs at least two subsets.")
    sizes = np.array([batch_size(batch) for batch in batches])
    operators = [operator(batch) for batch in batches]
    for op in operators:
        require_operator(op)
    return listed(operators, sizes / sizes.sum(), sizes)


def _ends(quadrature: Quadrature, count: int) -> tuple[np.ndarray, ...]:
    """The `count` smallest (ascending) and largest (descending) eigenvalues: the best Ritz values of all
    probes, which lie inside the spectrum. And the residuals of both."""
    columns = zip(*map(np.asarray, (quadrature.nodes, quadrature.residuals, quadrature.lengths)), strict=True)
    rows = [np.stack([nodes[:m], residuals[:m]]) for nodes, residuals, m in columns if m >= count]
    if not rows:
        raise SpectraError(f"the operator has fewer than {count} distinct eigenvalues; ask for fewer.")
    low, low_residuals = np.stack([row[:, :count] for row in rows], axis=1)
    high, high_residuals = np.stack([row[:, ::-1][:, :count] for row in rows], axis=1)
    first, last, rank = low.argmin(axis=0), high.argmax(axis=0), np.arange(count)
    return low[first, rank], high[last, rank], low_residuals[first, rank], high_residuals[last, rank]
