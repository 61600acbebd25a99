"""Jacobians: products, Gram matrices and singular values are those of NumPy in float64."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest

import spectra
from spectra.base.errors import Status

KEY = jax.random.key(0)
ROWS, COLUMNS = 40, 30
SINGULAR = np.logspace(0, -9, COLUMNS)
EPS = np.finfo(np.float64).eps


def linear(params, x):
    return {"y": x @ params["w"]}


@jax.custom_vjp
def reverse_only(x):
    return jnp.sin(x)


reverse_only.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (jnp.cos(x) * g,))


def called_back(params, x):
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((4,), x.dtype), x @ params["w"])


def planted(turned: bool) -> np.ndarray:
    rng = np.random.default_rng(3)
    left = np.linalg.qr(rng.standard_normal((ROWS, COLUMNS)))[0]
    right = np.linalg.qr(rng.standard_normal((COLUMNS, COLUMNS)))[0]
    matrix = (left * SINGULAR) @ right.T
    return matrix.T if turned else matrix


def jacobian_of(matrix: np.ndarray, dtype=None) -> spectra.JacobianOperator:
    return spectra.JacobianOperator(
        linear, {"w": jnp.zeros(matrix.shape[1], dtype)}, jnp.asarray(matrix, dtype)
    )


@pytest.mark.slow
def test_products_are_those_of_the_jacobian_in_closed_form(x64):
    net = networks.Network()
    rows = net.jacobians().reshape(-1, 18)
    jacobian = spectra.JacobianOperator(networks.model_fn, net.params(), jnp.asarray(net.x))
    assert (jacobian.shape, jacobian.T.shape, jacobian.T.T.shape) == ((33, 18), (18, 33), (33, 18))
    rng = np.random.default_rng(0)
    v, u = rng.standard_normal(18), rng.standard_normal(33)
    tolerance = {"rtol": 0, "atol": 100 * EPS * np.linalg.norm(rows)}  # sums of at most 33 products
    np.testing.assert_allclose(jacobian @ v, rows @ v, **tolerance)
    np.testing.assert_allclose(jacobian.T @ u, rows.T @ u, **tolerance)
    np.testing.assert_allclose(
        jacobian @ np.stack([v, 2 * v], 1), (rows @ np.stack([v, 2 * v], 1)), **tolerance
    )
    tree = {"A": jnp.asarray(v[:9].reshape(3, 3)), "B": jnp.asarray(v[9:15].reshape(3, 2)), "c": v[15:]}
    np.testing.assert_allclose(jacobian @ tree, (rows @ v).reshape(11, 3), **tolerance)
    for matrix in (jacobian.as_matrix(), jacobian.T.as_matrix().T):
        np.testing.assert_allclose(matrix, rows, **tolerance)
    # Of a weight alone, and of a block of the Gram matrix, which differentiates no other leaf.
    part = spectra.JacobianOperator(networks.model_fn, net.params(), jnp.asarray(net.x), wrt="c")
    np.testing.assert_allclose(part.as_matrix(), rows[:, 15:], **tolerance)
    block = jacobian.gram().block("c").as_matrix()
    np.testing.assert_allclose(block, rows[:, 15:].T @ rows[:, 15:], **tolerance)


def test_a_model_without_forward_mode_has_both_products(x64):
    x = np.random.default_rng(1).standard_normal((4, 3))
    jacobian = spectra.JacobianOperator(lambda w, x: reverse_only(x @ w), jnp.ones(3), jnp.asarray(x))
    assert jacobian.mode == "reverse-over-reverse"
    dense = np.cos(x.sum(1))[:, None] * x
    tolerance = {"rtol": 0, "atol": 50 * EPS * np.abs(dense).sum()}
    np.testing.assert_allclose(jacobian.as_matrix(), dense, **tolerance)
    np.testing.assert_allclose(
        jacobian @ np.ones(3), dense.sum(1), rtol=0, atol=50 * EPS * np.abs(dense).sum()
    )


@pytest.mark.parametrize("turned", [False, True])
def test_small_singular_values_keep_the_digits_that_the_gram_matrix_loses(x64, turned):
    matrix = planted(turned)
    jacobian = jacobian_of(matrix)
    # The roots of the eigenvalues are wrong by up to sqrt(eps), 1.5e-8: that is 15 times the smallest.
    squared = np.sqrt(np.maximum(np.linalg.eigvalsh(matrix.T @ matrix)[::-1][:COLUMNS], 0))
    assert np.abs(squared - SINGULAR).max() > 1e-10
    found = spectra.svds(jacobian, COLUMNS, key=KEY)
    assert (found.values.shape, found.status, found.shape) == ((COLUMNS,), Status.CONVERGED, matrix.shape)
    error = np.abs(found.values - SINGULAR)
    # Rounding of J V and of the small problem: a multiple of k eps σ₁, and what the planted matrix has.
    assert error.max() <= 3 * COLUMNS * EPS
    assert (error <= found.errors).all()
    assert found.errors.max() <= 1e-4
    left = np.asarray(jax.tree.leaves(found.left)[0]).T
    right = np.asarray(jax.tree.leaves(found.right)[0]).T
    assert np.abs(matrix @ right - left * found.values).max() <= 1e-7  # of which the vectors come: sqrt(eps)
    # The smaller side comes from `eigsh`; the other one is J V / σ, with errors of eps σ₁ / σ.
    near, far = (left, right) if turned else (right, left)
    assert np.abs(near.T @ near - np.eye(COLUMNS)).max() <= 100 * EPS
    assert np.abs(far.T @ far - np.eye(COLUMNS)).max() <= 100 * EPS * SINGULAR[0] / SINGULAR[-1]


def test_a_few_of_either_end_and_what_is_said_of_them(dtype):
    matrix = planted(False) + 0.0
    true = np.linalg.svd(matrix.astype(dtype).astype(np.float64), compute_uv=False)
    eps = float(jnp.finfo(dtype).eps)
    for scale in (1.0, 2.0**-84):  # of which the square is no number of float32
        jacobian = jacobian_of(matrix * scale, dtype)
        few = spectra.svds(jacobian, 3, key=KEY)
        assert np.abs(few.values / scale - true[:3]).max() <= 30 * eps
        assert (np.abs(few.values / scale - true[:3]) <= few.errors / scale).all()
        assert (few.errors <= 1e-4 * few.values[0] + few.noise_floor).all()
        assert few.left["y"].shape == (3, ROWS)
    last = spectra.svds(jacobian, 2, which="SM", key=KEY)
    # Below the floor of the Gram matrix, sqrt(eps), the smallest are not told apart: their errors say so.
    distance = np.abs(last.values[:, None] / scale - true).min(axis=1)
    assert (distance <= last.errors / scale).all()
    assert last.values.max() <= last.gram_floor
    assert last.status is Status.STAGNATED
    assert not last.converged.any()


def test_copies_of_a_singular_value_are_found_or_the_result_says_that_it_did_not_look():
    values = np.repeat([5.0, 2.0, 1.0], 10)
    jacobian = jacobian_of(np.linalg.qr(np.random.default_rng(0).standard_normal((40, 30)))[0] * values)
    found = spectra.svds(jacobian, 2, key=KEY)
    assert (np.abs(found.values - 5) <= found.errors).all()
    assert found.missed <= 0.01
    short = spectra.svds(jacobian, 2, key=KEY, max_matvecs=4)
    assert short.values[1] < 4  # one vector has one copy of each
    assert short.missed == 1
    assert dict(short.rows())["probability of a missed copy"] == "not bounded"


def _scaled(jacobian, t):
    return spectra.JacobianOperator(linear, jacobian.params, t * jacobian.inputs)


@pytest.mark.slow
def test_a_jacobian_of_zeros():
    found = spectra.svds(jacobian_of(np.zeros((6, 4))), 2, key=KEY)
    assert np.array_equal(found.values, [0, 0])
    # Products of a function may be zero because they underflow: its squares are then below the least number.
    assert np.all(found.errors <= np.sqrt(np.finfo(np.float32).tiny))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda j: spectra.svds(j.gram(), 1, key=KEY), "are |λ|: use eigsh"),
        (lambda j: spectra.svds(j, 4, key=KEY), r"min\(m, n\) = 3"),
        (lambda j: spectra.svds(j, 1, key=KEY, which="LA"), "use one of"),
        (lambda j: spectra.svds(j, 1, key=KEY, tol=1.0), "units of the largest singular value"),
        (lambda j: jax.grad(lambda t: spectra.svds(_scaled(j, t), 1, key=KEY).values[0])(1.0), "outside jit"),
        (lambda j: j @ j, r"J.gram\(\) and J.cogram\(\)"),
        (lambda j: j @ jnp.ones(4), "another structure"),
        (lambda j: j.as_matrix(memory_limit=10), r"dense Jacobian of shape \(4, 3\)"),
        (lambda j: jacobian_of(np.diag([1.0, np.nan])) @ jnp.ones(2), "NaN or infinite"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    jacobian = jacobian_of(np.eye(4, 3))
    with pytest.raises(spectra.SpectraError, match=message):
        call(jacobian)


def test_outputs_that_are_none_are_refused():
    weights, x = {"w": jnp.ones(3)}, jnp.eye(4, 3)
    with pytest.raises(spectra.StructureError, match="'labels' has dtype int32"):
        spectra.JacobianOperator(lambda p, x: {"labels": jnp.argmax(x @ p["w"])[None]}, weights, x)
    with pytest.raises(spectra.StructureError, match="returns no numbers"):
        spectra.JacobianOperator(lambda p, x: None, weights, x)
    with pytest.raises(spectra.StructureError, match="model_fn is a dict"):
        spectra.JacobianOperator(weights, weights, x)  # pyright: ignore[reportArgumentType]
    with pytest.raises(spectra.DifferentiationError, match="callback"):
        spectra.JacobianOperator(
            lambda p, x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((4,), x.dtype), x @ p["w"]),
            weights,
            x,
        )


@pytest.mark.slow
def test_a_tangent_kernel_needs_the_axis_of_the_examples():
    weights, x = jnp.ones(3), jnp.eye(4, 3)
    for model_fn, shapes in (
        (lambda w, x: (x @ w, jnp.sum(x @ w)), r"'0' \[4\], '1' \[\]"),
        (lambda w, x: {"a": x @ w, "b": (x @ w)[:2]}, r"'a' \[4\], 'b' \[2\]"),
        (lambda w, x: jnp.sum(x @ w), r"'<root>' \[\]"),
    ):
        with pytest.raises(spectra.StructureError, match=f"share no first axis.*{shapes}.*cogram"):
            spectra.TangentKernelOperator(model_fn, weights, x)
    # Several outputs of each example are fine, and so is a model of flattened tokens.
    both = spectra.TangentKernelOperator(lambda w, x: (x @ w, 2 * x * w), weights, x)
    rows = np.concatenate([np.eye(4, 3), *(2 * np.diag(row) for row in np.eye(4, 3))])
    np.testing.assert_allclose(both.as_matrix(), rows @ rows.T / 4, atol=1e-6)


def test_the_precision_of_a_model_that_casts_is_stated():
    def coarse(w, x):
        return (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)

    gram = spectra.JacobianOperator(coarse, jnp.ones(3), jnp.eye(4, 3)).gram()
    assert gram.precision == float(jnp.finfo(jnp.bfloat16).eps)
    assert gram.computes_in == "bfloat16"


def per_example(params, x):
    return {"y": jnp.tanh(x @ params["w"]), "z": (x**2) @ params["w"][:, :1]}


BATCHES = np.split(np.random.default_rng(7).standard_normal((11, 3)), [4, 8])  # the last one is smaller
WEIGHTS = {"w": np.linspace(-1.0, 1.0, 6).reshape(3, 2)}


@pytest.mark.parametrize("source", [BATCHES, pytest.param(lambda: iter(BATCHES), marks=pytest.mark.slow)])
def test_outputs_of_several_batches_are_stacked(x64, source):
    streamed = spectra.JacobianOperator(per_example, WEIGHTS, source)
    whole = spectra.JacobianOperator(per_example, WEIGHTS, np.concatenate(BATCHES))
    expected = np.asarray(whole.as_matrix())
    assert streamed.shape == streamed.T.shape[::-1] == (33, 6)
    tolerance = {"rtol": 0, "atol": 100 * EPS * np.linalg.norm(expected)}
    rng = np.random.default_rng(0)
    v, u = rng.standard_normal((6, 2)), rng.standard_normal((33, 2))
    np.testing.assert_allclose(streamed.as_matrix(), expected, **tolerance)
    np.testing.assert_allclose(streamed @ v, expected @ v, **tolerance)
    np.testing.assert_allclose(streamed.T @ u[:, 0], expected.T @ u[:, 0], **tolerance)
    np.testing.assert_allclose(streamed.gram().as_matrix(), expected.T @ expected, **tolerance)
    np.testing.assert_allclose(streamed.cogram() @ u[:, 0], expected @ (expected.T @ u[:, 0]), **tolerance)
    tree = streamed @ {"w": v[:, 0].reshape(3, 2)}
    assert jax.tree.map(jnp.shape, tree) == {"y": (11, 2), "z": (11, 1)}
    true = np.linalg.svd(expected, compute_uv=False)
    found = spectra.svds(streamed, 2, key=KEY)
    assert (np.abs(found.values - true[:2]) <= found.errors).all()
    kernel = spectra.TangentKernelOperator(per_example, WEIGHTS, source)
    np.testing.assert_allclose(kernel @ u[:, 0], expected @ (expected.T @ u[:, 0]) / 11, **tolerance)


def test_a_list_that_the_model_takes_is_one_batch_and_outputs_that_do_not_stack_are_refused():
    pair = spectra.JacobianOperator(lambda w, xs: xs[0] * w + xs[1], jnp.ones(3), [jnp.ones(3), jnp.ones(3)])
    assert pair.shape == (3, 3)
    with pytest.raises(spectra.StructureError, match="one number for a whole batch"):
        spectra.JacobianOperator(lambda p, x: jnp.sum(x @ p["w"]), WEIGHTS, lambda: iter(BATCHES))
    with pytest.raises(spectra.StructureError, match=r"outputs of batch 2 .* those of batch 0"):
        spectra.JacobianOperator(lambda p, x: (x @ p["w"]).T, WEIGHTS, lambda: iter(BATCHES))
    with pytest.raises(spectra.DataError, match="read only once"):
        spectra.JacobianOperator(per_example, WEIGHTS, iter(BATCHES))
