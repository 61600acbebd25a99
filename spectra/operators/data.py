"""What all curvature matrices of a data set share: a mean over examples at one point of parameter space."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import abc
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import jax
import numpy as np
from jax.tree_util import Partial

from spectra.base import host, trees
from spectra.base import paths as _paths
from spectra.base.calls import automatic, require_arguments
from spectra.base.draws import moved_parameters
from spectra.base.errors import DataError, DifferentiationError, NonFiniteError, SpectraError
from spectra.base.meshes import on_automatic_axes
from spectra.base.trees import PyTree
from spectra.operators import differentiate
from spectra.operators.accumulate import mean_over_microbatches, weighted_sum
from spectra.operators.advice import warn_of_state
from spectra.operators.arguments import (
    DataOptions,
    check_functions,
    check_options,
    check_signatures,
    explain_non_finite,
    loss_weight,
    open_data,
    require_call,
)
from spectra.operators.base import LinearOperator, product, product_batch
from spectra.operators.batches import Shared, batch_size, rows, shared_leaves
from spectra.operators.differences import Differences, measured
from spectra.operators.differentiate import resolve_mode
from spectra.operators.jaxprs import bytes_of_values, captured, rematerialises, scanned_inputs, traced
from spectra.operators.loss_rounding import Rounding, coarsest_rounding
from spectra.operators.means import require_mean
from spectra.operators.purity import require_function, traced_anew
from spectra.operators.pytree import OnParameters, explain_vector
from spectra.operators.restricted import Restricted
from spectra.operators.stochastic import (
    StochasticOperator,
    change_by_rounding,
    explain_underflow,
    largest_of_product,
)
from spectra.operators.streams import Stream

if TYPE_CHECKING:
    from jaxtyping import Float

F = TypeVar("F", bound=Callable[..., Any])

SEEN = 1e-3
"""Share of a product that rounding changes, from which on it is named as the reason for asymmetry."""
LINEARIZE_SHARE = 0.25
"""Share of the free memory that linearize="auto" spends on saved values; the basis needs the rest."""
_LOW_PRECISION = {"bfloat16": 2.0**-8, "tensorfloat32": 2.0**-11, "high": 2.0**-11, "default": 2.0**-8}


@dataclasses.dataclass(frozen=True, eq=False, repr=False, init=False)
class DataOperator(OnParameters, LinearOperator):
    """A curvature matrix that is a mean over the examples of a data set, at fixed parameters.

    Vectors are float32 at least: parameters in half precision are cast up, and the model is evaluated
    at the cast values. All operators on data take these keyword arguments:

    * wrt: the parameters to differentiate, as a glob ("params/*"), regex or predicate on their paths; all by
      default. The others are constants: frozen weights, batch statistics, integer leaves. Leaves that are not
      arrays (functions, strings, Python numbers) are always constants, and part of the compiled program.
    * mode: "forward-over-reverse", "reverse-over-reverse", "finite-difference", or "auto": the first of
      these that the model admits, with a warning that names the operation that refuses. The step of finite
      differences is measured once, in a few directions, and what they are off by, if it is much.
    * microbatch: number of examples in a piece; the pieces of a batch are accumulated under `lax.scan`.
    * linearize: whether `prepare` saves the values that all products at these parameters share. A Hessian
      product then costs 1.7 to 1.8 gradients instead of 2.1 to 2.5 (two CPU cores, three networks:
      benchmarks/results/product.md). "auto" saves them if they take at most a quarter of the free memory.
    * matmul_precision: precision of the matrix products inside the model, as of
      `jax.default_matmul_precision`. JAX's own default runs them in bfloat16 on a TPU and in TF32 on a
      GPU, which puts the noise floor of the spectrum near 1e-3 |H|.
    * weight_fn: weight of a batch or microbatch in the mean, for example its number of tokens; default:
      `loss_fn.weight` if the loss has one, else its number of examples.
    * shared: the leaves of a batch that belong to all examples alike (class weights, one random key), as a
      glob, regex or predicate on their paths, or several of these; scalars always do. The other leaves of a
      batch that is split, or weighted by its size, share a leading axis.
    * num_batches, subsample_key: use the first `num_batches` of a stream, or, with a key, as many drawn
      without replacement.
    * check_data: read a stream twice and refuse it if the passes differ; trace the loss twice and refuse it
      if its constants differ; where data are split, check once that the loss is a mean over examples.
    """

    params: PyTree
    data: Any
    selected: tuple[int, ...] | None  # leaves of params that vary; None for all
    mode: str
    microbatch: int | None
    linearize: bool | str
    matmul_precision: str
    weight_fn: Callable[[PyTree], Any] | None
    shared: Shared
    stream: Stream | None
    differences: Differences  # how finite differences are taken, where they are
    rounding: Rounding | None  # of the loss itself, where it computes in less than the vectors have
    linear: Callable[[PyTree], PyTree] | None  # v -> H v with what products share saved: `prepare`
    captured: tuple[Any, ...]  # traced values that the functions close over, in a caller's `grad` or `vmap`

    @automatic
    def _open(
        self,
        params: PyTree,
        data: Any,
        *,
        wrt: _paths.Select | None = None,
        mode: str = "auto",
        microbatch: int | None = None,
        linearize: bool | str = "auto",
        matmul_precision: str = "float32",
        weight_fn: Callable[[PyTree], Any] | None = None,
        shared: Shared = None,
        num_batches: int | None = None,
        subsample_key: jax.Array | None = None,
        check_data: bool = True,
        **functions: Any,
    ) -> None:
        """Check the arguments and set all fields; `functions` are the subclass's own."""
        check_options(mode, microbatch, linearize, matmul_precision)
        check_functions(functions | {"weight_fn": weight_fn})
        trees.check_alive(params, "parameter leaf")
        if wrt is None:
            warn_of_state(params)
        params, selected = _paths.select_parameters(params, wrt)
        self._set(
            params=on_automatic_axes(params),
            data=None,
            selected=selected,
            mode=mode,
            microbatch=microbatch,
            linearize=linearize,
            matmul_precision=matmul_precision,
            weight_fn=loss_weight(functions["loss_fn"]) if weight_fn is None else weight_fn,
            shared=tuple(cast("list[Any]", shared)) if isinstance(shared, list) else shared,
            stream=None,
            differences=Differences(),
            rounding=None,
            linear=None,
            captured=(),
            **functions,
        )
        trees.vector_structure(self.like)
        self._set(**open_data(self, data, num_batches, subsample_key, check=check_data))
        piece = self.first_piece()
        shared_leaves(piece.data, self.shared)  # a name that matches nothing is a mistake
        check_signatures(functions, piece.data)
        require_call(piece)
        for place, shapes in (self.stream.unlike() if self.stream else {}).items():
            require_call(self._with(data=shapes, stream=None), f"Batch {place} of the stream")
        try:
            mode, differences = resolve_mode(piece)
        except DifferentiationError:
            require_call(piece, call=traced_anew)  # a loss that can be called once only says so by itself
            raise
        self._set(mode=mode, differences=differences)
        self._set(rounding=self._coarsest_rounding())
        self._set(captured=captured(jax.make_jaxpr(differentiate.loss)(piece)))
        if check_data:
            require_function(self.first_piece())
            require_mean(self)

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def _with(self, **fields: Any) -> Self:
        """The same with other fields, without what was found out or saved since for this very operator."""
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        op = object.__new__(type(self))
        vars(op).update(own | {"linear": None} | fields)
        return op

    @abc.abstractmethod
    def _value(self, params: PyTree, piece: PyTree) -> jax.Array:
        """The mean loss of one piece of data, at all parameters."""

    @abc.abstractmethod
    def _piece_product(self, variables: PyTree, piece: PyTree, v: PyTree) -> PyTree:
        """The product of one piece's matrix with a vector, at the variables."""

    takes_single_examples: ClassVar[bool] = False
    """Whether the loss is evaluated on single examples."""

    @property
    def on_host(self) -> bool:
        """Whether the data are streamed."""
        return self.stream is not None

    @property
    def precision(self) -> float:
        """Unit roundoff, or worse: of finite differences, coarse products, or the loss's own casts."""
        if self.mode == "finite-difference":
            return max(super().precision ** (2 / 3), self.differences.error)
        return self.loss_precision

    @property
    def loss_precision(self) -> float:
        """Unit roundoff of the loss, or that of its coarse products or its own casts."""
        own = self.rounding.eps if self.rounding else 0.0
        return max(trees.roundoff(self.structure), own, _LOW_PRECISION.get(self.matmul_precision, 0.0))

    @property
    def known_linear(self) -> bool:
        """True: derivatives and their products are."""
        return True

    @property
    def computes_in(self) -> str:
        """The coarser of what the loss and its matrix products compute in."""
        coarse = _LOW_PRECISION.get(self.matmul_precision, 0.0)
        if self.rounding and self.rounding.eps > coarse:
            return self.rounding.dtype
        return self.matmul_precision if coarse else super().computes_in

    def explain_asymmetry(self) -> str:
        """Blame the loss's own precision where that is low, or what rounding is seen to do to a product."""
        if self.rounding is not None:
            return (
                f"Here {self.rounding}. Its derivatives carry that rounding through every layer: have the "
                "model compute in float32 for the analysis, such as by dtype=jnp.float32 of its layers or "
                "its policy."
            )
        if underflow := explain_underflow(largest_of_product(self), self.dtype, "products"):
            return underflow
        share = change_by_rounding(self._with())
        if share < SEEN:
            return super().explain_asymmetry()
        return (
            f"Rounding alone changes a product by {share:.1g} of its length: the loss subtracts what is "
            "nearly equal, as a classifier does that is sure of every example. Compute in float64: "
            "parameters and data in float64 under jax.enable_x64(True)."
        )

    def _stacks(self) -> dict[int, str]:
        chosen, names = self._leaves, _paths.leaf_paths(self.like)
        found = scanned_inputs(*traced(differentiate.loss, self.first_piece()), chosen)
        of_scan: dict[tuple[Any, ...], list[int]] = {}
        for place, i in enumerate(chosen):
            if i in found:
                of_scan.setdefault(found[i], []).append(place)
        paths = {scan: _paths.common_path([names[i] for i in places]) for scan, places in of_scan.items()}
        return {i: paths[scan] for scan, places in of_scan.items() for i in places}

    def _coarsest_rounding(self) -> Rounding | None:
        """What the loss rounds by itself between the parameters that vary and its value."""
        piece = self.first_piece()._with(rounding=None, matmul_precision="float32")
        jaxpr, first = traced(differentiate.loss, piece)
        moves = [i - first in self._leaves for i in range(len(jaxpr.jaxpr.invars))]
        return coarsest_rounding(jaxpr, moves, super().precision)

    def _principal(self, indices: tuple[int, ...]) -> Self:
        return self._of_leaves(
            tuple(self.selected[i] for i in indices) if self.selected is not None else indices
        )

    def _of_leaves(self, selected: tuple[int, ...]) -> Self:
        """The block of these leaves of all parameters. Its loss is the same number."""
        block = self._with(selected=selected, _finite=vars(self).get("_finite"))
        if self.rounding is not None:  # what is cast may not depend on the block
            block._set(rounding=block._coarsest_rounding())
        if self.mode == "finite-difference" and not trees.is_traced(self):
            block._set(differences=measured(block.first_piece()))
        return block

    def _block_of(self, whole: LinearOperator) -> Self:
        """The same, to be prepared through the whole; in reverse mode by itself, as maps may refuse `jvp`."""
        if not isinstance(whole, DataOperator) or not set(self._leaves) < set(whole._leaves):
            return self
        if self.mode != "forward-over-reverse" or whole.linear is not None or trees.is_traced(self):
            return self
        return self._with(_whole=whole, _finite=vars(self).get("_finite"))

    @property
    def _leaves(self) -> tuple[int, ...]:
        """Which leaves of all parameters vary."""
        return tuple(range(len(jax.tree.leaves(self.params)))) if self.selected is None else self.selected

    @automatic
    def loss(self) -> 'Float[jax.Array, ""]':
        """The mean loss over all data at the parameters."""
        trees.check_alive(self, "the operator's leaf")
        if self.stream is None:
            return differentiate.loss(self)
        return weighted_sum(differentiate.loss, self._pieces())

    @automatic
    def gradient(self) -> PyTree:
        """The gradient of the mean loss, in the working dtypes."""
        trees.check_alive(self, "the operator's leaf")
        if self.stream is None:
            return differentiate.gradient(self)
        return weighted_sum(differentiate.gradient, self._pieces())

    def mv(self, v: PyTree) -> PyTree:
        """One product; under tracing a stream raises, since its data live outside the program.

        `v` may be of another floating dtype than the operator's vectors, that of half-precision parameters.
        """
        try:
            v = trees.cast_like(v, self.structure)
            if self.linear is not None:
                return self.linear(v)
            if self.stream is not None:
                if trees.is_traced(v):
                    raise SpectraError(
                        "streamed data cannot be read inside jit or vmap: pass one batch instead, with "
                        "microbatch= if it is large, or call outside."
                    )
                return weighted_sum(lambda piece: product(piece, v), self._pieces())
            variables = self._variables()
            return self._mean(partial(self._piece_product, variables, v=v))
        except Exception as error:  # not by a decorator, which every call would pass through
            explain_vector(self, v, error)
            raise

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """Products with a stack of vectors, sharing each pass over streamed data."""
        if self.stream is None:
            return super().mv_batch(vectors)
        return weighted_sum(lambda piece: product_batch(piece, vectors), self._pieces())

    def prepare(self) -> Self:
        """Save what all products share, if asked to or if it fits; check the loss.

        One of several blocks saves what the whole does: one program to compile for all of them.

        Raises:
            NonFiniteError: the loss is NaN or infinite at these parameters.
        """
        if self.linear is not None:
            return self
        trees.check_alive(self, "the operator's leaf")
        saving = self.saving
        if saving is None:
            self.require_finite()
            return self
        loss, linear = differentiate.linearize(saving)
        self._require_finite(loss)
        if saving is not self:
            places = tuple(map(saving._leaves.index, self._leaves))
            linear = Partial(Restricted.to(places, saving.structure), linear)
        return self._with(linear=linear, _finite=vars(self).get("_finite"))

    def require_finite(self) -> None:
        """Raise a `NonFiniteError` if the loss is NaN or infinite; evaluated once."""
        if not vars(self).get("_finite"):
            self._require_finite(self.loss())

    def _require_finite(self, loss: jax.Array) -> None:
        if trees.is_traced(self):
            return
        if not np.isfinite(float(loss)):
            raise NonFiniteError(self.explain_non_finite())
        vars(self)["_finite"] = True

    def prepared_bytes(self) -> int:
        """Bytes of the saved values, from shapes alone; parameters and data are not counted twice."""
        saving = self.saving if self.linear is None else None
        return 0 if saving is None or saving._saved_bytes is None else saving._saved_bytes

    def recomputed_bytes(self) -> int | None:
        """Bytes of the tangents of saved values, of one microbatch: what `jax.vmap` holds for each vector."""
        if self.linear is not None or self.stream is not None or self.mode == "finite-difference":
            return None  # streams share each pass; differences evaluate at points of their own
        if self.saving and not rematerialises(differentiate.loss.trace(self).jaxpr):
            return None
        return self.evaluated_bytes()

    @property
    def known_in_double(self) -> bool:
        """Parameters and data are what they are, and all else is inside of a product, until some is saved."""
        return self.linear is None

    def evaluated_bytes(self) -> int:
        """Bytes of the saved values of one microbatch; for differences of gradients nothing is saved."""
        if self.mode == "finite-difference":
            return 0
        piece, step = self.first_piece(), self.microbatch
        pieces = 1 if step is None else -(-batch_size(piece.data, self.shared) // step)
        saved = piece._saved_bytes
        if saved is None:  # a product computes all of them anew, and drops some before others
            return bytes_of_values(differentiate.gradient.trace(piece).jaxpr)
        return saved // pieces

    @functools.cached_property
    def _saved_bytes(self) -> int | None:
        """Bytes of the values that the linear map saves and that are not the operator's own leaves.

        None where JAX has products but no linear map, as of a Pallas kernel: it has a rule for `jvp` alone.
        """
        try:
            jaxpr = differentiate.linearize.trace(self).jaxpr.jaxpr
        except ValueError:
            differentiate.require_product(self)  # else it says itself what is wrong
            return None
        own = {id(var) for var in jaxpr.invars}
        saved: dict[int, Any] = {id(var): var.aval for var in jaxpr.outvars[1:] if id(var) not in own}
        return sum(aval.size * aval.dtype.itemsize for aval in saved.values())

    def moved(self, key: jax.Array) -> LinearOperator | None:
        """The operator at parameters times 1 ± eps of what the loss computes in, with random signs, and with
        products in stochastic arithmetic. None once it is prepared: saved values are those of one point."""
        if self.linear is not None:
            return None
        coarse = self.rounding.eps if self.rounding else 0.0
        other = self._with(params=moved_parameters(self.params, key, coarse))
        return StochasticOperator(other, jax.random.bits(key, (), "uint32"))

    @property
    def saving(self) -> "DataOperator | None":
        """Whose values `prepare` saves for products to share: of the operator that this is one of several
        blocks of, so that one program serves all of them, or its own; None where they are not saved."""
        if self.stream is not None or self.mode == "finite-difference" or not self.linearize:
            return None
        for op in (vars(self).get("_whole", self), self):
            saved, available = op._saved_bytes, host.available_bytes() if self.linearize == "auto" else None
            if saved is not None and (available is None or saved <= LINEARIZE_SHARE * available):
                return op
        return None

    @property
    def linearized(self) -> bool:
        """Whether `prepare` saves values that products share."""
        return self.saving is not None

    def explain_non_finite(self) -> str:
        """Name the parameter leaf, the loss or the gradient leaf that is not finite."""
        return explain_non_finite(self)

    def _variables(self) -> PyTree:
        """The parameters that vary, in the working dtypes."""
        return trees.cast_like(self.like, self.structure)

    def _gradient(self, piece: PyTree) -> Callable[[PyTree], PyTree]:
        """The gradient of the mean loss of one piece, as a function of the variables."""
        return jax.grad(lambda x: self._value(self._merge(x), piece))

    def _mean(self, fn: Callable[[PyTree], PyTree]) -> PyTree:
        with jax.default_matmul_precision(self.matmul_precision):
            if self.microbatch is None:
                return fn(self.data)
            return mean_over_microbatches(fn, self.data, self.microbatch, self.weight_fn, self.shared)

    def _pieces(self) -> Iterator[tuple[float, Self]]:
        assert self.stream is not None
        for weight, batch in self.stream:
            whole = self.microbatch is None or batch_size(batch, self.shared) <= self.microbatch
            yield weight, self._with(data=batch, stream=None, microbatch=None if whole else self.microbatch)

    def split_data(self, count: int) -> list[Self]:
        """The operators of `count` disjoint parts of the data: runs of examples, or every count-th batch.

        Raises:
            DataError: there are fewer examples or batches than parts.
        """
        if self.stream is not None:
            return [self._on(stream=part) for part in self.stream.split(count)]
        n = batch_size(self.data, self.shared)
        if n < count:
            raise DataError(f"{n} examples cannot be split into {count} parts.")
        require_mean(self, n // count)
        edges = [n * i // count for i in range(count + 1)]
        return [self._on(data=rows(self.data, a, b, self.shared)) for a, b in itertools.pairwise(edges)]

    def _on(self, **data: Any) -> Self:
        """The same matrix of other data."""
        return self._with(**data)

    def first_piece(self) -> Self:
        """The operator of the first batch of a stream; the operator itself for one batch."""
        return self if self.stream is None else self._with(data=self.stream.first(), stream=None)


def shows_options(function: F) -> F:
    """`function` whose signature spells out its `**options`, for `help` and completion, and has no others."""
    signature = inspect.signature(function)
    own = [
        parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD
    ]
    defaults = inspect.signature(DataOperator._open).parameters
    options = [defaults[name] for name in DataOptions.__annotations__ if name not in signature.parameters]
    whole = signature.replace(parameters=[*own, *options])

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        made = function.__name__ == "__init__"
        require_arguments(type(args[0]).__name__ if made else function.__name__, whole, args, kwargs)
        return function(*args, **kwargs)

    cast("Any", call).__signature__ = whole
    return cast("F", call)
