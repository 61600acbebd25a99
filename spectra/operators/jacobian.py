"""The Jacobian of a model's outputs: products with it and its transpose, and the two Gram matrices."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef

from spectra.base import host, paths, programs, stacks, trees
from spectra.base.calls import automatic
from spectra.base.draws import moved_parameters
from spectra.base.errors import (
    DifferentiationError,
    MemoryLimitError,
    NonFiniteError,
    SpectraError,
    StructureError,
)
from spectra.base.meshes import on_automatic_axes
from spectra.base.trees import PyTree
from spectra.operators import differentiate
from spectra.operators.accumulate import weighted_sum
from spectra.operators.arguments import raised_by
from spectra.operators.base import LinearOperator, product
from spectra.operators.loss_rounding import Rounding, coarsest_rounding
from spectra.operators.pytree import OnParameters, operator
from spectra.operators.stochastic import StochasticOperator
from spectra.operators.streams import StackedOutputs, open_inputs
from spectra.results import format_bytes

if TYPE_CHECKING:
    from jaxtyping import Float

MODES = ("forward-over-reverse", "reverse-over-reverse")
ROWS = 64
"""Rows of the dense matrix in one vmapped product: bounds the batched activations."""


@operator(leaves=("params", "inputs"))
class JacobianOperator(OnParameters):
    """J = ∂ model_fn(params, inputs) / ∂ params, a matrix (m, n) that is never formed.

    `J @ v` is the change of the outputs along a vector v like the parameters; `J.T @ u` is the gradient of
    ⟨u, outputs⟩ for u like the outputs. Since J is not symmetric, it is not a `LinearOperator`, but its two
    Gram matrices are: `J.gram()` = Jᵀ J on parameters, N times the Gauss-Newton matrix of half the squared
    error, and `J.cogram()` = J Jᵀ on outputs, N times the tangent kernel. `spectra.svds` computes singular
    values and vectors.

    Args:
        model_fn: pure function (params, inputs) -> outputs, a pytree of floating arrays of any shapes.
            Static: pass the same function object each time.
        params: pytree of n parameters; products are in float32 at least.
        inputs: the second argument of the function, in one piece; or a stream of such batches, as for other
            operators (a list, a loader, a function that returns an iterator). Outputs of a stream are stacked
            along the first axis, and a product is one pass over the stream.
        wrt: the parameters to differentiate, as a glob, regex or predicate on their paths; default all.

    Raises:
        StructureError: outputs or parameters are not real floating arrays, or hold no numbers; the outputs
            of several batches cannot be stacked.
        DataError: a stream is empty, can be read only once, or changes between passes.
        DifferentiationError: the model refuses forward and reverse mode.

    Cost: one evaluation of the model and a pass forward (`J @ v`, 2 to 3 evaluations) or backward (`J.T @ u`,
    as a gradient); a Gram product both. The memory is that of a gradient; only `as_matrix` forms a matrix. If
    a model refuses forward mode (`custom_vjp`), J v is computed as the transpose of the transpose, for about
    one evaluation more.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def model_fn(params, x):
        ...     return jnp.tanh(x @ params["w"])
        >>> J = spectra.JacobianOperator(model_fn, {"w": jnp.zeros(3)}, jnp.eye(4, 3))
        >>> J.shape
        (4, 3)
        >>> J @ {"w": jnp.array([1.0, 2.0, 3.0])}
        Array([1., 2., 3., 0.], dtype=float32)
        >>> J.T @ jnp.array([1.0, 0.0, 0.0, 5.0])
        {'w': Array([1., 0., 0.], dtype=float32)}
        >>> J.cogram().size, J.gram().size
        (4, 3)
    """

    model_fn: Callable[[PyTree, PyTree], PyTree]
    params: PyTree
    inputs: PyTree
    selected: tuple[int, ...] | None  # leaves of params that vary; None for all
    mode: str
    rounding: Rounding | None  # of the model itself, where it computes in less than the vectors have
    outputs: tuple[PyTreeDef, trees.Kinds]  # the tree of the outputs, and the shape and dtype of each
    transposed: bool
    batches: StackedOutputs | None  # where inputs are streamed

    @automatic
    def __init__(
        self,
        model_fn: Callable[[PyTree, PyTree], PyTree],
        params: PyTree,
        inputs: PyTree,
        *,
        wrt: paths.Select | None = None,
    ):
        if not callable(model_fn):
            raise StructureError(
                f"model_fn is a {type(model_fn).__name__}; pass a function (params, inputs) -> outputs."
            )
        trees.check_alive(params, "parameter leaf")
        params, selected = paths.select_parameters(params, wrt)
        values = {
            "model_fn": model_fn,
            "params": on_automatic_axes(params),
            "selected": selected,
            "mode": MODES[0],
            "rounding": None,
            "transposed": False,
            "batches": None,
        }
        self._set(values)
        found = open_inputs(inputs, self._outputs_of)
        batches, first, outputs = found or (None, on_automatic_axes(inputs), None)
        self._set({"inputs": first, "outputs": _kinds(self._outputs_of(first))})
        _require_outputs(self._outputs())
        self._set({"mode": _resolve_mode(self)})
        self._set({"rounding": self._rounding()})
        if batches is not None:
            self._set({"inputs": None, "batches": batches, "outputs": _kinds(outputs)})

    def _set(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _with(self, **values: Any) -> Self:
        new = object.__new__(type(self))
        new._set(vars(self) | values)
        return new

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): how many numbers there are in the outputs, and in the parameters."""
        return trees.tree_size(self.like_left), trees.tree_size(self.like)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of products."""
        return jnp.result_type(trees.scalar_dtype(self.structure), trees.scalar_dtype(self.structure_left))

    @property
    def like(self) -> PyTree:
        """A vector that `J @ v` takes: the parameters; for `J.T`, the shapes of the outputs."""
        return self._outputs() if self.transposed else super().like

    @property
    def like_left(self) -> PyTree:
        """A vector that `J @ v` returns: the shapes of the outputs; for `J.T`, the parameters."""
        return self.T.like

    @property
    def structure(self) -> PyTree:
        """Pytree of `ShapeDtypeStruct` of what `J @ v` takes; float32 at least."""
        return trees.vector_structure(self.like)

    @property
    def structure_left(self) -> PyTree:
        """Pytree of `ShapeDtypeStruct` of what `J @ v` gives; float32 at least."""
        return trees.vector_structure(self.like_left)

    @property
    def T(self) -> "JacobianOperator":
        """The transpose; `J.T.T` is `J`."""
        return self._with(transposed=not self.transposed)

    def gram(self) -> "GramOperator":
        """Jᵀ J as a symmetric operator, on vectors like the parameters."""
        return GramOperator(self)

    def cogram(self) -> "GramOperator":
        """J Jᵀ as a symmetric operator, on vectors like the outputs: the tangent kernel, not divided by N."""
        return GramOperator(self.T)

    def mv(self, v: PyTree) -> PyTree:
        """J v: takes a pytree like the parameters, returns one like the outputs; pure, works in jit and
        vmap."""
        if self.batches is not None:
            return self._streamed(self.batches, v)
        push, pull = self._products()
        return pull(v) if self.transposed else push(v)

    @automatic
    def __matmul__(self, v: PyTree) -> PyTree:
        """J v for a pytree, or for a flat array (n,), whose result is flat, (m,); J V for a matrix (n, k)."""
        trees.check_alive(self, "the operator's leaf")
        domain = self.gram()
        if isinstance(v, (LinearOperator, JacobianOperator)):
            raise StructureError(
                "a Jacobian multiplies vectors: J.gram() and J.cogram() are its products with its transpose."
            )
        if domain.is_matrix(v):
            columns = trees.as_real(v, "the matrix", self.dtype).T
            if self.batches is not None:
                return self._checked(jax.vmap(lambda x: _flat(self, x))(columns)).T
            return self._checked(stacks.mapped(lambda x: _flat_product(self, x), columns, ROWS)).T
        vector = domain.as_vector(v)
        return self._checked(
            self.flat_product(trees.ravel(vector)) if domain.is_flat(v) else self.product(vector)
        )

    @automatic
    def as_matrix(self, *, memory_limit: int | None = None) -> 'Float[jax.Array, "m n"]':
        """The dense matrix, in the order of flat vectors.

        Args:
            memory_limit: bytes; by default half of what the device has free.

        Raises:
            MemoryLimitError: m n numbers exceed the limit.
            NonFiniteError: an entry is NaN or infinite.

        Cost: min(m, n) products with the transpose, or with J itself.
        """
        m, n = self.shape
        needed = 2 * m * n * jnp.dtype(self.dtype).itemsize
        limit = memory_limit or (host.available_bytes() or 2**63) // 2
        if needed > limit:
            raise MemoryLimitError(
                f"the dense Jacobian of shape ({m:,}, {n:,}) needs {format_bytes(needed)}, above the limit "
                f"of {format_bytes(limit)}. Use svds, or J.gram() and J.cogram() with eigsh, which need no "
                "matrix, or raise memory_limit."
            )
        if self.batches is not None:
            return self._checked(self._streamed_matrix())
        return self._checked(_rows(self.T).T if n <= m else _rows(self))

    def product(self, v: PyTree) -> PyTree:
        """J v, compiled; batch by batch where inputs are streamed."""
        return self.mv(v) if self.batches is not None else jacobian_product(self, v)

    def flat_product(self, flat: jax.Array) -> jax.Array:
        """The same for flat vectors."""
        return _flat(self, flat) if self.batches is not None else _flat_product(self, flat)

    def _checked(self, result: PyTree) -> PyTree:
        if not trees.is_traced(result) and not trees.all_finite(result):
            raise NonFiniteError(f"the product is NaN or infinite. {_NON_FINITE}")
        return result

    def __repr__(self) -> str:
        m, n = self.shape
        return f"{type(self).__name__}(shape=({m:,}, {n:,}), dtype={self.dtype})"

    def pieces(self) -> "Iterator[JacobianOperator]":
        """The Jacobians of the batches of a stream, whose rows these are; in one pass."""
        assert self.batches is not None
        for batch in self.batches.batches():
            yield self._with(inputs=batch, batches=None, outputs=_kinds(self._outputs_of(batch)))

    def _streamed(self, batches: StackedOutputs, v: PyTree) -> PyTree:
        if not self.transposed:
            return batches.stacked([jacobian_product(piece, v) for piece in self.pieces()])
        parts = zip(self.pieces(), batches.split(v), strict=True)
        return weighted_sum(lambda one: jacobian_product(*one), ((1.0, one) for one in parts))

    def _streamed_matrix(self) -> jax.Array:
        """Rows of each batch, in the order of the stacked outputs."""
        assert self.batches is not None
        if self.transposed:
            return self.T._streamed_matrix().T
        n = self.shape[1]

        def by_leaf(rows: jax.Array, structure: PyTree) -> PyTree:
            leaves, treedef = jax.tree.flatten(structure)
            edges = list(itertools.accumulate(leaf.size for leaf in leaves[:-1]))
            parts = jnp.split(rows, edges)
            return treedef.unflatten(
                [x.reshape(*leaf.shape, n) for x, leaf in zip(parts, leaves, strict=True)]
            )

        rows = [by_leaf(piece.as_matrix(), piece.like_left) for piece in self.pieces()]
        return jnp.concatenate([x.reshape(-1, n) for x in jax.tree.leaves(self.batches.stacked(rows))])

    def _outputs_of(self, inputs: PyTree) -> PyTree:
        working = self._working()
        try:
            return jax.eval_shape(self._evaluate, working, inputs)
        except SpectraError:
            raise
        except Exception as error:
            raise raised_by("model_fn(params, inputs)", error, inputs, "The input") from error

    def _outputs(self) -> PyTree:
        treedef, kinds = self.outputs
        return treedef.unflatten([jax.ShapeDtypeStruct(*kind) for kind in kinds])

    def _working(self) -> PyTree:
        """The structure of the parameters that vary, float32 at least."""
        return trees.vector_structure(super().like)

    def _evaluate(self, variables: PyTree, inputs: PyTree) -> PyTree:
        with jax.default_matmul_precision("float32"):
            return self.model_fn(self._merge(variables), inputs)

    def _products(self) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
        """v -> J v and u -> Jᵀ u at the parameters, which share one evaluation of the model."""
        variables = trees.cast_like(super().like, self._working())
        outputs = self._outputs()
        values, push, pull = differentiate.jacobian(
            self.mode, lambda x: self._evaluate(x, self.inputs), variables
        )

        def forward(v: PyTree) -> PyTree:
            with jax.default_matmul_precision("float32"):
                return trees.cast_like(push(trees.cast_like(v, variables)), trees.vector_structure(outputs))

        def backward(u: PyTree) -> PyTree:
            with jax.default_matmul_precision("float32"):
                return trees.cast_like(pull(trees.cast_like(u, values)), variables)

        return forward, backward

    def _rounding(self) -> Rounding | None:
        """What the model rounds by itself between the parameters that vary and its outputs."""
        working = self._working()
        jaxpr = jax.make_jaxpr(self._evaluate)(working, self.inputs)
        count = len(jax.tree.leaves(working))
        moves = [i < count for i in range(len(jaxpr.jaxpr.invars))]
        return coarsest_rounding(jaxpr, moves, float(jnp.finfo(self.dtype).eps))


_NON_FINITE = "Check the parameters, the inputs and the model's outputs for NaN and overflow."


@operator(leaves=("jacobian", "unit"))
class GramOperator(LinearOperator):
    """Jᵀ J of a `JacobianOperator`, or J Jᵀ of its transpose; written `J.gram()` and `J.cogram()`.

    In a `unit` of J it is (J / unit)ᵀ (J / unit): squares of float32 end at 1e-19 and 1e19.
    """

    jacobian: JacobianOperator
    unit: Any = 1.0

    @property
    def like(self) -> PyTree:
        """What the Jacobian takes."""
        return self.jacobian.like

    @property
    def on_host(self) -> bool:
        """Whether inputs are streamed."""
        return self.jacobian.batches is not None

    @property
    def known_linear(self) -> bool:
        """True: both passes are linear."""
        return True

    @property
    def semidefinite(self) -> bool:
        """True: a Gram matrix."""
        return True

    @property
    def precision(self) -> float:
        """Unit roundoff, or that of the model's own casts."""
        rounding, sides = self.jacobian.rounding, (self.jacobian.structure, self.jacobian.structure_left)
        return max(trees.roundoff(sides), rounding.eps if rounding else 0.0)

    @property
    def computes_in(self) -> str:
        """The type that the model computes in, where it casts."""
        rounding = self.jacobian.rounding
        return rounding.dtype if rounding else super().computes_in

    def explain_non_finite(self) -> str:
        """What to look at."""
        return _NON_FINITE

    @property
    def known_in_double(self) -> bool:
        """True: parameters and inputs are what they are, and all else is inside of a product."""
        return True

    def moved(self, key: jax.Array) -> LinearOperator:
        """The Gram matrix at parameters moved by one rounding each; its products are in stochastic arithmetic
        where inputs are no stream, whose pieces are programs of their own."""
        jacobian, rounding = self.jacobian, self.jacobian.rounding
        params = moved_parameters(jacobian.params, key, rounding.eps if rounding else 0.0)
        other = GramOperator(jacobian._with(params=params), self.unit)
        return other if self.on_host else StochasticOperator(other, jax.random.bits(key, (), "uint32"))

    def mv(self, v: PyTree) -> PyTree:
        """Jᵀ (J v)."""
        if self.jacobian.batches is not None:
            return self._streamed(v)
        push, pull = self.jacobian._products()
        first, second = (pull, push) if self.jacobian.transposed else (push, pull)
        return trees.scale(1 / self.unit, second(trees.scale(1 / self.unit, first(v))))

    def _streamed(self, v: PyTree) -> PyTree:
        """The same in one pass over the stream; J Jᵀ takes two."""
        jacobian = self.jacobian
        if jacobian.transposed:
            first = trees.scale(1 / self.unit, jacobian.mv(v))
            return trees.scale(1 / self.unit, jacobian.T.mv(first))
        grams = ((1.0, GramOperator(piece, self.unit)) for piece in jacobian.pieces())
        return weighted_sum(lambda gram: product(gram, v), grams)

    def _principal(self, indices: tuple[int, ...]) -> LinearOperator:
        jacobian = self.jacobian
        if jacobian.transposed:
            return super()._principal(indices)
        chosen = indices if jacobian.selected is None else tuple(jacobian.selected[i] for i in indices)
        return dataclasses.replace(self, jacobian=jacobian._with(selected=chosen))


@programs.jit
def jacobian_product(jacobian: JacobianOperator, v: PyTree) -> PyTree:
    """The compiled product."""
    return jacobian.mv(v)


def _flat(jacobian: JacobianOperator, flat: jax.Array) -> jax.Array:
    return trees.ravel(jacobian.mv(trees.unravel(flat, jacobian.structure)))


_flat_product = programs.jit(_flat)


def _kinds(outputs: PyTree) -> tuple[PyTreeDef, trees.Kinds]:
    leaves, treedef = jax.tree.flatten(outputs)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


@programs.jit
def _rows(jacobian: JacobianOperator) -> jax.Array:
    """The rows of a matrix, from products with its transpose."""
    m, _ = jacobian.shape
    turned = jacobian.T

    def one(i: int | jax.Array) -> PyTree:
        unit = jnp.zeros(m, jacobian.dtype).at[i].set(1)
        return trees.ravel(turned.mv(trees.unravel(unit, turned.structure)))

    return stacks.mapped(one, jnp.arange(m), min(ROWS, m))


def _require_outputs(outputs: PyTree) -> None:
    for path, leaf in jax.tree.leaves_with_path(outputs):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise StructureError(
                f"the model's output '{trees.path_str(path)}' has dtype {leaf.dtype}; a Jacobian needs real "
                "floating outputs. Leave it out of what model_fn returns, or cast it."
            )
    if not trees.tree_size(outputs):
        raise StructureError("model_fn returns no numbers; return the outputs, a pytree of floating arrays.")


def _resolve_mode(jacobian: JacobianOperator) -> str:
    """The first mode that the model admits: both are exact."""
    refusals: list[Exception] = []
    for mode in MODES:
        try:
            differentiate.require_product(GramOperator(jacobian._with(mode=mode)))
        except Exception as error:
            refusals.append(error)
        else:
            return mode
    raise DifferentiationError(
        f"the model cannot be differentiated: {str(refusals[-1]).strip().splitlines()[0]} A Jacobian needs "
        "reverse mode; look for callbacks, while loops or integer arithmetic between parameters and outputs."
    ) from refusals[-1]
