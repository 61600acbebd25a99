"""Eigenpairs nearest zero: the Chebyshev filter of `which="SM"` beside shift-and-invert with MINRES.

Diagonal operators in float64 with 5 wanted eigenvalues near zero and an indefinite rest: the truth is known.
MINRES is SciPy's, inside ARPACK's shift-and-invert mode at zero: each of its outer steps solves a system to
a relative residual of 1e-10. Products count all multiplications with the operator.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import LinearOperator, eigsh, minres

import spectra
from benchmarks.settings import Report, Settings, table
from benchmarks.timing import alternate, median_ms

K = 5


def spectrum(n: int, gap: float) -> np.ndarray:
    """Five eigenvalues within ±gap / 10, all others with |λ| in [gap, 1]."""
    rng = np.random.default_rng(0)
    rest = rng.choice([-1.0, 1.0], n - K) * np.geomspace(gap, 1.0, n - K)
    return np.concatenate([gap / 10 * np.array([-1.0, -0.5, 0.2, 0.6, 0.9]), rest])


def main(settings: Settings) -> Report:
    n = settings.choose(20_000, 2_200)
    rows = []
    with jax.enable_x64(True):
        for gap in settings.choose((0.3, 0.1, 0.03, 0.01), (0.3,)):
            values = spectrum(n, gap)
            rows += compare(values, gap, settings)
    head = ["gap / ‖H‖", "method", "products", "ms", "worst error / ‖H‖"]
    return Report(table(head, rows))


def compare(values: np.ndarray, gap: float, settings: Settings) -> list[list[str]]:
    exact = np.sort(values[:K])
    diagonal = jnp.asarray(values)
    op = spectra.FunctionOperator(lambda v: diagonal * v, jax.ShapeDtypeStruct(values.shape, jnp.float64))
    multiply = jax.jit(lambda v: diagonal * v)
    found: dict[str, tuple[int, np.ndarray]] = {}

    def own():
        pairs = spectra.eigsh(op, K, which="SM", key=jax.random.key(0), tol=1e-6)
        found["spectra, filter"] = (pairs.num_matvecs, pairs.values)

    def inverse():
        count = [0]

        def matvec(v):
            count[0] += 1
            return np.asarray(multiply(v.ravel()))

        shape = (len(values),) * 2
        forward = LinearOperator(shape, matvec=matvec, dtype=float)  # pyright: ignore

        def solve(b):
            return minres(forward, b.ravel(), rtol=1e-10, maxiter=20_000)[0]

        inverse = LinearOperator(shape, matvec=solve, dtype=float)  # pyright: ignore
        nearest = eigsh(forward, K, sigma=0.0, OPinv=inverse, tol=1e-8, return_eigenvectors=False)
        found["ARPACK, inverse by MINRES"] = (count[0], np.sort(nearest))

    runs = {"spectra, filter": own, "ARPACK, inverse by MINRES": inverse}
    times = alternate(runs, rounds=settings.choose(3, 1))
    return [
        [
            f"{gap:g}",
            name,
            f"{products:,}",
            f"{median_ms(times[name]):.0f}",
            f"{np.max(np.abs(np.sort(nearest) - exact)):.0e}",
        ]
        for name, (products, nearest) in found.items()
    ]


if __name__ == "__main__":
    print("\n".join(main(Settings()).lines))
