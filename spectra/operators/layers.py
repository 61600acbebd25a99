"""Where a model multiplies by its parameters, read from its jaxpr: nothing is registered.

A *site* is one equation that multiplies an activation by a parameter: `dot_general` (dense layers, the
projections of attention, einsums), `conv_general_dilated`, or a `gather` of rows (embeddings). Parameters
reach it through transposes, reshapes and casts, inside of compiled, rematerialised and scanned functions. A
bias is a parameter that is added to a site's output and constant along all but the output axes.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from spectra.operators.jaxprs import scan_parts
from spectra.operators.layouts import Layout, Step, View, apply_steps, step_of

Path = tuple[int, ...]
INDEX_LIMIT = 2**26
"""Outputs of one example beyond which a bias is not looked for: telling needs an index for each."""
CALLS = ("pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint")


@dataclasses.dataclass
class Site:
    """One multiplication with a parameter. Rows are a of y = Σ_i a_i W_i, one for each output position."""

    path: Path
    kind: str  # "dense", "convolution" or "embedding"
    view: View
    steps: tuple[Step, ...]  # from the view to (groups, inputs, outputs)
    sizes: tuple[int, int, int]
    loops: tuple[int, ...]  # lengths of the enclosing scans, outermost first
    out_shape: tuple[int, ...]
    out_dtype: Any
    out_steps: tuple[Step, ...]  # from an output to (groups, positions, outputs)
    eqn: Any
    activation: int  # which operand
    bias: int | None = None
    other_uses: int = 0  # of the output, beside adding the bias

    def layout(self, leaf_shape: tuple[int, ...]) -> Layout:
        """The parameter as this site's matrices."""
        groups, inputs, outputs = self.sizes
        stacked = len(self.view.loops)
        layers = math.prod(leaf_shape[:stacked])
        return Layout(leaf_shape, stacked, self.view.steps + self.steps, layers * groups, inputs, outputs)


@dataclasses.dataclass(frozen=True)
class _Output:
    """A site's output with its axes moved."""

    site: Site
    steps: tuple[Step, ...] = ()


@dataclasses.dataclass
class Found:
    """The sites of a model, and why the parameters that are no layers' are not."""

    sites: dict[Path, Site] = dataclasses.field(default_factory=dict[Path, Site])
    biases: dict[int, list[Path]] = dataclasses.field(default_factory=dict[int, list[Path]])
    others: dict[int, str] = dataclasses.field(
        default_factory=dict[int, str]
    )  # leaf: what else it is used in
    stacked: dict[int, set[tuple[int, ...]]] = dataclasses.field(
        default_factory=dict[int, set[tuple[int, ...]]]
    )

    def other(self, tag: Any, reason: str) -> None:
        """Note a use that is no layer's."""
        if isinstance(tag, View):
            self.others.setdefault(tag.leaf, reason)
            self.stacked.setdefault(tag.leaf, set()).add(tag.loops)
        elif isinstance(tag, _Output):
            tag.site.other_uses += 1


def find_sites(jaxpr: Any, num_leaves: int) -> Found:
    """The sites of a closed jaxpr whose first `num_leaves` inputs are the parameters."""
    found = Found()
    inner = jaxpr.jaxpr
    tags = [View(i, inner.invars[i].aval.shape) for i in range(num_leaves)]
    for tag in _walk(inner, [*tags, *[None] * (len(inner.invars) - num_leaves)], (), (), found):
        found.other(tag, "it is an output")
    return found


def _walk(jaxpr: Any, tags: list[Any], path: Path, loops: tuple[int, ...], found: Found) -> list[Any]:
    """Follow parameters and sites' outputs through a jaxpr; what its outputs are."""
    known = {id(var): tag for var, tag in zip(jaxpr.invars, tags, strict=True) if tag is not None}
    for number, eqn in enumerate(jaxpr.eqns):
        operands = [known.get(id(var)) for var in eqn.invars]
        if not any(operands):
            continue
        here = (*path, number)
        for var, tag in zip(eqn.outvars, _follow(eqn, operands, here, loops, found), strict=False):
            if tag is not None:
                known[id(var)] = tag
    return [known.get(id(var)) for var in jaxpr.outvars]


def _follow(eqn: Any, tags: list[Any], path: Path, loops: tuple[int, ...], found: Found) -> list[Any]:
    """What the outputs of an equation are whose operands are tagged."""
    name = eqn.primitive.name
    if name in CALLS:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        return _walk(getattr(inner, "jaxpr", inner), tags, path, loops, found)
    if name == "scan":
        return _scan(eqn, tags, path, loops, found)
    if name == "stop_gradient":
        return []
    if len(tags) == 1 and (steps := step_of(eqn)) is not None:
        (tag,) = tags
        return [dataclasses.replace(tag, steps=tag.steps + steps)]
    if name in ("add", "add_any") and _add_bias(tags, found):
        return []
    site = _site(eqn, tags, path, loops)
    if site is None:
        for tag in tags:
            found.other(tag, f"{name} is no layer")
        return []
    for operand, tag in enumerate(tags):
        if operand == site.activation:
            found.other(tag, "it is an activation")
    found.sites[path] = site
    return [_Output(site)]


def _scan(eqn: Any, tags: list[Any], path: Path, loops: tuple[int, ...], found: Found) -> list[Any]:
    consts, carry = scan_parts(eqn)
    rows = consts + carry
    inner: list[Any] = list(tags[:consts])
    for tag in tags[consts:rows]:
        found.other(tag, "a scan carries it")
        inner.append(None)
    for tag in tags[rows:]:
        if isinstance(tag, View) and not tag.steps:
            tag = dataclasses.replace(tag, shape=tag.shape[1:], loops=(*tag.loops, len(loops)))
        elif tag is not None:
            found.other(tag, "a scan runs over it with its axes moved")
            tag = None
        inner.append(tag)
    inner = [found.other(tag, "a scan reads it") if isinstance(tag, _Output) else tag for tag in inner]
    for tag in _walk(eqn.params["jaxpr"].jaxpr, inner, path, (*loops, eqn.params["length"]), found):
        found.other(tag, "a scan returns it")
    return []


def _site(eqn: Any, tags: list[Any], path: Path, loops: tuple[int, ...]) -> Site | None:
    read = {"dot_general": _dense, "conv_general_dilated": _convolution, "gather": _embedding}
    name = eqn.primitive.name
    if name not in read:
        return None
    own = [i for i, tag in enumerate(tags) if isinstance(tag, View)]
    if len(own) != 1 or tags[own[0]].repeats:
        return None
    spec = read[name](eqn, own[0])
    if spec is None:
        return None
    kind, steps, sizes, out_steps, activation = spec
    out = eqn.outvars[0].aval
    return Site(
        path, kind, tags[own[0]], steps, sizes, loops, out.shape, out.dtype, out_steps, eqn, activation
    )


def _dense(eqn: Any, own: int) -> Any:
    """Contracted axes of the parameter are inputs, its free axes outputs, batch axes groups."""
    contract, batch = (pair[own] for pair in eqn.params["dimension_numbers"])
    shape = eqn.invars[own].aval.shape
    free = [axis for axis in range(len(shape)) if axis not in (*contract, *batch)]
    groups, inputs, outputs = (math.prod(shape[axis] for axis in axes) for axes in (batch, contract, free))
    order = (*batch, *contract, *free)
    steps = (
        ("transpose", order),
        ("reshape", tuple(shape[i] for i in order), (groups, inputs, outputs)),
    )
    out = eqn.outvars[0].aval.shape
    rows = range(len(batch), len(out) - len(free)) if own == 1 else range(len(batch) + len(free), len(out))
    columns = [axis for axis in range(len(batch), len(out)) if axis not in rows]
    order = (*range(len(batch)), *rows, *columns)
    positions = math.prod(out[axis] for axis in rows)
    out_steps = (
        ("transpose", order),
        ("reshape", tuple(out[i] for i in order), (groups, positions, outputs)),
    )
    return "dense", steps, (groups, inputs, outputs), out_steps, 1 - own


def _convolution(eqn: Any, own: int) -> Any:
    """Each output position reads a patch; the groups of a grouped convolution are layers of their own."""
    if own != 1 or eqn.params["batch_group_count"] != 1:
        return None
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    shape, out = eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    channels, reads, *window = (shape[axis] for axis in numbers.rhs_spec)
    outputs, inputs = channels // groups, reads * math.prod(window)
    order = tuple(numbers.rhs_spec)
    steps = (
        ("transpose", order),
        ("reshape", tuple(shape[i] for i in order), (groups, outputs, inputs)),
        ("transpose", (0, 2, 1)),
    )
    batch, features, *space = numbers.out_spec
    order = (features, batch, *space)
    positions = math.prod(out) // channels
    out_steps = (
        ("transpose", order),
        ("reshape", tuple(out[i] for i in order), (groups, outputs, positions)),
        ("transpose", (0, 2, 1)),
    )
    return "convolution", steps, (groups, inputs, outputs), out_steps, 0


def _embedding(eqn: Any, own: int) -> Any:
    """Whole rows along one axis of the parameter."""
    numbers, sizes = eqn.params["dimension_numbers"], tuple(eqn.params["slice_sizes"])
    shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    axes = tuple(numbers.start_index_map)
    whole = own == 0 and len(axes) == 1 and tuple(numbers.collapsed_slice_dims) == axes
    if not whole or sizes != tuple(1 if axis == axes[0] else n for axis, n in enumerate(shape)):
        return None
    order = (axes[0], *[axis for axis in range(len(shape)) if axis != axes[0]])
    rows, outputs = shape[axes[0]], math.prod(shape) // max(shape[axes[0]], 1)
    steps = (("transpose", order), ("reshape", tuple(shape[i] for i in order), (1, rows, outputs)))
    columns = tuple(numbers.offset_dims)
    order = (*[axis for axis in range(len(out)) if axis not in columns], *columns)
    positions = math.prod(out) // max(outputs, 1)
    out_steps = (("transpose", order), ("reshape", tuple(out[i] for i in order), (1, positions, outputs)))
    return "embedding", steps, (1, rows, outputs), out_steps, 1


def _add_bias(tags: list[Any], found: Found) -> bool:
    """Whether an addition is that of a bias to a site's output; noted then."""
    views = [tag for tag in tags if isinstance(tag, View)]
    outputs = [tag for tag in tags if isinstance(tag, _Output)]
    if len(views) != 1 or len(outputs) != 1 or not _is_bias(views[0], outputs[0]):
        return False
    site = outputs[0].site
    if site.bias is not None or site.view.loops != views[0].loops:
        return False
    site.bias = views[0].leaf
    found.biases.setdefault(views[0].leaf, []).append(site.path)
    found.stacked.setdefault(views[0].leaf, set()).add(views[0].loops)
    return True


def _is_bias(view: View, output: _Output) -> bool:
    """Whether entry o of the parameter is added to output o of the layer at every position."""
    site, size = output.site, math.prod(output.site.out_shape)
    groups, _, outputs = site.sizes
    if math.prod(view.shape) != groups * outputs or size > INDEX_LIMIT:
        return False
    added = apply_steps(view.steps, np.arange(groups * outputs, dtype=np.int32).reshape(view.shape))
    places = apply_steps(output.steps, np.arange(size, dtype=np.int32).reshape(site.out_shape))
    if added.ndim != places.ndim or any(
        a not in (1, n) for a, n in zip(added.shape, places.shape, strict=True)
    ):
        return False
    entries = np.empty(size, np.int32)
    entries[places.ravel()] = np.broadcast_to(added, places.shape).ravel()
    entries = apply_steps(site.out_steps, entries.reshape(site.out_shape))
    expected = np.arange(groups * outputs, dtype=np.int32).reshape(groups, 1, outputs)
    return bool((entries == expected).all())
