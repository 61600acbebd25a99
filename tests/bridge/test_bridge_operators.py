"""Single operators against `torch.ops.aten`, family by family; refusals; sizes."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from operator_calls import CALLS, KEYWORDS, SIZES, Call, T
from operator_check import differences, to_jax

from spectra.bridge import BridgeError, agreement
from spectra.bridge.operators.registry import ABSENT, OPERATORS, SIGNATURES

FAMILIES: dict[str, list[Call]] = {family: [(n, a, {}) for n, a in calls] for family, calls in CALLS.items()}
FAMILIES["keywords"] = KEYWORDS
GROUPED = "transformers.grouped_mm_fallback.default"  # an operator of that package


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_operators(family):
    assert not differences(FAMILIES[family])


def test_a_wrong_operator_is_noticed_and_named(monkeypatch):
    """One with another value, one that cannot be traced; those beside them are found right."""

    def fails(*args):
        raise TypeError("not traced")

    monkeypatch.setitem(OPERATORS, "aten.hypot.default", lambda self, other: self + other)
    monkeypatch.setitem(OPERATORS, "aten.lerp.Scalar", fails)
    names = ["aten.atan2.default", "aten.hypot.default", "aten.lerp.Scalar", "aten.xlogy.Tensor"]
    found = differences([call for call in FAMILIES["pointwise"] if call[0] in names])
    assert [label.split()[1] for label in found] == names[2:0:-1]
    assert "not traced" in next(iter(found.values()))


@pytest.mark.slow
def test_every_operator_is_tested(monkeypatch):
    """Each function of the table is called here or by a model of the registry, which is only exported."""
    monkeypatch.setattr(agreement, "check", lambda *_: None)
    from bridge_coverage import covered_by_functions, covered_by_models, covered_by_second_derivatives
    from test_bridge_ties import TIES

    calls = [call for family in FAMILIES.values() for call in family]
    called = {name for name, _, _ in calls + SIZES} | covered_by_models()
    called |= covered_by_second_derivatives() | covered_by_functions()
    called |= {f"aten.{row[0]}" for row in TIES.values()}
    called |= {GROUPED, "spectra.packed"}  # below; packed sequences in test_bridge_containers.py
    functions = {OPERATORS[n] for n in called if n in OPERATORS}
    untested = sorted(n for n, f in OPERATORS.items() if f not in functions)
    assert not untested


def test_grouped_rows():
    """Rows 0 and 1 by the first matrix, row 2 by the third, none by the second, the last by none."""
    rows, matrices = T(4, 3), T(3, 3, 2)
    ours = OPERATORS[GROUPED](to_jax(rows), to_jax(matrices), jnp.array([2, 2, 3]))
    theirs = torch.cat([rows[:2] @ matrices[0], rows[2:3] @ matrices[2], torch.zeros(1, 2)])
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-6 * float(theirs.abs().max()))


def test_table_is_consistent():
    assert set(OPERATORS) == set(SIGNATURES)
    assert not set(ABSENT) & set(OPERATORS)
    for name in OPERATORS:
        if name.startswith("aten."):
            _, packet, overload = name.split(".")
            assert hasattr(getattr(torch.ops.aten, packet), overload), name


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("aten.div.Tensor_mode", (jnp.ones(2), jnp.ones(2), "up")),
        ("aten.gelu.default", (jnp.ones(2), "sigmoid")),
        ("aten.permute.default", (jnp.ones((2, 2)), [0, 5])),
        ("aten.select.int", (jnp.ones(3), 0, 3)),
        ("aten.split_with_sizes.default", (jnp.ones(5), [2, 2])),
        ("aten.split.Tensor", (jnp.ones(5), 0)),
        ("aten.split.Tensor", (jnp.ones(200_000), 1)),
        ("aten.expand.default", (jnp.ones((2, 2)), [2])),
        ("aten.as_strided.default", (jnp.ones(4), [3], [2], 0)),
        ("aten.as_strided.default", (jnp.ones(4), [2**40], [0], 0)),
        ("aten.index_put.default", (jnp.ones(4), [jnp.ones(4, bool)], jnp.ones(4))),
        ("aten.scatter_reduce.two", (jnp.ones(2), 0, jnp.zeros(2, int), jnp.ones(2), "most")),
        ("aten.one_hot.default", (jnp.zeros(2, int), -1)),
        (
            "aten.convolution.default",
            (jnp.ones(2), jnp.ones((1, 1)), None, [1], [0], [1], False, [0], 1),
        ),
        ("aten.max_pool2d_with_indices.default", (jnp.ones((1, 4, 4)), 8)),
        ("aten.max_pool2d_with_indices.default", (jnp.ones((1, 4, 4)), 2, 1, 2)),
        ("aten.max_pool2d_with_indices.default", (jnp.ones((1, 99, 99)), 99)),
        ("aten.adaptive_avg_pool1d.default", (jnp.ones((1, 4)), [2**40])),
        ("aten.einsum.default", ("__import__('os')", [jnp.ones(2)])),
        ("aten._embedding_bag.default", (jnp.ones((2, 2)), *[jnp.zeros(2, int)] * 2, False, 7)),
        ("aten.scaled_dot_product_attention.default", (*[jnp.ones((1, 2, 2))] * 3, None, 0.5)),
        ("aten.embedding.default", (jnp.ones((2, 2)), jnp.zeros(2, int), -1, True)),
        ("aten._embedding_bag.default", (jnp.ones((2, 2)), *[jnp.zeros(2, int)] * 2, True)),
        ("aten.im2col.default", (jnp.ones((1, 4, 4)), [2**20, 2**20], [1, 1], [2**20, 2**20], [1, 1])),
        ("aten.adaptive_avg_pool1d.default", (jnp.ones((1, 2**20)), [2**15])),
        ("aten._pdist_forward.default", (jnp.ones((2**14, 1)),)),
        ("aten.avg_pool1d.default", (jnp.ones((1, 4)), [1], [1], [2**40])),
        ("aten._fft_c2c.default", (jnp.ones(2, complex), [0], 7, True)),
        ("aten.rrelu_with_noise_functional.default", (jnp.ones(2), jnp.ones(2), 0.1, 0.3, True)),
        ("aten.kthvalue.default", (jnp.ones(3), 4)),
        ("aten.polygamma.default", (2**40, jnp.ones(2))),
        ("aten.special_legendre_polynomial_p.n_scalar", (jnp.ones(2), 2**40)),
        ("aten.special_legendre_polynomial_p.n_scalar", (jnp.ones(2), 1.5)),
        ("aten.histc.default", (jnp.ones(2), 2**40)),
        ("aten.bincount.default", (jnp.zeros(2, int), None, 2**40)),
        ("aten.nonzero_static.default", (jnp.ones(2), 2**40)),
        ("aten.searchsorted.Tensor", (jnp.ones((2, 3)), jnp.ones((3, 3)))),
        ("aten.searchsorted.Tensor", (jnp.ones(3), jnp.ones(3), False, False, "middle")),
        ("aten.linalg_qr.default", (jnp.eye(2), "some")),
        ("aten._linalg_eigh.default", (jnp.eye(2), "M")),
        ("aten.linalg_lu_factor_ex.default", (jnp.eye(2), False)),
        ("aten._upsample_bilinear2d_aa.default", (jnp.ones((1, 1, 4, 4)), [2**40, 4], False)),
        ("aten._upsample_bicubic2d_aa.default", (jnp.ones((1, 1, 4, 4)), [0, 4], False)),
        ("aten.grid_sampler_3d.default", (jnp.ones((1, 1, 2, 2, 2)), jnp.ones((1, 1, 1, 1, 3)), 2, 0, True)),
        ("aten._grouped_mm.default", (jnp.ones((2, 2)), jnp.ones((2, 2, 2)), jnp.ones(2, int), jnp.ones(2))),
        ("aten._grouped_mm.default", (*[jnp.ones((2, 2, 2))] * 2, jnp.ones(2, int))),
        ("size.pow", (2, 10**9)),
        ("size.add", ("a", "b")),
    ],
)  # fmt: skip
def test_refusals(name, args):
    with pytest.raises(BridgeError):
        OPERATORS[name](*args)


@pytest.mark.parametrize(("name", "args", "expected"), SIZES)
def test_size_arithmetic(name, args, expected):
    result = OPERATORS[name](*args)
    assert result == expected
    assert type(result) is type(expected)
