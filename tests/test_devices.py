"""The same key gives the same answer on one and on eight devices, and sharding is kept."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import json
import jax, jax.numpy as jnp, numpy as np, spectra
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

jax.config.update("jax_enable_x64", DTYPE == "float64")
mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))

def loss_fn(p, batch):
    hidden = jnp.tanh(batch @ p["w"] + p["b"])
    return jnp.mean((hidden @ p["v"]) ** 2)

rng = np.random.default_rng(0)
cast = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 4, DTYPE)
params = {"w": cast(16, 32), "b": cast(32), "v": cast(32, 8)}
batch = cast(64, 16)
put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
fsdp = {"w": P(None, "d"), "b": P("d"), "v": P("d", None)}
cases = {
    "one": (params, batch),
    "replicated": (jax.tree.map(lambda x: put(x, P()), params), put(batch, P("d"))),
    "fsdp": ({k: put(x, fsdp[k]) for k, x in params.items()}, put(batch, P("d"))),
}
out = {}
for name, (p, x) in cases.items():
    op = spectra.HessianOperator(loss_fn, p, x)
    q = spectra.slq(op, key=jax.random.key(0), num_steps=12, num_probes=2)
    result = spectra.lanczos(op, jax.tree.map(jnp.ones_like, p), 12)
    product = op @ jax.tree.map(jnp.ones_like, p)
    out[name] = {
        "nodes": q.nodes.tolist(),
        "weights": q.weights.tolist(),
        "alpha": np.asarray(result.alpha, float).tolist(),
        "orthogonality": float(result.orthogonality),
        "product": np.concatenate([np.ravel(x) for x in jax.tree.leaves(product)]).tolist(),
        # Bytes of the whole basis, and of what the fullest device holds of it.
        "bytes": sum(x.nbytes for x in jax.tree.leaves(result.segments)),
        "largest": max(
            sum(s.data.nbytes for x in jax.tree.leaves(result.segments)
                for s in x.addressable_shards if s.device == d)
            for d in jax.devices()
        ),
        "devices": jax.device_count(),
    }
print(json.dumps(out))
"""


@pytest.fixture(scope="module", params=["float32"])
def answers(request):
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", f"DTYPE = {request.param!r}\n{PROGRAM}"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout)
    assert result["one"]["devices"] == 8
    return result, float(np.finfo(request.param).eps)


@pytest.mark.parametrize("layout", ["replicated", "fsdp"])
def test_answers_do_not_depend_on_the_number_of_devices(layout, answers):
    result, eps = answers
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
    assert many["orthogonality"] <= (1e-5 if eps > 1e-10 else 1e-12)


def test_a_sharded_basis_is_never_gathered(answers):
    result, _ = answers
    fsdp = result["fsdp"]
    assert fsdp["largest"] == fsdp["bytes"] // 8
