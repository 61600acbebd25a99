"""Single operators against `torch.ops.aten`, with arguments that models rarely combine.

A call is (operator, arguments); tensors go in as they are on PyTorch's side and as arrays on ours.
Tolerances: one operator rounds each result a few times, so 1e-6 relative to the largest result in
float32 for elementary functions, 1e-5 where sums of up to a hundred terms are involved.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from spectra.bridge import BridgeError
from spectra.bridge._operators import ABSENT, OPERATORS, SIGNATURES
from spectra.bridge._promotion import category, result_type

rng = np.random.default_rng(0)


def T(*shape: int) -> torch.Tensor:
    return torch.tensor(rng.standard_normal(shape), dtype=torch.float32)


I = torch.tensor([[-7, 3, -2], [5, -4, 9]])
J = torch.tensor([[2, -2, 3], [-3, 3, 4]])
B = torch.tensor([[True, False, True], [False, False, True]])
X, P = T(2, 3), T(2, 3).abs() + 0.2
SPD = torch.eye(3) * 2 + (lambda a: a @ a.mT)(T(2, 3, 3))
NAN = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0, -2.5])
ORDER = torch.tensor([[0, 1, 0], [1, 1, 0]])

CALLS: list[tuple[str, tuple]] = [
    *((f"aten.{n}.default", (X,)) for n in (
        "abs", "neg", "sign", "sgn", "exp2", "erfc", "digamma", "frac", "relu6", "selu", "celu",
        "hardsigmoid", "hardswish", "mish", "silu", "erfinv", "isfinite",
        "sum", "mean", "prod", "max", "min", "zeros_like", "ones_like", "t", "squeeze",
        "clone", "contiguous", "alias", "lift_fresh_copy", "real", "logical_not", "count_nonzero",
    )),
    *((f"aten.{n}.default", (x,)) for n in ("isinf", "isnan", "isfinite", "relu", "sign")
      for x in (NAN,)),
    *((f"aten.{n}.default", (I,)) for n in (
        "abs", "neg", "sign", "ceil", "floor", "trunc", "round", "sum", "prod", "sqrt", "sigmoid",
        "reciprocal", "exp", "bitwise_not", "logical_not", "any", "all",
    )),
    *((f"aten.{n}.Tensor", (I, J)) for n in (
        "add", "sub", "mul", "div", "remainder", "fmod", "bitwise_and", "bitwise_or", "bitwise_xor",
        "eq", "ne", "lt", "le", "gt", "ge", "rsub",
    )),
    *((f"aten.{n}.Scalar", (x, s))
      for n in ("add", "sub", "mul", "div", "rsub", "remainder", "fmod")
      for x, s in ((I, 3), (I, 2.5), (X, 3), (X, -0.7))),
    *((f"aten.{n}.Scalar", (x, 0)) for n in ("eq", "ne", "lt", "le", "gt", "ge") for x in (I, X)),
    ("aten.floor_divide.default", (I, J)), ("aten.remainder.Scalar_Tensor", (7, J)),
    *((f"aten.logical_{n}.default", (I, B)) for n in ("and", "or", "xor")),
    ("aten.add.Tensor", (B, B)), ("aten.mul.Tensor", (B, B)), ("aten.add.Tensor", (B, I)),
    ("aten.add.Tensor", (X, I, )), ("aten.add.Tensor", (I, torch.tensor(2.5))),
    ("aten.add.Tensor", (X, torch.tensor(2.5, dtype=torch.float64))),
    ("aten.add.Tensor", (I.to(torch.uint8), I.to(torch.int8))),
    ("aten.add.Tensor", (X.half(), X.bfloat16())),
    ("aten.bitwise_left_shift.Tensor_Scalar", (I.abs(), 2)),
    ("aten.bitwise_right_shift.Tensor", (I.abs(), J.abs())),
    ("aten.pow.Tensor_Scalar", (I, 2)), ("aten.pow.Tensor_Scalar", (P, -1.5)),
    ("aten.pow.Tensor_Tensor", (P, X)), ("aten.pow.Scalar", (2, X)), ("aten.pow.Scalar", (2.0, I)),
    ("aten.pow.Tensor_Scalar", (I, 0.5)), ("aten.pow.Tensor_Scalar", (X, 100)),
    ("aten.maximum.default", (X, P)), ("aten.minimum.default", (I, J)),
    ("aten.fmax.default", (NAN, NAN.flip(0))), ("aten.fmin.default", (NAN, NAN.flip(0))),
    ("aten.maximum.default", (NAN, NAN.flip(0))), ("aten.atan2.default", (I, J)),
    ("aten.hypot.default", (X, P)), ("aten.copysign.Tensor", (X, P)),
    ("aten.copysign.Scalar", (X, -1)),
    ("aten.round.default", (torch.tensor([0.5, 1.5, 2.5, -0.5]),)),
    ("aten.where.self", (B, X, P)), ("aten.where.ScalarOther", (B, X, 2)),
    ("aten.where.ScalarSelf", (B, 2, X)), ("aten.where.Scalar", (B, 1, 2)),
    ("aten.clamp.default", (X, -0.2, 0.4)), ("aten.clamp.default", (I, -0.5, None)),
    ("aten.clamp.Tensor", (X, -P, P)), ("aten.clamp_min.default", (X, 0)),
    ("aten.clamp_max.default", (X, 0)), ("aten.hardtanh.default", (X, -0.1, 0.3)),
    ("aten.leaky_relu.default", (X, 0.2)), ("aten.prelu.default", (T(2, 3, 4), T(3))),
    ("aten._prelu_kernel.default", (X, T(1))), ("aten.elu.default", (X, 0.5, 2.0, 0.3)),
    ("aten.gelu.default", (X,)), ("aten.softplus.default", (X, 2.0, 0.5)),
    ("aten.threshold.default", (X, 0.1, 7.0)), ("aten.logit.default", (P / 4, 0.1)),
    ("aten.logit.default", (P / 4,)), ("aten.xlogy.Tensor", (I, P)),
    ("aten.xlogy.Scalar_Other", (X, 2)),
    ("aten.addcmul.default", (X, P, X)), ("aten.addcdiv.default", (X, P, P)),
    ("aten.lerp.Scalar", (X, P, 0.3)), ("aten.lerp.Tensor", (X, P, X)),
    ("aten.scalar_tensor.default", (3,)), ("aten.copy.default", (X, torch.tensor(2))),
    ("aten.complex.default", (X, P)), ("aten.imag.default", (torch.complex(X, P),)),
    ("aten.real.default", (torch.complex(X, P),)),
    # shapes
    ("aten.transpose.int", (X, 0, -1)), ("aten.view.default", (X, [3, -1])),
    ("aten._unsafe_view.default", (X, [6])), ("aten.expand.default", (X, [4, -1, 3])),
    ("aten.squeeze.dims", (T(1, 2, 1), [0, 1])), ("aten.squeeze.dim", (T(2, 1), -1)),
    ("aten.unsqueeze.default", (X, -1)), ("aten.cat.default", ([X, torch.zeros(0), P], 1)),
    ("aten.cat.default", ([I, X],)), ("aten.stack.default", ([X, P], -1)),
    ("aten.split.Tensor", (T(7, 2), 3)), ("aten.split_with_sizes.default", (T(7), [2, 0, 5])),
    ("aten.unbind.int", (X, -1)), ("aten.slice.Tensor", (T(9), 0, -7, 2**63 - 1, 2)),
    ("aten.slice.Tensor", (T(9), 0, 5, 2)),
    ("aten.slice_scatter.default", (T(6), T(2), 0, 1, 5, 2)),
    ("aten.select_scatter.default", (X, T(2), 1, -1)), ("aten.diag_embed.default", (X, 1)),
    ("aten.diagonal.default", (T(3, 4, 4), -1, 1, 2)), ("aten.roll.default", (X, [1, 2], [0, 1])),
    ("aten.roll.default", (X, [2])), ("aten.tril.default", (X, -1)), ("aten.triu.default", (X, 1)),
    ("aten.as_strided.default", (T(12), [2, 3], [1, 4], 1)), ("aten.flip.default", (X, [-1])),
    ("aten.constant_pad_nd.default", (X, [1, -1, 0, 2], 5)),
    ("aten.unfold.default", (T(2, 7), 1, 3, 2)),
    ("aten.reflection_pad1d.default", (X, [1, 2])),
    ("aten.replication_pad1d.default", (X, [-1, 2])),
    ("aten.reflection_pad3d.default", (T(1, 3, 3, 3), [1, 1, 0, 2, 1, 0])),
    ("aten.replication_pad2d.default", (T(1, 3, 3), [1, 2, 0, 1])),
    ("aten.pixel_shuffle.default", (T(2, 8, 2, 3), 2)),
    ("aten.pixel_unshuffle.default", (T(2, 4, 6), 2)),
    ("aten.full.default", ([2], True)), ("aten.full.default", ([2], 3)),
    ("aten.full.default", ([2], 3.5)),
    ("aten.full_like.default", (X, 3)), ("aten.fill.Scalar", (I, 2.0)),
    ("aten.zeros.default", ([2, 3],)),
    ("aten.ones.default", ([2, 3],)), ("aten.new_zeros.default", (I, [2])),
    ("aten.new_ones.default", (I, [2])), ("aten.new_full.default", (X, [2], 3)),
    ("aten.eye.default", (3,)), ("aten.eye.m", (3, 4)), ("aten.arange.start_step", (2, 9, 3)),
    ("aten.arange.start_step", (1.0, 2.0, 0.25)), ("aten.arange.start_step", (5, 0, -2)),
    ("aten.linspace.default", (0, 1, 5)), ("aten.repeat.default", (X, [2, 1, 2])),
    # indexing
    ("aten.index.Tensor", (T(3, 4), [None, torch.tensor([1, -1])])),
    ("aten.index.Tensor", (T(3, 4, 5), [torch.tensor([0, 2]), None, torch.tensor([1, 3])])),
    ("aten.index_put.default", (T(4), [torch.tensor([1, 1])], T(2), True)),
    ("aten.index_put.default", (T(4), [torch.tensor([-1, 1])], T(2))),
    ("aten.index_put.default", (X, [B], torch.tensor(2.0))),
    ("aten.index_put.default", (T(3, 2, 3), [None, B], torch.tensor([2.0]))),
    ("aten.index_put.default", (T(2, 3, 4), [B], torch.tensor(2.0), True)),
    ("aten.index_put.default", (T(2, 4, 3), [None, torch.arange(4) % 2 == 0], torch.tensor(1.0))),
    *(("aten._fft_r2c.default", (T(3, 4, 5), d, n, o))
      for d in ([2], [0, 2]) for n in (0, 1, 2) for o in (True, False)),
    *(("aten._fft_c2c.default", (torch.complex(X, P), d, n, f))
      for d in ([1], [1, 0]) for n in (0, 1, 2) for f in (True, False)),
    *(("aten._fft_c2r.default", (torch.fft.rfftn(T(4, size)), [0, 1], n, size))
      for n in (0, 1, 2) for size in (5, 6)),
    ("aten.index_select.default", (X, -1, torch.tensor([2, 0]))),
    ("aten.index_add.default", (X, 1, torch.tensor([2, 2]), T(2, 2))),
    ("aten.gather.default", (X, 0, ORDER[:, :2])),
    ("aten.scatter.src", (X, 1, ORDER[:, :1], T(2, 3))),
    ("aten.scatter.value", (X, 1, ORDER[:, :1], 4.0)),
    ("aten.scatter_add.default", (X, 1, ORDER, P)),
    ("aten.masked_fill.Scalar", (X, B, 2)), ("aten.masked_scatter.default", (X, B, P)),
    ("aten.sort.default", (I, 0, True)), ("aten.argsort.default", (X,)),
    ("aten.topk.default", (X, 2)),
    ("aten.topk.default", (X, 2, 1, False)), ("aten.one_hot.default", (ORDER, 3)),
    ("aten.bucketize.Tensor", (X, torch.tensor([-0.5, 0.0, 0.5]))),
    ("aten.isin.Tensor_Tensor", (I, J)),
    # reductions
    ("aten.sum.dim_IntList", (I, [0], True)), ("aten.sum.dim_IntList", (B, None)),
    ("aten.mean.dim", (X, [-1])), ("aten.prod.dim_int", (I, 1)), ("aten.var.correction", (X, [1])),
    ("aten.var.dim", (X, [0], False)), ("aten.std.correction", (X, None)),
    ("aten.var_mean.correction", (X, [1])), ("aten.amax.default", (I, [1], True)),
    ("aten.amin.default", (X,)), ("aten.max.dim", (I, 1)), ("aten.min.dim", (I, 0, True)),
    ("aten.argmax.default", (X,)), ("aten.argmin.default", (X, 1, True)), ("aten.any.dim", (B, 1)),
    ("aten.any.dims", (B, [0, 1])), ("aten.all.dim", (B, 0)), ("aten.cumsum.default", (I, 1)),
    ("aten.cumsum.default", (B, 0)), ("aten.cumprod.default", (X, 1)),
    ("aten.logcumsumexp.default", (X, 1)), ("aten.logsumexp.default", (X, [0])),
    ("aten._softmax.default", (X, -1, False)), ("aten._log_softmax.default", (X, 0, False)),
    *(("aten.linalg_vector_norm.default", (X, p, [1]))
      for p in (2, 1, 0, 3.5, float("inf"), -float("inf"))),
    *(("aten._cdist_forward.default", (X, T(4, 3), p, None)) for p in (1.0, 2.0, 3.0)),
    ("aten._pdist_forward.default", (T(4, 3), 2.0)),
    ("aten.count_nonzero.dim_IntList", (I - 3, [1])),
    ("aten.median.dim", (T(2, 6), 1)), ("aten.max.default", (I,)),
    # convolution and pooling outside of what modules produce
    ("aten.convolution.default", (T(1, 4, 9), T(6, 2, 3), T(6), [2], [1], [2], False, [0], 2)),
    ("aten.im2col.default", (T(3, 6, 5), [2, 3], [2, 1], [1, 0], [1, 2])),
    ("aten.col2im.default", (T(1, 8, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])),
    ("aten.max_pool2d_with_indices.default", (I[None].float(), [2, 2], [1, 1])),
    ("aten.max_pool2d_with_indices.default", (torch.zeros(1, 4, 4), 2)),
    ("aten.avg_pool1d.default", (X, [2])),
    ("aten.avg_pool2d.default", (T(1, 5, 5), [3], [2], [1], True, False)),
    ("aten.adaptive_avg_pool1d.default", (T(1, 2, 7), [3])),
    ("aten.adaptive_max_pool2d.default", (T(1, 5, 7), [2, 3])),
    # linear algebra
    ("aten.mm.default", (X, P.T)), ("aten.mv.default", (X, T(3))),
    ("aten.dot.default", (T(3), T(3))),
    ("aten.addmm.default", (torch.full((2, 2), float("nan")), X, P.T)),
    ("aten.addmv.default", (T(2), X, T(3))),
    ("aten.baddbmm.default", (T(2, 3, 3), T(2, 3, 4), T(2, 4, 3))),
    ("aten.addbmm.default", (T(3, 3), T(2, 3, 4), T(2, 4, 3))),
    ("aten.addr.default", (X, T(2), T(3))),
    *(("aten._embedding_bag.default", (T(7, 3), torch.tensor([1, 2, 4, 5, 4, 3, 1]), torch.tensor(o), False,
                                       mode, False, weights, last, 4))
      for mode in (0, 1, 2) for weights in ((None, T(7)) if mode == 0 else (None,))
      for o, last in (([0, 3, 3, 6], False), ([0, 2, 5, 7], True), ([0, 0, 7], True))),
    ("aten.polar.default", (P, X)), ("aten.view_as_real.default", (torch.complex(X, P),)),
    ("aten.view_as_complex.default", (T(3, 4, 2),)),
    *((f"aten.{n}.default", (SPD,)) for n in
      ("linalg_inv_ex", "linalg_cholesky_ex", "_linalg_det", "_linalg_slogdet")),
    *(("aten._linalg_solve_ex.default", (SPD, b)) for b in (T(2, 3, 5), T(2, 3), T(3))),
    ("aten.native_layer_norm.default", (X, [3], None, None, 1e-5)),
    ("aten.native_group_norm.default", (T(2, 4, 3), T(4), T(4), 2, 4, 3, 2, 1e-5)),
    ("aten._fused_rms_norm.default", (X, [3], T(3), 1e-6)),
    ("aten._native_batch_norm_legit_functional.default",
     (T(5, 3), T(3), T(3), T(3), P[0], True, 0.1, 1e-5)),
    ("aten._native_batch_norm_legit_functional.default",
     (T(5, 3), T(3), T(3), T(3), P[0], False, 0.1, 1e-5)),
]  # fmt: skip

KEYWORDS: list[tuple[str, tuple, dict]] = [
    *(
        ("aten.div.Tensor_mode", (a, b), {"rounding_mode": m})
        for a, b in ((I, J), (X, P), (I, P))
        for m in ("floor", "trunc", None)
    ),
    ("aten.div.Scalar_mode", (I, 2), {"rounding_mode": "floor"}),
    *(
        ("aten.div.Tensor_mode", (NAN, b), {"rounding_mode": m})
        for b in (torch.zeros(6), -torch.zeros(6), NAN.flip(0), torch.full((6,), -0.3))
        for m in ("floor", "trunc")
    ),
    ("aten.div.Scalar_mode", (X, 0.3), {"rounding_mode": "trunc"}),
    *(
        ("aten.scatter_reduce.two", (X, 1, ORDER, P, r), {"include_self": s})
        for s in (True, False)
        for r in ("sum", "prod", "mean", "amax", "amin")
    ),
    ("aten.scatter_reduce.two", (I, 1, ORDER, J, "amax"), {"include_self": False}),
    ("aten.round.decimals", (X,), {"decimals": 1}),
    ("aten.add.Tensor", (X, P), {"alpha": 2}),
    ("aten.add.Tensor", (X, I), {"alpha": 2}),
    ("aten.sub.Tensor", (I, J), {"alpha": 3}),
    ("aten.gelu.default", (X,), {"approximate": "tanh"}),
    ("aten.addmm.default", (torch.full((2, 2), float("nan")), X, P.T), {"beta": 0, "alpha": 2}),
    ("aten.addmm.default", (T(2, 2), X, P.T), {"beta": 0.5}),
    ("aten.var.correction", (X, None), {"correction": 0}),
    ("aten.sort.stable", (I.flatten() % 3,), {"stable": True, "descending": True}),
    ("aten.argsort.stable", (I.flatten() % 3,), {"stable": True}),
    ("aten.sum.dim_IntList", (B, [0]), {"dtype": torch.float32}),
    ("aten.cumsum.default", (I, 0), {"dtype": torch.float32}),
    ("aten._to_copy.default", (X * 3,), {"dtype": torch.int64}),
    ("aten._to_copy.default", (I,), {"dtype": torch.bool}),
    ("aten.arange.start_step", (0, 5), {"dtype": torch.float32}),
    ("aten.bucketize.Tensor", (X, X[0].sort().values), {"right": True, "out_int32": True}),
    ("aten.isin.Tensor_Tensor", (I, J), {"invert": True}),
    ("aten.addcmul.default", (X, P, X), {"value": 2}),
    ("aten.linalg_cholesky_ex.default", (SPD,), {"upper": True}),
    ("aten._linalg_solve_ex.default", (SPD, T(2, 5, 3)), {"left": False}),
    *(
        ("aten.linalg_solve_triangular.default", (SPD, b), {"upper": u, "left": left, "unitriangular": t})
        for b, left in ((T(2, 3, 5), True), (T(5, 3), False))
        for u in (True, False)
        for t in (True, False)
    ),
    ("aten.linalg_vector_norm.default", (X,), {"keepdim": True}),
]


def to_jax(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.dtype == torch.bfloat16:
            return jnp.asarray(value.float().numpy(), jnp.bfloat16)
        return jnp.asarray(value.numpy())
    if isinstance(value, torch.dtype):
        return jnp.dtype(str(value).removeprefix("torch."))
    return [to_jax(v) for v in value] if isinstance(value, list) else value


def torch_call(name: str, args: tuple, kwargs: dict) -> Any:
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)(*args, **kwargs)


SIZES: list[tuple[str, tuple, Any]] = [
    ("size.add", (2, 3), 5), ("size.sub", (2, 3), -1), ("size.mul", (2, 3), 6),
    ("size.floordiv", (-7, 2), -4), ("size.truediv", (7, 2), 3.5), ("size.mod", (-7, 3), 2),
    ("size.neg", (2,), -2), ("size.pow", (3, 2), 9), ("size.floor", (2.5,), 2),
    ("size.ceil", (2.5,), 3), ("size.int", (-2.5,), -2), ("size.float", (2,), 2.0),
    ("size.min", (2, 3), 2), ("size.max", (2, 3), 3), ("size.eq", (2, 2), True),
    ("size.ne", (2, 2), False), ("size.lt", (1, 2), True), ("size.le", (2, 2), True),
    ("size.gt", (1, 2), False), ("size.ge", (1, 2), False), ("size.not", (True,), False),
    ("size.and", (True, False), False), ("size.or", (True, False), True),
    ("size.ite", (False, 1, 2), 2), ("size.sum", ([1, 2, 3],), 6),
    ("aten.sym_size.int", (np.zeros((2, 3)), -1), 3), ("aten.sym_numel.default", (np.zeros(6),), 6),
]  # fmt: skip


def compare(ours: Any, theirs: Any, tolerance: float) -> None:
    if isinstance(theirs, (tuple, list)):
        for a, b in zip(ours, theirs, strict=True):
            compare(a, b, tolerance)
        return
    expected = to_jax(theirs)
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    a, b = (np.asarray(x, np.complex128) for x in (ours, expected))
    scale = max(1.0, np.max(np.abs(b[np.isfinite(b)]), initial=0.0))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [(n, a, {}) for n, a in CALLS] + KEYWORDS,
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_operator(name, args, kwargs):
    """Under x64, so that int64 results keep their width and dtypes can be compared exactly."""
    tolerance = 2e-2 if any(getattr(a, "dtype", None) == torch.bfloat16 for a in args) else 1e-5
    with jax.enable_x64(True):
        ours = OPERATORS[name](*[to_jax(a) for a in args], **{k: to_jax(v) for k, v in kwargs.items()})
        theirs = torch_call(name, args, kwargs)
        if "embedding_bag" in name or "_linalg" in name:  # the others serve PyTorch's own backward
            theirs = theirs[: len(ours)]
        compare(ours, theirs, tolerance)


@pytest.mark.slow
def test_every_operator_is_tested():
    """Each function of the table is called here or by a model of the registry."""
    from bridge_coverage import covered_by_models

    called = {n for n, _ in CALLS} | {n for n, _, _ in KEYWORDS + SIZES} | covered_by_models()
    functions = {OPERATORS[n] for n in called if n in OPERATORS}
    untested = sorted(n for n, f in OPERATORS.items() if f not in functions)
    assert not untested


def test_table_is_consistent():
    assert set(OPERATORS) == set(SIGNATURES)
    assert not set(ABSENT) & set(OPERATORS)
    for name in OPERATORS:
        if name.startswith("aten."):
            _, packet, overload = name.split(".")
            assert hasattr(getattr(torch.ops.aten, packet), overload), name


@pytest.mark.parametrize("a", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16,
                               torch.float32, torch.float64, torch.complex64])  # fmt: skip
@pytest.mark.parametrize("b", [torch.bool, torch.int8, torch.int32, torch.bfloat16, torch.float32,
                               torch.float64, 2, 2.5, True, 1j])  # fmt: skip
@pytest.mark.parametrize("shapes", [((2,), (2,)), ((2,), ()), ((), (2,)), ((), ())])
def test_promotion(a, b, shapes):
    """PyTorch's result_type over dtypes, 0-d tensors and Python numbers."""
    x = torch.zeros(shapes[0], dtype=a)
    y = torch.zeros(shapes[1], dtype=b) if isinstance(b, torch.dtype) else b
    with jax.enable_x64(True):
        operands = [jnp.zeros(x.shape, str(a).removeprefix("torch.")), y]
        if isinstance(y, torch.Tensor):
            operands[1] = jnp.zeros(y.shape, str(b).removeprefix("torch."))
        expected = str(torch.result_type(x, y)).removeprefix("torch.")
        expected = expected.replace("complex32", "complex64")  # JAX has no complex of halves
        assert str(jnp.dtype(result_type(*operands))) == expected
        assert category(result_type(*operands)) == category(jnp.dtype(expected))


GRADIENT_POINTS = {
    "relu": (lambda t: torch.relu(t), "aten.relu.default", ()),
    "clamp": (lambda t: t.clamp(0.0, 1.0), "aten.clamp.default", (0.0, 1.0)),
    "hardtanh": (
        lambda t: torch.nn.functional.hardtanh(t, 0.0, 1.0),
        "aten.hardtanh.default",
        (0.0, 1.0),
    ),
    "hardsigmoid": (torch.nn.functional.hardsigmoid, "aten.hardsigmoid.default", ()),
    "leaky_relu": (torch.nn.functional.leaky_relu, "aten.leaky_relu.default", ()),
    "hardswish": (torch.nn.functional.hardswish, "aten.hardswish.default", ()),
    "relu6": (torch.nn.functional.relu6, "aten.relu6.default", ()),
    "softplus": (torch.nn.functional.softplus, "aten.softplus.default", ()),
    "silu": (torch.nn.functional.silu, "aten.silu.default", ()),
    "selu": (torch.nn.functional.selu, "aten.selu.default", ()),
    "celu": (torch.nn.functional.celu, "aten.celu.default", ()),
    "prelu": (
        lambda t: torch.nn.functional.prelu(t, torch.tensor([0.2])),
        "aten.prelu.default",
        (jnp.array([0.2]),),
    ),
    "maximum": (
        lambda t: torch.maximum(t, torch.tensor(1.0)),
        "aten.maximum.default",
        (jnp.array(1.0),),
    ),
    "remainder": (lambda t: torch.remainder(t, 0.7), "aten.remainder.Scalar", (0.7,)),
    "sign": (torch.sign, "aten.sign.default", ()),
    "elu": (torch.nn.functional.elu, "aten.elu.default", ()),
    "square": (lambda t: t**2, "aten.pow.Tensor_Scalar", (2,)),
    "abs": (torch.abs, "aten.abs.default", ()),
}  # fmt: skip


@pytest.mark.parametrize("name", list(GRADIENT_POINTS))
def test_gradient_at_kinks(name):
    """At the points where a derivative jumps, ours is PyTorch's choice."""
    function, operator, args = GRADIENT_POINTS[name]
    points = torch.tensor([0.0, 1.0, -1.0, 3.0, -3.0], requires_grad=True)
    function(points).sum().backward()
    ours = jax.grad(lambda x: OPERATORS[operator](x, *args).sum())(jnp.asarray(points.detach().numpy()))
    assert points.grad is not None
    np.testing.assert_allclose(ours, points.grad.numpy(), rtol=1e-6)


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
    """PyTorch masks the infinite slope of the root at zero."""
    x = torch.ones(2, 3, requires_grad=True)
    x.std(1).sum().backward()
    ours = jax.grad(lambda t: OPERATORS["aten.std.correction"](t, [1]).sum())(jnp.ones((2, 3)))
    assert x.grad is not None
    np.testing.assert_array_equal(ours, x.grad.numpy())


def test_padding_row_of_an_embedding_gets_no_gradient():
    weight, ids = T(5, 3).requires_grad_(), torch.tensor([[0, 2, 2], [4, 0, 1]])
    torch.nn.functional.embedding(ids, weight, padding_idx=2).square().sum().backward()
    embedding = OPERATORS["aten.embedding.default"]
    ours = jax.grad(lambda w: (embedding(w, to_jax(ids), 2) ** 2).sum())(to_jax(weight.detach()))
    assert weight.grad is not None
    np.testing.assert_allclose(ours, weight.grad.numpy(), rtol=1e-6)


def test_max_pool_gradient_at_ties():
    """Equal maxima: the whole gradient goes to the first, in values and in derivatives."""
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    torch.nn.functional.max_pool2d(x, 2).sum().backward()
    pool = OPERATORS["aten.max_pool2d_with_indices.default"]
    ours = jax.grad(lambda v: pool(v, [2, 2])[0].sum())(jnp.zeros((1, 1, 4, 4)))
    assert x.grad is not None
    np.testing.assert_array_equal(ours, x.grad.numpy())


def test_layer_norm_in_half_precision():
    """Statistics in float32, the result in the input's dtype."""
    x = T(2, 64).bfloat16()
    theirs = torch.nn.functional.layer_norm(x, [64]).float().numpy()
    ours = OPERATORS["aten.native_layer_norm.default"](to_jax(x), [64], None, None, 1e-5)[0]
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(ours.astype(np.float32), theirs, atol=2**-8 * 4)


def test_norm_of_zero_has_finite_derivatives():
    norm = OPERATORS["aten.linalg_vector_norm.default"]
    gradient, product = jax.jvp(jax.grad(norm), (jnp.zeros(3),), (jnp.ones(3),))
    assert np.all(np.asarray(gradient) == 0)
    assert np.all(np.isfinite(np.asarray(product)))


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
