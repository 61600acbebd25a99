"""Three ways to multiply by the derivative of a gradient, and the linear map they share.

With g = ∇L, all compute (∂g/∂θ) v:

* forward-over-reverse, jvp of grad: about 3 gradients of work, no memory beyond the gradient's own.
* reverse-over-reverse, the vjp of grad: for losses that refuse forward mode (`custom_vjp`); holds the
  saved values of both sweeps.
* finite-difference, (g(θ + εu) - g(θ - εu)) |v| / 2ε with u = v/|v|: for losses that can be
  differentiated only once. With ε = eps^(1/3) |θ| truncation and cancellation are both of order
  eps^(2/3): expect 2e-5 |H| in float32 and 4e-11 |H| in float64, times the loss's own scale of change.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectra import _tree

PyTree = Any
Gradient = Callable[[PyTree], PyTree]


def forward_over_reverse(gradient: Gradient, params: PyTree, v: PyTree) -> PyTree:
    """jvp of the gradient."""
    return jax.jvp(gradient, (params,), (v,))[1]


def reverse_over_reverse(gradient: Gradient, params: PyTree, v: PyTree) -> PyTree:
    """vjp of the gradient; equal, since the Hessian is symmetric."""
    return jax.vjp(gradient, params)[1](v)[0]


def finite_difference(gradient: Gradient, params: PyTree, v: PyTree) -> PyTree:
    """Central difference of the gradient along the normalised direction."""
    eps = jnp.finfo(_tree.scalar_dtype(params)).eps
    theta, size = _tree.norm(params), _tree.norm(v)
    step = eps ** (1 / 3) * jnp.where(theta > 0, theta, 1)
    per_unit = step / jnp.where(size > 0, size, 1)
    plus = gradient(_tree.axpy(per_unit, v, params))
    minus = gradient(_tree.axpy(-per_unit, v, params))
    return _tree.scale(1 / (2 * per_unit), jax.tree.map(jnp.subtract, plus, minus))


PRODUCTS = {
    "forward-over-reverse": forward_over_reverse,
    "reverse-over-reverse": reverse_over_reverse,
    "finite-difference": finite_difference,
}


def linear_map(mode: str, gradient: Gradient, params: PyTree) -> tuple[PyTree, Callable]:
    """The gradient, and the linear map v -> H v with its saved values, a pytree that jit can return.

    The saved values of reverse-over-reverse come as a map to a tuple of one; see `apply_linear_map`.
    """
    if mode == "reverse-over-reverse":
        return jax.vjp(gradient, params)
    return jax.linearize(gradient, params)


def apply_linear_map(mode: str, linear: Callable, v: PyTree) -> PyTree:
    """The product of a map made by `linear_map`."""
    product = linear(v)
    return product[0] if mode == "reverse-over-reverse" else product
