"""Symmetry and positive semi-definiteness over random trees, shapes, dtypes and cuts of the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks import cross_entropy

import spectra
from spectra.base import trees

SHAPES = st.lists(st.integers(1, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from([jnp.float16, jnp.bfloat16, jnp.float32])
LEAVES = st.tuples(SHAPES, DTYPES)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=2).map(list),
        st.dictionaries(st.sampled_from("abc"), inner, min_size=1, max_size=2),
    ),
    max_leaves=4,
)
CLASSES, EXAMPLES = 3, 5


def model_fn(params, x):
    """tanh(x θ) with all parameters in one vector: every leaf matters, none is special."""
    return jnp.tanh(x @ trees.ravel(params))


def loss_fn(params, batch):
    return cross_entropy(model_fn(params, batch[0]), batch[1])


def is_leaf(node):
    return isinstance(node, tuple) and len(node) == 2 and isinstance(node[0], tuple)


def make(kind, params, data, **options):
    if kind == "covariance":
        return spectra.GradientCovarianceOperator(loss_fn, params, data, **options)
    if kind == "centered":
        return spectra.GradientCovarianceOperator(loss_fn, params, data, centered=True, **options)
    if kind == "hessian":
        return spectra.HessianOperator(loss_fn, params, data, **options)
    if kind == "ggn":
        return spectra.GGNOperator(model_fn, cross_entropy, params, data, **options)
    key = jax.random.key(0) if kind == "mc" else None
    return spectra.FisherOperator(model_fn, cross_entropy, params, data, kind=kind, key=key, **options)


def check(test, examples, **strategies):
    """Run a property on some examples, always the same ones: every one compiles a program of its own."""
    options = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=examples, **options)(given(**strategies)(test))()


@pytest.mark.slow
@pytest.mark.parametrize("examples", [4, 30])
def test_symmetric_and_positive_semi_definite(examples):
    check(
        symmetric_and_positive_semi_definite,
        examples,
        shape=TREES,
        kind=st.sampled_from(["hessian", "ggn", "type2", "mc", "empirical", "covariance", "centered"]),
        microbatch=st.sampled_from([None, 2]),
        seed=st.integers(0, 2**16),
    )


def symmetric_and_positive_semi_definite(shape, kind, microbatch, seed):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf[0]), leaf[1]), shape, is_leaf=is_leaf
    )
    n = trees.tree_size(params)
    data = (
        jnp.asarray(rng.standard_normal((EXAMPLES, CLASSES, n)), jnp.float32),
        jnp.asarray(rng.integers(0, CLASSES, EXAMPLES)),
    )
    op = make(kind, params, data, microbatch=microbatch, linearize=False)
    matrix = np.stack([np.asarray(op @ jnp.eye(n)[i], np.float64) for i in range(n)])
    size = np.linalg.norm(matrix, 2)
    # A column is a sum over 5 x 3 terms of chains of about ten float32 operations on n numbers; the
    # gradient's square bounds what cancels in a centred covariance.
    scale = max(
        size,
        np.linalg.norm(np.asarray(trees.ravel(spectra.HessianOperator(loss_fn, params, data).gradient())))
        ** 2,
    )
    limit = 32 * np.sqrt(n) * np.finfo(np.float32).eps * scale
    assert np.abs(matrix - matrix.T).max() <= limit
    if kind != "hessian":
        assert np.linalg.eigvalsh((matrix + matrix.T) / 2).min() >= -limit


@pytest.mark.slow
@pytest.mark.parametrize("examples", [3, 10])
def test_hessian_is_the_gauss_newton_matrix_of_a_linear_model(examples):
    check(of_a_linear_model, examples, shape=TREES, seed=st.integers(0, 2**16))


def of_a_linear_model(shape, seed):
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf[0]), leaf[1]), shape, is_leaf=is_leaf
    )
    n = trees.tree_size(params)
    x = rng.standard_normal((EXAMPLES, CLASSES, n)).astype(np.float32)
    data = (jnp.asarray(x), jnp.asarray(rng.integers(0, CLASSES, EXAMPLES)))

    def linear(params, x):
        return x @ trees.ravel(params)

    hessian = spectra.HessianOperator(lambda p, b: cross_entropy(linear(p, b[0]), b[1]), params, data)
    ggn = spectra.GGNOperator(linear, cross_entropy, params, data)
    v = jnp.asarray(rng.standard_normal(n), jnp.float32)
    # |∇²ℓ| <= 1/2, so |H| <= mean |x_i|² / 2.
    size = np.mean(np.linalg.norm(x, axis=(1, 2)) ** 2) / 2 * np.linalg.norm(v)
    difference = np.linalg.norm(np.asarray(hessian @ v) - np.asarray(ggn @ v))
    assert difference <= 32 * np.finfo(np.float32).eps * size
