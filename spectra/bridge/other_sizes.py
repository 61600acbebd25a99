"""Whether a graph with free sizes is the module at other sizes, too. Needs PyTorch.

`torch.export` follows the branches that the example takes, so where the module asks for a size
(`if x.shape[0] > 4`) the graph holds one of two functions. The conditions that the trace has met say at which
sizes the other one is computed, and a size of one is never traced: there, both are run side by side.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as torch_pytree

from spectra.bridge.adapter import preserved
from spectra.bridge.agreement import varied

Program = torch.export.ExportedProgram
Sizes = dict[Any, int]  # of PyTorch's symbols
Suspects = Callable[[list[Any], Sizes], Iterable[tuple[Sizes, str]]]  # of free sizes and the example's

_MOST = 10_000
"""Sizes beyond this are not tried: the example would have to be made as large."""


def other_branch(program: Program, module: torch.nn.Module, inputs: Any) -> str:
    """At which size the module takes another branch than its graph, in words; "" where none is found.

    What either of them refuses at a size cannot be taken for something else in silence, and is passed over.

    Args:
        program: what `torch.export` made of the module.
        module: in the mode that it was exported in.
        inputs: positional and keyword arguments, those of the export.
    """
    return _first(program, module, inputs, _guarded)


def other_at_one(program: Program, module: torch.nn.Module, inputs: Any) -> str:
    """As `other_branch`, where a free size is one: PyTorch traces for two and more, and asks no condition."""
    return _first(program, module, inputs, lambda _, example: ((s, "") for s in _changed(example, [1])))


def _first(program: Program, module: torch.nn.Module, inputs: Any, suspects: Suspects) -> str:
    """The first of the suspected sizes at which module and graph differ, and the line of the condition."""
    shapes = _shapes(program)
    free: list[Any] = [size for shape in shapes for size in shape or () if isinstance(size, torch.SymInt)]
    example = {size.node.expr: int(size.node.hint) for size in free if size.node.expr.is_symbol}
    inputs = torch_pytree.tree_map_only(torch.Tensor, varied, inputs)
    with preserved(module, module.training):
        for sizes, place in suspects(free, example):
            if _differs(program, module, _resized(inputs, shapes, sizes)):
                if _differs(program, module, inputs):
                    break  # random numbers, or what the comparison of every export names
                there, here = next((sizes[s], example[s]) for s in sizes if sizes[s] != example[s])
                return f"it takes another branch where a size is {there}, not {here}{place}"
    return ""


def _shapes(program: Program) -> list[Any]:
    """The shape of each input, with PyTorch's expressions for free sizes; None for what is no tensor."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    names = program.graph_signature.user_inputs  # or the values of numbers and texts
    given = [values.get(name) if isinstance(name, str) else None for name in names]
    return [v.shape if isinstance(v, torch.Tensor) else None for v in given]


def _guarded(free: list[Any], example: Sizes) -> Iterator[tuple[Sizes, str]]:
    """For each condition that the trace has met, sizes near at which it does not hold, and its line."""
    tried: list[Sizes] = []
    for guard in free[0].node.shape_env.guards if free else ():
        numbers = {abs(int(number)) for number in guard.expr.atoms() if number.is_Integer}
        near = {n + step for n in [*numbers, *example.values()] for step in (-1, 0, 1)}
        for sizes in _changed(example, [n for n in sorted(near) if 1 < n <= _MOST]):
            if guard.expr.xreplace(sizes) == False:  # noqa: E712 a truth value of sympy, or an expression
                if sizes not in tried:
                    tried.append(sizes)
                    yield sizes, f" {guard.sloc}"
                break


def _changed(example: Sizes, candidates: list[int]) -> Iterator[Sizes]:
    """The example's sizes with one of them replaced."""
    for symbol in example:
        yield from (example | {symbol: n} for n in candidates)


def _resized(inputs: Any, shapes: list[Any], sizes: Sizes) -> Any:
    """The inputs with these sizes in place of the free ones: cut, or repeated."""
    leaves, structure = torch_pytree.tree_flatten(inputs)
    for i, shape in enumerate(shapes):
        for axis, size in enumerate(shape or ()):
            if isinstance(size, torch.SymInt):
                count = int(size.node.expr.xreplace(sizes))
                rows = torch.arange(count, device=leaves[i].device) % leaves[i].shape[axis]
                leaves[i] = leaves[i].index_select(axis, rows)
    return torch_pytree.tree_unflatten(leaves, structure)


def _differs(program: Program, module: torch.nn.Module, inputs: Any) -> bool:
    """Whether the outputs of module and graph differ; False where one of them has none."""
    args, kwargs = inputs
    # Not the call of the graph's module, which asks first whether sizes are within those traced.
    graph = program.module(check_guards=False).forward
    try:
        with torch.no_grad():
            theirs, ours = (_outputs(function, args, kwargs) for function in (module, graph))
            equal = len(theirs) == len(ours) and all(map(_equal, theirs, ours))
    except Exception:  # of the user's code, of a layer that stands for an operator, of tensors without values
        return False
    return not equal


def _outputs(function: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors that a function returns, with the same random numbers each time."""
    torch.manual_seed(0)
    outputs = torch_pytree.tree_leaves(function(*args, **kwargs))
    return [value for value in outputs if isinstance(value, torch.Tensor)]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two outputs agree in shape, in NaN, and in half of the digits of the largest element.

    Both sides are the same operators in the same precision, in kernels that may round differently.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    eps = torch.finfo(a.dtype).eps if a.is_floating_point() or a.is_complex() else 0.0
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    scale = float(a.nan_to_num(0, 0, 0).abs().max()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=0, atol=eps**0.5 * scale, equal_nan=True)
