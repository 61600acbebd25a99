"""How much a spectrum depends on which data were used, apart from how much it depends on the probes."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from spectra._errors import SpectraError
from spectra._mesh import automatic
from spectra.data import batch_size
from spectra.density.slq import slq
from spectra.operators.base import LinearOperator
from spectra.operators.data_operator import DataOperator
from spectra.report import trace_estimate
from spectra.results import Array, Quadrature, text_table

PyTree = Any


@dataclasses.dataclass(frozen=True)
class DataVariability:
    """Leading eigenvalues and trace on disjoint subsets of the data.

    By convexity the largest eigenvalue of a mean of matrices is at most the mean of their largest
    eigenvalues, and the smallest at least the mean of their smallest: how far the whole lies inside
    the subsets is the curvature that cancels in the average.
    """

    largest: Array  # (s, k) of each subset, descending
    smallest: Array  # (s, k) of each subset, ascending
    trace: Array  # (s,)
    trace_probe_stderr: Array  # (s,) from the probes alone
    whole_largest: Array  # (k,) of all data
    whole_smallest: Array  # (k,)
    whole_trace: float
    num_matvecs: int

    @property
    def trace_data_std(self) -> float:
        """Standard deviation of the trace between subsets.

        All subsets see the same probes: the error that the probes cause is common to them, as far as
        the subsets are alike, and cancels between them.
        """
        return float(np.std(self.trace, ddof=1))

    @property
    def trace_probe_std(self) -> float:
        """Standard error of a subset's trace that the probes cause."""
        return float(np.sqrt(np.mean(np.square(self.trace_probe_stderr))))

    def __repr__(self) -> str:
        spread = [("subsets", f"{len(self.trace)}")]
        for name in ("largest", "smallest"):
            values, whole = getattr(self, name), getattr(self, f"whole_{name}")
            for i in range(values.shape[1]):
                text = f"{values[:, i].mean():.5g} ± {values[:, i].std(ddof=1):.2g}; all data {whole[i]:.5g}"
                spread.append((f"{name} eigenvalue" if i == 0 else f"  no. {i + 1}", text))
        text = f"{np.mean(self.trace):.5g}; between subsets ± {self.trace_data_std:.2g}, "
        spread.append(("trace", f"{text}from probes ± {self.trace_probe_std:.2g}"))
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

    Args:
        operator: an operator on data, whose data are cut into `num_subsets` parts in their order
            (a stream: every `num_subsets`-th batch); or a function from a batch to an operator, together
            with `batches`, one for each subset.
        batches: the subsets for a function.
        key: JAX random key of the probes, the same for every subset.
        num_subsets: s, at least 2.
        num_eigenvalues: k, eigenvalues reported at each end.
        num_steps: Lanczos steps a probe.
        num_probes: probes a subset.

    Returns:
        `DataVariability`; print it.

    Raises:
        SpectraError: fewer than two subsets, or more eigenvalues than steps.
        DataError: fewer examples or batches than subsets.

    Cost: (s + 1) num_steps num_probes products, each subset's over its share of the data.

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
    subsets, whole = _subsets(operator, batches, num_subsets)
    steps = min(num_steps, whole.size)
    if not 1 <= num_eigenvalues <= steps:
        raise SpectraError(f"num_eigenvalues={num_eigenvalues} is not between 1 and the {steps} steps.")
    results = [slq(op, key=key, num_steps=steps, num_probes=num_probes) for op in [*subsets, whole]]
    traces = [trace_estimate(q) for q in results]
    ends = [_ends(q, num_eigenvalues) for q in results]
    s = len(subsets)
    return DataVariability(
        largest=np.array([high for _, high in ends[:s]]),
        smallest=np.array([low for low, _ in ends[:s]]),
        trace=np.array([t.value for t in traces[:s]]),
        trace_probe_stderr=np.array([t.stderr for t in traces[:s]]),
        whole_largest=ends[-1][1],
        whole_smallest=ends[-1][0],
        whole_trace=traces[-1].value,
        num_matvecs=sum(q.num_matvecs for q in results),
    )


def _subsets(operator, batches, count: int) -> tuple[Sequence[LinearOperator], LinearOperator]:
    """The operators of the subsets, and the one of all data."""
    if isinstance(operator, DataOperator):
        if batches is not None:
            raise SpectraError(
                "this operator has its data; batches belong to a function that makes operators."
            )
        if count < 2:
            raise SpectraError(f"num_subsets={count}: a spread needs at least two subsets.")
        return operator.split_data(count), operator
    if not callable(operator) or batches is None:
        raise SpectraError(
            "pass an operator on data, or a function from a batch to an operator, and batches."
        )
    if len(batches) < 2:
        raise SpectraError(f"{len(batches)} batches: a spread needs at least two subsets.")
    subsets: list[Any] = [operator(batch) for batch in batches]
    sizes = np.array([batch_size(batch) for batch in batches], float)
    first, *rest = [float(w) * op for w, op in zip(sizes / sizes.sum(), subsets, strict=True)]
    for part in rest:
        first = first + part
    return subsets, first


def _ends(quadrature: Quadrature, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` smallest (ascending) and largest (descending) eigenvalues: the best Ritz values of all
    probes, which lie inside the spectrum."""
    rows = [
        nodes[:length]
        for nodes, length in zip(np.asarray(quadrature.nodes), np.asarray(quadrature.lengths), strict=True)
        if length >= count
    ]
    if not rows:
        raise SpectraError(f"the operator has fewer than {count} distinct eigenvalues; ask for fewer.")
    low = np.min([row[:count] for row in rows], axis=0)
    high = np.max([row[::-1][:count] for row in rows], axis=0)
    return low, high
