"""PyTorch's functions in float64 against its double backward; where derivatives jump or have to share."""

import re

import pytest
import torch
from cases import slow_but
from function_sweep import sweep, together
from torch_functions import FUNCTIONS
from torch_layers import LAYERS

from spectra.bridge import agreement

# PyTorch on functions that are young or old: no matter of ours.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:torch_functions",
    "ignore::FutureWarning:torch_functions",
    "ignore::UserWarning:torch",
)

FAMILIES = {**FUNCTIONS, **LAYERS}
# Those whose operators are written here by a formula of our own, rather than taken from JAX.
OWN = {
    "of each kind": """angle|complex scalar|cummax|scatter_reduce|eig, vectors|linalg.qr|erfcx|
        interpolate, bicubic, antialiased""",
    "others": """complex where|median|kthvalue|mode|nanmedian|scatter_reduce, prod|index_reduce|cov|
        diagonal_scatter|sparse @ dense|eig|lstsq|lu_factor|householder_product|linalg.lu_solve|pinv|
        linalg.matrix_exp|cholesky_solve|chebyshev_polynomial_t|grid_sample, 3d|gaussian_nll_loss|torch.cond|
        bincount|repeat_interleave by a constant""",
}

# Rounding: a Hessian of a few operations on numbers of order one, matrices with condition numbers up to 1e3.
TOLERANCE = 1e-9


@pytest.fixture
def _float64(x64):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# Whose operators have no counterpart in JAX.
REFUSED = {"fake_quantize_per_tensor_affine", "airy_ai", "bessel_j0", "modified_bessel_k0", "ctc_loss"}


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("which", slow_but(OWN, "of each kind"))
def test_own_formulas_have_the_derivatives_of_pytorch(which, monkeypatch):
    """The export's own comparison of outputs and gradients, with a program for each node, is left out: this
    one holds them, too. `test_functions` has both."""
    monkeypatch.setattr(agreement, "check", lambda *_: None)
    names = re.split(r"\|\s*", OWN[which])
    everything = {name: f for family in FAMILIES.values() for name, f in family.items()}
    errors = together({name: everything[name] for name in names})
    assert not {name: error for name, error in errors.items() if not error < TOLERANCE}


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if f not in ("random", "shapes that depend on values")]
)
def test_functions(family):
    functions = FAMILIES[family]
    errors = together({name: f for name, f in functions.items() if name not in REFUSED})
    assert not {name: error for name, error in errors.items() if not error < TOLERANCE}
    outcomes = sweep({name: f for name, f in functions.items() if name in REFUSED})
    assert all(outcome.errors is None for outcome in outcomes.values()), outcomes


@pytest.mark.slow
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("random", "it draws random numbers"),
        ("shapes that depend on values", "depends on the values"),
    ],
)
def test_refusals_say_why(family, reason):
    outcomes = sweep(FAMILIES[family])
    assert all(outcome.errors is None and reason in outcome.refusal for outcome in outcomes.values())
