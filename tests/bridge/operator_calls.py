"""Calls of single operators, by family, with arguments that models rarely combine.

A call is (operator, arguments, keywords); tensors go in as they are on PyTorch's side and as arrays on ours.
"""

from typing import Any

import numpy as np
import torch

Call = tuple[str, tuple, dict]

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
LU, PIVOTS = torch.linalg.lu_factor(T(2, 3, 3))
OFFSETS = torch.tensor([2, 3, 7], dtype=torch.int32)

CALLS: dict[str, list[tuple[str, tuple]]] = {
    "pointwise": [
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
        *((f"aten.{n}.default", (torch.complex(X, P),)) for n in (
            "angle", "_conj_physical", "conj_physical", "_conj", "sgn", "abs")),
        ("aten.angle.default", (NAN,)), ("aten.angle.default", (I,)), ("aten._neg_view.default", (X,)),
        ("aten.resolve_conj.default", (X,)),
        *((f"aten.{n}.default", (X,)) for n in (
            "i0", "special_i0e", "special_i1", "special_i1e", "special_modified_bessel_i0", "signbit",
            "special_modified_bessel_i1", "special_log_ndtr", "special_erfcx",
            "special_spherical_bessel_j0")),
        ("aten.special_log_ndtr.default", (torch.tensor([-30.0, -3.0, 2.0, 4.0]),)),
        ("aten.special_erfcx.default", (torch.tensor([-3.0, 4.99, 5.01, 60.0, float("inf")]),)),
        ("aten.special_ndtri.default", (P / 4,)), ("aten.signbit.default", (I,)),
        *(("aten.polygamma.default", (n, P)) for n in (0, 1, 2, 5)),
        ("aten.igamma.default", (P, X.abs())), ("aten.igammac.default", (P, X.abs())),
        ("aten.special_zeta.default", (P + 1.5, X.abs() + 0.5)),
        ("aten.special_zeta.other_scalar", (P + 2, 1.5)), ("aten.special_zeta.self_scalar", (2.5, P)),
        *((f"aten.special_{n}_polynomial_{k}.n_scalar", (P - 0.5, d))
          for n, k in (*((c, k) for c in ("chebyshev", "shifted_chebyshev") for k in "tuvw"),
                       ("hermite", "h"), ("hermite", "he"), ("laguerre", "l"), ("legendre", "p"))
          for d in (-1, 0, 1, 4)),
        ("aten.gcd.default", (I * 4, J + 8)), ("aten.lcm.default", (I * 4, J + 8)),
        ("aten.frexp.Tensor", (NAN,)), ("aten.frexp.Tensor", (X,)), ("aten.nextafter.default", (X, P)),
        ("aten.rrelu_with_noise_functional.default", (X, P)),
        ("aten.real.default", (torch.complex(X, P),)),
    ],
    "shapes": [
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
        ("aten.fft_fftfreq.default", (5, 0.3)), ("aten.fft_rfftfreq.default", (6,)),
        ("aten.ones.default", ([2, 3],)), ("aten.new_zeros.default", (I, [2])),
        ("aten.new_ones.default", (I, [2])), ("aten.new_full.default", (X, [2], 3)),
        ("aten.eye.default", (3,)), ("aten.eye.m", (3, 4)), ("aten.arange.start_step", (2, 9, 3)),
        ("aten.arange.start_step", (1.0, 2.0, 0.25)), ("aten.arange.start_step", (5, 0, -2)),
        ("aten.linspace.default", (0, 1, 5)), ("aten.repeat.default", (X, [2, 1, 2])),
    ],
    "indexing": [
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
        ("aten.bucketize.Scalar", (0.1, torch.tensor([-0.5, 0.0, 0.5]))),
        ("aten.searchsorted.Tensor", (I.sort(1).values, J)),
        ("aten.searchsorted.Tensor", (SPD.sort(-1).values, SPD[..., :2].contiguous())),
        ("aten.searchsorted.Scalar", (torch.tensor([-0.5, 0.0, 0.5]), 0.5)),
        ("aten.put.default", (X, torch.tensor([5, 0]), T(2))),
        ("aten.put.default", (X, torch.tensor([5, 5]), T(2), True)),
        ("aten.diagonal_scatter.default", (T(3, 4), T(3), 1)),
        ("aten.diagonal_scatter.default", (T(2, 4, 3), T(2, 3), -1, 1, 2)),
        ("aten.kthvalue.default", (T(4, 5), 2, 0)), ("aten.kthvalue.default", (I, 3, 1, True)),
        ("aten.mode.default", (I % 3, 1)), ("aten.mode.default", (T(2, 3), 0, True)),
        ("aten.cummax.default", (T(4, 5), 1)), ("aten.cummin.default", (I % 3, 0)),
        ("aten.histc.default", (T(50), 7, -1.0, 1.5)), ("aten.histc.default", (T(50), 7)),
        ("aten.histc.default", (torch.ones(3), 4)), ("aten.bincount.default", (I.abs().flatten(), None, 12)),
        ("aten.bincount.default", (I.abs().flatten(), T(6), 12)), ("aten.one_hot.default", (ORDER, 4)),
        ("aten.median.default", (I,)), ("aten.nanmedian.default", (NAN,)), ("aten.nanmedian.dim", (I, 1)),
        ("aten.isin.Tensor_Tensor", (I, J)),
    ],
    "reductions": [
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
        ("aten.var.correction", (torch.complex(X, P), [1])),
    ],
    "pooling": [
        ("aten.convolution.default", (T(1, 4, 9), T(6, 2, 3), T(6), [2], [1], [2], False, [0], 2)),
        ("aten.im2col.default", (T(3, 6, 5), [2, 3], [2, 1], [1, 0], [1, 2])),
        ("aten.col2im.default", (T(1, 8, 9), [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])),
        ("aten.max_pool2d_with_indices.default", (I[None].float(), [2, 2], [1, 1])),
        ("aten.max_pool2d_with_indices.default", (torch.zeros(1, 4, 4), 2)),
        ("aten.avg_pool1d.default", (X, [2])),
        ("aten.avg_pool2d.default", (T(1, 5, 5), [3], [2], [1], True, False)),
        ("aten.adaptive_avg_pool1d.default", (T(1, 2, 7), [3])),
        ("aten.conv_tbc.default", (T(5, 2, 3), T(2, 3, 4), T(4), 1)),
        *((f"aten._upsample_{n}2d_aa.default", (T(1, 2, 6, 9), size, corners))
          for n in ("bilinear", "bicubic") for size in ([4, 3], [11, 9]) for corners in (False, True)),
        ("aten._upsample_bilinear2d_aa.default", (T(1, 1, 6, 9), [3, 3], False, 0.4, 0.3)),
        ("aten.adaptive_max_pool2d.default", (T(1, 5, 7), [2, 3])),
    ],
    "linear algebra": [
        ("aten.mm.default", (X, P.T)), ("aten.mv.default", (X, T(3))),
        ("aten.dot.default", (T(3), T(3))),
        ("aten.addmm.default", (torch.full((2, 2), float("nan")), X, P.T)),
        ("aten.addmv.default", (T(2), X, T(3))),
        ("aten.baddbmm.default", (T(2, 3, 3), T(2, 3, 4), T(2, 4, 3))),
        ("aten.addbmm.default", (T(3, 3), T(2, 3, 4), T(2, 4, 3))),
        ("aten.addr.default", (X, T(2), T(3))),
        *(("aten._embedding_bag.default", (T(7, 3), torch.tensor([1, 2, 4, 5, 4, 3, 1]), torch.tensor(o),
                                           False, mode, False, weights, last, 4))
          for mode in (0, 1, 2) for weights in ((None, T(7)) if mode == 0 else (None,))
          for o, last in (([0, 3, 3, 6], False), ([0, 2, 5, 7], True), ([0, 0, 7], True))),
        ("aten.polar.default", (P, X)), ("aten.view_as_real.default", (torch.complex(X, P),)),
        ("aten.view_as_complex.default", (T(3, 4, 2),)),
        *((f"aten.{n}.default", (SPD,)) for n in
          ("linalg_inv_ex", "linalg_cholesky_ex", "_linalg_det", "_linalg_slogdet")),
        *(("aten._linalg_solve_ex.default", (SPD, b)) for b in (T(2, 3, 5), T(2, 3), T(3))),
        ("aten.native_layer_norm.default", (X, [3], None, None, 1e-5)),
        ("aten.linalg_matrix_exp.default", (SPD / 4,)),
        ("aten.linalg_householder_product.default", (T(2, 4, 3), T(2, 3))),
        *((f"aten.{n}.default", (SPD,)) for n in ("linalg_qr", "linalg_lu", "linalg_lu_factor_ex")),
        *(("aten.linalg_qr.default", (a, m))
          for a in (T(2, 3, 5), T(5, 3)) for m in ("reduced", "complete", "r")),
        *(("aten.linalg_lu.default", (a,)) for a in (T(2, 3, 5), T(5, 3))),
        ("aten.lu_unpack.default", (LU, PIVOTS)), ("aten.lu_unpack.default", (LU, PIVOTS, False)),
        *(("aten.cholesky_solve.default", (T(2, 3, 2), SPD, u)) for u in (False, True)),
        *(("aten.cholesky_inverse.default", (SPD, u)) for u in (False, True)),
        *(("aten.triangular_solve.default", (T(2, 3, 2), SPD, u, t, n))
          for u in (False, True) for t in (False, True) for n in (False, True)),
        ("aten.linalg_pinv.default", (T(2, 4, 3), 0.3)), ("aten.linalg_pinv.default", (SPD, 1e-3, True)),
        ("aten._grouped_mm.default", (T(7, 4), T(3, 4, 8), OFFSETS)),
        ("aten.native_group_norm.default", (T(2, 4, 3), T(4), T(4), 2, 4, 3, 2, 1e-5)),
        ("aten._fused_rms_norm.default", (X, [3], T(3), 1e-6)),
        ("aten._native_batch_norm_legit_functional.default",
         (T(5, 3), T(3), T(3), T(3), P[0], True, 0.1, 1e-5)),
        ("aten._native_batch_norm_legit_functional.default",
         (T(5, 3), T(3), T(3), T(3), P[0], False, 0.1, 1e-5)),
    ],
}  # fmt: skip

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
    ("aten.searchsorted.Tensor", (J, I), {"side": "right", "sorter": J.argsort(1), "out_int32": True}),
    ("aten.nonzero_static.default", (B,), {"size": 5, "fill_value": -7}),
    ("aten.repeat_interleave.Tensor", (torch.tensor([2, 0, 3]),), {"output_size": 5}),
    ("aten.empty_permuted.default", ([2, 0], [1, 0]), {"dtype": torch.float64}),
    *(
        ("aten.index_reduce.default", (X, 1, ORDER[0], P, r), {"include_self": s})
        for s in (True, False)
        for r in ("prod", "mean", "amax", "amin")
    ),
    *(
        ("aten.linalg_lu_solve.default", (LU, PIVOTS, T(2, *b)), {"left": left, "adjoint": a})
        for b, left in (((3, 2), True), ((2, 3), False))
        for a in (True, False)
    ),
    *(
        ("aten.linalg_pinv.atol_rtol_float", (T(2, 4, 3),), {"atol": a, "rtol": r})
        for a, r in ((None, None), (0.4, None), (0.1, 0.3))
    ),
    ("aten.histogram.bin_ct", (T(40), 5), {"weight": P.repeat(7, 1).flatten()[:40], "density": True}),
]


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
