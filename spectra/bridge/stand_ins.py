"""What `torch.export` refuses though nothing speaks against it: the same in operations that it takes.

Some functions check their arguments' values, or return beside their result something whose shape depends on
values; sparse matrices have no storage to trace. PyTorch's own definitions are followed.
"""

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from spectra.bridge.errors import BridgeError

_ATEN = torch.ops.aten
MAX_DENSE = 2**28  # entries of a sparse matrix that is written out


def _gaussian_nll_loss(
    input: Any, target: Any, var: Any, full: bool = False, eps: float = 1e-6, reduction: str = "mean"
) -> Any:
    """Without the check that no variance is negative, which is a branch on values."""
    if isinstance(var, (int, float)):
        var = torch.full_like(input, var)
    if input.shape[:-1] == var.shape:
        var = var.unsqueeze(-1)
    elif [v for v, n in zip(var.shape, input.shape, strict=True) if v != n] not in ([], [1]):
        raise ValueError("var is of incorrect size")
    # The derivative passes the bound, as in PyTorch. A block without gradients would not be recorded here.
    var = var + (var.clamp(min=eps) - var).detach()
    loss = 0.5 * (torch.log(var) + (input - target) ** 2 / var)
    if full:
        loss = loss + 0.9189385332046727  # log(2π) / 2
    return {"none": lambda: loss, "mean": loss.mean, "sum": loss.sum}[reduction]()


def _cov(input: Any, *, correction: int = 1, fweights: Any = None, aweights: Any = None) -> Any:
    rows = input.reshape(1, -1) if input.ndim < 2 else input
    weights = torch.ones(rows.shape[1], dtype=rows.real.dtype, device=rows.device)
    for given in (fweights, aweights):
        weights = weights if given is None else weights * given
    total = weights.sum()
    centred = rows - ((rows * weights).sum(1) / total)[:, None]
    lost = 1.0 if aweights is None else (weights * aweights).sum() / total
    count = (total - correction * lost).clamp(min=0)
    return (centred @ (centred * weights).mH / count).squeeze()


def _corrcoef(input: Any) -> Any:
    covariance = _cov(input)
    if not covariance.ndim:
        return covariance / covariance
    deviation = covariance.diagonal().real.sqrt()
    result = covariance / deviation[:, None] / deviation
    if result.is_complex():
        return torch.complex(result.real.clip(-1, 1), result.imag.clip(-1, 1))
    return result.clip(-1, 1)


def _lstsq(A: Any, B: Any, rcond: float | None = None, *, driver: str | None = None) -> Any:
    """By the pseudoinverse, through which PyTorch differentiates it too."""
    vector = B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1])
    right = B.unsqueeze(-1) if vector else B
    solution = torch.linalg.pinv(A, rtol=rcond) @ right
    rank = torch.linalg.matrix_rank(A.detach(), rtol=rcond)
    missed = A @ solution - right
    given = driver not in (None, "gelsy") and A.shape[-2] > A.shape[-1]  # the others leave them empty
    residuals = (missed * missed.conj()).real.sum(-2) if given else A.real.new_zeros(0)
    solution = solution.squeeze(-1) if vector else solution
    return _LSTSQ((solution, residuals, rank, A.real.new_zeros(0)))


_LSTSQ: Any = vars(torch.return_types)["linalg_lstsq"]


def _sparse_coo_tensor(indices: Any, values: Any, size: Any = None, **options: Any) -> Any:
    """Written out, entries at the same place added; as it is where its shape depends on values."""
    if size is None:
        return torch.sparse_coo_tensor(indices, values, **options)
    values = torch.as_tensor(values, dtype=options.get("dtype"))
    return values.new_zeros(size).index_put(tuple(torch.as_tensor(indices)), values, accumulate=True)


def _unless_dense(function: Any) -> Any:
    """A conversion that leaves a matrix that is written out already as it is."""
    return lambda value, *args, **kwargs: function(value, *args, **kwargs) if _is_sparse(value) else value


_STAND_INS: dict[Any, Any] = {
    functional.gaussian_nll_loss: _gaussian_nll_loss,
    torch.cov: _cov,
    torch.Tensor.cov: _cov,
    torch.corrcoef: _corrcoef,
    torch.Tensor.corrcoef: _corrcoef,
    torch.linalg.lstsq: _lstsq,
    torch.sparse_coo_tensor: _sparse_coo_tensor,
    torch.sparse.mm: torch.mm,
    torch.sparse.addmm: torch.addmm,
    **{
        function: _unless_dense(function)
        for function in (
            torch.Tensor.coalesce,
            torch.Tensor.to_sparse,
            torch.Tensor.to_sparse_coo,
            torch.Tensor.to_sparse_csr,
            torch.Tensor.to_sparse_csc,
        )
    },
}


class StandIns(TorchFunctionMode):
    """Call the stand-in where there is one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _STAND_INS.get(func, func)(*args, **(kwargs or {}))


def written_out(value: Any) -> Any:
    """A sparse matrix as a dense one; anything else as it is."""
    if not _is_sparse(value):
        return value
    if value.numel() > MAX_DENSE:
        raise BridgeError(
            f"a sparse matrix of shape {tuple(value.shape)} would be written out in full, with more than "
            f"{MAX_DENSE} entries: multiply by its entries with index_add instead"
        )
    return value.to_dense()


# Products with a sparse matrix are those with the dense one; conversions leave it as it is.
_DENSE = {
    _ATEN._sparse_mm.default: _ATEN.mm.default,
    _ATEN._sparse_addmm.default: _ATEN.addmm.default,
    **dict.fromkeys(
        (
            _ATEN._to_dense.default,
            _ATEN.to_dense.default,
            _ATEN._to_sparse.default,
            _ATEN._to_sparse_csr.default,
            _ATEN._to_sparse_csc.default,
            _ATEN.to_sparse.default,
            _ATEN.to_sparse_csr.default,
            _ATEN.to_sparse_csc.default,
            _ATEN.coalesce.default,
        ),
        _ATEN.alias.default,
    ),
}


def _is_sparse(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is not torch.strided


def write_out_attributes(module: torch.nn.Module) -> None:
    """Turn the sparse matrices that a module holds into dense ones: there is no product with a traced one."""
    for part in module.modules():
        for holder in (part._buffers, part.__dict__):
            holder.update({name: written_out(x) for name, x in holder.items() if _is_sparse(x)})


def write_out_sparse(program: torch.export.ExportedProgram) -> None:
    """Turn the sparse matrices that a program holds into dense ones, and products with them likewise."""
    if not any(_is_sparse(node.meta.get("val")) for node in program.graph.nodes):
        return
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and _is_sparse(value):
            with value.fake_mode:
                node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
        elif node.target in _DENSE:
            node.target = _DENSE[node.target]
            if node.target is _ATEN.alias.default:
                node.args, node.kwargs = node.args[:1], {}
    for holder in (program.state_dict, program.constants):
        for name, value in list(holder.items()):
            if isinstance(value, torch.Tensor):
                holder[name] = written_out(value)
    program.graph_module.recompile()
