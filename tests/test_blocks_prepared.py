"""Blocks of one operator are prepared through the whole: one program for all, products as of each alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from networks import cross_entropy
from programs import OPTIMISED

import spectra
from spectra.operators import data, differentiate

KEYS = jax.random.split(jax.random.key(0), 5)


def params(dtype=None):
    shapes = {"in": (5, 4), "layers": {"w": (3, 4, 4), "b": (3, 4)}, "out": (4, 3)}
    shapes, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return treedef.unflatten(
        [jax.random.normal(key, shape, dtype) / 2 for key, shape in zip(KEYS, shapes, strict=False)]
    )


def batch(dtype=None):
    return jax.random.normal(KEYS[4], (6, 5), dtype), jnp.arange(6) % 3


def model_fn(p, x):
    def layer(h, one):
        return h + jnp.tanh(h @ one["w"] + one["b"]), None

    return lax.scan(jax.checkpoint(layer), x @ p["in"], p["layers"])[0] @ p["out"]  # pyright: ignore


def loss_fn(p, b):
    return cross_entropy(model_fn(p, b[0]), b[1])


def hessian(dtype=None, **options):
    return spectra.HessianOperator(loss_fn, params(dtype), batch(dtype), linearize=True, **options)


def ggn(dtype=None):
    return spectra.GGNOperator(model_fn, cross_entropy, params(dtype), batch(dtype), linearize=True)


KINDS = {
    "one batch": hessian,
    "microbatches": lambda dtype: hessian(dtype, microbatch=2),
    "reverse mode": lambda dtype: hessian(dtype, mode="reverse-over-reverse"),
    "frozen leaves": lambda dtype: hessian(dtype, wrt="layers/*"),
    "gauss-newton": ggn,
    "centred": lambda dtype: spectra.GradientCovarianceOperator(
        loss_fn, params(dtype), batch(dtype), centered=True, linearize=True
    ),
    "sum": lambda dtype: 2.0 * hessian(dtype) - ggn(dtype).shift(0.5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_products_are_those_of_each_block_alone(name, x64):
    op = KINDS[name](jnp.float64)
    dense = np.asarray(op.as_matrix())
    limit = 64 * np.finfo(float).eps * np.linalg.norm(dense, 2)
    sizes = [leaf.size for leaf in jax.tree.leaves(op.structure)]
    rows = np.split(np.arange(op.size), np.cumsum(sizes)[:-1])
    blocks = op.blocks()
    assert sum(block.size for block in blocks.values()) == op.size
    assert len(blocks) > len(sizes)  # layers of a stack are blocks of their own
    for path, block in blocks.items():
        first, *rest = path.split("/")
        leaf = {"in": 0, "layers": 1 if rest[-1:] == ["b"] else 2, "out": 3}[first]
        leaf -= 1 if name == "frozen leaves" else 0
        chosen = rows[leaf] if len(rest) < 2 else rows[leaf].reshape(3, -1)[int(rest[0])]
        found = np.asarray(block.prepare() @ jnp.eye(block.size))
        assert np.abs(found - dense[np.ix_(chosen, chosen)]).max() <= limit, path


@pytest.fixture
def linearized(monkeypatch):
    """The orders of the operators whose values are saved."""
    found = []

    class Counted:
        trace = staticmethod(differentiate.linearize.trace)

        def __call__(self, op, known=differentiate.linearize):
            found.append(op.size)
            return known(op)

    monkeypatch.setattr(differentiate, "linearize", Counted())
    return found


def test_every_block_saves_what_the_whole_does(linearized):
    op = hessian()
    spectra.slq(op.blocks(), key=jax.random.key(1), num_steps=4, num_probes=1)
    spectra.eigsh(op.blocks()["out"], 1, key=jax.random.key(1))
    assert set(linearized) == {op.size}
    whole = op.prepared_bytes()
    assert {block.prepared_bytes() for block in op.blocks().values()} == {whole}
    op.block("out").prepare()
    assert linearized[-1] == 12  # one that is asked for by itself does not
    assert op.block("out").prepared_bytes() < whole


@pytest.mark.slow
def test_the_whole_is_not_saved_where_it_does_not_fit(linearized, monkeypatch):
    op = spectra.HessianOperator(loss_fn, params(), batch())
    block = op.blocks()["out"]
    room = (op.prepared_bytes() + op.block("out").prepared_bytes()) / 2 / data.LINEARIZE_SHARE
    monkeypatch.setattr(data.host, "available_bytes", lambda device=None: int(room))
    block.prepare()
    assert linearized == [block.size]


def test_a_product_costs_what_that_of_the_block_alone_does():
    """As the compiler counts: other leaves contribute nothing, neither forward nor backward."""

    def loss(p, x):
        for w in p["layers"]:
            x = jnp.tanh(x @ w)
        return jnp.mean((x @ p["out"]) ** 2)

    tree = {"layers": [jnp.eye(8)] * 6, "out": jnp.ones((8, 2))}
    op = spectra.HessianOperator(loss, tree, jnp.ones((16, 8)))

    def flops(op):
        v = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), op.structure)
        cost = jax.jit(lambda op, v: op.mv(v)).lower(op.prepare(), v).compile(OPTIMISED).cost_analysis()
        assert cost is not None
        return cost["flops"]

    for path, block in op.blocks().items():
        assert flops(block) <= 1.02 * flops(op.block(path)), path
