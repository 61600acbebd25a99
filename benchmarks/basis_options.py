"""What each way to save memory for the basis costs in accuracy, on the demo's network.

Two probes of the Hessian of the trained digits network (85,002 parameters, 512 of its images), the same ones
in all rows but the last. The truth is a float32 run of 80 steps. Columns:

* basis: rows of the basis of a probe in flight, as bytes on each device and in the host's memory. With
  `basis="none"` there is none: six working vectors, which the others have besides, are all.
* orthogonality: largest |q_i.q_j - 1(i=j)| over the stored rows of the first probe.
* smallest, largest: differences of the extreme Ritz values from those of the truth, over the largest
  |eigenvalue|.
* distance: Wasserstein-1 distance of the eigenvalue distribution to the truth's, over the width of the
  spectrum. The last row, with other probes, says what the sampling error is.

On a CPU "device" and "host" are the same memory; four devices are simulated.
"""

import argparse
import dataclasses
import os
import sys
from datetime import date
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"  # before JAX starts

import jax
import numpy as np

import spectra
from benchmarks import timing
from spectra.base import draws
from spectra.demos import digits
from spectra.krylov import recurrence
from spectra.krylov.plan import place_basis
from spectra.krylov.rows import gram
from spectra.results import format_bytes

KEY, PROBES, TRUTH = jax.random.key(1), 2, 80


def orthogonality(op, steps: int, place: str, dtype) -> float:
    """max |Q Q^T - I| of the rows as they are stored, for the first probe."""
    where = place_basis(op, place, dtype)
    layout = where.layout
    with jax.default_device(where.device):
        start = draws.sphere_sample(jax.random.fold_in(KEY, 0), layout.anonymous().structure)
        state = recurrence.init(layout.anonymous(), start, steps)
    setup = recurrence.Setup(op.prepare(), where)
    state = recurrence.advance(setup, state, 0, steps, batched=False)
    products = np.asarray(gram(state.basis))[:steps, :steps]
    return float(np.max(np.abs(products - np.eye(steps))))


def points(quadrature) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the mean over probes."""
    return quadrature.nodes.ravel(), quadrature.weights.ravel() / quadrature.nodes.shape[0]


def wasserstein(x, p, y, q) -> float:
    """The integral of |F - G| for two discrete distributions."""
    places = np.sort(np.concatenate([x, y]))
    cdfs = []
    for nodes, weights in ((x, p), (y, q)):
        order = np.argsort(nodes)
        total = np.concatenate([[0.0], np.cumsum(weights[order])])
        cdfs.append(total[np.searchsorted(nodes[order], places[:-1], side="right")])
    return float(np.sum(np.abs(cdfs[0] - cdfs[1]) * np.diff(places)))


def main() -> list[str]:
    problem = digits.problem()
    problem = dataclasses.replace(problem, data=tuple(x[:512] for x in problem.data))
    op = problem.operator()
    mesh = spectra.distributed.make_mesh("data=4")
    spread = problem.on(mesh).operator()
    truth = spectra.slq(op, key=KEY, num_steps=TRUTH, num_probes=PROBES)
    low, high = truth.range
    largest, width = max(abs(low), abs(high)), high - low

    def errors(ends, x, p) -> str:
        ends = [f"{abs(a - b) / largest:.1e}" for a, b in zip(ends, truth.range, strict=True)]
        return f"{ends[0]} | {ends[1]} | {wasserstein(x, p, *points(truth)) / width:.1e} |"

    def row(name: str, steps: int, *, on=op, key=KEY, basis="inherit", basis_dtype=None, deflate=None) -> str:
        places = {"basis": basis, "basis_dtype": basis_dtype}
        plan = spectra.plan(on, num_steps=steps, num_probes=PROBES, **places)
        q = spectra.slq(on, key=key, num_steps=steps, num_probes=PROBES, deflate=deflate, **places)
        kept = deflate is None and basis != "none"
        quality = f"{orthogonality(on, steps, basis, basis_dtype):.0e}" if kept else ""
        host = format_bytes(plan.host) if plan.host else "0"
        stored = format_bytes(plan.basis) if plan.basis else "0"
        size = f"{stored} | {host}"
        print(name, file=sys.stderr, flush=True)
        return f"| {name} | {steps * PROBES} | {size} | {quality} | {errors(q.range, *points(q))}"

    def chebyshev(moments: int) -> str:
        result = spectra.kpm(op, key=KEY, num_moments=moments, num_probes=PROBES)
        density = spectra.spectral_density(result)
        x, p = density.grid, density.density * np.gradient(density.grid)
        distance = wasserstein(x, p, *points(truth)) / width
        return f"| kpm, {moments} moments | {result.num_matvecs} | 0 | 0 | | | | {distance:.1e} |"

    pairs = spectra.eigsh(op, 5, which="LM", key=jax.random.key(2))
    return [
        f"Largest |eigenvalue| {largest:.4g}, width {width:.4g}; eigsh took {pairs.num_matvecs} products for "
        "five eigenpairs.",
        "",
        "| | products | basis, a device | basis, host | orthogonality | smallest | largest | distance |",
        "|---|---|---|---|---|---|---|---|",
        row("40 steps", 40),
        row('40 steps, basis_dtype="bfloat16"', 40, basis_dtype="bfloat16"),
        row('40 steps, basis="sharded", 4 devices', 40, on=spread, basis="sharded"),
        row('40 steps, basis="host"', 40, basis="host"),
        row('40 steps, basis="none"', 40, basis="none"),
        row('80 steps, basis="none"', 80, basis="none"),
        row("20 steps", 20),
        row("20 steps, 5 eigenpairs deflated", 20, deflate=pairs),
        row('20 steps, 5 eigenpairs deflated, basis="none"', 20, deflate=pairs, basis="none"),
        row("40 steps, 5 eigenpairs deflated", 40, deflate=pairs),
        row('40 steps, 5 eigenpairs deflated, basis="none"', 40, deflate=pairs, basis="none"),
        chebyshev(80),
        row("40 steps, other probes", 40, key=jax.random.key(7)),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).with_name("results") / "basis_options.md"
    parser.add_argument("-o", "--output", type=Path, default=default)
    output = parser.parse_args().output
    head = [
        f"# Memory options of the basis, {date.today()}",
        "",
        timing.machine(),
        "",
        (__doc__ or "").strip(),
        "",
    ]
    lines = [*head, *main(), ""]
    output.write_text("\n".join(lines))
    print("\n".join(lines))
