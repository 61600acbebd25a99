"""Results that hold vectors: they come back in the tree and in the order that they had."""

from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Ridge
from flax import nnx
from test_pictures import plane

import spectra


def quadratic(params, _):
    # Eigenvalues 1, 2, 3, ... in tree order.
    leaves = [jnp.ravel(x) for x in jax.tree.leaves(params)]
    flat = jnp.concatenate(leaves)
    return 0.5 * jnp.sum(jnp.arange(1.0, len(flat) + 1) * flat**2)


# Sorted as flat names "a-b/x" stands before "a/x", as keys "a" before "a-b": the order must survive.
TREES = {
    "dicts": {"a": {"x": jnp.ones(3)}, "a-b": {"x": jnp.ones((2, 2))}, "c": jnp.ones(30)},
    "list and tuple": [jnp.ones(3), (jnp.ones((2, 2)), jnp.ones(30))],
    "block": {"frozen": None, "w": jnp.ones(30)},
    "array": jnp.ones(40),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_eigenpairs_come_back_with_their_tree(name, tmp_path):
    op = spectra.HessianOperator(quadratic, TREES[name], None)
    pairs = spectra.eigsh(op, 3, which="LA", key=jax.random.key(0))
    loaded = spectra.load(spectra.save(pairs, tmp_path / "pairs"))
    assert jax.tree.structure(loaded.vectors) == jax.tree.structure(pairs.vectors)
    np.testing.assert_array_equal(loaded.matrix(), pairs.matrix())
    assert repr(loaded) == repr(pairs)
    assert loaded.status is pairs.status
    for vector, value in zip(range(3), loaded.values, strict=True):
        v = jax.tree.map(lambda x, i=vector: jnp.asarray(x[i]), loaded.vectors)
        product = op @ v
        difference = jax.tree.map(lambda a, b, lam=value: np.abs(a - lam * b).max(), product, v)
        assert max(jax.tree.leaves(difference)) <= 1e-3 * pairs.values[-1]
    deflated = spectra.slq(op, key=jax.random.key(1), num_steps=10, num_probes=1, deflate=loaded)
    np.testing.assert_array_equal(np.sort(deflated.atoms), pairs.values)


@pytest.mark.slow
def test_vectors_of_other_containers_come_back_by_path_in_the_order_of_the_tree(tmp_path):
    model = nnx.Sequential(*[nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in range(12)])
    graph, params = nnx.split(model, nnx.Param)
    x = jnp.eye(3)
    op = spectra.HessianOperator(lambda p, x: jnp.mean(nnx.merge(graph, p)(x) ** 2), params, x)
    pairs = spectra.eigsh(op, 2, key=jax.random.key(0))
    loaded = spectra.load(spectra.save(pairs, tmp_path / "pairs"))
    assert isinstance(loaded.vectors, OrderedDict)
    assert list(loaded.vectors)[:2] == ["layers/0/bias", "layers/0/kernel"]
    np.testing.assert_array_equal(loaded.matrix(), pairs.matrix())
    back = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(loaded.vectors))
    assert jax.tree.structure(back) == jax.tree.structure(pairs.vectors)


@pytest.mark.slow
def test_all_other_results_can_be_saved(tmp_path):
    op = Ridge().operator()
    t = spectra.lanczos(op, jnp.ones(6), 4)
    loaded = spectra.load(spectra.save(t, tmp_path / "t"))
    np.testing.assert_array_equal(loaded.alpha, t.alpha)
    np.testing.assert_array_equal(loaded.matrix(), np.asarray(t.matrix()))
    with pytest.raises(ValueError, match="the basis was not kept"):
        _ = loaded.basis
    planned = spectra.plan(op, num_steps=4, num_probes=2)
    assert spectra.load(spectra.save(planned, tmp_path / "plan")) == planned
    spread = spectra.data_variability(op, key=jax.random.key(0), num_subsets=2, num_steps=4, num_probes=1)
    assert repr(spectra.load(spectra.save(spread, tmp_path / "spread"))) == repr(spread)
    drawn = spectra.load(spectra.save(plane(), tmp_path / "plane"))
    assert repr(drawn) == repr(plane())
    np.testing.assert_array_equal(drawn.loss, plane().loss)
    by_layer = spectra.diagonal(op, key=jax.random.key(0), method="exact")
    back = spectra.load(spectra.save(by_layer, tmp_path / "diagonal"))
    assert jax.tree.structure(back.value) == jax.tree.structure(by_layer.value)
