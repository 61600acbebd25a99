"""Reorthogonalisation alone: n = 1e6, m = 96, float32, a diagonal operator, averaged over the run.

Goals: at most 0.25 of matfree's time a step (aim 0.15); at least 80 % of the bandwidth of a plain
matrix-vector product, counted over the filled rows (two reads of 4 n bytes a row and step).
"""

import jax
import jax.numpy as jnp
import numpy as np

import spectra
from benchmarks.timing import alternate, median_ms, ratio, spread
from spectra.krylov.orthogonalize import orthogonalize


def main(n: int = 1_000_000, m: int = 96, rounds: int = 5) -> list[str]:
    diagonal = jnp.linspace(0.0, 1.0, n) ** 3
    v0 = jax.random.normal(jax.random.key(0), (n,))
    op = spectra.FunctionOperator(lambda v: diagonal * v, v0)
    matrix = jax.random.normal(jax.random.key(1), (m, n))
    gemv = jax.jit(lambda a, x: jnp.matmul(a, x, precision="highest"))
    result = spectra.lanczos(op, v0, m)
    rows = result.segments

    @jax.jit
    def passes(rows, w):
        """One orthogonalisation at each fill from 1 to m rows."""
        body = lambda i, w: orthogonalize(rows, w, i + 1)[0]  # noqa: E731
        return jax.lax.fori_loop(0, m, body, w)

    packed = result.layout.pack(v0)
    contestants = {
        "spectra": lambda: spectra.lanczos(op, v0, m).segments,
        "passes": lambda: passes(rows, packed),
        "matrix-vector product": lambda: gemv(matrix, v0),
    }
    try:
        from matfree import decomp

        peer = decomp.tridiag_sym(m, reortho="full", materialize=False)
        peer_run = jax.jit(lambda v: peer(lambda x: diagonal * x, v))
        contestants["matfree"] = lambda: peer_run(v0)
    except ImportError:
        print("matfree is not installed: its column is left out (pip install 'spectra-jax[benchmarks]')")
    times = alternate(contestants, rounds=rounds)
    step = median_ms(times["spectra"], m)
    filled = 2 * 4 * n * (m + 1) / 2  # bytes a step, mean over the run
    alone = median_ms(times["passes"], m)
    bandwidth = filled / alone * 1e3 / 1e9
    plain = 4 * n * m / median_ms(times["matrix-vector product"]) * 1e3 / 1e9
    rows = np.concatenate(
        [np.moveaxis(np.asarray(s[0]), 1, 0).reshape(s[0].shape[1], -1) for s in result.segments]
    )
    worst = 0.0
    for low in range(0, m, 16):
        gram = rows[low : low + 16].astype(np.float64) @ rows[:m].T.astype(np.float64)
        worst = max(worst, float(np.abs(gram - np.eye(m)[low : low + 16]).max()))
    lines = [
        "| what | value |",
        "|---|---|",
        f"| a Lanczos step, product and all vector work included | {step:.1f} ms ± "
        f"{spread(times['spectra']):.0%} |",
        f"| orthogonalisation alone | {alone:.1f} ms ± {spread(times['passes']):.0%} |",
        f"| its bandwidth over the filled rows | {bandwidth:.1f} GB/s |",
        f"| bandwidth of a matrix-vector product | {plain:.1f} GB/s |",
        f"| share of it | {bandwidth / plain:.0%} |",
        f"| max abs(QQᵀ - I), in float64 | {worst:.1e} |",
        f"| second passes | {int(result.second_passes)} of {m} |",
    ]
    if "matfree" in times:
        lines += [
            f"| matfree, full | {median_ms(times['matfree'], m):.1f} ms a step |",
            f"| ratio to matfree | {ratio(times, 'spectra', 'matfree'):.3f} |",
        ]
    return lines


if __name__ == "__main__":
    print("\n".join(main()))
