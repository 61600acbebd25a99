"""Convolutions, which XLA runs slowly inside loops on a CPU, leave the loops and change no result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.krylov import chebyshev, dense
from spectra.operators import arithmetic, jaxprs

KEY = jax.random.key(5)


def loss_fn(params, batch):
    images, targets = batch
    shape = jax.lax.conv_dimension_numbers(images.shape, params["kernel"].shape, ("NHWC", "HWIO", "NHWC"))
    x = jax.lax.conv_general_dilated(
        images, params["kernel"], (1, 1), "SAME", dimension_numbers=shape, precision="highest"
    )
    return jnp.mean((jnp.tanh(x + params["bias"]).mean((1, 2)) @ params["head"] - targets) ** 2)


def operator(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / 2, dtype)  # noqa: E731
    params = {"kernel": draw(3, 3, 1, 3), "bias": draw(3), "head": draw(3, 2)}
    return spectra.HessianOperator(loss_fn, params, (draw(7, 6, 6, 1), draw(7, 2)))


ESTIMATES = {
    "trace": lambda op: spectra.trace(op, key=KEY, num_matvecs=12).value,
    "exact": lambda op: spectra.trace(op, key=None, method="exact").value,
    "hutchinson": lambda op: spectra.trace(op, key=KEY, method="hutchinson", num_matvecs=5).value,
    "hutch++": lambda op: spectra.trace(op, key=KEY, method="hutch++", num_matvecs=12).value,
    "diagonal": lambda op: spectra.diagonal(op, key=KEY, method="hutchinson", num_matvecs=6).value["bias"],
    "lanczos": lambda op: spectra.lanczos(op, jnp.ones(op.size), 8).alpha,
    "slq": lambda op: spectra.slq(op, key=KEY, num_steps=6, num_probes=2).nodes,
    "eigsh": lambda op: spectra.eigsh(op, 2, which="LA", key=KEY, tol=1e-9).values,
    "smallest": lambda op: spectra.eigsh(op, 2, which="SM", key=KEY, max_matvecs=200).values,
    "kpm": lambda op: spectra.kpm(op, key=KEY, num_moments=20, num_probes=2).moments,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATES)
def test_products_are_called_one_by_one_and_give_the_same(name, monkeypatch, x64):
    if jax.default_backend() != "cpu":
        pytest.skip("an accelerator runs convolutions in loops as fast as outside")
    calls, original = [], arithmetic.product

    def counted(op, v):
        calls.append(isinstance(v["bias"], jax.core.Tracer))
        return original(op, v)

    monkeypatch.setattr(dense, "LARGEST", 0)
    monkeypatch.setattr(arithmetic, "product", counted)
    apart = np.asarray(ESTIMATES[name](operator()))
    assert calls
    assert not any(calls)  # none inside of a program
    monkeypatch.setattr(jaxprs, "slow_in_loops", lambda op: False)
    together = np.asarray(ESTIMATES[name](operator()))
    # The same products up to the order of sums: n roundings of |H|; the filter of "smallest" raises them.
    size = np.abs(np.linalg.eigvalsh(operator().as_matrix())).max()
    tol = 36 * np.finfo(float).eps * (chebyshev.GROWTH if name == "smallest" else 1)
    np.testing.assert_allclose(apart, together, rtol=0, atol=tol * max(size, np.abs(together).max()))


def test_other_operators_stay_in_loops():
    op = spectra.MatrixOperator(jnp.eye(4))
    assert jaxprs.outside_loops(op) is op


@pytest.mark.slow
def test_bad_values_are_named_through_it():
    op = operator(jnp.float32)
    bad = spectra.HessianOperator(loss_fn, op.params | {"bias": jnp.full(3, jnp.nan)}, op.data)
    with pytest.raises(spectra.NonFiniteError, match="'bias'"):
        spectra.trace(bad, key=KEY, num_matvecs=8)
