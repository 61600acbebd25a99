"""All curvature matrices against curvlinops 3.0.1 on the same PyTorch weights and data, in float64.

`data/make_curvlinops_reference.py` says how the reference was made.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHARP, relative_error, slow_but
from networks import cross_entropy

import spectra

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")  # rows of the reference; JAX sorts biases first


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parent / "data" / "curvlinops.npz") as file:
        return dict(file)


def model_fn(p, x):
    return jnp.tanh(x @ p["0.weight"].T + p["0.bias"]) @ p["2.weight"].T + p["2.bias"]


def mse(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def num_terms(batch):
    """curvlinops reads PyTorch's MSELoss, the mean over all numbers, as a mean of as many terms."""
    return batch[1].size


def in_tree_order(matrix, params):
    """Rows and columns moved from the order of `NAMES` to the sorted order of the leaves."""
    edges = np.cumsum([0] + [params[name].size for name in NAMES])
    rows = {name: np.arange(a, b) for name, a, b in zip(NAMES, edges, edges[1:], strict=False)}
    order = np.concatenate([rows[name] for name in sorted(NAMES)])
    return matrix[np.ix_(order, order)]


def operator(kind, loss, params, data, sampled):
    if kind == "hessian":
        return spectra.HessianOperator(lambda p, b: loss(model_fn(p, b[0]), b[1]), params, data)
    args = (model_fn, loss, params)
    if kind == "ggn":
        return spectra.GGNOperator(*args, data)
    if kind == "type2":
        return spectra.FisherOperator(*args, data, kind="type2")
    if kind == "empirical":
        return spectra.FisherOperator(*args, data, kind="empirical", weight_fn=num_terms)
    return spectra.FisherOperator(
        *args,
        (data[0], sampled),
        kind="mc",
        key=jax.random.key(0),
        sample_fn=lambda key, outputs, targets: targets,  # the reference's own samples
        weight_fn=num_terms,
    )


@SHARP
@pytest.mark.parametrize(
    "kind", slow_but(["hessian", "ggn", "type2", "empirical", "mc"], "hessian", "ggn", "empirical", "mc")
)
@pytest.mark.parametrize("loss", slow_but([cross_entropy, mse], cross_entropy), ids=["cross_entropy", "mse"])
def test_matrix(reference, loss, kind, dtype):
    name = "mse" if loss is mse else "cross_entropy"
    params = {key: jnp.asarray(reference[f"params/{key}"], dtype) for key in NAMES}
    x = jnp.asarray(reference["x"], dtype)
    targets, sampled = (jnp.asarray(reference[f"{name}/{key}"]) for key in ("targets", "sampled"))
    if name == "mse":
        targets, sampled = targets.astype(dtype), sampled.astype(dtype)
    op = operator(kind, loss, params, (x, targets), sampled)
    expected = in_tree_order(reference[f"{name}/{'ggn' if kind == 'type2' else kind}"], params)
    limit = {"float32": 1e-5, "float64": 1e-9}[dtype]
    assert relative_error(op.as_matrix(), expected) <= limit
