"""Blocks: principal submatrices by path, products, spectra and pictures of all of them."""

import re

import jax
import jax.numpy as jnp
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from cases import OPERATORS, relative_error, slow_but
from jax import lax
from networks import LOSSES, Network, cross_entropy, model_fn
from programs import OPTIMISED

import spectra
from spectra.base import paths, trees

SPLIT = {"A": slice(0, 9), "B": slice(9, 15), "c": slice(15, 18)}


def loss_fn(params, batch):
    return LOSSES["cross_entropy"](model_fn(params, batch[0]), batch[1])


def batch(net):
    return jnp.asarray(net.x), jnp.asarray(net.labels)


def hessian(params, data):
    return spectra.HessianOperator(loss_fn, params, data)


def ggn(params, data):
    return spectra.GGNOperator(model_fn, cross_entropy, params, data)


KINDS = {
    "hessian": hessian,
    "stream": lambda params, data: spectra.HessianOperator(loss_fn, params, [data, data], linearize=False),
    "ggn": ggn,
    "mc": lambda params, data: spectra.FisherOperator(
        model_fn, cross_entropy, params, data, kind="mc", key=jax.random.key(0)
    ),
    "centered covariance": lambda params, data: spectra.GradientCovarianceOperator(
        loss_fn, params, data, centered=True
    ),
    "sum": lambda params, data: 2.0 * hessian(params, data) - ggn(params, data).shift(0.5),
    "function": lambda params, data: spectra.FunctionOperator(lambda v: trees.scale(3.0, v), params),
}


def operator(name):
    net = Network()
    return KINDS[name](net.params(), batch(net))


@pytest.mark.parametrize("name", slow_but(KINDS, "hessian", "function"))
def test_a_block_is_a_principal_submatrix(name, x64):
    op = operator(name)
    dense = np.asarray(op.as_matrix())
    limit = 64 * np.finfo(float).eps * np.linalg.norm(dense, 2)
    for select, rows in (("B", SPLIT["B"]), ("[AB]", slice(0, 15)), ("*", slice(0, 18))):
        block = op.block(select)
        assert block.size == len(dense[rows])
        assert np.abs(np.asarray(block.as_matrix()) - dense[rows, rows]).max() <= limit
    nested = op.block("[Bc]").block("c").as_matrix()
    assert np.abs(np.asarray(nested) - dense[SPLIT["c"], SPLIT["c"]]).max() <= limit
    vectors = jax.random.normal(jax.random.key(1), (3, 6))
    many = op.block("B").mv_batch({"A": None, "B": vectors.reshape(3, 3, 2), "c": None})
    assert np.abs(np.asarray(many["B"]).reshape(3, 6) - vectors @ dense[9:15, 9:15]).max() <= 4 * limit


@pytest.mark.slow
def test_a_block_differentiates_its_own_leaves_only():
    """The gradient stops at the last layer: half the operations, as the compiler counts them."""
    net = Network()
    params, data = net.params(), batch(net)
    deep = {f"layer {i}": params["B"][:2, :2] for i in range(20)} | {"out": params["A"][:, :2]}

    def deep_loss(params, batch):
        x, y = batch
        for i in range(20):
            x = jnp.tanh(x @ params[f"layer {i}"])
        return cross_entropy(x @ params["out"].T, y)

    op = spectra.HessianOperator(deep_loss, deep, data)

    def flops(op):
        v = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), op.structure)
        cost = jax.jit(lambda op, v: op.mv(v)).lower(op, v).compile(OPTIMISED).cost_analysis()
        assert cost is not None
        return cost["flops"]

    assert flops(op.block("out")) < 0.3 * flops(op)


def test_selection_by_glob_regex_and_predicate():
    op = operator("hessian")
    for select in ("[Bc]", re.compile("^[Bc]$"), lambda path: path in "Bc"):
        assert op.block(select).size == 9
    with pytest.raises(spectra.StructureError, match=r"no parameter matches 'D'; the paths are A, B, c"):
        op.block("D")
    with pytest.raises(spectra.StructureError, match="select is a int"):
        op.block(3)  # pyright: ignore
    with pytest.raises(spectra.StructureError, match="select is a type"):
        op.block(int)  # pyright: ignore
    with pytest.raises(spectra.StructureError, match="by='model'"):
        op.blocks(by="model")


def test_names_of_leaves_and_layers():
    tree = {"a": {"kernel": 1.0, "bias": 2.0}, "b": [3.0, {"w": 4.0}], "fc1.weight": 5.0, "fc1.bias": 6.0}
    assert paths.leaf_paths(tree) == ["a/bias", "a/kernel", "b/0", "b/1/w", "fc1.bias", "fc1.weight"]
    assert list(paths.group_leaves(tree, "layer")) == ["a", "b", "b/1", "fc1"]
    assert list(paths.group_leaves(jnp.ones(3), "leaf")) == ["<root>"]
    assert paths.select_leaves(tree, "b") == (2, 3)
    assert paths.select_leaves(tree, "fc1") == (4, 5)


def test_boxes_of_flax_are_no_part_of_a_name():
    from flax import linen, nnx

    _, params = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert paths.leaf_paths(params) == ["bias", "kernel"]
    assert paths.leaf_paths({"params": params, "scale": 1.0}) == ["params/bias", "params/kernel", "scale"]
    assert paths.leaf_paths({"value": 1.0, "other": {"value": 2.0}}) == ["other/value", "value"]
    boxed = {"kernel": linen.Partitioned(jnp.ones((2, 3)), (None, "model")), "bias": jnp.ones(3)}
    tree = {"Dense_0": boxed, "Dense_1": {"kernel": linen.LogicallyPartitioned(jnp.ones(2), ("model",))}}
    for same in (tree, linen.meta.unbox(tree)):
        assert paths.leaf_paths(same) == ["Dense_0/bias", "Dense_0/kernel", "Dense_1/kernel"]
        assert paths.group_leaves(same, "layer") == {"Dense_0": (0, 1), "Dense_1": (2,)}
    kept = trees.keep_leaves(tree, (0, 2))
    assert paths.leaf_paths(kept) == ["Dense_0/bias", "Dense_1/kernel"]


# (tree, names of its leaves, names of its layers); the leaves of each count upwards in tree order.
ALIKE = [
    ({"a": {"b": 0.0}, "a/b": 1.0}, ["a/b", "'a/b'"], ["a", "'a/b'"]),
    ({"a": {"b": {"w": 0.0}}, "a/b": {"v": 1.0}}, ["a/b/w", "'a/b'/v"], ["a/b", "'a/b'"]),
    ({"a": {"b/c": 0.0}, "a/b": {"c": 1.0}}, ["a/'b/c'", "a/b/c"], ["a", "a/b"]),
    ({"net/~/linear": {"w": 0.0, "b": 1.0}, "net": {"w": 2.0}}, None, ["net", "net/~/linear"]),
]


@pytest.mark.parametrize(("tree", "names", "layers"), ALIKE)
def test_paths_that_read_alike_are_told_apart(tree, names, layers):
    found = paths.leaf_paths(tree)
    assert found == (names or ["net/w", "net/~/linear/b", "net/~/linear/w"])
    assert list(paths.group_leaves(tree, "layer")) == layers
    assert sum(map(len, paths.group_leaves(tree, "layer").values())) == len(found)
    for index, name in enumerate(found):
        assert paths.select_leaves(tree, name) == (index,)


def scanned_loss(params, x):
    """The microbatches' scan, recomputation and a cast lie between the parameters and their own scan."""

    def layer(hidden, weights):
        return hidden + jnp.tanh(hidden @ weights["dense"]["kernel"] + weights["bias"]), None

    def network(layers, x):
        return lax.scan(jax.checkpoint(layer), x, layers)[0]

    return jnp.mean((jax.checkpoint(network)(params["layers"], x) @ params["out"]["w"]) ** 2)


@pytest.mark.slow
def test_scanned_layers_are_blocks_of_their_own(x64):
    rng = np.random.default_rng(0)
    layers = {"bias": rng.standard_normal((3, 2)), "dense": {"kernel": rng.standard_normal((3, 2, 2))}}
    params = jax.tree.map(jnp.asarray, {"layers": layers, "out": {"w": rng.standard_normal(2)}})
    x = jnp.asarray(rng.standard_normal((5, 2)))
    op = spectra.HessianOperator(scanned_loss, params, x, microbatch=2)
    blocks = op.blocks(by="layer")
    assert {name: block.size for name, block in blocks.items()} == {
        **{f"layers/{i}": 2 for i in range(3)},
        **{f"layers/{i}/dense": 4 for i in range(3)},
        "out": 2,
    }
    dense = np.asarray(op.as_matrix())  # 6 of the biases, 12 of the kernels, 2 of the output
    limit = 64 * np.finfo(float).eps * np.linalg.norm(dense, 2)
    for i in range(3):
        rows = slice(6 + 4 * i, 10 + 4 * i)
        block = blocks[f"layers/{i}/dense"]
        assert np.abs(np.asarray(block.as_matrix()) - dense[rows, rows]).max() <= limit
    assert list((2 * op).blocks()) == list(op.blocks())
    assert list(blocks["layers/1"].blocks()) == ["layers/bias"]


@pytest.mark.slow
def test_a_scan_that_differentiation_has_made_is_read():
    """Its operands are grouped otherwise than those of a scan that a user writes, in jax 0.11 and later."""

    def network(layers, x):
        return jnp.sum(lax.scan(lambda hidden, w: (hidden * w, None), x, layers)[0])

    def slope(layers, x):  # of the network in its inputs: Π_i w_i
        return jnp.mean(jax.vmap(jax.grad(network, argnums=1), (None, 0))(layers, x) ** 2)

    op = spectra.HessianOperator(slope, jnp.array([2.0, 3.0]), jnp.ones((4, 1)))
    assert [block.size for block in op.blocks(by="layer").values()] == [1, 1]
    np.testing.assert_allclose(op.as_matrix(), [[18.0, 24.0], [24.0, 8.0]])  # of (w_0 w_1)²


@pytest.mark.slow
def test_stacks_that_no_scan_shows_are_chosen():
    """An ensemble under `jax.vmap`."""
    members = {"net": {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}, "scale": jnp.ones(2)}

    def ensemble_loss(params, x):
        one = jax.vmap(lambda net: jnp.sum(net["w"] * x) + net["b"])
        return jnp.sum(one(params["net"]) ** 2) * jnp.sum(params["scale"])

    op = spectra.HessianOperator(ensemble_loss, members, jnp.ones(2))
    assert list(op.blocks(by="layer")) == ["net", "scale"]
    blocks = op.blocks(by="layer", scanned="net")
    assert {name: block.size for name, block in blocks.items()} == {
        "net/0": 3,
        "net/1": 3,
        "net/2": 3,
        "scale": 2,
    }
    # ∂²/∂(b, w)² of 2 (w·x + b)², the factor of the scales included, is 4 (1, x)(1, x)ᵀ.
    np.testing.assert_allclose(blocks["net/1"].as_matrix(), 4 * np.ones((3, 3)), rtol=1e-6)
    scalar = spectra.HessianOperator(ensemble_loss, {**members, "scale": jnp.array(1.0)}, jnp.ones(2))
    with pytest.raises(spectra.StructureError, match="'scale' share no leading axis"):
        scalar.blocks(scanned="scale")


@pytest.mark.slow
def test_an_empty_leaf_is_no_block(x64):
    """H = diag(12 a²) for the quartic Σ a⁴: traces, and what divides by a size, where a leaf has none."""
    params = {"empty": jnp.zeros((0, 3)), "layer": {"a": jnp.arange(1.0, 4.0), "none": jnp.zeros(0)}}
    op = spectra.HessianOperator(quartic, params, None)
    assert list(op.blocks()) == ["layer/a"]
    assert {name: block.size for name, block in op.blocks(by="layer").items()} == {"layer": 3}
    key, values = jax.random.key(0), 12 * np.arange(1.0, 4.0) ** 2
    assert spectra.trace(op, key=key, by="leaf").value == {"layer/a": pytest.approx(values.sum(), rel=1e-14)}
    report = spectra.spectrum(op, key=key, num_steps=3, num_probes=1)
    assert report.quadrature.range[1] == pytest.approx(108.0)


def quartic(params, _):
    return sum(jnp.sum(x**4) for x in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_the_block_of_everything_is_the_operator(name, x64):
    op, dense = OPERATORS[name]()
    limit = 32 * op.precision
    assert relative_error(op.block("*").as_matrix(), dense) <= limit


@pytest.mark.slow
def test_slq_of_all_blocks_shares_the_code_of_the_recurrence(x64):
    from spectra.krylov import recurrence

    rng = np.random.default_rng(0)
    params = {f"layer {i}": jnp.asarray(rng.standard_normal((4, 5))) for i in range(3)}

    def product_loss(params, x):
        return jnp.mean(jnp.tanh(sum(x @ w for w in params.values())) ** 2)

    op = spectra.HessianOperator(product_loss, params, jnp.asarray(rng.standard_normal((7, 4))))
    blocks = op.blocks()
    before = recurrence._absorb_one.cache_size()
    results = spectra.slq(blocks, key=jax.random.key(0), num_steps=30, num_probes=2)
    assert recurrence._absorb_one.cache_size() == before + 1
    for name, block in blocks.items():
        exact = np.linalg.eigvalsh(block.as_matrix())
        assert results[name].num_steps == 20  # n of a block
        ends = results[name].nodes[:, [0, -1]]
        assert np.abs(ends - exact[[0, -1]]).max() <= 1e-12 * np.abs(exact).max()
    alone = spectra.slq(
        blocks["layer 1"], key=jax.random.fold_in(jax.random.key(0), 1), num_steps=20, num_probes=2
    )
    np.testing.assert_allclose(alone.nodes, results["layer 1"].nodes, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_pictures_and_files_of_blocks(tmp_path):
    mpl.use("Agg")
    values = {"a/kernel": jnp.linspace(-1.0, 1.0, 40), "a/bias": jnp.linspace(0.0, 100.0, 60)}
    blocks = {name: spectra.MatrixOperator(jnp.diag(v)) for name, v in values.items()}
    results = spectra.slq(blocks, key=jax.random.key(0), num_steps=20, num_probes=2)
    axes = spectra.plot_blocks(results)
    assert [ax.get_title() for ax in axes] == ["a/kernel, n = 40", "a/bias, n = 60"]
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert axes[0].get_xlim()[1] >= 100
    axes[0].figure.savefig(tmp_path / "blocks.png")
    plt.close("all")
    path = spectra.save(results, tmp_path / "blocks")
    again = spectra.load(path)
    assert list(again) == list(results)
    np.testing.assert_array_equal(again["a/bias"].nodes, results["a/bias"].nodes)
    with pytest.raises(spectra.SpectraError, match="no blocks"):
        spectra.plot_blocks({})


def test_distances_between_spectra():
    """Distributions that do not overlap are at distance 1; equal ones at 0 whatever the probes."""
    base = np.linspace(1.0, 2.0, 60)
    values = {"a": base, "again": base, "tenfold": 10 * base, "negative": -base}
    ops = {name: spectra.MatrixOperator(jnp.diag(jnp.asarray(v))) for name, v in values.items()}
    results = spectra.slq(ops, key=jax.random.key(0), num_steps=60, num_probes=8)
    d = spectra.spectral_distances(results)
    np.testing.assert_allclose(d, d.T, atol=1e-12)
    assert np.diag(d).max() < 1e-6
    assert d[0, 1] < 0.1
    assert min(d[0, 2], d[0, 3]) > 0.999
    shapes = spectra.spectral_distances(results, normalize=True)
    assert shapes[0, 2] < 0.1
    assert shapes[0, 3] > 0.999
    with pytest.raises(spectra.SpectraError, match="at least two"):
        spectra.spectral_distances({"a": results["a"]})
    with pytest.raises(spectra.SpectraError, match="metric="):
        spectra.spectral_distances(results, metric="euclidean")


@pytest.mark.slow
def test_wasserstein_distances_between_known_spectra():
    """∫ |F⁻¹ - G⁻¹| of the exact eigenvalues; with n steps every rule is exact but for its weights."""
    base = np.linspace(1.0, 2.0, 60)
    values = {"a": base, "tenfold": 10 * base, "negative": -base}
    ops = {name: spectra.MatrixOperator(jnp.diag(jnp.asarray(v))) for name, v in values.items()}
    results = spectra.slq(ops, key=jax.random.key(0), num_steps=60, num_probes=40)
    d = spectra.spectral_distances(results, metric="wasserstein")
    scale = np.sqrt(np.mean(base**2))
    axis = {name: np.sort(np.arcsinh(v / scale)) for name, v in values.items()}
    for i, first in enumerate(axis):
        for j, second in enumerate(axis):
            exact = np.mean(np.abs(axis[first] - axis[second]))
            # Forty probes see shares of the eigenvalues to sqrt(2 / (40 (n + 2))) = 0.03, four times over,
            # of spectra that are at most 0.8 wide on this axis.
            assert abs(d[i, j] - exact) <= 4 * 0.03 * 0.8
