"""The registry: spectra and operators that every algorithm runs through, with exact answers.

References are NumPy float64 and use neither JAX nor automatic differentiation. To add an operator,
add a function to `OPERATORS`; it inherits every test of products, dense matrices and quadratures.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import networks
import numpy as np
import optax
import pytest

import spectra
from spectra.operators.base import LinearOperator
from spectra.operators.pytree import operator

SHARP = pytest.mark.parametrize(
    "dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)], indirect=True
)
"""For the fixture `dtype`: float64, whose bounds are sharper, in every run, and float32 with `-m ''`."""
COARSE = pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)], indirect=True
)
"""The other way round, where a fault shows in float32 alone."""


def slow_but(names, *always):
    """Parameters, or tuples of them, of which every run takes the named ones, and `-m ''` all."""
    assert {*always} <= {*names}

    def slow(name):
        return pytest.param(*(name if isinstance(name, tuple) else (name,)), marks=pytest.mark.slow)

    return [name if name in always else slow(name) for name in names]


def all_but(names, *rare):
    """Parameters, or tuples of them, of which every run takes all but the named ones, and `-m ''` all."""
    assert {*rare} <= {*names}
    return slow_but(names, *(name for name in names if name not in rare))


N = 48  # one order for all planted spectra: the compiled code is shared


def _spectra() -> dict[str, np.ndarray]:
    ones = np.ones(N)
    bulk = np.linspace(0.5, 1.5, N)
    return {
        "decaying": np.logspace(0, -6, N),
        "clustered": np.repeat([1.0, 2.0, 5.0], N // 3) + 1e-3 * np.linspace(-1, 1, N),
        "repeated": np.repeat([1.0, 2.0, 5.0], N // 3),
        "indefinite": np.linspace(-2.0, 3.0, N),
        "rank deficient": np.concatenate([np.zeros(N - 5), [1.0, 2.0, 3.0, 4.0, 5.0]]),
        "zero": 0 * ones,
        "multiple of the identity": -0.7 * ones,
        "outliers 1e4 times the bulk": np.concatenate([bulk[:-3], [-8e3, 9e3, 1e4]]),
    }


SPECTRA = _spectra()


def rotation(n: int, seed: int = 0) -> np.ndarray:
    """An orthogonal matrix in float64."""
    q, r = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return q * np.sign(np.diag(r))


def planted(eigenvalues: np.ndarray) -> np.ndarray:
    """A dense symmetric float64 matrix with the given eigenvalues."""
    q = rotation(len(eigenvalues))
    a = (q * eigenvalues) @ q.T
    return (a + a.T) / 2


@operator(leaves=("entries",))
class Diagonal(LinearOperator):
    """diag(entries). Entries are a leaf: one compiled program serves all spectra of one order."""

    entries: jax.Array

    @property
    def like(self):
        return self.entries

    def mv(self, v):
        return self.entries * v


def diagonal(eigenvalues, dtype=None) -> Diagonal:
    return Diagonal(jnp.asarray(eigenvalues, dtype))


def runs_of(num_probes: int, quadrature):
    """A quadrature of many probes as runs of `num_probes` each: what as many keys would give, in one call.

    Probe i depends on the key and i alone, so the runs are independent of each other. All is sampled in them:
    what resolves eigenvalues is left out.
    """
    for start in range(0, quadrature.num_probes, num_probes):
        yield _rows(quadrature, slice(start, start + num_probes))


def _rows(quadrature, rows: slice):
    fields = ("nodes", "weights", "residuals", "lengths", "asymmetry")
    arrays = {name: getattr(quadrature, name)[rows] for name in fields}
    bulk = quadrature.bulk and _rows(quadrature.bulk, rows)
    products = int(np.sum(arrays["lengths"]))
    return dataclasses.replace(quadrature, **arrays, bulk=bulk, num_matvecs=products, sketches=None)


def ridge_loss(params, batch):
    """mean of tanh² over examples, weighted if the batch carries a mask: smooth, not convex."""
    inputs, mask = batch
    z = inputs @ params["w"] + params["b"]
    return jnp.sum(mask * jnp.tanh(z) ** 2) / jnp.sum(mask)


def ridge_count(batch):
    """The weight of a batch of `ridge_loss`: how many examples its mask keeps."""
    return batch[1].sum()


class Ridge:
    """`ridge_loss` on fixed data, with its Hessian in closed form.

    With t = tanh(z), z = xᵀw + b, and x extended by one, (tanh²)'' = 2 (1 - t²)(1 - 3 t²), so
    H = Σ m_i 2 (1 - t_i²)(1 - 3 t_i²) x_i x_iᵀ / Σ m_i; leaves in tree order are b, w.
    """

    def __init__(self, num_examples=13, width=5, masked=False):
        rng = np.random.default_rng(1)
        self.inputs = rng.standard_normal((num_examples, width))
        self.mask = rng.integers(1, 4, num_examples) * 1.0 if masked else np.ones(num_examples)
        self.w, self.b = rng.standard_normal(width) / 2, 0.3

    def params(self, dtype=None):
        return {"w": jnp.asarray(self.w, dtype), "b": jnp.asarray(self.b, dtype)}

    def batch(self, dtype=None):
        return jnp.asarray(self.inputs, dtype), jnp.asarray(self.mask, dtype)

    def parts(self, *stops):
        x, m = self.batch()
        edges = (0, *stops, len(x))
        return [(x[a:b], m[a:b]) for a, b in itertools.pairwise(edges)]

    def hessian(self) -> np.ndarray:
        t = np.tanh(self.inputs @ self.w + self.b)
        x = np.column_stack([np.ones(len(t)), self.inputs])
        curvature = self.mask * 2 * (1 - t**2) * (1 - 3 * t**2) / self.mask.sum()
        return (x.T * curvature) @ x

    def operator(self, data=None, **options):
        data = self.batch() if data is None else data
        return spectra.HessianOperator(ridge_loss, self.params(), data, **options)


def negative_laplacian(v):
    """-∂² with zero boundary values: eigenvalues 4 sin²(π k / 2(n + 1)) along each axis."""
    out = 2 * v.ndim * v
    for axis in range(v.ndim):
        padded = jnp.pad(v, [(1, 1) if a == axis else (0, 0) for a in range(v.ndim)])
        out = out - jnp.take(padded, jnp.arange(v.shape[axis]), axis)
        out = out - jnp.take(padded, jnp.arange(2, v.shape[axis] + 2), axis)
    return out


def laplacian_eigenvalues(*shape: int) -> np.ndarray:
    """Known eigenvalues of `negative_laplacian` on a grid."""
    total = np.zeros(1)
    for n in shape:
        axis = 4 * np.sin(np.pi * np.arange(1, n + 1) / (2 * (n + 1))) ** 2
        total = (total[:, None] + axis).ravel()
    return np.sort(total)


def laplacian_matrix(n: int) -> np.ndarray:
    return 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)


def _matrix(name="indefinite"):
    return spectra.MatrixOperator(planted(SPECTRA[name])), planted(SPECTRA[name])


def _ridge(data=None, masked=False, **options):
    ridge = Ridge(masked=masked)
    return ridge.operator(ridge.parts(*data) if data else None, **options), ridge.hessian()


def _arithmetic():
    op, dense = _ridge()
    eye = np.eye(len(dense))
    return ((2.0 * op - op.shift(0.25)) / 4.0 + (-op)).shift(-1.5), -0.75 * dense - 1.5625 * eye


def _preconditioned(data=None):
    """Adagrad after one step along a gradient g: P = sqrt(0.1 + g² + 1e-7)."""
    ridge = Ridge()
    optimizer, params = optax.adagrad(0.1), ridge.params()
    gradient = {"b": jnp.asarray(0.5), "w": jnp.linspace(-1.0, 2.0, 5)}
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    g = np.concatenate([[0.5], np.linspace(-1.0, 2.0, 5)])
    root = (0.1 + g**2 + 1e-7) ** -0.25
    op = spectra.PreconditionedOperator(ridge.operator(ridge.parts(*data) if data else None), state)
    return op, ridge.hessian() * np.outer(root, root)


def _kfac():
    """The factors of networks.Network in closed form: rows are hidden units, and inputs with a one."""
    net = networks.Network()
    hessians = networks.curvature("half_square", net)[0]
    hidden = np.tanh(net.x @ net.B.T + net.c)
    inner = net.A * (1 - hidden**2)[:, None, :]
    inputs = np.column_stack([net.x, np.ones(len(net.x))])
    lower = networks.sandwich(inner, hessians)
    dense = np.zeros((18, 18))
    dense[:9, :9] = np.kron(hessians.sum(0), hidden.T @ hidden / len(hidden))  # A is (outputs, inputs)
    block = np.kron(lower, inputs.T @ inputs / len(inputs)).reshape(3, 3, 3, 3)
    dense[9:15, 9:15] = block[:, :2, :, :2].reshape(6, 6)  # B
    dense[9:15, 15:] = block[:, :2, :, 2].reshape(6, 3)  # with its bias c
    dense[15:, 9:15] = dense[9:15, 15:].T
    dense[15:, 15:] = block[:, 2, :, 2]
    x, y = jnp.asarray(net.x), jnp.asarray(net.real)
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    op = spectra.KFACOperator(
        networks.model_fn, networks.half_square, net.params(), batches, microbatch=4, check_data=False
    )
    return op, dense


def _damped_inverse():
    op, dense = _kfac()
    return op.inverse(0.5), np.linalg.inv(dense + 0.5 * np.eye(len(dense)))


def _low_rank():
    """On a tree: rows of a matrix that are not orthonormal, with values of both signs."""
    rows = np.random.default_rng(6).standard_normal((3, 6))
    vectors = {"b": jnp.asarray(rows[:, 0]), "w": jnp.asarray(rows[:, 1:])}
    values = np.array([2.0, -1.0, 0.5])
    return spectra.LowRankOperator(vectors, values), (rows.T * values) @ rows


def _diagonal_tree():
    entries = {"b": jnp.asarray(-0.5), "w": jnp.linspace(1.0, 2.0, 5)}
    return spectra.DiagonalOperator(entries), np.diag(np.concatenate([[-0.5], np.linspace(1.0, 2.0, 5)]))


def _product():
    """D H D + H, with a diagonal D: a product in a sum stays one."""
    (outer, dense), ridge = _diagonal_tree(), Ridge()
    op, hessian = ridge.operator(), ridge.hessian()
    return outer @ op @ outer + op, dense @ hessian @ dense + hessian


def _submatrix():
    op, dense = _ridge(microbatch=4)
    rows = [4, 0, 2]
    return op.submatrix(rows), dense[np.ix_(rows, rows)]


def _tangent_kernel():
    """J Jᵀ / N of networks.Network, whose Jacobian is known in closed form."""
    net = networks.Network()
    rows = net.jacobians().reshape(-1, 18)
    op = spectra.TangentKernelOperator(networks.model_fn, net.params(), jnp.asarray(net.x))
    return op, rows @ rows.T / len(net.x)


def _gram():
    """Jᵀ J of networks.Network, by the parameters B alone."""
    net = networks.Network()
    rows = net.jacobians().reshape(-1, 18)[:, 9:15]
    jacobian = spectra.JacobianOperator(networks.model_fn, net.params(), jnp.asarray(net.x), wrt="B")
    return jacobian.gram(), rows.T @ rows


def _kronecker():
    """Of a tree and an array, where the second factor is indefinite."""
    outer, inner = planted(np.array([1.0, 2.0, 4.0])), np.diag([1.0, -2.0, 3.0])
    tree = spectra.DiagonalOperator({"a": jnp.asarray(1.0), "b": jnp.asarray([-2.0, 3.0])})
    return spectra.KroneckerOperator(tree, outer), np.kron(inner, outer)


OPERATORS = {
    "matrix": _matrix,
    "function": lambda: (
        spectra.FunctionOperator(negative_laplacian, jnp.zeros(9)),
        laplacian_matrix(9),
    ),
    "one batch": _ridge,
    "one batch, not linearised": lambda: _ridge(linearize=False),
    "one batch, linearised": lambda: _ridge(linearize=True),
    "forward over reverse": lambda: _ridge(mode="forward-over-reverse"),
    "reverse over reverse": lambda: _ridge(mode="reverse-over-reverse"),
    "reverse over reverse, not linearised": lambda: _ridge(mode="reverse-over-reverse", linearize=False),
    "finite difference": lambda: _ridge(mode="finite-difference"),
    "microbatches that divide": lambda: _ridge(microbatch=13),
    "microbatches with a rest": lambda: _ridge(microbatch=4),
    "microbatches, not linearised": lambda: _ridge(microbatch=4, linearize=False),
    "masked microbatches": lambda: _ridge(masked=True, microbatch=4, weight_fn=ridge_count),
    "stream": lambda: _ridge(data=(1, 6)),
    "masked stream": lambda: _ridge(data=(1, 6), masked=True, weight_fn=ridge_count),
    "masked stream of microbatches": lambda: _ridge(
        data=(1, 6), masked=True, microbatch=2, weight_fn=ridge_count
    ),
    "sum, multiple and shift": _arithmetic,
    "preconditioned": _preconditioned,
    "preconditioned stream": lambda: _preconditioned(data=(4,)),
    "kfac stream of microbatches": _kfac,
    "kfac inverse": _damped_inverse,
    "diagonal": _diagonal_tree,
    "low rank": _low_rank,
    "product": _product,
    "kronecker product": _kronecker,
    "submatrix": _submatrix,
    "tangent kernel": _tangent_kernel,
    "gram of a jacobian": _gram,
    "sum with a stream": lambda: (
        Ridge().operator() + Ridge().operator(Ridge().parts(4)),
        2 * Ridge().hessian(),
    ),
}


def relative_error(got, expected) -> float:
    """|got - expected| / |expected| in the Frobenius norm, in float64."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(got - expected) / (size if size > 0 else 1.0))
