"""The neural tangent kernel: the Gauss-Newton matrix seen from the outputs."""

from collections.abc import Callable

import jax

from spectra.base import paths
from spectra.base.calls import automatic
from spectra.base.errors import StructureError
from spectra.base.trees import PyTree, path_str
from spectra.operators.arithmetic import Wrapped
from spectra.operators.base import LinearOperator
from spectra.operators.jacobian import JacobianOperator
from spectra.operators.pytree import operator


@operator(leaves=("base",))
class TangentKernelOperator(Wrapped):
    """J Jᵀ / N, the empirical neural tangent kernel, on vectors like the model's outputs for N examples.

    J = ∂ model_fn(params, inputs) / ∂ params. Its non-zero eigenvalues are those of Jᵀ J / N, the
    Gauss-Newton matrix of half the squared error; their square roots are the singular values of J divided by
    √N. Use it if there are fewer outputs than parameters, because the smaller matrix is the cheaper one. It
    is `JacobianOperator(...).cogram()` divided by N.

    Args:
        model_fn: pure function (params, inputs) -> outputs. Static: pass the same function object each time.
        params: pytree of parameters.
        inputs: inputs of N examples, or a stream of batches of them; the first axis of the outputs' leaves is
            that of the examples.
        wrt: the parameters to differentiate, as a glob, regex or predicate on their paths; default all.

    Raises:
        StructureError: the leaves of the outputs share no first axis, or hold no real floating numbers.
        DifferentiationError: the model refuses forward and reverse mode.

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

    base: LinearOperator
    num_examples: int

    @automatic
    def __init__(
        self,
        model_fn: Callable[[PyTree, PyTree], PyTree],
        params: PyTree,
        inputs: PyTree,
        *,
        wrt: paths.Select | None = None,
    ):
        kernel = JacobianOperator(model_fn, params, inputs, wrt=wrt).cogram()
        object.__setattr__(self, "base", kernel)
        object.__setattr__(self, "num_examples", _num_examples(kernel.like))

    @property
    def semidefinite(self) -> bool:
        """True: a Gram matrix."""
        return True

    def _apply(self, multiply: Callable[[PyTree], PyTree], v: PyTree) -> PyTree:
        return jax.tree.map(lambda x: x / self.num_examples, multiply(v))

    def _with_base(self, base: LinearOperator) -> "TangentKernelOperator":
        new = object.__new__(TangentKernelOperator)
        object.__setattr__(new, "base", base)
        object.__setattr__(new, "num_examples", self.num_examples)
        return new


def _num_examples(outputs: PyTree) -> int:
    """N, the length of the first axis that all outputs share."""
    leaves = jax.tree.leaves_with_path(outputs)
    lengths = {leaf.shape[:1] for _, leaf in leaves}
    if len(lengths) > 1 or () in lengths:
        shapes = ", ".join(f"'{path_str(path)}' {list(leaf.shape)}" for path, leaf in leaves)
        raise StructureError(
            f"the outputs share no first axis, that of the N examples: {shapes}. Return outputs of every "
            "example, or use JacobianOperator(...).cogram(), J Jᵀ without the division by N."
        )
    return lengths.pop()[0]
