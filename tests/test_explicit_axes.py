"""Under `jax.set_mesh` with explicit axes, JAX's default: same numbers, on the user's mesh."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

PROGRAM = """
import json
import jax, jax.numpy as jnp, numpy as np, spectra
from jax.sharding import PartitionSpec as P, auto_axes, explicit_axes, get_abstract_mesh, reshard

rng = np.random.default_rng(0)
weights = jnp.asarray(rng.standard_normal((16, 4)) / 4, "float32")
inputs = jnp.asarray(rng.standard_normal((32, 16)), "float32")
key = np.asarray(jax.random.key_data(jax.random.key(0)))

def naive(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)

def written(w, x):
    hidden = jnp.einsum("bi,io->bo", x, reshard(w, P()), out_sharding=P("d", None))
    return jnp.mean(jnp.tanh(hidden) ** 2)

def numbers(loss, w, x, mesh=None):
    op, k = spectra.HessianOperator(loss, w, x), jax.random.key(0)
    pairs = spectra.eigsh(op, 2, key=k)
    krylov = spectra.lanczos(op, w, 8)
    vectors = {
        "product": op @ w,
        "gradient": op.gradient(),
        "diagonal": spectra.diagonal(op, key=k, num_matvecs=32).value,
        "vector": jnp.abs(pairs.vectors[0]),
        "basis": krylov.basis[1],
    }
    found = {name: np.ravel(v).tolist() for name, v in vectors.items()}
    found["mixes"] = [np.ravel(w + v).tolist() for v in vectors.values()] and True
    found["meshes"] = mesh and [
        jax.typeof(v).sharding.mesh == mesh.abstract_mesh for v in (op @ w, op.gradient())
    ]
    found["values"] = [
        float(op.loss()),
        *pairs.values.tolist(),
        *spectra.slq(op, key=k, num_probes=2, num_steps=8, deflate=pairs).atoms.tolist(),
        spectra.slq(op, key=k, num_probes=2, num_steps=8).nodes[0, 0],
        spectra.trace(op, key=k, num_matvecs=32).value,
        spectra.frobenius_norm(op, key=k).value,
        *spectra.kpm(op, key=k, num_probes=1, num_moments=8, bounds=(-1, 1)).moments[0].tolist(),
        spectra.logdet(op, 1.0, key=k).value,
        *spectra.loss_slice(op, pairs, num_points=3).loss.ravel().tolist(),
        *np.diag(op.as_matrix()).tolist(),
        float(krylov.matrix()[0, 0]),
    ]
    found["orthogonality"] = float(krylov.orthogonality)
    return found

def message(call):
    try:
        call()
    except Exception as error:
        return " ".join([type(error).__name__, str(error), *getattr(error, "__notes__", ())])

out = {"one": numbers(naive, weights, inputs)}
mesh = jax.make_mesh((8,), ("d",))
with jax.set_mesh(mesh):
    rows = P("d", None)
    x = jax.device_put(inputs, rows)
    split, whole = jax.device_put(weights, rows), jax.device_put(weights, P(None, None))
    out["replicated"] = numbers(naive, whole, x, mesh)
    out["fsdp"] = numbers(naive, split, x, mesh)
    out["written"] = numbers(explicit_axes(written, in_sharding=(rows, rows)), split, x, mesh)
    out["own"] = float(jax.jit(written)(split, x))

    def inside(w):
        op = spectra.HessianOperator(naive, w, x)
        return spectra.trace(op, key=jax.random.key(0), method="hutchinson", num_matvecs=4).value

    out["outside"] = inside(split)
    out["inside"] = float(jax.jit(auto_axes(inside, out_sharding=P()))(split))
    out["unwrapped"] = message(lambda: spectra.HessianOperator(written, split, x))
    out["in jit"] = message(lambda: jax.jit(inside)(split))
    out["kept"] = str(get_abstract_mesh().axis_types)
print(json.dumps(out))
"""


@functools.cache
def run():
    """What the program says."""
    flags = "--xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize("layout", ["replicated", "fsdp", "written"])
def test_numbers_are_those_of_one_device(layout):
    one, many = run()["one"], run()[layout]
    eps = float(np.finfo(np.float32).eps)
    # Sums over 32 examples and 64 parameters in another order. A vector of the basis and an eigenvector move
    # by a rounding over the gap: eigenvalues of this Hessian are some 1 % of its norm apart.
    for name, error in {"product": 64, "gradient": 64, "diagonal": 64, "vector": 6400, "basis": 6400}.items():
        size = np.abs(one[name]).max()
        np.testing.assert_allclose(many[name], one[name], rtol=0, atol=error * eps * size, err_msg=name)
    size = np.abs(one["values"]).max()
    np.testing.assert_allclose(many["values"], one["values"], rtol=0, atol=64 * eps * size)
    assert many["orthogonality"] <= 1e-5


@pytest.mark.parametrize("layout", ["replicated", "fsdp", "written"])
def test_results_lie_on_the_users_mesh(layout):
    assert run()[layout]["mixes"]
    assert all(run()[layout]["meshes"])
    assert "Explicit" in run()["kept"]


def test_inside_jit_with_automatic_axes():
    assert run()["inside"] == pytest.approx(run()["outside"], rel=64 * float(np.finfo(np.float32).eps))


def test_errors_say_what_to_wrap():
    assert "explicit_axes(loss_fn, in_sharding=" in run()["unwrapped"]
    assert run()["in jit"].startswith("StructureError")
    assert "auto_axes(f, out_sharding=" in run()["in jit"]
