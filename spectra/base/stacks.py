"""Stacks of vectors: pytrees with leaves (k, *leaf.shape), and their algebra leaf by leaf.

Contractions run in full precision on the leaves as they are, so that a stack keeps the sharding of the
parameters and nothing is gathered: only (k, k) matrices are summed over devices.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import arrays, programs, trees

PyTree = Any


def length(stack: PyTree) -> int:
    """k, the number of vectors."""
    return jax.tree.leaves(stack)[0].shape[0]


@trees.one_program
def row(stack: PyTree, i: int) -> PyTree:
    """Vector i."""
    return jax.tree.map(lambda x: x[0], _rows(stack, i, 1))


def rows(stack: PyTree, start: int, stop: int) -> PyTree:
    """Vectors start..stop-1, as far as there are."""
    return _rows(stack, start, min(stop, length(stack)) - start)


@functools.partial(trees.one_program, static_argnames="count")
def _rows(stack: PyTree, start: int, count: int) -> PyTree:
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, start, count), stack)


def split(stack: PyTree) -> list[PyTree]:
    """The vectors one by one."""
    return [row(stack, i) for i in range(length(stack))]


def mapped(fn: Callable[[PyTree], PyTree], stack: PyTree, batch: int | None = None) -> PyTree:
    """fn of each vector, all side by side, or `batch` at a time.

    One after the other where an operation in `fn` refuses `jax.vmap`: `lax.ragged_dot` of a mixture of
    experts, a callback of NumPy's products without `vmap_method=`.
    """
    if batch == 1:
        return lax.map(fn, stack)
    try:
        return jax.vmap(fn)(stack) if batch is None else lax.map(fn, stack, batch_size=batch)
    except (NotImplementedError, ValueError):  # the latter of ordered callbacks; others raise it again
        return lax.map(fn, stack)


@trees.one_program
def stacked(vectors: list[PyTree]) -> PyTree:
    """The stack of some vectors."""
    return jax.tree.map(lambda *xs: jnp.stack(xs), *vectors)


def concatenate(stacks: list[PyTree]) -> PyTree:
    """One stack after the other."""
    return stacks[0] if len(stacks) == 1 else _concatenate(stacks)


@trees.one_program
def _concatenate(stacks: list[PyTree]) -> PyTree:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *stacks)


@functools.partial(trees.one_program, static_argnames="count")
def padded(stack: PyTree, count: int) -> PyTree:
    """`count` vectors: those of the stack, and zeros."""
    missing = count - length(stack)
    return jax.tree.map(lambda x: arrays.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)]), stack)


@programs.jit
def gram(a: PyTree, b: PyTree) -> jax.Array:
    """Inner products a_i · b_j restricted to each leaf; shape (leaves, k, l). Their sum is A Bᵀ."""
    return jnp.stack([part.astype(trees.scalar_dtype(a)) for part in _leaf_grams(a, b)])


@programs.jit
def inner(a: PyTree, b: PyTree) -> jax.Array:
    """A Bᵀ, the inner products a_i · b_j; shape (k, l)."""
    dtype = trees.scalar_dtype(a)
    return sum((part.astype(dtype) for part in _leaf_grams(a, b)), jnp.zeros((), dtype))


def _leaf_grams(a: PyTree, b: PyTree) -> list[jax.Array]:
    return [arrays.inner(x, y, 1) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]


@programs.jit
def row_dots(a: PyTree, b: PyTree) -> jax.Array:
    """Inner products a_i · b_i restricted to each leaf; shape (leaves, k)."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    parts = [arrays.inner(x, y, 1, paired=True) for x, y in pairs]
    return jnp.stack([part.astype(trees.scalar_dtype(a)) for part in parts])


@programs.jit
def combine(coefficients: jax.Array, stack: PyTree) -> PyTree:
    """Σ_j c_j v_j of a vector of coefficients; of a matrix a stack whose row i is Σ_j c_ij v_j."""

    def one(x: jax.Array) -> jax.Array:
        return jnp.tensordot(coefficients.astype(x.dtype), x, axes=1, precision=lax.Precision.HIGHEST)

    return jax.tree.map(one, stack)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """a - b."""
    return jax.tree.map(jnp.subtract, a, b)
