"""Parameters seen through transposes and reshapes, and as the matrices of linear layers.

A layer multiplies rows a (inputs) by a matrix that is its parameter up to moved axes; the Kronecker factors
live in the coordinates of that matrix, and vectors in those of the parameter.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]
Step = tuple[Any, ...]


def apply_steps(steps: tuple[Step, ...], x: Any) -> Any:
    """An array of JAX or NumPy after transposes, reshapes, reversals and (NumPy only) broadcasts."""
    for name, *args in steps:
        if name == "transpose":
            x = x.transpose(args[0])
        elif name == "reshape":
            x = x.reshape(args[1])
        elif name == "reverse":
            x = x[tuple(slice(None, None, -1) if axis in args[0] else slice(None) for axis in range(x.ndim))]
        else:
            shape, axes = args
            place = [1] * len(shape)
            for axis, size in zip(axes, x.shape, strict=True):
                place[axis] = size
            x = np.broadcast_to(x.reshape(place), shape)
    return x


def undo_steps(steps: tuple[Step, ...], x: Any) -> Any:
    """The inverse of `apply_steps` for steps that repeat nothing."""
    for name, *args in reversed(steps):
        if name == "transpose":
            x = x.transpose(tuple(int(i) for i in np.argsort(args[0])))
        elif name == "reshape":
            x = x.reshape(args[0])
        else:
            x = apply_steps(((name, *args),), x)  # a reversal undoes itself
    return x


def step_of(eqn: Any) -> tuple[Step, ...] | None:
    """The steps of an equation that only moves, repeats or casts the entries of its operand, else None."""
    name, params = eqn.primitive.name, eqn.params
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    if name == "transpose":
        return (("transpose", tuple(params["permutation"])),)
    if name in ("reshape", "squeeze", "expand_dims"):
        plain = params.get("dimensions") is None or name != "reshape"
        return (("reshape", before.shape, after.shape),) if plain else None
    if name == "broadcast_in_dim":
        if math.prod(before.shape) == math.prod(after.shape):
            return (("reshape", before.shape, after.shape),)
        return (("broadcast", after.shape, tuple(params["broadcast_dimensions"])),)
    if name == "rev":
        return (("reverse", tuple(params["dimensions"])),)
    floats = jnp.issubdtype(before.dtype, jnp.floating) and jnp.issubdtype(after.dtype, jnp.floating)
    if name in ("convert_element_type", "copy", "copy_p", "reduce_precision", "sharding_constraint"):
        return () if floats else None
    return None


@dataclasses.dataclass(frozen=True)
class View:
    """A parameter leaf, or one of the layers stacked in it, with its entries moved or repeated."""

    leaf: int
    shape: Shape  # of the leaf without the axes that scans run over
    steps: tuple[Step, ...] = ()
    loops: tuple[int, ...] = ()  # which of the enclosing scans run over a leading axis of the leaf

    @property
    def repeats(self) -> bool:
        """Whether entries are repeated."""
        return any(step[0] == "broadcast" for step in self.steps)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A leaf as `groups` matrices of shape (inputs, outputs): what a layer multiplies rows by.

    Stacked layers and the groups of a convolution are matrices of their own.
    """

    shape: Shape  # of the leaf
    stacked: int  # its leading axes that scans run over
    steps: tuple[Step, ...]
    groups: int
    inputs: int
    outputs: int

    @property
    def _layers(self) -> int:
        return math.prod(self.shape[: self.stacked])

    def matrix(self, leaf: jax.Array) -> jax.Array:
        """(groups, inputs, outputs)."""
        layers = leaf.reshape(self._layers, *self.shape[self.stacked :])
        moved = jax.vmap(lambda x: apply_steps(self.steps, x))(layers)
        return moved.reshape(self.groups, self.inputs, self.outputs)

    def leaf(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `matrix`."""
        each = matrix.reshape(self._layers, -1, self.inputs, self.outputs)
        return jax.vmap(lambda x: undo_steps(self.steps, x))(each).reshape(self.shape)

    def places(self) -> np.ndarray:
        """The entry of the leaf that each entry of the matrices is, as NumPy indices."""
        index = np.arange(math.prod(self.shape)).reshape(self._layers, *self.shape[self.stacked :])
        moved = [apply_steps(self.steps, x) for x in index]
        return np.stack(moved).reshape(self.groups, self.inputs, self.outputs)


def flat_layout(shape: Shape, stacked: int = 0) -> Layout:
    """A leaf as a column: what is no layer has a block over all its entries, or over those of each layer."""
    layers, size = math.prod(shape[:stacked]), math.prod(shape[stacked:])
    return Layout(shape, stacked, (("reshape", shape[stacked:], (1, size, 1)),), layers, size, 1)
