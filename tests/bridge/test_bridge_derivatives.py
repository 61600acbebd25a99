"""Derivatives of single operators where PyTorch makes a choice: kinks, ties, roots at zero."""

import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import bridge_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from operator_calls import T
from operator_check import to_jax
from torch import nn

from spectra import bridge
from spectra.bridge import schema
from spectra.bridge.dtypes import Exporter, exported_by
from spectra.bridge.operators.registry import OPERATORS

RELEASE = tuple(int(n) for n in torch.__version__.split(".")[:2])
POINTS = torch.tensor([0.0, 1.0, -1.0, 3.0, -3.0])
# Every order and every tie of a value and its two bounds.
VALUES, LOW, HIGH = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=3))).unbind(1)

# name: (PyTorch's function, the operator, arrays to differentiate, further arguments)
KINKS: dict[str, tuple[Callable[..., Any], str, tuple, tuple]] = {
    "relu": (torch.relu, "relu.default", (POINTS,), ()),
    "clamp": (torch.clamp, "clamp.default", (POINTS,), (0.0, 1.0)),
    "clamp_to_one_number": (torch.clamp, "clamp.default", (POINTS,), (1.0, 1.0)),
    "clamp_to_crossed_numbers": (torch.clamp, "clamp.default", (POINTS,), (1.0, 0.0)),
    "clamp_min": (torch.clamp_min, "clamp_min.default", (POINTS,), (1.0,)),
    "clamp_max": (torch.clamp_max, "clamp_max.default", (POINTS,), (1.0,)),
    "clamp_between_arrays": (torch.clamp, "clamp.Tensor", (VALUES, LOW, HIGH), ()),
    "clamp_above_array": (torch.clamp, "clamp.Tensor", (VALUES, LOW), ()),
    "clamp_min_of_arrays": (torch.clamp_min, "clamp_min.Tensor", (VALUES, LOW), ()),
    "clamp_max_of_arrays": (torch.clamp_max, "clamp_max.Tensor", (VALUES, HIGH), ()),
    "hardtanh": (F.hardtanh, "hardtanh.default", (POINTS,), (0.0, 1.0)),
    "hardsigmoid": (F.hardsigmoid, "hardsigmoid.default", (POINTS,), ()),
    "leaky_relu": (F.leaky_relu, "leaky_relu.default", (POINTS,), ()),
    "hardswish": (F.hardswish, "hardswish.default", (POINTS,), ()),
    "relu6": (F.relu6, "relu6.default", (POINTS,), ()),
    "softplus": (F.softplus, "softplus.default", (POINTS,), ()),
    "silu": (F.silu, "silu.default", (POINTS,), ()),
    "selu": (F.selu, "selu.default", (POINTS,), ()),
    "celu": (F.celu, "celu.default", (POINTS,), ()),
    "prelu": (F.prelu, "prelu.default", (POINTS, torch.tensor([0.2])), ()),
    "threshold": (F.threshold, "threshold.default", (POINTS,), (1.0, 0.5)),
    "maximum": (torch.maximum, "maximum.default", (VALUES, LOW), ()),
    "minimum": (torch.minimum, "minimum.default", (VALUES, LOW), ()),
    "remainder": (torch.remainder, "remainder.Scalar", (POINTS,), (0.7,)),
    "sign": (torch.sign, "sign.default", (POINTS,), ()),
    "elu": (F.elu, "elu.default", (POINTS,), ()),
    "square": (torch.pow, "pow.Tensor_Scalar", (POINTS,), (2,)),
    "abs": (torch.abs, "abs.default", (POINTS,), ()),
    "nextafter": (torch.nextafter, "nextafter.default", (VALUES, LOW), ()),
}


class _Kinks(nn.Module):
    """Every function of the table on parameters of its own."""

    def __init__(self):
        super().__init__()
        self.values = nn.ParameterDict({
            f"{name}_{i}": nn.Parameter(array.clone())
            for name, (_, _, arrays, _) in KINKS.items()
            for i, array in enumerate(arrays)
        })  # fmt: skip

    def forward(self, one):
        results = {}
        for name, (function, _, arrays, numbers) in KINKS.items():
            results[name] = function(*(self.values[f"{name}_{i}"] for i in range(len(arrays))), *numbers)
        return [r * one for r in results.values()]


def _of_the_table(params):
    total = 0
    for name, (_, operator, arrays, numbers) in KINKS.items():
        values = [params[f"values.{name}_{i}"] for i in range(len(arrays))]
        total = total + OPERATORS[f"aten.{operator}"](*values, *numbers).sum()
    return total


def test_gradients_at_kinks():
    """Where a derivative jumps, ours is PyTorch's choice: of the operators and of the exported module."""
    module, one = _Kinks(), torch.ones(())
    sum(r.sum() for r in module(one)).backward()
    model = bridge.from_torch(module, one)

    def of_the_model(params):
        return sum(r.sum() for r in model.apply(params, jnp.ones(())))

    with exported_by(Exporter(RELEASE)):
        both = jax.jit(lambda p: (jax.grad(_of_the_table)(p), jax.grad(of_the_model)(p)))
        both = both.lower(model.params).compile(reference.FAST)(model.params)
    wrong = {}
    for name, parameter in module.named_parameters():
        expected = parameter.grad.numpy()
        if RELEASE < (2, 14) and name == "values.clamp_between_arrays_1":
            # Below two equal bounds that release gave neither a derivative; here the lower one has it.
            expected = np.where((VALUES < LOW) & (LOW == HIGH), 1.0, expected)
        for kind, ours in zip(("operator", "exported"), both, strict=True):
            # A slope of order one by a few roundings.
            if not np.allclose(ours[name], expected, rtol=1e-6, atol=1e-6):
                wrong[name, kind] = ours[name], expected
    assert not wrong


class _Clamp(nn.Module):
    def forward(self, x):
        return x.clamp(0.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("release", "slope"), [("2.13.0+cpu", [1, 1, 0, 0, 0]), ("2.14.1+cu130", [0, 0, 0, 0, 0])]
)
def test_a_graph_keeps_the_choice_of_the_release_that_exported_it(release, slope, tmp_path):
    """At the bounds of a clamp: 1 up to 2.13 (derivatives.yaml: self >= min && self <= max), then 0."""
    bridge.export(_Clamp(), POINTS, tmp_path)
    document = json.loads((tmp_path / "graph.json").read_text())
    document["producer"]["torch"] = release
    document["digest"] = schema.digest(document)
    (tmp_path / "graph.json").write_text(json.dumps(document))
    model = bridge.load(tmp_path)
    ours = jax.jit(jax.grad(lambda x: model.apply({}, x).sum()))(to_jax(POINTS))
    np.testing.assert_array_equal(ours, slope)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.3])
def test_celu_has_the_derivatives_of_its_formula(alpha, x64):
    """d/dx α(exp(x/α) - 1) = exp(x/α); PyTorch's own backward rounds 1/α to float32.

    The slope is computed as 1 + expm1(x/α): a few roundings of numbers up to one.
    """
    atol = 4 * np.finfo(float).eps
    celu = OPERATORS["aten.celu.default"]
    for x in (-2.0, -0.1):
        gradient, product = jax.jvp(jax.grad(lambda t: celu(t, alpha)), (x,), (1.0,))
        np.testing.assert_allclose(gradient, np.exp(x / alpha), rtol=0, atol=atol)
        np.testing.assert_allclose(product, np.exp(x / alpha) / alpha, rtol=0, atol=atol / alpha)


def test_std_of_constants_has_derivative_zero():
    """PyTorch masks the infinite slope of the root at zero; four ones have the mean one, not about one."""
    x = torch.ones(2, 4, requires_grad=True)
    x.std(1).sum().backward()
    ours = jax.jit(jax.grad(lambda t: OPERATORS["aten.std.correction"](t, [1]).sum()))(jnp.ones((2, 4)))
    assert x.grad is not None
    np.testing.assert_array_equal(ours, x.grad.numpy())


def test_padding_row_of_an_embedding_gets_no_gradient():
    weight, ids = T(5, 3).requires_grad_(), torch.tensor([[0, 2, 2], [4, 0, 1]])
    F.embedding(ids, weight, padding_idx=2).square().sum().backward()
    embedding = OPERATORS["aten.embedding.default"]
    ours = jax.jit(jax.grad(lambda w: (embedding(w, to_jax(ids), 2) ** 2).sum()))(to_jax(weight.detach()))
    assert weight.grad is not None
    np.testing.assert_allclose(ours, weight.grad.numpy(), rtol=1e-6)


def test_max_pool_gradient_at_ties():
    """Equal maxima: the whole gradient goes to the first, in values and in derivatives."""
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    F.max_pool2d(x, 2).sum().backward()
    pool = OPERATORS["aten.max_pool2d_with_indices.default"]
    ours = jax.jit(jax.grad(lambda v: pool(v, [2, 2])[0].sum()))(jnp.zeros((1, 1, 4, 4)))
    assert x.grad is not None
    np.testing.assert_array_equal(ours, x.grad.numpy())


def test_layer_norm_in_half_precision():
    """Statistics in float32, the result in the input's dtype."""
    x = T(2, 64).bfloat16()
    theirs = F.layer_norm(x, [64]).float().numpy()
    ours = OPERATORS["aten.native_layer_norm.default"](to_jax(x), [64], None, None, 1e-5)[0]
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(np.float32), theirs, atol=2**-8 * 4)


@pytest.mark.parametrize("norm", ["linalg_vector_norm", "_cdist_forward"])
def test_a_length_of_zero(norm):
    """It has no second derivative, as in PyTorch: zero would make that of its square zero, which is 2.

    The distance of a point from itself is zero wherever the point is.
    """

    def length(x):
        if norm == "linalg_vector_norm":
            return OPERATORS["aten.linalg_vector_norm.default"](x)
        return OPERATORS["aten._cdist_forward.default"](x[None], x[None]).sum()

    gradient, product = jax.jit(partial(jax.jvp, jax.grad(length)))((jnp.zeros(3),), (jnp.ones(3),))
    np.testing.assert_array_equal(gradient, np.zeros(3))
    np.testing.assert_array_equal(product, np.full(3, np.nan if norm == "linalg_vector_norm" else 0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_exponentials_of_any_norm(dtype, x64):
    """Within rounding of the closed form; JAX's own loses 1e-3 of exp(7.8) in float32."""
    norms = np.geomspace(1e-3, 60, 40)
    shape = np.array([[2.0, -1, 0], [-1, 2, -1], [0, -1, 2]]) / 4  # of norm 1
    values, vectors = np.linalg.eigh(shape)
    large = (vectors * np.exp(norms[:, None] * values)[:, None, :]) @ vectors.T
    run = jax.jit(OPERATORS["aten.linalg_matrix_exp.default"])
    for A, truth in (
        (norms[:, None, None] * shape, large),
        (norms[:, None, None], np.exp(norms)[:, None, None]),
    ):
        error = np.linalg.norm(run(A.astype(dtype)) - truth, axis=(1, 2)) / np.linalg.norm(truth, axis=(1, 2))
        # The exponential magnifies a rounding by the norm, and each squaring adds one for each of n terms.
        assert (error < 20 * np.finfo(dtype).eps * np.maximum(1, norms)).all()


def test_singular_vectors_that_complete_a_basis(x64):
    """The last row of a full Vᴴ spans the kernel, whose projector is I - Aᵀ (A Aᵀ)⁻¹ A."""
    rng = np.random.default_rng(0)
    A, D, W = rng.standard_normal((3, 4)), rng.standard_normal((3, 4)), np.diag([1.0, 2, 3, 5])

    def by_svd(A):
        kernel = OPERATORS["aten._linalg_svd.default"](A, True)[2][3:]
        return (kernel.T @ kernel * W).sum()

    def by_formula(A):
        return ((jnp.eye(4) - A.T @ jnp.linalg.solve(A @ A.T, A)) * W).sum()

    def derivatives(f):
        return jax.jvp(jax.grad(f), (A,), (D,))

    for ours, truth in zip(derivatives(by_svd), derivatives(by_formula), strict=True):
        np.testing.assert_allclose(ours, truth, rtol=0, atol=1e-12 * np.linalg.norm(truth))


@pytest.mark.slow
def test_singular_values_by_the_default_of_pytorch():
    class Nuclear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))

        def forward(self, x):
            return torch.linalg.svd(self.weight * x)[1].sum()

    model = bridge.from_torch(Nuclear(), torch.ones(()))  # which compares the gradients
    assert model.params["weight"].shape == (3, 4)
