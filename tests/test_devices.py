"""The same key gives the same answer on one and on eight devices, and sharding is kept."""

import functools
import json

import numpy as np
import pytest
from children import answer

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, spectra
from spectra.base import draws, meshes
from spectra.estimators import blocks, comparison
from spectra.estimators.sketches import _grow_compiled
from spectra.krylov import explored, product_rounding
from spectra.report import variability
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

flat = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
grid = spectra.distributed.make_mesh("data=4,model=2")
explicit = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Explicit,))

def loss_fn(p, batch):
    hidden = jnp.tanh(batch @ p["w"] + p["b"])
    return jnp.mean((hidden @ p["v"]) ** 2)

rng = np.random.default_rng(0)
cast = lambda *shape: np.asarray(rng.standard_normal(shape) / 4, "float32")
params = {"w": cast(16, 32), "b": cast(32), "v": cast(32, 8)}
examples = cast(67, 16)

def on(mesh, specs, data=None):
    placed = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in params.items()}
    if data is None:
        return placed, spectra.distributed.shard_data(batch, mesh)
    return placed, jax.device_put(batch, NamedSharding(mesh, data))

whole = {k: P() for k in params}
fsdp = {"w": P(None, "d"), "b": P("d"), "v": P("d", None)}
mixed = {"w": P("data", "model"), "b": P(), "v": P("model", None)}
stream = lambda: (batch[i : i + 20] for i in range(0, len(batch), 20))
tensor = {"w": P(None, "model"), "b": P("model"), "v": P("model", None)}
cases = {
    "one": lambda: (params, jnp.asarray(batch)),
    "replicated": lambda: on(flat, whole),
    "spread": lambda: on(flat, whole),
    "fsdp": lambda: on(flat, fsdp),
    "mixed": lambda: on(grid, mixed),
    "bfloat16": lambda: on(flat, fsdp),
    "explicit": lambda: on(explicit, fsdp, P("d")),
    "tensor": lambda: on(grid, tensor),
    "tensor, spread": lambda: on(grid, tensor),
    "mixed, spread": lambda: on(grid, mixed),
    "default": lambda: (
        spectra.distributed.shard_params(params, grid),
        spectra.distributed.shard_data(batch, grid),
    ),
    "stream": lambda: (on(flat, fsdp)[0], spectra.distributed.shard_data(stream, flat)),
}

def share(tree):  # what the fullest device holds of it
    leaves = jax.tree.leaves(tree)
    held = [sum(s.data.nbytes for x in leaves for s in x.addressable_shards if s.device == d)
            for d in jax.devices()]
    return max(held) / sum(x.nbytes for x in leaves)

def shares(op):  # of vectors and stacks that estimators and runs draw, multiply, hold
    options = dict(start=0, stop=3, kind="normal", batch=2, project=True, grouped=False)
    options["where"] = meshes.places(op.like)
    probes = blocks.draw(op, key, jnp.arange(3), "normal")
    drawn = explored.draw(key, 0, op)
    return {
        "probes": share(probes),
        "products": share(blocks.products(op, probes, 2)),
        "sketch": share(_grow_compiled(op, key, None, jnp.zeros(()), **options)[0]),
        "vector": share(drawn),
        "unit vector": share(draws.unit_vector(key, op)),
        "comparison": share(comparison._probes(key, op, 3, False, options["where"])),
        "variability": share(variability._vectors(op, key, jnp.arange(3), False, options["where"])),
        "product": share(product_rounding.multiply(op, drawn)),
        "zeros": share(meshes.zeros(op.structure, op.like)),
    }

def answers(name, names):
    p, x = cases[name]()
    op = spectra.HessianOperator(loss_fn, p, x)
    options = {"basis": "sharded"} if "spread" in name else {}
    if name == "bfloat16":
        options = {"basis_dtype": name}
    q = spectra.slq(op, key=key, num_steps=12, num_probes=2, **options)
    result = spectra.lanczos(op, jax.tree.map(jnp.ones_like, p), 12)
    product = op @ jax.tree.map(jnp.ones_like, p)
    plan = spectra.plan(op, num_steps=12, num_probes=2, **options)
    paired = "fsdp" in names and name in ("one", "fsdp")
    pairs = spectra.eigsh(op, 2, which="LM", key=key) if paired else None
    traced = "mixed" in names and name in ("one", "mixed")
    trace = traced and spectra.trace(op, key=key, method="hutchinson", num_matvecs=8).value
    return {
        "nodes": q.nodes.tolist(),
        "weights": q.weights.tolist(),
        "alpha": np.asarray(result.alpha, float).tolist(),
        "orthogonality": float(result.orthogonality),
        "product": np.concatenate([np.ravel(x) for x in jax.tree.leaves(product)]).tolist(),
        "shares": name == "fsdp" and shares(op),
        "pairs": pairs and pairs.values.tolist(),
        "trace": trace,
        # Bytes of the whole basis, and of what the fullest device holds of it.
        "bytes": sum(x.nbytes for x in jax.tree.leaves(result.segments)),
        "largest": max(
            sum(s.data.nbytes for x in jax.tree.leaves(result.segments)
                for s in x.addressable_shards if s.device == d)
            for d in jax.devices()
        ),
        "planned": plan.basis,
        "plan devices": plan.num_devices,
        "devices": jax.device_count(),
    }

key = jax.random.key(0)
out = {}
for run, names in json.loads(sys.argv[1]).items():
    batch = examples[:64] if run.startswith("divides") else examples
    out[run] = {name: answers(name, names) for name in ("one", *names)}
print(json.dumps(out))
"""
LAYOUTS = {
    "divides": ["fsdp", "bfloat16"],
    "divides, slow": ["replicated", "mixed", "spread", "explicit"],
    "uneven, slow": ["tensor", "tensor, spread", "mixed, spread", "stream", "default"],
}
"""On 64 examples or on 67: layouts of the parameters, those of every test run and those of `-m ''`."""


def cases(*layouts):
    """The layouts with the run of the program that has them."""
    runs = {layout: run for run, names in LAYOUTS.items() for layout in names if layout != "bfloat16"}
    return [(runs[name], name) for name in layouts or runs]


@functools.cache
def program(slow):
    """What the program says of all layouts of every test run, or of all others; each runs once."""
    layouts = {run: names for run, names in LAYOUTS.items() if run.endswith("slow") == slow}
    return answer("-c", PROGRAM, json.dumps(layouts), devices=8)


def run(layouts):
    """The layouts of one batch, with "one" of a single device."""
    result = program(layouts.endswith("slow"))[layouts]
    assert result["one"]["devices"] == 8
    return result, float(np.finfo(np.float32).eps)


@pytest.mark.parametrize(("layouts", "layout"), cases())
def test_answers_do_not_depend_on_the_number_of_devices(layouts, layout):
    result, eps = run(layouts)
    one, many = result["one"], result[layout]
    size = np.abs(one["nodes"]).max()
    # Sums over 64 examples and 800 parameters in another order: at most 64 roundings of a product;
    # twelve steps on this decaying spectrum leave extreme nodes and the CDF as stable as that.
    for name, unit in (("product", np.linalg.norm(one["product"])), ("alpha", size)):
        np.testing.assert_allclose(many[name][:4], one[name][:4], rtol=0, atol=64 * eps * unit)
    nodes, other = np.array(one["nodes"]), np.array(many["nodes"])
    np.testing.assert_allclose(other[:, [0, -1]], nodes[:, [0, -1]], rtol=0, atol=64 * eps * size)
    moments = [[np.sum(np.array(r["weights"]) * np.array(r["nodes"]) ** d) for d in (1, 2)]
               for r in (one, many)]  # fmt: skip
    np.testing.assert_allclose(moments[1], moments[0], rtol=0, atol=64 * eps * max(size, size**2))
    assert many["orthogonality"] <= 1e-5
    # An eigenvalue of a pair is off by at most its residual, 1e-5 |H| by default.
    if many["pairs"]:
        np.testing.assert_allclose(many["pairs"], one["pairs"], rtol=0, atol=2e-5 * size)
    if many["trace"]:
        assert abs(many["trace"] - one["trace"]) <= 64 * eps * size * np.sqrt(len(one["product"])) * 8


@pytest.mark.parametrize(("layouts", "layout"), cases("fsdp", "tensor", "mixed", "replicated"))
def test_the_basis_lies_as_the_parameters_do_and_as_planned(layouts, layout):
    case = run(layouts)[0][layout]
    pieces = {"fsdp": 8, "tensor": 2, "replicated": 1}.get(layout)
    if pieces:  # the leaves of "mixed" lie in three ways
        assert case["largest"] == case["bytes"] // pieces
    assert case["largest"] == case["planned"]
    assert case["plan devices"] == 8


def test_vectors_and_their_products_lie_as_the_parameters_do():
    """Whole on one device, or on every one, unless it is said where they lie."""
    shares = run("divides")[0]["fsdp"]["shares"]
    assert shares == dict.fromkeys(shares, 1 / 8)


@pytest.mark.parametrize(("layouts", "layout"), cases("mixed, spread", "spread", "tensor, spread"))
def test_a_spread_basis_is_divided_by_the_number_of_devices(layouts, layout):
    result, _ = run(layouts)
    assert result[layout]["planned"] == result["one"]["planned"] // 8


def test_a_basis_in_bfloat16_takes_half_and_keeps_the_extremes():
    result, _ = run("divides")
    one, half = result["one"], result["bfloat16"]
    assert half["planned"] == result["fsdp"]["planned"] // 2
    # Rows are off by 2^-9 each: what Gram-Schmidt leaves along them, squared, moves a Ritz value.
    nodes, other = np.array(one["nodes"]), np.array(half["nodes"])
    assert np.abs(other[:, [0, -1]] - nodes[:, [0, -1]]).max() <= 2.0**-18 * 12 * np.abs(nodes).max()


APART = """
import json
import jax, jax.numpy as jnp, spectra

here, there = jax.devices()
x = jnp.ones((4, 3))
op = spectra.HessianOperator(lambda p, x: jnp.mean((x @ p) ** 2), jax.device_put(x[0], here), x)
apart = spectra.HessianOperator(op.loss_fn, op.params, jax.device_put(x, there), check_data=False)

def message(call):
    try:
        call()
    except spectra.StructureError as error:
        return str(error)

print(json.dumps([
    message(apart.as_matrix),
    message((op + 2 * spectra.HessianOperator(op.loss_fn, jax.device_put(x[0], there), x)).as_matrix),
    message(lambda: spectra.solve(op.shift(1.0), jax.device_put(x[0], there))),
]))
"""


def test_arrays_on_different_devices_are_named_with_what_to_do():
    of_data, of_terms, of_vector = answer("-c", APART, devices=2)
    assert all(
        "device ids [0]" in text and "device ids [1]" in text for text in (of_data, of_terms, of_vector)
    )
    assert all("jax.device_put" in text for text in (of_data, of_terms, of_vector))
    assert "op.params" in of_data
    assert "op.data" in of_data
    assert "terms[1]" in of_terms
