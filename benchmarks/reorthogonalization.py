"""Reorthogonalisation alone: n = 1e6, m = 96, float32, a diagonal operator, averaged over the run.

The vector is one array, or a tree of 6 or 150 leaves of unequal sizes. Bandwidth is counted over the filled
rows (two reads of 4 n bytes a row and step) and compared with that of a plain matrix-vector product.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import spectra
from benchmarks import problems
from benchmarks.settings import Goal, Report, Settings, table
from benchmarks.timing import alternate, median_ms, ratio, spread
from spectra.krylov.step import orthogonalize


def tree(n: int, leaves: int):
    """A diagonal in (0, 1) as a tree: n numbers in leaves whose sizes grow linearly."""
    edges = np.round(n * np.cumsum(np.arange(leaves) + 1.0) / np.sum(np.arange(leaves) + 1.0)).astype(int)
    flat = jnp.linspace(0.0, 1.0, n) ** 3
    return {f"leaf{i:03}": part for i, part in enumerate(jnp.split(flat, edges[:-1]))}


@functools.partial(jax.jit, static_argnames="layout")
def passes(rows, w, layout):
    """One orthogonalisation at each fill from 1 to all rows."""
    m = sum(segment[0].shape[1] for segment in rows)
    return jax.lax.fori_loop(0, m, lambda i, w: orthogonalize(rows, w, i + 1, layout)[0], w)


def main(settings: Settings) -> Report:
    n, m, rounds = settings.choose((1_000_000, 96, 5), (2000, 16, 1))
    matrix = jax.random.normal(jax.random.key(1), (m, n))
    gemv = jax.jit(lambda a, x: jnp.matmul(a, x, precision="highest"))
    flat = jax.random.normal(jax.random.key(0), (n,))
    contestants, runs = {"matrix-vector product": lambda: gemv(matrix, flat)}, {}
    for leaves in (1, 6, 150):
        diagonal = tree(n, leaves)
        v0 = problems.vector(diagonal)
        op = spectra.FunctionOperator(functools.partial(jax.tree.map, jnp.multiply, diagonal), v0)
        result = spectra.lanczos(op, v0, m)
        runs[leaves] = result
        packed = result.layout.pack(v0)
        contestants[f"run, {leaves}"] = lambda op=op, v0=v0: spectra.lanczos(op, v0, m).segments
        contestants[f"passes, {leaves}"] = functools.partial(passes, result.segments, packed, result.layout)
    note = "matfree is not installed: left out"
    try:
        from matfree import decomp

        peer = decomp.tridiag_sym(m, reortho="full", materialize=False)
        spread_out = jnp.linspace(0.0, 1.0, n) ** 3
        peer_run = jax.jit(lambda v: peer(lambda x: spread_out * x, v))
        contestants["matfree"] = lambda: peer_run(flat)
        note = ""
    except ImportError:
        pass
    times = alternate(contestants, rounds=rounds)
    plain = 4 * n * m / median_ms(times["matrix-vector product"]) / 1e6
    filled = 2 * 4 * n * (m + 1) / 2  # bytes a step, mean over the run
    report, rows = Report([]), []
    for leaves, result in runs.items():
        step, alone = median_ms(times[f"run, {leaves}"], m), median_ms(times[f"passes, {leaves}"], m)
        bandwidth = filled / alone / 1e6
        to_peer = f"{ratio(times, f'run, {leaves}', 'matfree'):.3f}" if "matfree" in times else ""
        rows.append(
            [
                f"{leaves}",
                f"{step:.2f} ± {spread(times[f'run, {leaves}']):.0%}",
                f"{alone:.2f} ± {spread(times[f'passes, {leaves}']):.0%}",
                f"{bandwidth:.1f}",
                f"{bandwidth / plain:.0%}",
                f"{worst(result, m):.1e}",
                f"{int(result.second_passes)}",
                to_peer,
            ]
        )
        what = f"bandwidth of the orthogonalisation, {leaves} leaves, of a matrix-vector product's"
        report.goals.append(Goal(what, bandwidth / plain, 0.8, at_least=True))
    head = ["leaves", "a step, ms", "orthogonalisation alone, ms", "GB/s", "of a matrix-vector product"]
    head += ["max abs(QQᵀ − I)", "second passes", "step / matfree's"]
    report.lines = table(head, rows)
    report.lines += ["", f"A matrix-vector product of the whole basis runs at {plain:.1f} GB/s. {note}"]
    if "matfree" in times:
        report.lines[-1] += f"matfree, full: {median_ms(times['matfree'], m):.1f} ms a step."
    return report


def worst(result, m: int) -> float:
    """max |QQᵀ - I| in float64."""
    rows = np.concatenate(
        [np.moveaxis(np.asarray(s[0]), 1, 0).reshape(s[0].shape[1], -1) for s in result.segments]
    )
    found = 0.0
    for low in range(0, m, 16):
        gram = rows[low : low + 16].astype(np.float64) @ rows[:m].T.astype(np.float64)
        found = max(found, float(np.abs(gram - np.eye(m)[low : low + 16]).max()))
    return found


if __name__ == "__main__":
    print("\n".join(main(Settings()).lines))
