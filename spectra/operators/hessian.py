"""The Hessian of a loss as an operator."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra import _memory, _tree
from spectra._errors import DifferentiationError, NonFiniteError, SpectraError, StructureError
from spectra.data import Stream, as_batch, is_stream
from spectra.operators import products
from spectra.operators.accumulate import mean_over_microbatches
from spectra.operators.base import LinearOperator, operator
from spectra.operators.diagnose import may_refuse_at_lowering, refusing_operations

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]

LINEARIZE_SHARE = 0.25
"""Share of the free memory that linearize="auto" spends on saved values; the basis needs the rest."""
_PRECISIONS = ("float32", "highest", "high", "tensorfloat32", "bfloat16", "default")
_LOW_PRECISION = {"bfloat16": 2.0**-8, "tensorfloat32": 2.0**-11, "default": 2.0**-8}


@operator(leaves=("params", "data"))
class HessianOperator(LinearOperator):
    """The Hessian ∇²L(θ) of a loss, multiplied without being formed.

    (H v)_i = Σ_j ∂²L/∂θ_i∂θ_j v_j, with L the mean of `loss_fn` over the data. Vectors are float32 at
    least: parameters in half precision are cast up, and the loss is evaluated at the cast values.

    Args:
        loss_fn: pure function (params, batch) -> scalar, the mean over the examples of the batch. It is
            static: keep one function object.
        params: pytree of real floating arrays (dicts, Flax linen or nnx state, Equinox, ...).
        data: one batch (a tuple, dict or other pytree of arrays with a common leading axis), or a
            re-iterable of batches (list, DataLoader, generator function), which is then read anew for
            every product; None for a loss that ignores its second argument.
        mode: "forward-over-reverse", "reverse-over-reverse", "finite-difference", or "auto": the first
            of these that the loss admits, with a warning that names the operation that refuses.
        microbatch: examples a piece; pieces of one batch are accumulated under `lax.scan`.
        linearize: whether `prepare` saves the values of the linearised gradient. A product then costs
            1 to 1.6 gradients instead of 2.1. "auto": if they take at most a quarter of the free memory.
        matmul_precision: precision of the matrix products inside the loss, as of
            `jax.default_matmul_precision`. JAX's own default runs them in bfloat16 on a TPU and in TF32
            on a GPU, which puts the noise floor of the spectrum near 1e-3 |H|.
        weight_fn: weight of a batch or microbatch in the mean, for example its number of tokens;
            default: its number of examples.
        check_data: read a stream twice and refuse it if the passes differ.

    Raises:
        StructureError: a parameter leaf is not a real floating array, or the loss is not a scalar.
        DataError: the data are empty, inconsistent, or change between passes.
        DifferentiationError: the loss has no gradient; carries JAX's reason.

    Cost: see `spectra.operators.products`; streams cost one pass over the data a product.

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, doi:10.1162/neco.1994.6.1.147.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> def loss_fn(params, batch):
        ...     inputs, targets = batch
        ...     return 0.5 * jnp.mean((inputs @ params["w"] - targets) ** 2)
        >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
        >>> op = spectra.HessianOperator(loss_fn, {"w": jnp.zeros(2)}, (x, jnp.ones(2)))
        >>> op @ {"w": jnp.ones(2)}
        {'w': Array([0.5, 4.5], dtype=float32)}
    """

    loss_fn: LossFn
    params: PyTree
    data: Any
    mode: str
    microbatch: int | None
    linearize: bool | str
    matmul_precision: str
    weight_fn: Callable | None
    stream: Stream | None

    def __init__(
        self,
        loss_fn: LossFn,
        params: PyTree,
        data: Any,
        *,
        mode: str = "auto",
        microbatch: int | None = None,
        linearize: bool | str = "auto",
        matmul_precision: str = "float32",
        weight_fn: Callable | None = None,
        check_data: bool = True,
    ):
        if mode not in ("auto", *products.PRODUCTS):
            raise SpectraError(f"mode={mode!r}: use 'auto' or one of {sorted(products.PRODUCTS)}.")
        if linearize not in (True, False, "auto"):
            raise SpectraError(f"linearize={linearize!r}: use True, False or 'auto'.")
        if microbatch is not None and not (isinstance(microbatch, int) and microbatch > 0):
            raise SpectraError(f"microbatch={microbatch}: use a positive number of examples, or None.")
        if matmul_precision not in _PRECISIONS:
            raise SpectraError(f"matmul_precision={matmul_precision!r}: use one of {_PRECISIONS}.")
        if not callable(loss_fn):
            raise StructureError(f"loss_fn is a {type(loss_fn).__name__}; pass a function (params, batch).")
        _tree.vector_structure(params)
        stream = None
        if is_stream(data):
            stream, data = Stream.open(data, weight_fn, check=check_data), None
        elif data is not None:
            data = as_batch(data)
        self._set(
            loss_fn=loss_fn,
            params=params,
            data=data,
            mode=mode,
            microbatch=microbatch,
            linearize=linearize,
            matmul_precision=matmul_precision,
            weight_fn=weight_fn,
            stream=stream,
        )
        object.__setattr__(self, "mode", _resolve_mode(self))

    def _set(self, **fields):
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def like(self) -> PyTree:
        """The parameters."""
        return self.params

    @property
    def on_host(self) -> bool:
        """Whether the data are streamed."""
        return self.stream is not None

    @property
    def precision(self) -> float:
        """Unit roundoff, or worse where finite differences or coarse matrix products set the limit."""
        eps = super().precision
        if self.mode == "finite-difference":
            return eps ** (2 / 3)
        return max(eps, _LOW_PRECISION.get(self.matmul_precision, 0.0))

    def loss(self) -> jax.Array:
        """The mean loss over all data at the parameters."""
        if self.stream is None:
            return _loss(self)
        return _weighted_sum((weight, _loss(piece)) for weight, piece in self._pieces())

    def gradient(self) -> PyTree:
        """The gradient of the mean loss, in the working dtypes."""
        if self.stream is None:
            return _gradient(self)
        return _weighted_sum((w, _gradient(piece)) for w, piece in self._pieces())

    def mv(self, v: PyTree) -> PyTree:
        """One product H v; under tracing a stream raises, since its data live outside the program."""
        if self.stream is not None:
            if _tree.is_traced(v):
                raise SpectraError(
                    "streamed data cannot be read inside jit or vmap: pass one batch instead, with "
                    "microbatch= if it is large, or call outside."
                )
            return _weighted_sum((w, _hvp(piece, v)) for w, piece in self._pieces())
        params, product = self._cast_params(), products.PRODUCTS[self.mode]

        def one(piece):
            return product(lambda p: self._grad(p, piece), params, v)

        with jax.default_matmul_precision(self.matmul_precision):
            return mean_over_microbatches(one, self.data, self.microbatch, self.weight_fn)

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """Products with a stack of vectors, sharing each pass over streamed data."""
        if self.stream is None:
            return super().mv_batch(vectors)
        return _weighted_sum((w, _hvp_batch(piece, vectors)) for w, piece in self._pieces())

    def prepare(self) -> LinearOperator:
        """Linearise the gradient once, if asked to or if the saved values fit; check the loss.

        Raises:
            NonFiniteError: the loss or its gradient is NaN or infinite at these parameters.
        """
        traced = _tree.is_traced((self.params, self.data))
        use = self._should_linearize()
        if not use:
            if not traced and not np.isfinite(float(self.loss())):
                raise NonFiniteError(self.explain_non_finite())
            return self
        loss, linear = (_linearize_traced if traced else _linearize)(self)
        if not traced and not np.isfinite(float(loss)):
            raise NonFiniteError(self.explain_non_finite())
        return LinearizedOperator(linear, self)

    def prepared_bytes(self) -> int:
        """Bytes of the saved values, from shapes alone; parameters and data are not counted twice."""
        if self.stream is not None or self.mode == "finite-difference" or self.linearize is False:
            return 0
        return _saved_bytes(self) if self._should_linearize() else 0

    @property
    def linearized(self) -> bool:
        """What `prepare` will choose: whether the linearised gradient is saved and re-used."""
        return self._should_linearize()

    def explain_non_finite(self) -> str:
        """Name the parameter leaf, the loss or the gradient leaf that is not finite."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            if not bool(jnp.isfinite(leaf).all()):
                return f"The parameter leaf '{_tree.path_str(path)}' holds NaN or infinite values."
        loss = float(self.loss())
        if not np.isfinite(loss):
            return f"The loss is {loss} at these parameters: check the data and the loss function."
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.gradient()):
            if not bool(jnp.isfinite(leaf).all()):
                return (
                    f"The loss is finite but its gradient is not, in leaf '{_tree.path_str(path)}': "
                    "look for sqrt, log, norm or division at zero."
                )
        return (
            "Loss and gradient are finite, second derivatives are not: look for sqrt, norm or "
            "jnp.where with a branch that overflows."
        )

    def _should_linearize(self) -> bool:
        if self.stream is not None or self.mode == "finite-difference" or self.linearize is False:
            return False
        if self.linearize is True:
            return True
        available = _memory.available_bytes()
        return available is None or _saved_bytes(self) <= LINEARIZE_SHARE * available

    def _cast_params(self) -> PyTree:
        return _tree.cast_like(self.params, self.structure)

    def _value(self, params: PyTree, piece: PyTree) -> jax.Array:
        value = self.loss_fn(params, piece)
        if not jax.tree_util.all_leaves((value,)):
            raise StructureError(
                f"loss_fn returned a {type(value).__name__}; it must return one real number, the mean "
                "over the batch (without auxiliary outputs)."
            )
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            kind = f"shape {jnp.shape(value)} and dtype {jnp.result_type(value)}"
            raise StructureError(
                f"loss_fn returned {kind}; it must return one real number, the mean over the batch "
                "(without auxiliary outputs)."
            )
        return value

    def _grad(self, params: PyTree, piece: PyTree) -> PyTree:
        return jax.grad(self._value)(params, piece)

    def _mean(self, fn: Callable[[PyTree, PyTree], PyTree], params: PyTree) -> PyTree:
        with jax.default_matmul_precision(self.matmul_precision):
            return mean_over_microbatches(
                lambda piece: fn(params, piece), self.data, self.microbatch, self.weight_fn
            )

    def _with(self, **fields) -> "HessianOperator":
        op = object.__new__(HessianOperator)
        op._set(**(vars(self) | fields))
        return op

    def _pieces(self):
        assert self.stream is not None
        for weight, batch in self.stream:
            yield weight, self._with(data=batch, stream=None)


@operator(leaves=("linear", "source"))
class LinearizedOperator(LinearOperator):
    """A Hessian whose linearised gradient is saved; made by `prepare`, for the length of a run."""

    linear: Any
    source: HessianOperator

    @property
    def like(self) -> PyTree:
        """The parameters."""
        return self.source.params

    @property
    def precision(self) -> float:
        """As the source's."""
        return self.source.precision

    def mv(self, v: PyTree) -> PyTree:
        """One application of the saved linear map."""
        return products.apply_linear_map(self.source.mode, self.linear, v)

    def explain_non_finite(self) -> str:
        """As the source."""
        return self.source.explain_non_finite()


def _value_traced(op: HessianOperator) -> jax.Array:
    return op._mean(op._value, op._cast_params())


def _gradient_traced(op: HessianOperator) -> PyTree:
    return op._mean(op._grad, op._cast_params())


def _linearize_traced(op: HessianOperator) -> tuple[jax.Array, Callable]:
    params = op._cast_params()
    _, linear = products.linear_map(op.mode, lambda p: op._mean(op._grad, p), params)
    return op._mean(op._value, params), linear


# Jitted once for all operators: the cache is keyed by the operator's static part and the shapes of its
# leaves, so the next checkpoint of a model neither traces nor compiles.
_loss = jax.jit(_value_traced)
_gradient = jax.jit(_gradient_traced)
_linearize = jax.jit(_linearize_traced)


@jax.jit
def _hvp(op: HessianOperator, v: PyTree) -> PyTree:
    return op.mv(v)


@jax.jit
def _hvp_batch(op: HessianOperator, vectors: PyTree) -> PyTree:
    return jax.vmap(op.mv)(vectors)


@jax.jit
def _add_weighted(weight, product, total):
    return _tree.axpy(weight, product, total)


def _weighted_sum(parts) -> PyTree:
    """Σ w x over (w, x); float32 sums of a handful of batches, in the order of the stream."""
    total = None
    for weight, product in parts:
        zero = jax.tree.map(jnp.zeros_like, product) if total is None else total
        total = _add_weighted(weight, product, zero)
    return total


def _saved_bytes(op: HessianOperator) -> int:
    """Bytes of the values that the linear map saves and that are not the operator's own leaves."""
    jaxpr = _linearize.trace(op).jaxpr.jaxpr
    own = {id(var) for var in jaxpr.invars}
    saved = {id(var): var.aval for var in jaxpr.outvars[1:] if id(var) not in own}
    return sum(aval.size * aval.dtype.itemsize for aval in saved.values())  # pyright: ignore


def _resolve_mode(op: HessianOperator) -> str:
    """The first mode that the loss admits, found by tracing alone; raises where there is none."""
    piece = op if op.stream is None else op._with(data=op.stream.first(), stream=None)
    _loss.eval_shape(piece)
    try:
        _gradient.eval_shape(piece)
    except Exception as error:
        raise DifferentiationError(
            f"the loss cannot be differentiated: {_first_line(error)} Every mode needs a gradient; "
            "look for integer arithmetic, while loops or callbacks between parameters and loss."
        ) from error
    modes = list(products.PRODUCTS) if op.mode == "auto" else [op.mode]
    refusals = []
    for mode in modes:
        try:
            traced = _hvp.trace(piece._with(mode=mode), op.structure)
            if may_refuse_at_lowering(traced.jaxpr.jaxpr):
                traced.lower()
        except Exception as error:
            refusals.append((mode, error))
            continue
        if refusals:
            blame = refusing_operations(lambda p, b: piece._value(p, b), piece.params, piece.data)
            reasons = " ".join(f"{m} failed: {_first_line(e)}" for m, e in refusals)
            accuracy = ""
            if mode == "finite-difference":
                error = float(jnp.finfo(op.dtype).eps) ** (2 / 3)
                accuracy = f" Expect relative errors near {error:.0e} in each product."
            warnings.warn(
                f"the loss refuses second derivatives in {refusals[-1][0]} mode because of {blame}; "
                f"products use {mode}.{accuracy} ({reasons})",
                stacklevel=4,
            )
        return mode
    mode, error = refusals[-1]
    raise DifferentiationError(
        f"mode='{mode}' does not work for this loss: {_first_line(error)} Use mode='auto'."
    ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
