"""What rounding does to blocks is measured by products of the whole: bounds of a table hold."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.density.extremes import extreme
from spectra.krylov import floors, product_rounding

SIZES = (8, 16, 16, 16, 16, 3)
KEY = jax.random.key(0)


def stacked_loss(params, batch):
    """A network whose inner layers are scanned over: one leaf for all of them."""
    x, labels = batch
    x = jax.nn.relu(x @ params["first"])
    x = jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, params["inner"])[0]
    logits = x @ params["last"]
    chosen = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - chosen)


def problem(seed):
    """Weights of four times the usual size: rounding grows from layer to layer, and nothing shows it."""
    rng = np.random.default_rng(seed)
    shapes = itertools.pairwise(SIZES)
    weights = [(4 * rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32) for s in shapes]
    params = {"first": weights[0], "inner": np.stack(weights[1:-1]), "last": weights[-1]}
    return params, (rng.standard_normal((40, 8)).astype(np.float32), rng.integers(0, 3, 40).astype(np.int32))


def operator(seed, dtype):
    params, (x, labels) = problem(seed)
    params = jax.tree.map(lambda w: jnp.asarray(w, dtype), params)
    return spectra.HessianOperator(stacked_loss, params, (jnp.asarray(x, dtype), labels))


@pytest.mark.parametrize("seed", [19, 39])  # without what is measured, off by 50 of their floors
def test_bounds_of_a_table_hold_where_asymmetry_does_not_show_what_a_loss_rounds(seed):
    with jax.enable_x64(True):
        exact = {
            name: np.asarray(op.as_matrix()) for name, op in operator(seed, jnp.float64).blocks().items()
        }
    table = spectra.summary(operator(seed, jnp.float32), key=KEY, by="leaf", num_steps=30, num_probes=1)
    assert list(table.quadratures) == list(exact) == ["first", "inner/0", "inner/1", "inner/2", "last"]
    for name, q in table.quadratures.items():
        values = np.linalg.eigvalsh(exact[name])
        largest, smallest = extreme(q, -1), extreme(q, 0)
        assert largest.lower <= values[-1] <= largest.upper, name
        assert smallest.lower <= values[0] <= smallest.upper, name
        assert q.noise_floor <= 1e-3 * np.abs(values).max(), name


@pytest.mark.slow
@pytest.mark.parametrize("moved", [False, True])
def test_what_is_measured_of_a_block_is_that_of_the_block_itself(moved, monkeypatch):
    """By products in float64, and by those of moved operators: within a factor of each block's own."""
    if moved:
        monkeypatch.setattr(product_rounding, "doubled", lambda op: None)
    op = operator(19, jnp.float32)
    own = {name: floors.relative_change(block) for name, block in op.blocks("leaf").items()}
    found = floors.relative_changes(op, "leaf", own)
    assert found.keys() == own.keys()
    for name, change in own.items():
        assert change / 10 <= found[name] <= 10 * change, name


def test_blocks_of_a_matrix_have_nothing_that_could_be_measured():
    assert not floors.relative_changes(spectra.MatrixOperator(jnp.eye(4)), "leaf", ["<root>"])
