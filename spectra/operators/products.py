"""Three ways to differentiate once more, named after how they multiply by a Hessian.

With g = ∇L the product (∂g/∂θ) v, and with a model f the products J v and Jᵀ u of its Jacobian, are
computed as:

* forward-over-reverse, jvp of grad: about 3 gradients of work, no memory beyond the gradient's own.
* reverse-over-reverse, the vjp of grad: for functions that refuse forward mode (`custom_vjp`); holds the
  saved values of both sweeps.
* finite-difference, (g(θ + εu) - g(θ - εu)) |v| / 2ε with u = v/|v|: for functions that can be
  differentiated only once. With ε = eps^(1/3) |θ| truncation and cancellation are both of order
  eps^(2/3): expect 2e-5 |H| in float32 and 4e-11 |H| in float64, times the function's own scale of
  change.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectra import _tree

PyTree = Any
Function = Callable[[PyTree], PyTree]
MODES = ("forward-over-reverse", "reverse-over-reverse", "finite-difference")


def derivative(mode: str, gradient: Function, params: PyTree, v: PyTree) -> PyTree:
    """(∂g/∂θ) v for a function whose derivative is symmetric: the gradient of something."""
    if mode == "forward-over-reverse":
        return jax.jvp(gradient, (params,), (v,))[1]
    if mode == "reverse-over-reverse":
        return jax.vjp(gradient, params)[1](v)[0]
    return central_difference(gradient, params, v)


def jacobian(mode: str, fn: Function, params: PyTree) -> tuple[PyTree, Function, Function]:
    """(f(θ), v -> J v, u -> Jᵀ u), sharing one evaluation of the function where the mode admits it."""
    if mode == "forward-over-reverse":
        outputs, push = jax.linearize(fn, params)
        transposed = jax.linear_transpose(push, params)
        return outputs, push, lambda u: transposed(u)[0]
    outputs, pullback = jax.vjp(fn, params)

    def pull(u):
        return pullback(u)[0]

    if mode == "reverse-over-reverse":  # u -> Jᵀ u is linear, so its own vjp multiplies by J
        return outputs, lambda v: jax.vjp(pull, outputs)[1](v)[0], pull
    return outputs, lambda v: central_difference(fn, params, v), pull


def central_difference(fn: Function, params: PyTree, v: PyTree) -> PyTree:
    """(∂f/∂θ) v from two evaluations along the normalised direction."""
    eps = jnp.finfo(_tree.scalar_dtype(params)).eps
    theta, size = _tree.norm(params), _tree.norm(v)
    step = eps ** (1 / 3) * jnp.where(theta > 0, theta, 1)
    per_unit = step / jnp.where(size > 0, size, 1)
    plus = fn(_tree.axpy(per_unit, v, params))
    minus = fn(_tree.axpy(-per_unit, v, params))
    return _tree.scale(1 / (2 * per_unit), jax.tree.map(jnp.subtract, plus, minus))
