"""PyTorch's functions, one expression each, for the sweep of `benchmarks.bridge_report` and its test.

The name of an argument says what it is: a parameter of the module in which the expression stands, so that
every function has a gradient and a Hessian product. What is not differentiable multiplies a parameter.

    x, y    (3, 4)         standard normal
    p, q    (3, 4)         uniform in (0.3, 1.3)
    u       (3, 4)         uniform in (-0.8, 0.8)
    v, w    (5,)           standard normal
    a       (3, 3)         a matrix with distinct eigenvalues and singular values
    b       (3, 2)         standard normal
    t       (4, 3)         a matrix of full rank
    l       (2, 4, 8)      a sequence
    i       (2, 4, 6, 6)   an image
    c       (1, 2, 4, 4, 4)  a volume
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fft, linalg, special

IDS = torch.tensor([[0, 2, 1, 1], [1, 0, 2, 0], [2, 2, 0, 1]])
ROWS = torch.tensor([2, 0, 0, 1])
MASK = torch.tensor([[True, False, True, True], [False, True, True, False], [True, True, False, True]])
CLASSES, SIGNS = torch.tensor([1, 3, 0]), torch.tensor([1.0, -1.0, 1.0])
SPARSE = torch.sparse_coo_tensor(torch.tensor([[0, 0, 2, 3], [1, 2, 0, 2]]), torch.tensor([0.5, -1.0, 2.0, 0.3]), (4, 3))  # fmt: skip

C = torch.complex


def R(z: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(z)


def S(a: torch.Tensor) -> torch.Tensor:
    """A symmetric positive definite matrix."""
    return a @ a.mT + torch.eye(3, dtype=a.dtype)


def H(a: torch.Tensor) -> torch.Tensor:
    """A Hermitian positive definite matrix."""
    z = C(a, a.mT * 0.5)
    return z @ z.mH + torch.eye(3, dtype=z.dtype)


def like(constant: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return constant.to(x.dtype)


def sparse(x: torch.Tensor) -> torch.Tensor:
    return SPARSE.to(x.dtype)


FUNCTIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "torch, pointwise": {
        "abs": lambda x: torch.abs(x), "acos": lambda u: torch.acos(u), "acosh": lambda p: torch.acosh(p + 1),
        "add": lambda x, y: torch.add(x, y, alpha=2), "addcdiv": lambda x, y, p: torch.addcdiv(x, y, p),
        "addcmul": lambda x, y, p: torch.addcmul(x, y, p, value=0.5),
        "angle": lambda x, y: torch.angle(C(x, y)) + torch.angle(x) * y,
        "asin": lambda u: torch.asin(u), "asinh": lambda x: torch.asinh(x), "atan": lambda x: torch.atan(x),
        "atan2": lambda x, y: torch.atan2(x, y), "atanh": lambda u: torch.atanh(u),
        "bitwise_and": lambda x: torch.bitwise_and(IDS, 1) * x, "ceil": lambda x: torch.ceil(x) * x,
        "clamp": lambda x: torch.clamp(x, -0.5, 0.5), "clip": lambda x, p: torch.clip(x, -p, p),
        "conj": lambda x, y: R(torch.conj(C(x, y)) * C(y, x)),
        "conj_physical": lambda x, y: R(torch.conj_physical(C(x, y))),
        "copysign": lambda x, y: torch.copysign(x, y), "cos": lambda x: torch.cos(x),
        "cosh": lambda x: torch.cosh(x), "deg2rad": lambda x: torch.deg2rad(x),
        "digamma": lambda p: torch.digamma(p), "div": lambda x, p: torch.div(x, p),
        "erf": lambda x: torch.erf(x), "erfc": lambda x: torch.erfc(x), "erfinv": lambda u: torch.erfinv(u),
        "exp": lambda x: torch.exp(x), "exp2": lambda x: torch.exp2(x), "expm1": lambda x: torch.expm1(x),
        "fake_quantize_per_tensor_affine": lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 15) * x,
        "float_power": lambda p: torch.float_power(p, 1.7), "floor": lambda x: torch.floor(x) * x,
        "floor_divide": lambda x, p: torch.floor_divide(x.detach(), 0.3) * p,
        "fmod": lambda x, p: torch.fmod(x, p), "frac": lambda x: torch.frac(x),
        "frexp": lambda x: torch.frexp(x.detach()).exponent * x + torch.frexp(x).mantissa,
        "gcd": lambda x: torch.gcd(IDS * 4, IDS + 4) * x, "lcm": lambda x: torch.lcm(IDS * 4, IDS + 4) * x,
        "heaviside": lambda x, p: torch.heaviside(x.detach(), p.detach()) * p,
        "hypot": lambda x, y: torch.hypot(x, y), "i0": lambda x: torch.i0(x),
        "igamma": lambda p, q: torch.igamma(p.detach(), q), "igammac": lambda p, q: torch.igammac(p.detach(), q),
        "imag": lambda x, y: torch.imag(torch.exp(C(x, y))), "isclose": lambda x, y: torch.isclose(x, y) * x,
        "ldexp": lambda x: torch.ldexp(x, IDS), "lerp": lambda x, y, p: torch.lerp(x, y, p),
        "lgamma": lambda p: torch.lgamma(p), "log": lambda p: torch.log(p), "log10": lambda p: torch.log10(p),
        "log1p": lambda p: torch.log1p(p), "log2": lambda p: torch.log2(p),
        "logaddexp": lambda x, y: torch.logaddexp(x, y), "logaddexp2": lambda x, y: torch.logaddexp2(x, y),
        "logit": lambda p: torch.logit(p / 2, 0.01), "maximum": lambda x, y: torch.maximum(x, y),
        "minimum": lambda x, y: torch.minimum(x, y), "fmax": lambda x, y: torch.fmax(x, y),
        "fmin": lambda x, y: torch.fmin(x, y), "mul": lambda x, y: torch.mul(x, y),
        "mvlgamma": lambda p: torch.mvlgamma(p + 1, 2), "nan_to_num": lambda x: torch.nan_to_num(x, 0.0, 1.0),
        "neg": lambda x: torch.neg(x), "nextafter": lambda x, y: torch.nextafter(x.detach(), y.detach()) * x,
        "polar": lambda p, x: R(torch.polar(p, x)), "polygamma": lambda p: torch.polygamma(2, p),
        "positive": lambda x: torch.positive(x), "pow": lambda p, x: torch.pow(p, x),
        "rad2deg": lambda x: torch.rad2deg(x), "real": lambda x, y: torch.real(C(x, y) ** 2),
        "reciprocal": lambda p: torch.reciprocal(p), "remainder": lambda x, p: torch.remainder(x, p),
        "round": lambda x: torch.round(x, decimals=1) * x, "rsqrt": lambda p: torch.rsqrt(p),
        "rsub": lambda x, y: torch.rsub(x, y), "sgn": lambda x, y: R(torch.sgn(C(x, y))),
        "sigmoid": lambda x: torch.sigmoid(x), "sign": lambda x: torch.sign(x) * x,
        "signbit": lambda x: torch.signbit(x) * x, "sin": lambda x: torch.sin(x), "sinc": lambda x: torch.sinc(x),
        "sinh": lambda x: torch.sinh(x), "sqrt": lambda p: torch.sqrt(p), "square": lambda x: torch.square(x),
        "sub": lambda x, y: torch.sub(x, y), "tan": lambda u: torch.tan(u), "tanh": lambda x: torch.tanh(x),
        "true_divide": lambda x, p: torch.true_divide(x, p), "trunc": lambda x: torch.trunc(x) * x,
        "where": lambda x, y: torch.where(x > y, x, y), "xlogy": lambda x, p: torch.xlogy(x, p),
    },
    "torch, complex": {
        "complex abs": lambda x, y: torch.abs(C(x, y)), "complex arithmetic": lambda x, y: R(C(x, y) / (C(y, x) + 3)),
        "complex exp": lambda x, y: R(torch.exp(C(x, y))), "complex log": lambda x, y: R(torch.log(C(x, y))),
        "complex sqrt": lambda x, y: R(torch.sqrt(C(x, y))), "complex pow": lambda x, y: R(C(x, y) ** 3),
        "complex reciprocal": lambda x, y: R(torch.reciprocal(C(x, y))),
        "complex sigmoid": lambda x, y: R(torch.sigmoid(C(x, y))), "complex tanh": lambda x, y: R(torch.tanh(C(x, y))),
        "complex sin": lambda x, y: R(torch.sin(C(x, y))), "complex cosh": lambda x, y: R(torch.cosh(C(x, y))),
        "complex matmul": lambda x, t: R(C(x, x * 2) @ C(t, t * 0.5)),
        "complex sum": lambda x, y: R(C(x, y).sum(0)), "complex mean": lambda x, y: R(C(x, y).mean()),
        "complex prod": lambda x, y: R(C(x, y).prod(1)), "complex cumsum": lambda x, y: R(C(x, y).cumsum(1)),
        "complex var": lambda x, y: torch.var(C(x, y)), "complex norm": lambda x, y: linalg.norm(C(x, y)),
        "complex mH": lambda x, y: R(C(x, y).mH @ C(x, y)), "complex where": lambda x, y: R(torch.where(MASK, C(x, y), 2.0)),
        "complex rsqrt": lambda x, y: R(torch.rsqrt(C(x, y))), "complex linear": lambda x, t: R(F.linear(C(x, x), C(t.mT, t.mT * 2))),
        "complex scalar": lambda x: R(x * 2j + (1 - 1j)), "resolve_conj": lambda x, y: R(torch.resolve_conj(torch.conj(C(x, y)))),
        "resolve_neg": lambda x, y: torch.resolve_neg(torch.imag(torch.conj(C(x, y)))),
        "complex inv": lambda a: R(linalg.inv(C(a, a.mT))), "complex det": lambda a: R(linalg.det(C(a, a.mT))),
        "complex solve": lambda a, b: R(linalg.solve(C(a, a.mT), C(b, b * 2))),
        "complex cholesky": lambda a: R(linalg.cholesky(H(a))), "complex eigvalsh": lambda a: linalg.eigvalsh(H(a)),
        "complex svdvals": lambda a: linalg.svdvals(C(a, a.mT)),
    },
    "torch, reductions and order": {
        "all": lambda x: torch.all(x > 0, 1) * x[:, 0], "amax": lambda x: torch.amax(x, 1),
        "amin": lambda x: torch.amin(x, 0), "aminmax": lambda x: list(torch.aminmax(x, dim=1)),
        "any": lambda x: torch.any(x > 1, 1) * x[:, 0], "argmax": lambda x: torch.argmax(x, 1) * x[:, 0],
        "argmin": lambda x: torch.argmin(x) * x, "argsort": lambda x: torch.argsort(x, 1) * x,
        "bincount": lambda x: torch.bincount(ROWS, minlength=4) * x,
        "bincount with weights": lambda w, x: torch.bincount(ROWS, x[0].detach(), 4) * x,
        "bucketize": lambda x, v: torch.bucketize(x.detach(), v.detach().sort().values) * x,
        "count_nonzero": lambda x: torch.count_nonzero(x > 0, 1) * x[:, 0],
        "cummax": lambda x: torch.cummax(x, 1).values, "cummin": lambda x: torch.cummin(x, 0).values,
        "cumprod": lambda x: torch.cumprod(x, 1), "cumsum": lambda x: torch.cumsum(x, 1),
        "cumulative_trapezoid": lambda x, y: torch.cumulative_trapezoid(x, y), "diff": lambda x: torch.diff(x, n=2),
        "dist": lambda x, y: torch.dist(x, y, 3), "histc": lambda x: torch.histc(x.detach(), 4, -1.0, 1.0) * x,
        "histogram": lambda x: torch.histogram(x.detach(), 4, range=(-1.0, 1.0)).hist * x,
        "isin": lambda x: torch.isin(IDS, ROWS[:2]) * x, "kthvalue": lambda x: torch.kthvalue(x, 2, 1).values,
        "logcumsumexp": lambda x: torch.logcumsumexp(x, 1), "logsumexp": lambda x: torch.logsumexp(x, 0),
        "max": lambda x: torch.max(x, 1).values, "mean": lambda x: torch.mean(x, 0), "median": lambda x: torch.median(x),
        "median along an axis": lambda x: torch.median(x, 1).values, "min": lambda x: torch.min(x),
        "mode": lambda x: torch.mode(torch.round(x.detach()) * 0 + x, 1).values, "msort": lambda x: torch.msort(x),
        "nanmean": lambda x: torch.nanmean(torch.where(MASK, x, torch.nan), 1),
        "nanmedian": lambda x: torch.nanmedian(torch.where(MASK, x, torch.nan), 1).values,
        "nanquantile": lambda x: torch.nanquantile(torch.where(MASK, x, torch.nan), 0.4, 1),
        "nansum": lambda x: torch.nansum(torch.where(MASK, x, torch.nan), 1), "norm": lambda x: torch.norm(x, 3, 1),
        "prod": lambda x: torch.prod(x, 1), "quantile": lambda x: torch.quantile(x, 0.3, 1),
        "renorm": lambda x: torch.renorm(x, 2, 0, 1.0), "searchsorted": lambda x, v: torch.searchsorted(v.detach().sort().values, x.detach()) * x,
        "sort": lambda x: torch.sort(x, 1, descending=True).values, "std": lambda x: torch.std(x, 1),
        "std_mean": lambda x: list(torch.std_mean(x, 1)), "sum": lambda x: torch.sum(x, 1),
        "topk": lambda x: torch.topk(x, 2, 1).values, "trapezoid": lambda x, y: torch.trapezoid(x, y),
        "var": lambda x: torch.var(x, 1), "var_mean": lambda x: list(torch.var_mean(x, 0, correction=0)),
        "cov": lambda x: torch.cov(x), "corrcoef": lambda x: torch.corrcoef(x), "gradient": lambda x: list(torch.gradient(x)),
        "logical_or": lambda x: torch.logical_or(MASK, x > 0) * x, "allclose": lambda x: x * float(3 > 2),
    },
    "torch, shapes and indices": {
        "as_strided": lambda x: torch.as_strided(x, (2, 3), (4, 1), 1), "atleast_2d": lambda v: torch.atleast_2d(v),
        "block_diag": lambda x, a: torch.block_diag(x, a), "broadcast_to": lambda v: torch.broadcast_to(v, (3, 5)),
        "cartesian_prod": lambda v, w: torch.cartesian_prod(v, w), "cat": lambda x, y: torch.cat([x, y], 1),
        "cdist": lambda x, y: torch.cdist(x, y), "chunk": lambda x: list(torch.chunk(x, 3, 1)),
        "column_stack": lambda x, y: torch.column_stack((x, y)), "combinations": lambda v: torch.combinations(v),
        "diag": lambda v: torch.diag(v), "diag_embed": lambda x: torch.diag_embed(x), "diagflat": lambda x: torch.diagflat(x),
        "diagonal": lambda a: torch.diagonal(a), "diagonal_scatter": lambda a, v: torch.diagonal_scatter(a, v[:3]),
        "dsplit": lambda l: list(torch.dsplit(l, 2)), "expand_as": lambda v, x: v[:4].expand_as(x), "empty": lambda x: torch.empty(3, 4).zero_().to(x.dtype) + x,
        "empty_permuted": lambda x: torch.empty_permuted((3, 4), (1, 0), dtype=x.dtype).fill_(2.0) * x,
        "flatten": lambda l: torch.flatten(l, 1), "flip": lambda x: torch.flip(x, [1]), "fliplr": lambda x: torch.fliplr(x),
        "gather": lambda x: torch.gather(x, 1, IDS), "hstack": lambda x, y: torch.hstack([x, y]),
        "index_add": lambda x, y: torch.index_add(x, 1, ROWS, y, alpha=2), "index_copy": lambda x, y: torch.index_copy(x, 0, ROWS[:2], y[:2]),
        "index_fill": lambda x: torch.index_fill(x, 1, ROWS[:2], 0.5), "index_put": lambda x, y: torch.index_put(x, (ROWS[:2], ROWS[1:3]), y[0, :2], True),
        "index_reduce": lambda x, y: [torch.index_reduce(x, 1, ROWS, y, r) for r in ("mean", "amax", "amin")],
        "index_select": lambda x: torch.index_select(x, 1, ROWS), "kron": lambda x, a: torch.kron(x, a),
        "masked_fill": lambda x: torch.masked_fill(x, MASK, 2.0), "masked_scatter": lambda x, y: torch.masked_scatter(x, MASK, y),
        "masked_select by a constant": lambda x: torch.masked_select(x, MASK) if False else x[MASK],
        "meshgrid": lambda v, w: list(torch.meshgrid(v, w, indexing="ij")), "movedim": lambda l: torch.movedim(l, 0, 2),
        "narrow": lambda x: torch.narrow(x, 1, 1, 2), "narrow_copy": lambda x: torch.narrow_copy(x, 1, 1, 2), "permute": lambda l: torch.permute(l, (2, 0, 1)),
        "put": lambda x, y: torch.put(x, ROWS, y[0], accumulate=True), "ravel": lambda x: torch.ravel(x), "repeat_interleave": lambda x: torch.repeat_interleave(x, 2, 1),
        "repeat_interleave by a tensor": lambda x: torch.repeat_interleave(x, torch.tensor([1, 0, 3]), 0, output_size=4),
        "repeat_interleave by a constant": lambda x: torch.repeat_interleave(x, torch.tensor([1, 0, 3]), 0),
        "roll": lambda x: torch.roll(x, 1, 1), "rot90": lambda x: torch.rot90(x), "scatter": lambda x, y: torch.scatter(x, 1, torch.argsort(y, 1), y),
        "scatter_add": lambda x, y: torch.scatter_add(x, 1, IDS, y),
        "scatter_reduce": lambda x, y: [torch.scatter_reduce(x, 1, IDS, y, r) for r in ("sum", "mean", "amax", "amin")],
        "scatter_reduce, prod": lambda p, q: torch.scatter_reduce(p, 1, IDS, q, "prod"),
        "select_scatter": lambda x, v: torch.select_scatter(x, v[:4], 0, 1), "slice_scatter": lambda x, y: torch.slice_scatter(x, y[:, :2], 1, 0, 4, 2),
        "split": lambda x: list(torch.split(x, [1, 3], 1)), "squeeze": lambda x: torch.squeeze(x[None]), "stack": lambda x, y: torch.stack([x, y]),
        "swapaxes": lambda x: torch.swapaxes(x, 0, 1), "t": lambda x: torch.t(x), "take": lambda x: torch.take(x, ROWS), "take_along_dim": lambda x: torch.take_along_dim(x, IDS, 1),
        "tensor_split": lambda x: list(torch.tensor_split(x, 3, 1)), "tile": lambda x: torch.tile(x, (2, 1)), "tril": lambda a: torch.tril(a, -1),
        "tril_indices": lambda a: a[tuple(torch.tril_indices(3, 3))], "triu": lambda a: torch.triu(a), "unbind": lambda x: list(torch.unbind(x)),
        "unflatten": lambda x: torch.unflatten(x, 1, (2, 2)), "unsqueeze": lambda x: torch.unsqueeze(x, 0), "unfold": lambda l: l.unfold(2, 3, 2),
        "vander": lambda v: torch.vander(v, 3), "view_as_complex": lambda b: R(torch.view_as_complex(b) ** 2), "vstack": lambda x, y: torch.vstack([x, y]),
        "one_hot": lambda x: F.one_hot(IDS[0], 3) * x[0][:, None], "nonzero_static": lambda x: torch.nonzero_static(MASK, size=6).sum() * x,
    },
    "torch, products": {
        "addbmm": lambda a, l: torch.addbmm(a[:1, :1], l, l.mT), "addmm": lambda a, x, t: torch.addmm(a, x, t, beta=0.5, alpha=2),
        "addmv": lambda v, x, t: torch.addmv(v[:3], x, t[:, 0]), "addr": lambda x, b, v: torch.addr(x, b[:, 0], v[:4]),
        "baddbmm": lambda l: torch.baddbmm(l[:, :, :4], l, l.mT), "bmm": lambda l: torch.bmm(l, l.mT), "chain_matmul": lambda x, t, a: torch.chain_matmul(x, t, a),
        "cross": lambda t, a: torch.cross(t[:3], a, dim=1), "dot": lambda v, w: torch.dot(v, w), "einsum": lambda x, y: torch.einsum("ij,kj->ik", x, y),
        "ger": lambda v, w: torch.outer(v, w), "inner": lambda x, y: torch.inner(x, y), "matmul": lambda l, b: torch.matmul(l.mT[..., :3], b), "mm": lambda x, t: torch.mm(x, t),
        "mv": lambda x, t: torch.mv(x, t[:, 0]), "tensordot": lambda x, t: torch.tensordot(x, t, dims=1), "vdot": lambda v, w: R(torch.vdot(C(v, w), C(w, v))),
        "trace": lambda a: torch.trace(a), "matrix_power": lambda a: torch.matrix_power(a, 3), "matrix_exp": lambda a: torch.matrix_exp(a),
        "sparse @ dense": lambda a: sparse(a) @ a, "sparse.mm": lambda a: torch.sparse.mm(sparse(a), a), "sparse mv": lambda a: torch.mv(sparse(a), a[0]),
        "sparse.addmm": lambda t, a: torch.sparse.addmm(t, sparse(a), a), "sparse csr @ dense": lambda a: sparse(a).to_sparse_csr() @ a, "to_dense": lambda t, a: sparse(a).to_dense() * t,
        "grouped_mm": lambda x, l: F.grouped_mm(x, l.transpose(0, 1)[:2, :, :].permute(0, 1, 2).reshape(2, 2, 8)[:, :, :4].repeat(1, 2, 1), offs=torch.tensor([1, 3], dtype=torch.int32)),
        "lu_solve": lambda a, b: torch.lu_solve(b, *torch.linalg.lu_factor(a)), "lu_unpack": lambda a: list(torch.lu_unpack(*torch.linalg.lu_factor(a))[1:]),
        "cholesky_inverse": lambda a: torch.cholesky_inverse(linalg.cholesky(S(a))), "cholesky_solve": lambda a, b: torch.cholesky_solve(b, linalg.cholesky(S(a))),
        "logdet": lambda a: torch.logdet(S(a)), "pinverse": lambda t: torch.pinverse(t), "triangular_solve": lambda a, b: torch.triangular_solve(b, S(a))[0],
        "svd": lambda t: torch.svd(t).S, "qr": lambda t: list(torch.qr(t)), "geqrf": lambda t: torch.geqrf(t.detach())[0] * t,
    },
    "torch.linalg": {
        "cholesky": lambda a: linalg.cholesky(S(a)), "cond": lambda a: [linalg.cond(a), linalg.cond(a, "fro"), linalg.cond(a, 1)], "det": lambda a: linalg.det(a),
        "eig": lambda a: R(linalg.eig(a).eigenvalues), "eig, vectors": lambda a: (lambda e: e[1].abs())(linalg.eig(a)), "eigh": lambda a: (lambda e: [e[0], e[1].abs()])(linalg.eigh(S(a))), "eigvals": lambda a: R(linalg.eigvals(a)), "eigvalsh": lambda a: linalg.eigvalsh(S(a)),
        "householder_product": lambda t, v: linalg.householder_product(t, v[:3]), "inv": lambda a: linalg.inv(a), "ldl_factor": lambda a: linalg.ldl_factor(S(a).detach())[0] * a,
        "lstsq": lambda t, x: linalg.lstsq(t, x.mT).solution, "lu": lambda a: list(linalg.lu(a)[1:]), "lu_factor": lambda a: linalg.lu_factor(a)[0], "linalg.lu_solve": lambda a, b: linalg.lu_solve(*linalg.lu_factor(a), b),
        "matrix_norm": lambda x: [linalg.matrix_norm(x, o) for o in ("fro", "nuc", 2, -2, 1, float("inf"))], "matrix_rank": lambda t: linalg.matrix_rank(t.detach()) * t, "linalg.matrix_exp": lambda a: linalg.matrix_exp(a), "multi_dot": lambda x, t, a: linalg.multi_dot([x, t, a]), "linalg.norm": lambda x: linalg.norm(x),
        "pinv": lambda t: linalg.pinv(t), "pinv, Hermitian": lambda a: linalg.pinv(S(a), hermitian=True), "linalg.qr": lambda t: list(linalg.qr(t)), "qr, complete": lambda a: list(linalg.qr(a, "complete")), "slogdet": lambda a: linalg.slogdet(a)[1], "solve": lambda a, b: linalg.solve(a, b), "solve_ex": lambda a, b: linalg.solve_ex(a, b)[0], "solve_triangular": lambda a, b: linalg.solve_triangular(S(a), b, upper=True), "linalg.svd": lambda t: (lambda d: [d[0].abs(), d[1], d[2].abs()])(linalg.svd(t, full_matrices=False)), "svdvals": lambda t: linalg.svdvals(t), "tensorinv": lambda i: linalg.tensorinv(i[0, 0, :4, :4].reshape(2, 2, 4) + 3 * torch.eye(4, dtype=i.dtype).reshape(2, 2, 4)), "tensorsolve": lambda a, b: linalg.tensorsolve(a, b[:, 0]), "vander": lambda v: linalg.vander(v, N=3), "vecdot": lambda x, y: linalg.vecdot(x, y), "vector_norm": lambda x: [linalg.vector_norm(x, o, 1) for o in (1, 2, 3.5, float("inf"), -float("inf"))], "inv_ex": lambda a: linalg.inv_ex(a)[0], "cholesky_ex": lambda a: linalg.cholesky_ex(S(a))[0], "linalg.cross": lambda t, a: linalg.cross(t[:3], a), "linalg.diagonal": lambda a: linalg.diagonal(a), "linalg.matrix_power": lambda a: linalg.matrix_power(a, -2), "eig of a symmetric product": lambda a: R(linalg.eigvals(S(a) @ a)),
    },
    "torch.fft": {
        "fft": lambda x: R(fft.fft(x)), "fft2": lambda x: R(fft.fft2(x, norm="ortho")), "fftfreq": lambda x: fft.fftfreq(4) * x, "fftn": lambda l: R(fft.fftn(l)), "fftshift": lambda x: fft.fftshift(x), "hfft": lambda x: fft.hfft(C(x, x)), "hfft2": lambda x: fft.hfft2(C(x, x)), "ifft": lambda x, y: R(fft.ifft(C(x, y))), "ifft2": lambda x, y: R(fft.ifft2(C(x, y))), "ifftn": lambda x, y: R(fft.ifftn(C(x, y))), "ifftshift": lambda x: fft.ifftshift(x), "ihfft": lambda x: fft.ihfft(x).abs(), "irfft": lambda x, y: fft.irfft(C(x, y)), "irfft2": lambda x, y: fft.irfft2(C(x, y)), "irfftn": lambda x, y: fft.irfftn(C(x, y)), "rfft": lambda x: fft.rfft(x).abs(), "rfft2": lambda x: R(fft.rfft2(x)), "rfftn": lambda x: R(fft.rfftn(x)), "ihfftn": lambda x: R(fft.ihfftn(x)), "hfftn": lambda x: fft.hfftn(C(x, x)),
        "stft": lambda v: R(torch.stft(v.repeat(4), 8, 2, window=torch.hann_window(8, dtype=v.dtype), return_complex=True)), "istft": lambda l: torch.istft(torch.stft(l[0], 8, 2, window=torch.hann_window(8, dtype=l.dtype), return_complex=True), 8, 2, window=torch.hann_window(8, dtype=l.dtype)),
    },
    "torch.special": {
        "airy_ai": lambda x: special.airy_ai(x.detach()) * x, "bessel_j0": lambda x: special.bessel_j0(x.detach()) * x, "bessel_j1": lambda x: special.bessel_j1(x.detach()) * x, "bessel_y0": lambda p: special.bessel_y0(p.detach()) * p, "bessel_y1": lambda p: special.bessel_y1(p.detach()) * p, "chebyshev_polynomial_t": lambda u: special.chebyshev_polynomial_t(u.detach(), 3) * u, "special.digamma": lambda p: special.digamma(p), "entr": lambda p: special.entr(p), "special.erf": lambda x: special.erf(x), "erfcx": lambda x: special.erfcx(x), "special.expit": lambda x: special.expit(x), "gammaincc": lambda p, q: special.gammaincc(p.detach(), q), "gammainc": lambda p, q: special.gammainc(p.detach(), q), "gammaln": lambda p: special.gammaln(p), "hermite_polynomial_h": lambda x: special.hermite_polynomial_h(x.detach(), 3) * x, "special.i0": lambda x: special.i0(x), "i0e": lambda x: special.i0e(x), "i1": lambda x: special.i1(x), "i1e": lambda x: special.i1e(x), "laguerre_polynomial_l": lambda x: special.laguerre_polynomial_l(x.detach(), 3) * x, "legendre_polynomial_p": lambda u: special.legendre_polynomial_p(u.detach(), 3) * u, "log_ndtr": lambda x: special.log_ndtr(x), "special.log_softmax": lambda x: special.log_softmax(x, 1), "modified_bessel_k0": lambda p: special.modified_bessel_k0(p.detach()) * p, "modified_bessel_k1": lambda p: special.modified_bessel_k1(p.detach()) * p, "modified_bessel_i0": lambda p: special.modified_bessel_i0(p.detach()) * p, "multigammaln": lambda p: special.multigammaln(p + 1, 2), "ndtr": lambda x: special.ndtr(x), "ndtri": lambda p: special.ndtri(p / 2), "special.polygamma": lambda p: special.polygamma(1, p), "psi": lambda p: special.psi(p), "scaled_modified_bessel_k0": lambda p: special.scaled_modified_bessel_k0(p.detach()) * p, "special.sinc": lambda x: special.sinc(x), "spherical_bessel_j0": lambda p: special.spherical_bessel_j0(p.detach()) * p, "special.xlog1py": lambda x, p: special.xlog1py(x, p), "special.xlogy": lambda x, p: special.xlogy(x, p), "zeta": lambda p: special.zeta(p.detach() + 1.2, p.detach()) * p,
    },
    "nn.functional, activations": {
        **{name: (lambda x, f=getattr(F, name): f(x)) for name in ("celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "relu", "relu6", "selu", "silu", "softplus", "softshrink", "softsign", "tanhshrink")},
        "glu": lambda x: F.glu(x), "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"), "log_softmax": lambda x: F.log_softmax(x, 1), "prelu": lambda x, p: F.prelu(x, p[0]), "rrelu": lambda x: F.rrelu(x), "softmax": lambda x: F.softmax(x, 1), "softmin": lambda x: F.softmin(x, 1), "threshold": lambda x: F.threshold(x, 0.1, 0.5), "alpha_dropout, evaluation": lambda x: F.alpha_dropout(x, 0.5, False), "dropout, evaluation": lambda x: F.dropout(x, 0.5, False), "feature_dropout, evaluation": lambda l: F.dropout1d(l, 0.5, False),
    },
    "nn.functional, layers": {
        "adaptive_avg_pool2d": lambda i: F.adaptive_avg_pool2d(i, 4), "adaptive_max_pool2d": lambda i: F.adaptive_max_pool2d(i, 4), "affine_grid": lambda x: F.affine_grid(x[:2, :3].reshape(1, 2, 3), [1, 1, 3, 4], align_corners=False), "avg_pool1d": lambda l: F.avg_pool1d(l, 3), "avg_pool2d": lambda i: F.avg_pool2d(i, 3, 2, 1), "avg_pool3d": lambda c: F.avg_pool3d(c, 2), "batch_norm": lambda l: F.batch_norm(l, None, None, training=True), "bilinear": lambda x, y, l: F.bilinear(x, y, l[:, :4, :4]), "channel_shuffle": lambda i: F.channel_shuffle(i, 2), "conv1d": lambda l: F.conv1d(l, l[:, :, :3]), "conv2d": lambda i: F.conv2d(i, i[:, :, :3, :2], padding=1), "conv3d": lambda c: F.conv3d(c, c[:, :, :2, :2, :2]), "conv_transpose1d": lambda l: F.conv_transpose1d(l, l[0, :, None, :3]), "conv_transpose2d": lambda i: F.conv_transpose2d(i, i[0, :, None, :3, :2], stride=2), "conv_transpose3d": lambda c: F.conv_transpose3d(c, c[0, :, None, :2, :2, :2]), "conv_tbc": lambda l: torch.conv_tbc(l, l[:, :, :].reshape(2, 8, 4), l[0, 0, :4]), "cosine_similarity": lambda x, y: F.cosine_similarity(x, y), "embedding": lambda t: F.embedding(IDS, t), "embedding_bag": lambda t: F.embedding_bag(IDS, t, mode="sum"), "fold": lambda l: F.fold(l, (3, 5), (2, 2)), "fractional_max_pool2d": lambda i: F.fractional_max_pool2d(i, 2, output_size=3, _random_samples=torch.full((2, 4, 2), 0.3, dtype=i.dtype)),
        "grid_sample": lambda i: F.grid_sample(i, torch.tanh(i[:, :2].permute(0, 2, 3, 1)), align_corners=False), "grid_sample, 3d": lambda c, v: F.grid_sample(c, torch.tanh(c[:, 0, ..., None] * v[:3]), align_corners=True), "grid_sample, nearest 3d": lambda c: F.grid_sample(c, torch.tanh(c[:, 0, ..., None].detach().expand(1, 4, 4, 4, 3)), mode="nearest", padding_mode="reflection", align_corners=False), "group_norm": lambda i: F.group_norm(i, 2), "instance_norm": lambda i: F.instance_norm(i),
        **{f"interpolate, {m}": (lambda i, m=m: F.interpolate(i, (4, 9), mode=m)) for m in ("nearest", "nearest-exact", "area", "bilinear", "bicubic")}, **{f"interpolate, {m}, antialiased": (lambda i, m=m: F.interpolate(i, (4, 9), mode=m, antialias=True)) for m in ("bilinear", "bicubic")}, "interpolate, linear": lambda l: F.interpolate(l, 13, mode="linear"), "interpolate, trilinear": lambda c: F.interpolate(c, (3, 5, 6), mode="trilinear"), "layer_norm": lambda x: F.layer_norm(x, [4]), "linear": lambda x, t: F.linear(x, t.mT), "local_response_norm": lambda i: F.local_response_norm(i, 3), "lp_pool2d": lambda i: F.lp_pool2d(i, 2, 2), "max_pool1d": lambda l: F.max_pool1d(l, 3), "max_pool2d": lambda i: F.max_pool2d(i, 3, 2, 1), "max_pool3d": lambda c: F.max_pool3d(c, 2), "max_unpool2d": lambda i: F.max_unpool2d(*F.max_pool2d(i, 2, return_indices=True), 2), "multi_head_attention": lambda l: F.scaled_dot_product_attention(l, l, l, is_causal=True), "normalize": lambda x: F.normalize(x), "pad": lambda i: F.pad(i, (1, 2, 0, 1)), "pad, circular": lambda i: F.pad(i, (1, 2, 0, 1), "circular"), "pad, reflect": lambda i: F.pad(i, (1, 2, 0, 1), "reflect"), "pad, replicate": lambda i: F.pad(i, (1, 2, 0, 1), "replicate"), "pairwise_distance": lambda x, y: F.pairwise_distance(x, y), "pdist": lambda x: F.pdist(x), "pixel_shuffle": lambda i: F.pixel_shuffle(i, 2), "pixel_unshuffle": lambda i: F.pixel_unshuffle(i, 2), "rms_norm": lambda x: F.rms_norm(x, [4]), "scaled_dot_product_attention": lambda l: F.scaled_dot_product_attention(l, l * 2, l), "unfold": lambda i: F.unfold(i, 3),
    },
    "nn.functional, losses": {
        "binary_cross_entropy": lambda p, q: F.binary_cross_entropy(p / 2, q / 2), "binary_cross_entropy_with_logits": lambda x, p: F.binary_cross_entropy_with_logits(x, p), "cosine_embedding_loss": lambda x, y: F.cosine_embedding_loss(x, y, like(SIGNS, x)), "cross_entropy": lambda x: F.cross_entropy(x, CLASSES), "ctc_loss": lambda l: F.ctc_loss(l.permute(2, 0, 1).log_softmax(-1), torch.tensor([[1, 2], [3, 3]]), torch.tensor([8, 7]), torch.tensor([2, 2])), "gaussian_nll_loss": lambda x, y, p: F.gaussian_nll_loss(x, y, p), "hinge_embedding_loss": lambda x: F.hinge_embedding_loss(x, torch.sign(x.detach())), "huber_loss": lambda x, y: F.huber_loss(x, y), "kl_div": lambda x, p: F.kl_div(x, p), "l1_loss": lambda x, y: F.l1_loss(x, y), "margin_ranking_loss": lambda x, y: F.margin_ranking_loss(x, y, torch.sign(x.detach())), "mse_loss": lambda x, y: F.mse_loss(x, y), "multi_margin_loss": lambda x: F.multi_margin_loss(x, CLASSES), "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(x, torch.tensor([[1, 2, -1, 0], [3, -1, 0, 0], [0, 1, 2, -1]])), "multilabel_soft_margin_loss": lambda x: F.multilabel_soft_margin_loss(x, like(MASK, x)), "nll_loss": lambda x: F.nll_loss(x, CLASSES), "poisson_nll_loss": lambda x, p: F.poisson_nll_loss(x, p, full=True), "smooth_l1_loss": lambda x, y: F.smooth_l1_loss(x, y), "soft_margin_loss": lambda x: F.soft_margin_loss(x, torch.sign(x.detach())), "triplet_margin_loss": lambda x, y, p: F.triplet_margin_loss(x, y, p), "triplet_margin_with_distance_loss": lambda x, y, p: F.triplet_margin_with_distance_loss(x, y, p),
    },
    "control flow": {
        "cond": lambda x: torch.cond(x.sum() > 0, lambda z: z.sin(), lambda z: z.exp(), (x,)), "vmap": lambda x, t: torch.vmap(lambda r: r @ t)(x), "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False),
    },
    "random": {
        "bernoulli": lambda p: torch.bernoulli(p.detach() / 2) * p, "dropout": lambda x: F.dropout(x, 0.5, True), "gumbel_softmax": lambda x: F.gumbel_softmax(x), "multinomial": lambda p: torch.multinomial(p.detach(), 2) * p[:, :2], "normal": lambda x, p: torch.normal(x.detach(), p.detach()) * x, "poisson": lambda p: torch.poisson(p.detach()) * p, "rand": lambda x: torch.rand(3, 4) * x, "rand_like": lambda x: torch.rand_like(x) * x, "randint": lambda x: torch.randint(0, 3, (3, 4)) * x, "randn": lambda x: torch.randn(3, 4) * x, "randperm": lambda x: x[:, torch.randperm(4)], "rrelu in training": lambda x: F.rrelu(x, training=True),
    },
    "shapes that depend on values": {
        "masked_select": lambda x: torch.masked_select(x, x > 0), "nonzero": lambda x: torch.nonzero(x > 0) * x.sum(), "unique": lambda x: torch.unique(x.detach()).sum() * x, "unique_consecutive": lambda x: torch.unique_consecutive(x.detach()).sum() * x,
    },
}  # fmt: skip
