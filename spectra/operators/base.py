"""The symmetric linear operator: what algorithms may ask of it, and its arithmetic."""

import abc
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from spectra.base import calls, host, meshes, paths, programs, stacks, trees
from spectra.base.errors import MemoryLimitError, NonFiniteError, SpectraError, StructureError
from spectra.base.trees import PyTree
from spectra.operators.pytree import Field, Order, register
from spectra.operators.pytree import operator as operator
from spectra.results import format_bytes
from spectra.results.base import call

if TYPE_CHECKING:
    import scipy.sparse.linalg
    from jaxtyping import Float


class LinearOperator(abc.ABC):
    """A real symmetric operator on vectors that are pytrees; itself a pytree.

    Subclasses define how one product is computed (`mv`) and what a vector looks like (`like`). Parameters and
    data are leaves and functions are static, so a jitted function takes an operator as an argument, and
    another operator of the same structure reuses the compiled code.

    To write your own operator, define a dataclass that inherits from this class and has `like`, as a field or
    a property, and `mv`; nothing has to be registered. Arrays in its fields, including those in containers
    and other operators, are leaves; everything else, and fields with `metadata={"static": True}`, is static:
    changing a Python number recompiles, changing an array does not. A class already registered with JAX keeps
    its registration.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, 2.0]))).shift(1.0)
        >>> (2.0 * op) @ jnp.ones(2)
        Array([4., 6.], dtype=float32)

        >>> import dataclasses, jax
        >>> @dataclasses.dataclass(frozen=True)
        ... class Diagonal(spectra.LinearOperator):
        ...     like: jax.Array
        ...     def mv(self, v):
        ...         return self.like * v
        >>> spectra.eigsh(Diagonal(jnp.arange(1.0, 51.0)), 1, key=jax.random.key(0)).values.round(3)
        array([50.])
    """

    if TYPE_CHECKING:

        @property
        @abc.abstractmethod
        def like(self) -> PyTree:
            """Arrays (or their shapes) with the structure of a vector, placed where vectors should be."""

        @property
        def shape(self) -> tuple[int, int]:
            """(n, n)."""
            ...

    else:
        like = Field()
        shape = Order()

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """A new instance of a class that JAX knows from here on.

        Raises:
            TypeError: the class defines no `like`.
        """
        owner = next(base for base in cls.__mro__ if "like" in vars(base))
        if owner is LinearOperator and "like" not in getattr(cls, "__dataclass_fields__", ("like",)):
            raise TypeError(
                f"{cls.__name__} defines no `like`: give it a property or a field with arrays, or shapes, "
                "like those of a vector."
            )
        register(cls)
        return super().__new__(cls)

    @abc.abstractmethod
    def mv(self, v: PyTree) -> PyTree:
        """The product with a vector: takes and returns a pytree like `like`; pure, works in jit and vmap."""

    @property
    def structure(self) -> PyTree:
        """Pytree of `ShapeDtypeStruct` of one vector; float32 at least."""
        return trees.vector_structure(self.like)

    @property
    def size(self) -> int:
        """n, the order of the matrix: the number of parameters."""
        return trees.tree_size(self.like)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of inner products of vectors."""
        return trees.scalar_dtype(self.structure)

    @property
    def made_of(self) -> "tuple[LinearOperator, ...]":
        """Operators that compute its products: what is known of them is what is known of it."""
        return ()

    @property
    def precision(self) -> float:
        """Relative error to expect of one product; the unit roundoff unless a subclass knows worse."""
        eps = max(float(jnp.finfo(self.dtype).eps), trees.roundoff(self.structure))
        return max((part.precision for part in self.made_of), default=eps)

    @property
    def computes_in(self) -> str:
        """The type or setting that limits the precision of a product, for messages."""
        return self._coarsest.computes_in if self.made_of else str(self.dtype)

    @property
    def cancels(self) -> bool:
        """Whether products subtract numbers larger than themselves: their error is then relative to |H|."""
        return True

    @property
    def known_linear(self) -> bool:
        """Whether products are linear by construction, as derivatives are; a function may be anything."""
        return bool(self.made_of) and all(part.known_linear for part in self.made_of)

    @property
    def semidefinite(self) -> bool:
        """Whether no eigenvalue can be negative, by construction; False means that this is unknown."""
        return False

    @property
    def on_host(self) -> bool:
        """Whether products are driven from the host (streamed data) and cannot be compiled whole."""
        return any(part.on_host for part in self.made_of)

    @property
    def device(self) -> Any:
        """The device on which products are computed; of several, the first."""
        leaves = jax.tree.leaves(self)
        arrays = [x for x in leaves if isinstance(x, jax.Array) and not isinstance(x, Tracer)]
        local: Iterable[Any] = (
            cast("Any", arrays[0].sharding).addressable_devices if arrays else jax.local_devices()
        )
        return min(local, key=lambda device: device.id)

    def prepare(self) -> "LinearOperator":
        """An equal operator that is faster to multiply with many times, at the cost of memory."""
        return self

    def prepared_bytes(self) -> int:
        """Bytes that `prepare` would allocate."""
        return 0

    def recomputed_bytes(self) -> int | None:
        """What each further vector of a product holds where all share one evaluation that is not saved; None
        where there is nothing to share."""
        return None

    @property
    def known_in_double(self) -> bool:
        """Whether the program of a product, evaluated in float64, gives that with the matrix that is meant.

        Not that of a matrix, whose entries may have been rounded before: see `doubled.rounded_once`.
        """
        return False

    @property
    def holds_constants(self) -> bool:
        """Whether products depend on numbers that are no leaves, as a function may: these may be rounded."""
        return any(part.holds_constants for part in self.made_of)

    def evaluated_bytes(self) -> int:
        """Bytes of the values inside of one product, where there are more than of vectors."""
        return 0

    def moved(self, key: jax.Array) -> "LinearOperator | None":
        """The operator with its parameters, or the parts that it is made of, moved by one rounding each.

        None where products are right to their stated precision: that of a matrix, a diagonal, a function. It
        is what rounding is measured by where products are not `known_in_double`.
        """
        del key
        return None

    def explain_non_finite(self) -> str:
        """What is known about why a product is not finite, for error messages."""
        known = " ".join(part.explain_non_finite() for part in self.made_of)
        return known or "Check the matrix or the function for NaN and overflow."

    def explain_asymmetry(self) -> str:
        """Why products may contradict symmetry or linearity, for error messages."""
        if self.made_of:
            return self._coarsest.explain_asymmetry()
        return (
            "A loss that is random or depends on call order (dropout, batch statistics that are updated) is "
            "a common reason; so is a derivative written by hand (custom_vjp, custom_jvp) that is not that "
            "of a function, as where gradients are clipped or reversed."
        )

    @property
    def _coarsest(self) -> "LinearOperator":
        return max(self.made_of, key=lambda part: part.precision)

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """Products with a stack of vectors: leaves (k, *leaf.shape) in and out."""
        if self.on_host or trees.is_traced((self, vectors)):
            return stacks.mapped(self.mv, vectors)
        return product_batch(self, vectors)

    def as_vector(self, v: PyTree, what: str = "the vector") -> PyTree:
        """`v`, a pytree or a flat array of shape (n,), as a pytree in the working dtypes."""
        structure, v = self.structure, meshes.on_automatic_axes(v)
        if self.is_flat(v):
            v = trees.unravel(trees.as_real(v, what), structure)
        trees.check_structure(v, structure, what)
        return trees.cast_like(v, structure)

    @calls.automatic
    def __matmul__(self, v: PyTree) -> PyTree:
        """H v for a pytree, or for a flat array of shape (n,); the result has the form of `v`.

        H V for a matrix of shape (n, k), whose columns are flat vectors. The product with another operator is
        an operator, for matrices that are symmetric: A B A, or A B where they commute.
        """
        trees.check_alive(self, "the operator's leaf")
        if isinstance(v, LinearOperator):
            return call("product", (self, v))
        if not trees.is_traced((self, v)):
            self.require_finite()
        if self.is_matrix(v):
            return self._checked(call("matrix_product", self, trees.as_real(v, "the matrix")))
        vector = self.as_vector(v)
        if self.on_host:
            result = self._checked(self.mv(vector))
        else:
            result, finite = _product_and_check(self, vector)
            self._require_finite_product(finite)
        return trees.ravel(result) if self.is_flat(v) else result

    def require_finite(self) -> None:
        """Raise a `NonFiniteError` if the function whose derivatives the products are is not finite."""
        for part in self.made_of:
            part.require_finite()

    def _checked(self, result: PyTree) -> PyTree:
        self._require_finite_product(trees.finite(result))
        return result

    def _require_finite_product(self, finite: jax.Array) -> None:
        if not isinstance(finite, Tracer) and not finite:
            raise NonFiniteError(f"the product is NaN or infinite. {self.explain_non_finite()}")

    def is_matrix(self, v: PyTree) -> bool:
        """Whether `v` is a matrix of flat vectors, not a vector that is a matrix itself."""
        shape, own = getattr(v, "shape", ()), getattr(self.like, "shape", None)
        return len(shape) == 2 and shape[0] == self.size and shape[1] > 0 and shape != own

    def is_flat(self, v: PyTree) -> bool:
        """Whether `v` is a flat array that stands for a vector of another form."""
        own = getattr(self.like, "shape", None)  # an operator on a single array
        return getattr(v, "shape", None) == (self.size,) and own != (self.size,)

    @calls.automatic
    def as_matrix(self, *, memory_limit: int | None = None) -> 'Float[jax.Array, "n n"]':
        """The dense matrix, symmetric to the bit: (A + Aᵀ) / 2 of the n columns.

        Args:
            memory_limit: bytes; by default half of what the device has free.

        Raises:
            MemoryLimitError: 3 n² numbers (columns, transpose, result) exceed the limit.
            NotSymmetricError: the columns are not symmetric, or the operator is not linear.

        Cost: n products in chunks of at most 64 columns, and one that checks linearity; n more, one by one,
        where the columns are not symmetric; 3 n² numbers at the peak.
        """
        n = self.size
        needed = 3 * n * n * jnp.dtype(self.dtype).itemsize
        limit = memory_limit or (host.available_bytes() or 2**63) // 2
        if needed > limit:
            raise MemoryLimitError(
                f"the dense matrix of order {n:,} needs {format_bytes(needed)} at its peak, above the "
                f"limit of {format_bytes(limit)}. Use eigsh, slq or condition_number, which need no matrix, "
                "op.block(...) for one layer, or raise memory_limit."
            )
        matrix = self._matrix()
        if not trees.is_tracer(matrix) and not trees.all_finite(matrix):
            raise NonFiniteError(f"the matrix has NaN or infinite entries. {self.explain_non_finite()}")
        return matrix

    def _matrix(self) -> jax.Array:
        """The dense matrix; subclasses that know more than products override it."""
        return call("matrix", self)

    def block(self, select: paths.Select) -> "LinearOperator":
        """The principal submatrix of the parameters whose path matches.

        Vectors keep the parameters' tree, with None in place of leaves that are not chosen. A block
        of an operator on data differentiates only the chosen leaves, which is cheaper than the whole.

        Args:
            select: a glob on the path ("Dense_0/*", or "Dense_0" for everything under it), a compiled regular
                expression to search for, or a function of the path.

        Raises:
            StructureError: nothing matches (the message lists the paths), or the leaves that match hold no
                numbers.

        Examples:
            >>> import jax.numpy as jnp, spectra
            >>> def loss_fn(params, x):
            ...     return jnp.mean((x @ params["a"]["w"]) ** 2) + jnp.sum(params["b"]["w"] ** 2)
            >>> params = {"a": {"w": jnp.ones(3)}, "b": {"w": jnp.ones(2)}}
            >>> op = spectra.HessianOperator(loss_fn, params, jnp.eye(3))
            >>> op.block("b/*").as_matrix()
            Array([[2., 0.],
                   [0., 2.]], dtype=float32)
        """
        indices = paths.select_leaves(self.like, select)
        sizes = [leaf.size for leaf in jax.tree.leaves(self.structure)]
        if not sum(sizes[i] for i in indices):
            raise StructureError(f"the block {select!r} holds no numbers: its leaves are empty.")
        return self._principal(indices)

    @calls.automatic
    def submatrix(self, indices: Any) -> "LinearOperator":
        """The principal submatrix of some rows and columns, on flat vectors.

        Args:
            indices: distinct row numbers in the order of the flat vector, or a mask (n,).

        Raises:
            StructureError: indices that are neither.

        Examples:
            >>> import jax.numpy as jnp, spectra
            >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, 2.0, 3.0])))
            >>> op.submatrix([2, 0]) @ jnp.ones(2)
            Array([3., 1.], dtype=float32)
        """
        return call("submatrix", self, indices)

    @calls.automatic
    def blocks(self, by: str = "leaf", *, scanned: paths.Select | None = None) -> dict[str, "LinearOperator"]:
        """The diagonal blocks: one for every leaf (`by="leaf"`), or for every layer (`by="layer"`).

        A layer is all leaves that share their path up to its last part: `Dense_0/kernel` and
        `Dense_0/bias`, `fc1.weight` and `fc1.bias`. Groups without numbers (leaves of shape (0, 3)) are
        left out.

        Layers whose parameters are stacked along the leading axis become separate blocks, `layers/0`,
        `layers/1` and so on. Those that a loss runs `lax.scan` over (Flax's `nn.scan`) are found; others,
        such as the members of an ensemble under `jax.vmap`, are selected by `scanned`, which takes what
        `block` takes.

        A block of an operator on data saves, when it is prepared, what the products of the whole share, if
        that fits: one program serves all blocks. One that is chosen by `block` saves only its own part.
        """
        stacks = self._stacks() if scanned is None else paths.stacks_of(self.like, scanned)
        leaves = jax.tree.leaves(self.structure)
        blocks: dict[str, LinearOperator] = {}
        for name, indices, stack in paths.stacked_groups(self.like, by, stacks):
            block = self._principal(indices)._block_of(self)
            if stack is None:
                blocks[name] = block
                continue
            shapes = [leaves[i].shape for i in indices]
            if len({shape[:1] for shape in shapes}) > 1 or () in shapes:
                raise StructureError(
                    f"scanned={scanned!r}: the leaves of '{name}' share no leading axis; "
                    f"their shapes are {shapes}."
                )
            for i in range(shapes[0][0]):
                blocks[paths.numbered(name, stack, i)] = call("layer", block, jnp.asarray(i))
        return blocks

    def _stacks(self) -> dict[int, str]:
        """The leaves that are known to be stacks of layers, with the path that all of a stack lie under."""
        return {}

    def _principal(self, indices: tuple[int, ...]) -> "LinearOperator":
        return call("block", self, indices)

    def _block_of(self, whole: "LinearOperator") -> "LinearOperator":
        """The same, told that it is one of several blocks of another operator."""
        del whole
        return self

    @calls.automatic
    def to_scipy(self) -> "scipy.sparse.linalg.LinearOperator":
        """A `scipy.sparse.linalg.LinearOperator` on flat vectors, with the linearisation reused."""
        from scipy.sparse.linalg import LinearOperator as ScipyOperator

        trees.require_values("to_scipy", self)
        op = self.prepare()
        dtype = np.dtype(self.dtype)

        def matvec(x: "np.ndarray[Any, np.dtype[Any]]") -> np.ndarray:
            if np.iscomplexobj(x):  # of a solver for matrices that are not symmetric
                return matvec(np.real(x)) + 1j * matvec(np.imag(x))
            with calls.own_rules():
                image = op @ jnp.asarray(np.ravel(x), dtype)
                trees.require_values("to_scipy", image)  # inside jit those of numbers have none either
                return np.asarray(image)

        return ScipyOperator((self.size, self.size), matvec=matvec, rmatvec=matvec, dtype=dtype)

    # An array of NumPy's would meet the operator with each of its entries, and become an array of objects.
    __array_ufunc__ = None

    def __add__(self, other: Any) -> "LinearOperator":
        if not isinstance(other, LinearOperator) and getattr(other, "shape", ()):
            raise StructureError(
                f"an operator plus an array of shape {other.shape}: wrap a matrix in MatrixOperator, a "
                "diagonal in DiagonalOperator; H + delta I is op.shift(delta)."
            )
        return call("sum", (self, other)) if isinstance(other, LinearOperator) else NotImplemented

    __radd__ = __add__

    def __sub__(self, other: Any) -> "LinearOperator":
        return self + (-1.0) * other if isinstance(other, LinearOperator) else NotImplemented

    def __rmul__(self, factor: Any) -> "LinearOperator":
        if getattr(factor, "shape", ()):
            raise StructureError(
                f"an operator times an array of shape {factor.shape}: a factor is one real number. For the "
                "product with a vector or a matrix write op @ v; for a weight at each parameter multiply by "
                "a DiagonalOperator, d @ op @ d."
            )
        return call("multiple", self, factor) if is_real_scalar(factor) else NotImplemented

    __mul__ = __rmul__

    def __neg__(self) -> "LinearOperator":
        return (-1.0) * self

    def __truediv__(self, divisor: Any) -> "LinearOperator":
        return (1.0 / divisor) * self

    def shift(self, delta: ArrayLike) -> "LinearOperator":
        """H + delta I, a damped operator: every eigenvalue moves by `delta`."""
        if not is_real_scalar(delta):
            raise SpectraError(f"shift needs a real scalar, got {delta!r}.")
        return call("shift", self, delta)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size:,}, dtype={self.dtype})"


def require_operator(op: Any) -> None:
    """Raise a helpful error for what is not an operator."""
    name = type(op).__name__
    parts: dict[Any, Any] = dict(cast("Mapping[Any, Any]", op)) if isinstance(op, Mapping) else {}
    if any(isinstance(part, LinearOperator) for part in parts.values()):
        raise StructureError(
            f"op is a {name} of {len(parts)} operators, as returned by `blocks`: pass one of them, such as "
            f"op[{next(iter(parts))!r}], or the whole operator to summary(), which has a row for each block."
        )
    if not isinstance(op, LinearOperator):
        raise StructureError(
            f"op is a {name}, not a LinearOperator; wrap a matrix in MatrixOperator, a "
            "function of a vector in FunctionOperator, a loss in HessianOperator."
        )
    trees.check_alive(op, "the operator's leaf")


def is_real_scalar(x: Any) -> bool:
    """Whether x is one real number, or an array of no axes."""
    if isinstance(x, (int, float)):
        return True
    if not isinstance(x, (np.generic, np.ndarray, jax.Array)):
        return False
    x = cast("jax.Array", x)
    return x.ndim == 0 and not jnp.issubdtype(x.dtype, jnp.complexfloating)


@programs.jit
def product(op: LinearOperator, v: PyTree) -> PyTree:
    """The compiled product."""
    return op.mv(v)


@programs.jit
def _product_and_check(op: LinearOperator, v: PyTree) -> tuple[PyTree, jax.Array]:
    """The product and whether it is finite: one program, since starting a second takes as long as a small
    product."""
    result = op.mv(v)
    return result, trees.finite(result)


@programs.jit
def product_batch(op: LinearOperator, vectors: PyTree) -> PyTree:
    """The compiled products with a stack of vectors."""
    return stacks.mapped(op.mv, vectors)


def in_batches(op: LinearOperator, vectors: PyTree, batch: int) -> PyTree:
    """Products with a stack of vectors, `batch` of them side by side, as part of a program."""
    leaves = jax.tree.leaves(vectors)
    if batch >= leaves[0].shape[0]:
        return stacks.mapped(op.mv, vectors)
    # `lax.map` puts the results of batches together by a reshape, which leaves without numbers refuse.
    plain = batch == 1 or any(x.size == 0 for x in leaves)
    return stacks.mapped(op.mv, vectors, 1 if plain else batch)
