"""The neural tangent kernel: the Gauss-Newton matrix seen from the outputs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from spectra.base import trees
from spectra.base.meshes import automatic, on_automatic_axes
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator
from spectra.operators.pytree import operator


@operator(leaves=("params", "inputs"))
class TangentKernelOperator(LinearOperator):
    """J Jᵀ / N, the empirical neural tangent kernel, on vectors like the model's outputs for N examples.

    J = ∂ model_fn(params, inputs) / ∂ params. Its non-zero eigenvalues are those of Jᵀ J / N, the
    Gauss-Newton matrix of half the squared error, and their roots the singular values of J over √N. Use it
    where there are fewer outputs than parameters: the smaller matrix is the cheaper one.

    Args:
        model_fn: pure function (params, inputs) -> outputs. Static: pass the same function object each time.
        params: pytree of parameters.
        inputs: inputs of N examples; the first axis of the outputs' leaves is that of the examples.

    Cost: a forward and a backward pass per product.

    References:
        Jacot, Gabriel and Hongler, arXiv:1806.07572.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def model_fn(params, x):
        ...     return x @ params
        >>> op = spectra.TangentKernelOperator(model_fn, jnp.ones(3), jnp.eye(4, 3))
        >>> jnp.diagonal(op.as_matrix())
        Array([0.25, 0.25, 0.25, 0.  ], dtype=float32)
    """

    model_fn: Callable[[PyTree, PyTree], PyTree]
    params: PyTree
    inputs: PyTree

    @automatic
    def __init__(self, model_fn: Callable[[PyTree, PyTree], PyTree], params: PyTree, inputs: PyTree):
        values = {"model_fn": model_fn, "params": params, "inputs": inputs}
        for name, value in values.items():
            object.__setattr__(self, name, value if name == "model_fn" else on_automatic_axes(value))

    @property
    def like(self) -> PyTree:
        """The shapes of the outputs."""
        return jax.eval_shape(self.model_fn, self.params, self.inputs)

    @property
    def known_linear(self) -> bool:
        """True: both passes are linear."""
        return True

    @property
    def semidefinite(self) -> bool:
        """True: a Gram matrix."""
        return True

    def mv(self, v: PyTree) -> PyTree:
        """J (Jᵀ v) / N."""
        with jax.default_matmul_precision("float32"):
            outputs, pull = jax.vjp(lambda p: self.model_fn(p, self.inputs), self.params)
            (direction,) = pull(trees.cast_like(v, outputs))
            _, image = jax.jvp(lambda p: self.model_fn(p, self.inputs), (self.params,), (direction,))
        count = jax.tree.leaves(outputs)[0].shape[0]
        return trees.cast_like(jax.tree.map(lambda x: x / jnp.asarray(count, x.dtype), image), v)
