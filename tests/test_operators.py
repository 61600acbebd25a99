"""Every operator of the registry against its dense float64 reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPERATORS, SHARP, SPECTRA, Ridge, planted, relative_error, slow_but

import spectra
from spectra.base import trees


def tolerance(op) -> float:
    """32 roundings of one product.

    A product is a sum over at most N = 48 terms of a handful of chained float operations; their
    rounding errors add up to less than 32 eps |H| |v|. `op.precision` is eps, except for finite
    differences, where both of the error's parts are of order eps^(2/3) by the choice of the step.
    """
    return 32 * op.precision


SELDOM = (
    *("one batch, linearised", "forward over reverse", "reverse over reverse, not linearised"),
    *("microbatches that divide", "microbatches with a rest", "microbatches, not linearised"),
    *("masked microbatches", "stream", "masked stream", "preconditioned stream", "sum with a stream"),
    *("masked stream of microbatches", "finite difference", "submatrix", "sum, multiple and shift"),
    *("preconditioned", "matrix", "function", "kronecker product", "tangent kernel", "product"),
    "reverse over reverse",
)
"""What tests of their own have as well: "kfac stream of microbatches" is a stream, and cut."""


@pytest.fixture(params=slow_but(OPERATORS, *(OPERATORS.keys() - {*SELDOM})), ids=str)
def case(request, dtype):
    op, dense = OPERATORS[request.param]()
    assert str(op.dtype) == dtype
    return op, dense


@SHARP
def test_dense_matrix_product_and_scipy_agree_with_the_reference(case):
    op, dense = case
    assert op.size == len(dense)
    matrix = op.as_matrix()
    assert (np.asarray(matrix) == np.asarray(matrix).T).all()
    assert relative_error(matrix, dense) <= tolerance(op)
    v = np.random.default_rng(2).standard_normal(op.size)
    scale = np.linalg.norm(dense, 2) * np.linalg.norm(v)
    flat = np.asarray(op @ jnp.asarray(v), np.float64)
    assert np.linalg.norm(flat - dense @ v) <= tolerance(op) * scale
    through_scipy = op.to_scipy().matvec(v)
    assert through_scipy.dtype == op.dtype
    assert np.linalg.norm(through_scipy - dense @ v) <= tolerance(op) * scale


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_prepared_and_batched_products_equal_the_plain_product(name, x64):
    op, dense = OPERATORS[name]()
    structure = op.structure
    rows = np.asarray(jax.random.normal(jax.random.key(3), (3, op.size), op.dtype))
    vectors = [trees.unravel(row, structure) for row in rows]
    batched = op.prepare().mv_batch(jax.tree.map(lambda *leaves: np.stack(leaves), *vectors))
    for i, vector in enumerate(vectors):
        product = op @ vector
        one = jax.tree.map(lambda x, i=i: np.asarray(x)[i], batched)
        for tree in (product, one):
            assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(
                lambda x: (x.shape, x.dtype), structure
            )
        flat, other = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (one, product)
        )
        scale = np.linalg.norm(dense, 2) * np.linalg.norm(rows[i])
        assert np.linalg.norm(flat - other) <= 2 * tolerance(op) * scale


@pytest.mark.slow
def test_a_pytree_product_has_the_structure_of_the_parameters():
    op = Ridge().operator()
    v = {"w": jnp.ones(5), "b": jnp.ones(())}
    product = op @ v
    assert jax.tree.map(jnp.shape, product) == jax.tree.map(jnp.shape, v)
    flat = op @ jnp.ones(6)
    assert flat.shape == (6,)
    np.testing.assert_array_equal(flat, np.concatenate([product["b"][None], product["w"]]))


@pytest.mark.parametrize("name", SPECTRA)
def test_a_planted_matrix_has_the_planted_eigenvalues(name, dtype):
    eigenvalues = np.sort(SPECTRA[name])
    matrix = np.asarray(spectra.MatrixOperator(planted(eigenvalues)).as_matrix(), np.float64)
    # Weyl: eigenvalues move by at most the norm of the rounding, N roundings of |A|.
    error = np.abs(np.linalg.eigvalsh(matrix) - eigenvalues).max()
    eps = float(jnp.finfo(dtype).eps)
    assert error <= len(eigenvalues) * eps * np.abs(eigenvalues).max()


def test_an_operator_is_a_pytree_of_its_parameters_and_data():
    op = Ridge().operator()
    assert {x.shape for x in jax.tree.leaves(op)} == {(5,), (), (13, 5), (13,)}
    doubled = jax.tree.map(lambda x: 2 * x, op)
    assert isinstance(doubled, spectra.HessianOperator)
    np.testing.assert_array_equal(doubled.params["w"], 2 * op.params["w"])


def test_multiples_from_either_side_and_from_numpy_scalars():
    a = planted(SPECTRA["indefinite"])
    op, v = spectra.MatrixOperator(a), jnp.ones(len(a))
    for scaled in (2.0 * op, op * 2.0, np.float32(2) * op, jnp.float32(2) * op, op / 0.5):
        np.testing.assert_array_equal(scaled @ v, 2 * (op @ v))


@pytest.mark.slow
def test_the_data_shared_by_losses_without_data_may_be_none(dtype):
    op = spectra.HessianOperator(lambda p, _: jnp.sum(p**4) / 12, jnp.array([1.0, 2.0, 3.0]), None)
    np.testing.assert_allclose(op.as_matrix(), np.diag([1.0, 4.0, 9.0]), rtol=32 * op.precision)


def _mean_square(params, x):
    return jnp.mean(jnp.tanh(x @ params["w"] + params["b"]) ** 2)


PARAMETERS = {"w": np.ones((3, 2), "float32"), "b": np.ones(2, "float32")}
PRODUCTS = {
    "loss": lambda: spectra.HessianOperator(_mean_square, PARAMETERS, jnp.eye(4, 3)),
    "prepared": lambda: spectra.HessianOperator(_mean_square, PARAMETERS, jnp.eye(4, 3)).prepare(),
    "shifted": lambda: spectra.HessianOperator(_mean_square, PARAMETERS, jnp.eye(4, 3)).shift(1.0),
    "own": lambda: spectra.FunctionOperator(lambda v: {"w": 2 * v["w"], "b": v["b"]}, PARAMETERS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_says_what_is_wrong_with_its_vector(name):
    """`op.mv` takes what the operator's functions take, and JAX's words are about these."""
    op = PRODUCTS[name]()
    assert op.shape == (8, 8)
    half = op.mv(jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMETERS))
    assert jnp.allclose(half["w"], op.mv(PARAMETERS)["w"], rtol=1e-6)
    gone = jax.tree.map(jnp.array, PARAMETERS)
    jax.jit(lambda v: jax.tree.map(jnp.negative, v), donate_argnums=0)(gone)
    with pytest.raises(spectra.StructureError, match=r"the vector's leaf 'b' was deleted.*donated"):
        op.mv(gone)
    with pytest.raises(spectra.StructureError, match="op @ v takes a flat array"):
        op.mv(jnp.ones(8))
    if name != "own":  # a function of the user's may take what it likes
        with pytest.raises(spectra.StructureError, match=r"'w' has shape \(2, 3\), expected \(3, 2\)"):
            jax.jit(op.mv)({"w": jnp.ones((2, 3)), "b": jnp.ones(2)})


@pytest.mark.slow
def test_an_operator_may_have_a_shape_of_its_own():
    @dataclasses.dataclass(frozen=True)
    class Image(spectra.LinearOperator):
        like: jax.Array
        shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

        def mv(self, v):
            return v * self.shape[0]

    op = Image(jnp.ones(3), (5, 7))
    assert op.shape == (5, 7)
    assert spectra.eigsh(op, 1, key=jax.random.key(0)).values == 5
