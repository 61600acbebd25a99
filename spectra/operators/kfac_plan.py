"""Which parameters are layers, with which factors, and what becomes of the others."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from spectra.base import paths as _paths
from spectra.base.trees import PyTree
from spectra.operators.kronecker import Place
from spectra.operators.layers import Found, Path, Site
from spectra.operators.layouts import Layout, flat_layout


@dataclasses.dataclass(frozen=True)
class Group:
    """All uses of one parameter as a layer's weight.

    A use is *turned* where the parameter's outputs are what it reads, as the embedding that is the last layer
    as well. Uses of one orientation are positions of one sequence.
    """

    place: Place
    uses: tuple[tuple[Path, bool], ...]
    kind: str  # of the sites: "dense", "convolution", "embedding", or "tied"
    indexed: tuple[bool, ...]  # orientations whose inputs are one-hot
    factor_limit: int
    only_bias: bool = False

    @property
    def paths(self) -> tuple[Path, ...]:
        """The sites."""
        return tuple(path for path, _ in self.uses)

    @property
    def turns(self) -> tuple[bool, ...]:
        """The orientations that occur."""
        return tuple(sorted({turned for _, turned in self.uses}))

    def of(self, turned: bool) -> tuple[Path, ...]:
        """The sites of one orientation."""
        return tuple(path for path, own in self.uses if own == turned)

    @property
    def has_bias(self) -> bool:
        """Whether the input has an entry of one for the bias."""
        return self.place.bias is not None

    @property
    def groups(self) -> int:
        """Layers in the parameter."""
        return self.place.layout.groups

    def input_size(self, turned: bool) -> int:
        """Entries of a row of the sites of one orientation."""
        layout = self.place.layout
        return layout.outputs if turned else layout.inputs + self.has_bias

    def output_size(self, turned: bool) -> int:
        """Entries of an output."""
        return self.input_size(False) if turned else self.place.layout.outputs

    def input_is_diagonal(self, turned: bool) -> bool:
        """Whether A is kept as its diagonal: it is diagonal for one-hot inputs."""
        return turned in self.indexed or self.input_size(turned) > self.factor_limit

    def output_is_diagonal(self, turned: bool) -> bool:
        """Whether B is kept as its diagonal."""
        return self.output_size(turned) > self.factor_limit


@dataclasses.dataclass(frozen=True)
class Plan:
    """The blocks: groups of layers, and the other leaves."""

    groups: tuple[Group, ...]
    rest: tuple[Place, ...]
    coverage: tuple[tuple[str, str], ...]  # path of each leaf, and how it is treated

    @property
    def rest_leaves(self) -> tuple[int, ...]:
        """The leaves that are no layers'."""
        return tuple(place.leaf for place in self.rest)


def plan_of(like: PyTree, found: Found, setup: Any) -> Plan:
    """The plan for the parameters `like` of a model with these sites."""
    leaves, names = jax.tree.leaves(like), _paths.leaf_paths(like)
    uses: dict[int, list[Site]] = {}
    for site in found.sites.values():
        uses.setdefault(site.view.leaf, []).append(site)
    reasons = dict(found.others)
    groups: list[Group] = []
    for leaf, sites in uses.items():
        if leaf in found.biases:
            reasons.setdefault(leaf, "it is a weight and a bias")
        if leaf in reasons:
            continue
        group = _group(names[leaf], leaves[leaf].shape, sites, setup.factor_limit)
        if group is None:
            reasons[leaf] = "its uses do not match each other"
            continue
        bias = _bias_of(sites, found) if setup.bias == "joint" else None
        place = dataclasses.replace(group.place, bias=bias)
        groups.append(dataclasses.replace(group, place=place))
    taken = {leaf for group in groups for leaf in group.place.leaves}
    if setup.bias == "separate":
        for leaf, paths in found.biases.items():
            sites = [found.sites[path] for path in paths]
            if leaf not in taken and leaf not in reasons and not any(site.other_uses for site in sites):
                groups.append(_bias_group(names[leaf], leaf, leaves[leaf].shape, sites, setup.factor_limit))
                taken.add(leaf)
    groups.sort(key=lambda group: group.place.leaf)
    rest = tuple(
        _rest_place(names[i], i, leaf.shape, found, uses.get(i, []), setup.exact_limit)
        for i, leaf in enumerate(leaves)
        if i not in taken
    )
    for place in rest:
        known = place.leaf in found.biases
        reasons.setdefault(
            place.leaf, "it is not the bias of one layer" if known else "no output depends on it"
        )
    return Plan(tuple(groups), rest, _coverage(names, groups, rest, reasons))


def _group(name: str, shape: tuple[int, ...], sites: list[Site], limit: int) -> Group | None:
    """The uses of one leaf, or None where they are not those of one matrix."""
    layout = sites[0].layout(shape)
    turns = [_turned(layout, site.layout(shape)) for site in sites]
    if None in turns:
        return None
    uses = tuple((site.path, bool(turned)) for site, turned in zip(sites, turns, strict=True))
    kinds = {turned: {s.kind for s, t in zip(sites, turns, strict=True) if t == turned} for turned in turns}
    if any("embedding" in own and len(own) > 1 for own in kinds.values()):
        return None
    indexed = tuple(bool(turned) for turned, own in kinds.items() if own == {"embedding"})
    every = set[str]().union(*kinds.values())
    kind = every.pop() if len(every) == 1 else "tied"
    return Group(Place(name, sites[0].view.leaf, None, layout, "kronecker"), uses, kind, indexed, limit)


def _turned(first: Layout, other: Layout) -> bool | None:
    """Whether another use reads the matrix as it is (False) or its transpose (True); None for neither."""
    if other == first:
        return False
    if math.prod(first.shape) == 0 or other.groups != first.groups:
        return None
    places, own = first.places(), other.places()
    if own.shape == places.shape and (own == places).all():
        return False
    turned = np.swapaxes(places, 1, 2)
    return True if own.shape == turned.shape and (own == turned).all() else None


def _bias_of(sites: list[Site], found: Found) -> int | None:
    """The leaf that is the bias of all these uses and of nothing else."""
    biases = {site.bias for site in sites}
    if len(biases) != 1 or any(site.kind == "embedding" or site.other_uses for site in sites):
        return None
    (bias,) = biases
    if bias is None or bias in found.others or {s.view.leaf for s in found.sites.values()} & {bias}:
        return None
    return bias if sorted(found.biases[bias]) == sorted(site.path for site in sites) else None


def _bias_group(name: str, leaf: int, shape: tuple[int, ...], sites: list[Site], limit: int) -> Group:
    stacked = len(sites[0].view.loops)
    groups, _, outputs = sites[0].sizes
    steps = (("reshape", shape[stacked:], (groups, 1, outputs)),)
    layout = Layout(shape, stacked, steps, math.prod(shape[:stacked]) * groups, 1, outputs)
    place = Place(name, leaf, None, layout, "kronecker")
    return Group(place, tuple((site.path, False) for site in sites), "bias", (), limit, only_bias=True)


def _rest_place(
    name: str, leaf: int, shape: tuple[int, ...], found: Found, sites: list[Site], limit: int
) -> Place:
    loops = found.stacked.get(leaf, set()) | {site.view.loops for site in sites}
    stacked = len(next(iter(loops))) if len(loops) == 1 else 0
    layout = flat_layout(tuple(shape), stacked)
    kind = "exact" if 0 < layout.inputs <= limit and math.prod(shape) else "diagonal"
    return Place(name, leaf, None, layout, kind)


def _coverage(
    names: list[str], groups: list[Group], rest: tuple[Place, ...], reasons: dict[int, str]
) -> tuple[tuple[str, str], ...]:
    said: dict[int, str] = {}
    for group in groups:
        layout = group.place.layout
        sides = f"{layout.inputs}{'+1' if group.has_bias else ''} x {layout.outputs}"
        many = f"{layout.groups} of " if layout.groups > 1 else ""
        shared = f", {len(group.uses)} uses" if len(group.uses) > 1 else ""
        kept = {True: ", input side diagonal", False: ""}[
            any(group.input_is_diagonal(t) and t not in group.indexed for t in group.turns)
        ]
        out = ", output side diagonal" if any(map(group.output_is_diagonal, group.turns)) else ""
        said[group.place.leaf] = f"Kronecker, {group.kind}, {many}{sides}{shared}{kept}{out}"
        if group.place.bias is not None:
            said[group.place.bias] = f"Kronecker, with {group.place.name}"
    for place in rest:
        size = f"{place.layout.groups} of " if place.layout.groups > 1 else ""
        form = "exact block" if place.kind == "exact" else "diagonal"
        said[place.leaf] = f"{form}, {size}{place.layout.inputs}: {reasons[place.leaf]}"
    return tuple((name, said[i]) for i, name in enumerate(names))
