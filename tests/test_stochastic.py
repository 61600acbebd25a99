"""What rounding inside a loss does to its matrices, where parameters moved by one rounding do not feel it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from jax import lax

import spectra
from spectra.base import host
from spectra.operators.data import DataOperator
from spectra.operators.doubled import DoubledOperator, doubled, rounded_once
from spectra.operators.stochastic import StochasticOperator, rounded_at_random

KEY = jax.random.key(0)
EPS = float(jnp.finfo(jnp.float32).eps)
N, D, K = 40, 3, 3
SCALE = 1e5


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=1))


def linear(w, x):
    return x @ w


def softmax_loss(w, batch):
    x, labels = batch
    return cross_entropy(linear(w, x), labels)


def confident(seed, margin):
    """A linear classifier whose examples all have about this margin, and the eigenvalues of its Hessian.

    That is the mean of x xᵀ ⊗ (diag(p) - p pᵀ), whose diagonal p (1 - p) is the sum over the others of
    p_a p_b: in float64 nothing is subtracted that is nearly equal.
    """
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((D, K)).astype(np.float32)
    x = rng.standard_normal((N, D))
    logits = np.sort(x @ w, axis=1)
    x = (x * margin / (logits[:, -1:] - logits[:, -2:-1])).astype(np.float32)
    logits = x.astype(float) @ w.astype(float)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    pairs = -p[:, :, None] * p[:, None, :]
    pairs[:, range(K), range(K)] = 0
    pairs[:, range(K), range(K)] = -pairs.sum(axis=2)
    exact = np.einsum("ni,nj,nab->iajb", x, x, pairs, dtype=float).reshape(D * K, D * K) / N
    op = spectra.HessianOperator(
        softmax_loss, jnp.asarray(w), (jnp.asarray(x), jnp.asarray(np.eye(K)[p.argmax(1)], jnp.float32))
    )
    return op, np.linalg.eigvalsh(exact)


@pytest.mark.parametrize(
    ("margin", "in_double", "widest"),
    slow_but(
        [(3.0, True, 8), (8.0, True, 8), (11.0, True, 8), (14.0, True, 8), (11.0, False, 100)],
        (8.0, True, 8),
    ),
)
def test_the_noise_floor_of_a_confident_classifier_holds(margin, in_double, widest, monkeypatch):
    """1 - p of 1e-5 has the spacing of numbers at one, 6e-8. The floors held a twentieth of it.

    In float64 errors E are seen. For a random v the bound sqrt(1.9 sqrt(n) |E E v|) is at most 1.9 |E| for
    n = 9 if E has one large eigenvalue, 2.4 |E| if all are alike; eigenvalues move by less than |E|. From a
    margin of 11 on the matrix is one of float64, with entries that are rounded once. What rounding may have
    done to constants of the program, half an eps of |H|, is stated beside that and does not occur here.
    """
    if not in_double:
        monkeypatch.setattr(DataOperator, "known_in_double", False)
    wide = []
    for seed in range(12):
        op, exact = confident(seed, margin)
        found = spectra.condition_number(op, key=KEY)
        values = np.linalg.eigvalsh(np.asarray(op.as_matrix(), float))
        error = np.abs(values - exact).max()
        assert error <= found.noise_floor
        assert found.largest_interval.lower <= exact[-1] <= found.largest_interval.upper
        wide.append((found.noise_floor - EPS / 2 * exact[-1]) / error)
        pairs = spectra.eigsh(op, 1, which="LA", key=KEY)
        away = np.abs(exact - pairs.values[0]).min()
        assert away <= pairs.residuals[0] + pairs.noise_floor
    assert np.median(wide) <= widest


def saturated_loss(w, x):
    return jnp.sum(jax.nn.sigmoid(x * w))


@pytest.mark.slow
def test_krylov_says_what_a_loss_that_saturates_cannot_resolve():
    """1 / (1 + exp(-30)) is 1 in float32: all products are zero, of a Hessian that is not."""
    op = spectra.HessianOperator(saturated_loss, jnp.full(6, 30.0), jnp.ones(6))
    found = spectra.condition_number(op, key=KEY, method="krylov")
    exact = np.exp(-30.0)  # p (1 - p) (1 - 2 p) of p = 1 / (1 + exp(-30)), to a share of 1e-13
    assert found.largest == 0
    assert found.largest_interval.lower <= exact <= found.largest_interval.upper
    assert exact <= found.noise_floor


def chained(w, x):
    """Loops, branches, calls and recomputation."""
    x = lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=2)[0]
    x = lax.cond(x[0, 0] > 9.0, jnp.sin, jnp.cos, x)
    x = jax.checkpoint(lambda y: jax.nn.softplus(y @ w))(x)
    x = lax.fori_loop(0, 2, lambda _, y: jnp.sin(y), x)
    return jnp.mean(x**2)


def product_of(a, b):
    """A reduction that JAX does not know by name, whose jaxpr has as many operands as the reduction."""
    return a * b + 0.0


def reduced(w, x):
    """Reductions of the data by a function."""
    one = jnp.ones((), x.dtype)
    rows = lax.reduce(x, one, product_of, (1,))
    windows = lax.reduce_window(x, one, product_of, (1, 2), (1, 2), "VALID")
    return jnp.mean(jnp.tanh((rows + windows.sum(axis=1))[:, None] * (x @ w)) ** 2)


def solved(w, x):
    """A linear system of a condition number near 1, with the derivatives that JAX has for its solution."""
    return jnp.mean(jnp.linalg.solve(jnp.eye(4) + w @ w.T / 40, jnp.tanh(x.T)) ** 2)


def batches():
    yield from (X[:4], X[4:])


X = jnp.asarray(np.random.default_rng(3).standard_normal((8, 4)), jnp.float32)
W = jnp.asarray(np.random.default_rng(4).standard_normal((4, 4)), jnp.float32)


@pytest.mark.parametrize(
    ("loss_fn", "data"),
    [(chained, X), (chained, batches), (reduced, X), (solved, X)],
    ids=["batch", "stream", "reductions", "system"],
)
def test_products_are_those_of_the_operator_but_for_rounding(loss_fn, data):
    op = spectra.HessianOperator(loss_fn, W, data, check_data=False)
    v = jnp.ones((4, 4))
    product = op @ v
    others = [StochasticOperator(op, jnp.uint32(salt)) @ v for salt in range(8)]
    changes = [float(jnp.linalg.norm(other - product) / jnp.linalg.norm(product)) for other in others]
    # Six layers of sums of four terms, and their second derivatives: some ten roundings each way.
    assert min(changes) > 0.1 * EPS
    assert max(changes) < 100 * EPS
    assert len({np.asarray(other).tobytes() for other in others}) == len(others)
    repeated = StochasticOperator(op, jnp.uint32(3)) @ v
    np.testing.assert_array_equal(repeated, others[3])


@pytest.mark.parametrize(
    ("loss_fn", "data"),
    [(chained, X), (chained, batches), (reduced, X), (solved, X)],
    ids=["batch", "stream", "reductions", "system"],
)
def test_products_in_float64_are_those_of_float64_arrays(loss_fn, data):
    op = spectra.HessianOperator(loss_fn, W, data, check_data=False)
    v = np.linspace(-1, 1, 16, dtype=np.float32)
    found = doubled(op).unrounded(v)
    with jax.enable_x64(True):
        exact = spectra.HessianOperator(loss_fn, W.astype(float), X.astype(float), check_data=False)
        exact = np.asarray(exact @ jnp.asarray(v.reshape(4, 4), float)).ravel()
    # 100 roundings, as above.
    assert np.linalg.norm(found - exact) <= 100 * np.finfo(float).eps * np.linalg.norm(exact)
    image = op @ v
    change = doubled(op).distance(jnp.asarray(v.reshape(4, 4)), image.reshape(4, 4))
    np.testing.assert_allclose(change, np.linalg.norm(np.asarray(image) - exact), rtol=0.3)


def called(w, x):
    """A loss with a part of a fixed type."""
    return jax.pure_callback(np.sum, jax.ShapeDtypeStruct((), jnp.float32), x) * jnp.sum(w**2)


def test_what_is_not_known_in_float64_is_moved():
    assert isinstance(doubled(spectra.HessianOperator(chained, W, X)), DoubledOperator)
    assert doubled(spectra.HessianOperator(called, W, X, check_data=False)) is None
    assert doubled(spectra.MatrixOperator(jnp.eye(3))) is None
    function = spectra.FunctionOperator(subtracting, jnp.zeros(SIZE))
    assert doubled(function.shift(1.0)) is not None
    assert doubled(function - 2 * function) is None  # its constants may be rounded, too, which counts here
    assert doubled(spectra.HessianOperator(chained, W, batches, check_data=False).shift(1.0)) is None
    with jax.enable_x64(True):
        assert doubled(spectra.HessianOperator(chained, W.astype(float), X.astype(float))) is None


@pytest.mark.slow
def test_rounding_of_a_gram_matrix_is_measured():
    gram = spectra.JacobianOperator(lambda w, x: jnp.tanh(x @ w), W, X).gram()
    v = jnp.ones((4, 4))
    product = gram @ v
    other = gram.moved(KEY)
    assert isinstance(other, StochasticOperator)
    # A layer of sums of four terms and of eight, there and back, at parameters that are moved by eps.
    assert 0.1 * EPS < float(jnp.linalg.norm(other.mv(v) - product) / jnp.linalg.norm(product)) < 50 * EPS
    with jax.enable_x64(True):
        exact = spectra.JacobianOperator(
            lambda w, x: jnp.tanh(x @ w), W.astype(float), X.astype(float)
        ).gram()
        exact = np.asarray(exact @ v.astype(float))
    found = doubled(gram).unrounded(np.ones(16))
    np.testing.assert_allclose(found, exact.ravel(), rtol=1e-12)


def test_what_is_exact_is_not_rounded():
    """Masks, permutations, signs and comparisons; an integer as a float."""

    class Exact(spectra.LinearOperator):
        like = jnp.zeros(6)

        def mv(self, v):
            mask = (jnp.arange(6) > 2).astype(jnp.float32)
            return jnp.where(mask > 0, -v[::-1], jnp.concatenate([v[3:], v[:3]]))

    v = jnp.linspace(0.1, 1.0, 6)
    np.testing.assert_array_equal(StochasticOperator(Exact(), jnp.uint32(1)) @ v, Exact() @ v)


SIZE, LARGE = 24, np.float32(1e4)
TURN = np.linalg.qr(np.random.default_rng(9).standard_normal((SIZE, SIZE)))[0]
DENSE = ((TURN * np.geomspace(1e-2, 1.0, SIZE)) @ TURN.T).astype(np.float32)
DENSE = np.tril(DENSE) + np.tril(DENSE, -1).T


def subtracting(v):
    """D v, after numbers that are 10⁴ times as large."""
    return (jnp.matmul(DENSE, v, precision="highest") + LARGE * v) - LARGE * v


@pytest.mark.parametrize("hidden", [-np.inf, float(np.finfo(np.float32).min)])
def test_masks_have_no_neighbours(hidden):
    """An infinite number that is moved is none, and the largest one becomes infinite, a row of them NaN.

    Four roundings to a probability: a shift, an exponential, a sum, a quotient.
    """

    def probabilities(x):
        return jax.nn.softmax(x + jnp.array([[0.0, 0.0, hidden], [0.0, hidden, hidden]]), axis=1)

    x = jnp.array([[0.3, 0.7, 0.1], [0.2, 0.9, 0.4]])
    moved = jax.jit(lambda salt: rounded_at_random(probabilities, salt, x)[0])
    for salt in range(4):
        np.testing.assert_allclose(moved(jnp.uint32(salt)), probabilities(x), rtol=8 * EPS)


def test_what_a_function_subtracts_is_measured():
    """10⁴ eps |v| for each product, where its types say eps |D v|: half of the values were outside of it."""
    exact = np.linalg.eigvalsh(DENSE.astype(float))
    op = spectra.FunctionOperator(subtracting, jnp.zeros(SIZE))
    for seed in range(6):
        pairs = spectra.eigsh(op, 2, which="LA", key=jax.random.key(seed))
        away = np.abs(pairs.values[:, None] - exact).min(axis=1)
        assert (away <= pairs.residuals + pairs.noise_floor).all()
        assert pairs.noise_floor <= 2 * LARGE * EPS * np.sqrt(SIZE)  # each of its sums to half a rounding


@pytest.mark.slow
def test_numbers_before_they_were_rounded_are_drawn_by_their_digits():
    """In units of the last digit they are spread evenly from -1/2 to 1/2, and alike where numbers are."""
    x = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    x = np.concatenate([x, -4 * x, np.float32([0, 1, -0.5, 3])])
    with jax.enable_x64(True):
        first, second = (np.asarray(rounded_once(x, jnp.uint32(salt))) for salt in (0, 1))
    np.testing.assert_array_equal(first.astype(np.float32), x)
    away = (first - x) / np.spacing(np.abs(x))
    np.testing.assert_allclose(np.mean(away[:20_000] ** 2), 1 / 12, rtol=0.05)  # 0.9 / sqrt(20,000) and 1e-3
    assert abs(np.corrcoef(first - x, second - x)[0, 1]) < 0.1
    np.testing.assert_array_equal(first[20_000:40_000], -4 * first[:20_000])
    np.testing.assert_array_equal(first[40_000:], x[40_000:])


def test_memory_for_float64_is_that_of_all_vectors_of_a_kronecker_product(monkeypatch):
    hessian = spectra.HessianOperator(chained, W, X)
    op = spectra.KroneckerOperator(hessian, hessian)
    five = spectra.MatrixOperator(jnp.eye(5))
    for other in (spectra.KroneckerOperator(hessian, five), spectra.KroneckerOperator(five, hessian)):
        assert other.evaluated_bytes() == 5 * hessian.evaluated_bytes()
    monkeypatch.setattr(host, "available_bytes", lambda device=None: 20 * hessian.evaluated_bytes())
    assert doubled(hessian) is not None
    assert doubled(op) is None


@pytest.mark.slow
def test_asymmetry_by_rounding_is_named():
    """A softmax is sure of every example: what is left of its products is rounding."""

    def loss_fn(w, batch):
        x, labels = batch
        logits = x @ w
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.sum(logits * labels, axis=1))

    op, _ = confident(0, 17.0)
    op = spectra.HessianOperator(loss_fn, op.params, op.data)
    with pytest.raises(spectra.NotSymmetricError, match=r"Rounding alone changes .* float64"):
        spectra.slq(op, key=KEY, num_steps=9, num_probes=2)


@pytest.mark.parametrize("margin", [15.0, 17.0])
@pytest.mark.parametrize("kind", slow_but(["hessian", "ggn"], "ggn"))
def test_a_matrix_of_which_a_sure_classifier_leaves_no_digits_is_that_of_float64(kind, margin):
    """Of a margin of 15 the columns are not symmetric; of 17 they are, and up to 31 % off."""
    for seed in range(4):
        op, exact = confident(seed, margin)
        if kind == "ggn":
            op = spectra.GGNOperator(linear, cross_entropy, op.params, op.data)
        values = np.linalg.eigvalsh(np.asarray(op.as_matrix(), float))
        np.testing.assert_allclose(values, exact, rtol=0, atol=EPS * np.sqrt(D * K) * exact[-1])


def log_sigmoid(logits, _):
    return -jnp.mean(jnp.log(jax.nn.sigmoid(logits)))


def test_a_symmetric_matrix_without_digits_is_that_of_float64():
    """p (1 - p) of a margin of 15 is 3e-7, in multiples of 6e-8; its outer products are symmetric anyway."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal(D).astype(np.float32), rng.standard_normal((N, D))
    x = (15 * x / (x @ w)[:, None]).astype(np.float32)
    exact = (x.T / (2 + 2 * np.cosh(x.astype(float) @ w.astype(float)))) @ x.astype(float) / N
    op = spectra.GGNOperator(linear, log_sigmoid, jnp.asarray(w), (jnp.asarray(x), jnp.zeros(N)))
    limit = 2 * EPS * np.abs(exact).max()
    np.testing.assert_allclose(op.as_matrix(), exact, rtol=0, atol=limit)
    assert np.abs(np.stack([op @ e for e in jnp.eye(D)]) - exact).max() > 1e4 * limit


def test_what_was_saved_in_float32_says_nothing_in_float64():
    """A prepared operator's products start from saved values, whose rounding float64 would not see."""
    op, _ = confident(0, 3.0)
    assert doubled(op) is not None
    assert doubled(op.prepare()) is None


def exact_and_sure(params, factors):
    """Curvatures that products have exactly, and p (1 - p) of classifiers that are sure, times 10⁵."""
    sure = jnp.sum(jnp.log(1 + jnp.exp(params["logits"])))
    return 0.5 * jnp.sum(factors * params["exact"] ** 2) + SCALE * sure


def test_rounding_is_sought_beyond_the_directions_of_largest_curvature():
    """The forty smallest eigenvalues are off by eps / (1 - p) at most, the others by nothing."""
    exact, logits = np.arange(16, 129), np.linspace(11, 12.5, 40).astype(np.float32)
    params = {"exact": jnp.ones(len(exact)), "logits": jnp.asarray(logits)}
    op = spectra.HessianOperator(
        exact_and_sure, params, jnp.asarray(exact, jnp.float32), shared=lambda path: True
    )
    x = logits.astype(np.float64)
    true = np.concatenate([exact, SCALE * np.exp(x) / (1 + np.exp(x)) ** 2])
    off = np.abs(np.diag(op.as_matrix()) - true).max()
    report = spectra.spectrum(op, key=KEY, exact=False)
    assert off > 32 * EPS * 128  # far more than products of this size are stated to be off by
    assert off <= 2 * report.quadrature.rounding * 128  # three steps may not find the largest of forty


def gelus(z, _):
    return jnp.sum(jax.nn.gelu(z))


@pytest.mark.usefixtures("optimised")
def test_a_matrix_is_made_of_single_columns_where_several_are_rounded_more():
    """The second derivative of GELU at |z| = 500 is zero, and a rounding times 10¹¹ where it is fused."""
    z = np.concatenate([np.linspace(-500, 500, 64), np.linspace(-2, 2, 16)]).astype(np.float32)
    x, a, c = z.astype(np.float64), 0.044715, (2 / np.pi) ** 0.5
    t, slope = np.tanh(c * (x + a * x**3)), c * (1 + 3 * a * x**2)
    true = (1 - t**2) * (slope + x / 2 * (6 * c * a * x - 2 * t * slope**2))
    op = spectra.HessianOperator(gelus, jnp.asarray(z), jnp.zeros(1), shared=lambda path: True)
    report = spectra.spectrum(op, key=KEY)
    assert report.noise_floor < 0.01 * np.abs(true).max()
    assert np.abs(np.sort(report.quadrature.resolved) - np.sort(true)).max() <= report.noise_floor
