"""A table of the blocks of an operator: extremes, trace, condition and signs of each, with their errors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from spectra.base import trees
from spectra.base.calls import automatic, require_key
from spectra.base.errors import SpectraError
from spectra.density import deflation as dense
from spectra.density.extremes import LEVEL, condition, extreme
from spectra.density.slq import slq
from spectra.krylov.floors import relative_changes
from spectra.krylov.matrices import matrices_of
from spectra.models.problem import Problem
from spectra.operators.base import LinearOperator, require_operator
from spectra.report.spectrum import condition_text, rank, share_text, trace_estimate
from spectra.results import (
    Named,
    Quadrature,
    as_quadrature,
    by_name,
    plain,
    result,
)
from spectra.results.base import extreme_cell
from spectra.results.text import enclosed, within


@result()
class Summary(Named):
    """The spectra of several operators, such as the blocks of one; prints as a table.

    `records()`, `to_dataframe()` and the printed table are computed from the quadratures, without further
    products. For each operator: its order n, the extreme eigenvalues (see `spectra.density.extremes`: a bound
    on the inner side, a limit that holds with probability 0.99 on the outer side), the trace with its 95 %
    interval, bounds of the condition number over the non-zero eigenvalues (the upper one is finite where all
    eigenvalues are known, see `spectra.density.extremes.condition`), the stable rank tr H² / |H|² (94 %
    interval), and the share of negative eigenvalues (95 %).
    """

    quadratures: dict[str, Quadrature]

    def records(self) -> list[dict[str, Any]]:
        """One row per operator, with lower and upper limits next to each number."""
        return [plain(_record(name, q)) for name, q in self.quadratures.items()]

    def table(self) -> list[list[str]]:
        """Cells of the printed table, header row first."""
        head = ["layer", "n", "largest λ", "smallest λ", "trace", "condition", "stable rank", "negative"]
        return [head, *(_cells(name, q) for name, q in self.quadratures.items())]


STEPS, PROBES = 100, 8


@automatic
def summary(
    source: LinearOperator | Problem | Mapping[str, Any],
    *,
    key: jax.Array | None = None,
    by: str = "layer",
    num_steps: int | None = None,
    num_probes: int | None = None,
    progress: bool = False,
) -> Summary:
    """Compare the blocks of an operator in a table: one row per block, every number with its error.

    Of a block whose order num_steps x num_probes reaches, all eigenvalues are computed from its dense matrix,
    as `spectrum` does; the status of its row is EXACT.

    Args:
        source: an operator with blocks, a `Problem`, or a mapping of results (quadratures or reports), which
            costs no products.
        key: JAX random key; needed unless results are given.
        by: "layer" or "leaf": see `LinearOperator.blocks`.
        num_steps: Lanczos steps per probe, at most n for a block of order n; default 100.
        num_probes: probes per block; default 8. If results are given, neither num_probes nor num_steps may
            be.
        progress: show a progress bar.

    Returns:
        `Summary`, which prints as a table; see also its `to_dataframe()`, `records()` and `plot()`.

    Raises:
        SpectraError: as `slq`; or no key for an operator.

    Cost: at most num_steps x num_probes products per block, as `slq`, and n for a small one. Where the
    operator says what it depends on, as that of a loss does, seven or eight more of the whole measure the
    rounding of each block that is not small.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def loss_fn(params, x):
        ...     return jnp.mean((jnp.tanh(x @ params["hidden"]["w"]) @ params["out"]["w"]) ** 2)
        >>> params = {"hidden": {"w": jnp.eye(3)}, "out": {"w": jnp.ones(3)}}
        >>> op = spectra.HessianOperator(loss_fn, params, jnp.eye(3))
        >>> table = spectra.summary(op, key=jax.random.key(0))
        >>> [(row["layer"], row["n"]) for row in table.records()]
        [('hidden', 9), ('out', 3)]
    """
    if isinstance(source, Mapping):
        for name, value in {"num_steps": num_steps, "num_probes": num_probes}.items():
            if value is not None:
                raise SpectraError(
                    f"{name}={value} has no effect on results, whose runs are done: leave it out."
                )
        found = {name: as_quadrature(held) for name, held in by_name(source).items()}
        trees.require_values("summary", found)
        return Summary(found)
    op = source.operator() if isinstance(source, Problem) else source
    require_operator(op)
    trees.require_values("summary", (op, key))
    key = require_key(key)
    op.require_finite()  # the loss, which is the same of all blocks
    blocks = op.blocks(by=by)
    steps = STEPS if num_steps is None else num_steps
    probes = PROBES if num_probes is None else num_probes
    small = {
        name: block
        for name, block in blocks.items()
        if dense.choose(block, None, min(steps, block.size), probes, None, True)
    }
    large = {name: block for name, block in blocks.items() if name not in small}
    exact = {name: dense.eigenvalues(blocks[name], matrix) for name, matrix in matrices_of(small)}
    found = exact | slq(large, key=key, num_steps=steps, num_probes=probes, progress=progress)
    some = {name for name in large if any(found[name].range)}
    for name, rounding in relative_changes(op, by, some).items():
        found[name] = dataclasses.replace(found[name], rounding=rounding)
    return Summary({name: found[name] for name in blocks})


def _record(name: str, q: Quadrature) -> dict[str, Any]:
    trace = trace_estimate(q).interval()
    negative, bounds = q.cdf(np.nextafter(-q.noise_floor, -np.inf)), condition(q)
    numbers = {
        "largest": extreme(q, -1),
        "smallest": extreme(q, 0),
        "trace": trace,
        "stable_rank": rank(q, 2),
        "negative": negative,
    }
    columns = {
        f"{name}{suffix}": value
        for name, interval in numbers.items()
        for suffix, value in zip(("", "_lower", "_upper"), (interval[1], *interval[::2]), strict=True)
    }
    return {
        "layer": name,
        "n": q.size,
        **columns,
        "condition_at_least": bounds.lower,
        "condition_at_most": bounds.upper,
        "noise_floor": q.noise_floor,
        "num_matvecs": q.num_matvecs,
        "status": q.judged,
    }


def _cells(name: str, q: Quadrature) -> list[str]:
    low, trace, high = trace_estimate(q).interval()
    stable = rank(q, 2)
    shares = q.cdf(np.nextafter(-q.noise_floor, -np.inf))
    return [
        name,
        f"{q.size:,}",
        extreme_cell(extreme(q, -1), -1, LEVEL),
        extreme_cell(extreme(q, 0), 0, LEVEL),
        within(trace, max(high - trace, trace - low)),
        condition_text(q, "≥ "),
        enclosed(stable.estimate, stable.lower, stable.upper),
        share_text(shares),
    ]
