"""Small blocks are cut from one matrix: the same matrices, in fewer programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import spectra
from spectra.krylov import matrices
from spectra.krylov.dense import matrix_error
from spectra.operators.data import DataOperator

KEY = jax.random.key(3)
EPS = float(np.finfo(np.float32).eps)


def loss_fn(params, x):
    for layer in params["layers"]:
        x = x + layer["gain"] * jnp.tanh(x @ layer["w"] + layer["bias"]) @ layer["w"].T
    return jnp.mean((x @ params["head"] - 1) ** 2) / 2


def problem():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    layers = [
        {
            "w": jax.random.normal(next(keys), (4, 4)) / 2,
            "bias": jax.random.normal(next(keys), (4,)),
            "gain": jnp.ones(4) * 30.0**i,  # blocks of very different size
        }
        for i in range(2)
    ]
    params = {"head": jax.random.normal(next(keys), (4, 1)), "layers": layers}
    return params, jax.random.normal(next(keys), (12, 4))


@pytest.fixture
def made(monkeypatch):
    """The orders of the matrices that are computed."""
    found = []

    def counted(op, known=matrices.matrix_of):
        found.append(op.size)
        return known(op)

    monkeypatch.setattr(matrices, "matrix_of", counted)
    return found


def blocks_in_float64(op):
    """Cut from JAX's own Hessian, by name."""
    drawn = jax.tree.map(np.asarray, (op.params, op.data))
    with jax.enable_x64(True):
        flat, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), drawn[0]))
        whole = jax.jit(jax.hessian(lambda x, data: loss_fn(unravel(x), data)))
        whole = np.asarray(whole(flat, jnp.asarray(drawn[1], jnp.float64)))
    blocks = op.blocks()
    ends = np.cumsum([block.size for block in blocks.values()])
    parts = [slice(end - block.size, end) for end, block in zip(ends, blocks.values(), strict=True)]
    return {name: whole[part, part] for name, part in zip(blocks, parts, strict=True)}


def test_blocks_share_a_program_and_keep_their_own_error(made):
    op = spectra.HessianOperator(loss_fn, *problem())
    truth, blocks = blocks_in_float64(op), op.blocks()
    found = dict(matrices.matrices_of(blocks))
    assert made == [52]
    assert found.keys() == truth.keys()
    for name, matrix in found.items():
        values = np.linalg.eigvalsh(matrix.entries)
        error = np.linalg.norm(matrix.entries - truth[name], 2)
        bound = matrix_error(blocks[name], matrix, values)
        # Of a block as small as 1e-3 of its neighbours, too: entries are rounded relative to themselves.
        assert error <= bound <= 4 * len(values) * EPS * np.abs(values).max(), name
        vector = np.linspace(-1, 2, len(values)).astype(np.float32)
        scale = np.abs(values).max()
        np.testing.assert_allclose(matrix.unrounded(vector), truth[name] @ vector, rtol=0, atol=1e-12 * scale)


@pytest.mark.slow
def test_those_of_a_module_share_one_where_that_of_the_network_is_dear(made, monkeypatch):
    monkeypatch.setattr(matrices, "_pays", lambda blocks: len(blocks) == 3)
    list(matrices.matrices_of(spectra.HessianOperator(loss_fn, *problem()).blocks()))
    assert made == [24, 24, 4]  # two layers, and the head


def test_by_themselves_where_products_are_dear(made, monkeypatch):
    blocks = spectra.HessianOperator(loss_fn, *problem()).blocks()
    together = dict(matrices.matrices_of(blocks))
    made.clear()
    monkeypatch.setattr(matrices, "WORTH", 0.0)
    for name, matrix in matrices.matrices_of(blocks):
        scale = np.abs(matrix.entries).max()
        np.testing.assert_allclose(matrix.entries, together[name].entries, rtol=0, atol=1e-5 * scale)
    assert made == [block.size for block in blocks.values()]


def test_no_matrix_is_computed_before_it_is_asked_for(made):
    """All of them at once would be gigabytes for a network of many layers."""
    next(matrices.matrices_of(spectra.HessianOperator(loss_fn, *problem()).blocks()))
    assert len(made) == 1


@pytest.mark.slow
def test_groups_are_no_larger_than_a_matrix_may_be(made, monkeypatch):
    monkeypatch.setattr(matrices, "LARGEST", 9)
    list(matrices.matrices_of(spectra.HessianOperator(loss_fn, *problem()).blocks()))
    assert sorted(made) == [4, 8, 8, 16, 16]  # two pairs of biases, gains and the head


@pytest.mark.slow
@pytest.mark.parametrize("ask", [spectra.summary, spectra.condition_number])
def test_the_loss_is_evaluated_once_for_all_blocks(ask, monkeypatch):
    """It is the same number, and was a program and a pass over the data for each of them."""
    params, x = problem()
    op = spectra.HessianOperator(loss_fn, params, [x[:4], x[4:]])
    evaluated = []

    def counted(piece, known=DataOperator.loss):
        evaluated.append(piece.selected)
        return known(piece)

    monkeypatch.setattr(DataOperator, "loss", counted)
    options = {"per_layer": True} if ask is spectra.condition_number else {"by": "leaf"}
    ask(op, key=KEY, **options)
    assert evaluated == [None]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_found_before_its_blocks():
    params, x = problem()
    op = spectra.HessianOperator(lambda p, x: loss_fn(p, x) * jnp.nan, params, x)
    with pytest.raises(spectra.NonFiniteError, match="loss"):
        spectra.summary(op, key=KEY)
