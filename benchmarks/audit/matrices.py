"""Operators whose eigenvalues, diagonal and norms are known in float64, without the package under audit.

Orders from 5 to 5,000. Up to 505 they are dense matrices, so that one compiled program serves all of an
order; that of order 5,000 is a diagonal in a rotated cosine basis, whose products cost n log n.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import spectra

N = 505


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One operator in float64, or in float32 where that is what is audited, with the truth in float64."""

    name: str
    operator: spectra.LinearOperator
    eigenvalues: np.ndarray  # ascending
    diagonal: np.ndarray
    dtype: str = "float64"

    @property
    def size(self) -> int:
        return len(self.eigenvalues)

    @property
    def trace(self) -> float:
        return float(self.eigenvalues.sum())

    @property
    def norm(self) -> float:
        return float(np.linalg.norm(self.eigenvalues))

    @property
    def semidefinite(self) -> bool:
        return bool(self.eigenvalues[0] > -1e-10 * np.abs(self.eigenvalues).max())


@functools.cache
def rotation(n: int, seed: int = 7) -> np.ndarray:
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return q * np.sign(np.diag(r))


def planted(eigenvalues: np.ndarray, seed: int = 7) -> np.ndarray:
    """A dense symmetric matrix with these eigenvalues and eigenvectors without a preferred axis."""
    q = rotation(len(eigenvalues), seed)
    a = (q * eigenvalues) @ q.T
    return (a + a.T) / 2


def spiked(rng: np.random.Generator) -> np.ndarray:
    """Squared singular values of a random (250, 505) matrix, three outliers, and zeros for the rest."""
    values = np.zeros(N)
    values[:250] = np.linalg.svd(rng.standard_normal((N, 250)) / np.sqrt(250), compute_uv=False) ** 2
    values[:3] = 60, 45, 20
    return values


def pair(_: np.random.Generator) -> np.ndarray:
    """Zeros but for one off-diagonal pair."""
    a = np.zeros((N, N))
    a[3, 9] = a[9, 3] = 1.0
    return a


@functools.cache
def case(name: str) -> Case:
    """The case of a name, in float64; needs x64."""
    if name == LARGE:
        return large(1 / np.arange(1.0, 5001.0))
    matrix = MATRICES[name](np.random.default_rng(NAMES.index(name)))
    values = np.linalg.eigvalsh(matrix)
    if name in ("rank 50", "repeated"):  # zeros that are none but for rounding
        values = np.where(np.abs(values) < 1e-12 * np.abs(values).max(), 0.0, values)
    return Case(name, spectra.MatrixOperator(jnp.asarray(matrix)), values, np.diag(matrix))


def large(eigenvalues: np.ndarray) -> Case:
    """A diagonal in the basis of the cosine transform, with signs of its axes flipped at random."""
    from scipy.fft import dct

    n = len(eigenvalues)
    order = np.random.default_rng(0).permutation(eigenvalues)
    basis = np.asarray(dct(np.eye(n), norm="ortho", axis=0)) ** 2
    weights = jnp.asarray(order)

    def product(v):
        inner = weights * jax.scipy.fft.dct(v, norm="ortho")
        return jax.scipy.fft.idct(inner, norm="ortho")

    op = spectra.FunctionOperator(product, jax.ShapeDtypeStruct((n,), jnp.float64))
    return Case(LARGE, op, np.sort(eigenvalues), order @ basis)


def network(activation, seed: int, steps: int = 300):
    """(loss, parameters (505,), data) of a 19-20-5 network, trained on a mixture; float64 NumPy arrays."""
    rng = np.random.default_rng(seed)
    centres, labels = rng.standard_normal((5, 19)), rng.integers(0, 5, 200)
    inputs = centres[labels] + 1.2 * rng.standard_normal((200, 19))
    shapes = [(19, 20), (20,), (20, 5), (5,)]
    edges = np.cumsum([0, *(int(np.prod(s)) for s in shapes)])

    def loss(flat, data):
        x, y = data
        w1, b1, w2, b2 = (flat[a:b].reshape(s) for a, b, s in zip(edges[:-1], edges[1:], shapes, strict=True))
        z = activation(x @ w1 + b1) @ w2 + b2
        return jnp.mean(jax.nn.logsumexp(z, 1) - jnp.take_along_axis(z, y[:, None], 1)[:, 0])

    data, start = (jnp.asarray(inputs), jnp.asarray(labels)), jnp.asarray(0.3 * rng.standard_normal(N))
    step = jax.jit(lambda flat, _: (flat - 0.5 * jax.grad(loss)(flat, data), None))
    flat, _ = jax.jit(lambda x: jax.lax.scan(step, x, length=steps))(start)
    return loss, np.asarray(flat), (inputs, labels)


def network_hessian(activation, seed: int) -> np.ndarray:
    """Its Hessian by JAX's own `hessian` in float64."""
    loss, flat, data = network(activation, seed)
    matrix = np.asarray(jax.jit(jax.hessian(loss))(jnp.asarray(flat), tuple(map(jnp.asarray, data))))
    return (matrix + matrix.T) / 2


MATRICES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "five": lambda _: planted(np.array([0.5, 1.0, 2.0, 4.0, 10.0])),
    "forty, indefinite": lambda rng: planted(rng.standard_normal(40)),
    "decaying, i^-1.5": lambda _: planted(np.arange(1.0, N + 1) ** -1.5),
    "decaying, 0.9^i": lambda _: planted(0.9 ** np.arange(N)),
    "bulk and spikes": lambda rng: planted(spiked(rng)),
    "flat and a spike": lambda rng: planted(np.append(1 + 0.01 * rng.standard_normal(N - 1), 100.0)),
    "spikes of both signs": lambda rng: planted(np.append(rng.standard_normal(N - 3), [-80.0, 50, 20])),
    "three equal spikes": lambda rng: planted(
        np.append(1 + 0.3 * rng.standard_normal(N - 3), np.full(3, 100.0))
    ),
    "pairs of spikes": lambda rng: planted(
        np.append(rng.standard_normal(N - 8), [80.0, 60, 60, 40, 30, 30 * (1 + 1e-9), 20, -50])
    ),
    "two clusters": lambda rng: planted(np.repeat([1.0, 5.0], [252, 253]) + 1e-3 * rng.standard_normal(N)),
    "repeated": lambda _: planted(np.repeat([0.0, 1.0, 2.0, 10.0], [300, 150, 50, 5])),
    "rank 50": lambda rng: planted(np.append(np.zeros(N - 50), np.exp(2 * rng.standard_normal(50)))),
    "sixteen decades": lambda _: planted(np.logspace(-12, 4, N)),
    "diagonal, log-normal": lambda rng: np.diag(np.exp(3 * rng.standard_normal(N))),
    "a pair off the diagonal": pair,
    "network, tanh": lambda _: network_hessian(jnp.tanh, 3),
    "network, relu": lambda _: network_hessian(jax.nn.relu, 5),
}
LARGE = "decaying, 5,000"
NAMES = (*MATRICES, LARGE)
