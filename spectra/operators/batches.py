"""One batch: a pytree of arrays, of which those that are cut share a leading axis, the examples.

Other leaves belong to all examples alike: scalars always, and those that `shared=` names (class weights, one
random key, the edges of a graph). The axis is needed only where a batch is cut or weighted by its size, so
a batch that is used whole may hold leaves of any shape.
"""

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import paths as _paths
from spectra.base.errors import DataError, StructureError
from spectra.base.meshes import on_automatic_axes
from spectra.base.trees import PyTree, check_alive, path_str

Shared = _paths.Select | tuple[_paths.Select, ...] | list[str] | None


@jax.tree_util.register_static
class Text(str):
    """Text in a batch: a constant of the compiled program, since JAX takes no text as an argument."""


@jax.tree_util.register_static
class Labels:
    """A list or array of text, say file names: no compiled program reads it, and one serves all of them."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels)

    def __hash__(self) -> int:
        return hash(Labels)

    def __repr__(self) -> str:
        return "a list of text"

    def __len__(self) -> int:
        raise DataError(
            "the loss reads a list of text in the batch, which a compiled program cannot: encode it as an "
            "array of numbers, or leave it out."
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        return len(self)


def to_numpy(value: Any) -> np.ndarray:
    """A NumPy array of an array or a PyTorch tensor, on any device, bfloat16 included."""
    if hasattr(value, "detach"):  # tensors that require gradients refuse np.asarray
        if str(value.layout) != "torch.strided":
            raise DataError(
                f"a tensor of shape {tuple(value.shape)} is sparse ({value.layout}): give tensor.to_dense()."
            )
        value = value.detach().cpu().resolve_conj()
        if str(value.dtype) == "torch.bfloat16":  # PyTorch has no NumPy form of it: through int16
            int16 = value.new_empty(0).short().dtype
            return value.view(int16).numpy().view("bfloat16")
        return value.numpy()
    return np.asarray(value)


def as_batch(batch: PyTree, where: str = "data") -> PyTree:
    """The batch with array leaves that JAX accepts, numbers and text included."""

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        name = f"{where}: leaf '{path_str(path)}'"
        if isinstance(leaf, (jax.Array, np.ndarray)):
            array: Any = cast("Any", leaf)
        elif isinstance(leaf, (bool, int, float)):
            array = jnp.asarray(leaf)  # weakly typed, as in the user's own call
        elif hasattr(leaf, "__array__"):
            array = to_numpy(leaf)
        elif isinstance(leaf, jax.ShapeDtypeStruct):  # enough to plan with
            array = leaf
        elif hasattr(leaf, "toarray"):
            raise DataError(
                f"{name} is a {type(leaf).__name__} of SciPy: give leaf.toarray(), or for a batch that is "
                "used whole jax.experimental.sparse.BCOO.from_scipy_sparse(leaf)."
            )
        elif hasattr(leaf, "__getitem__") and hasattr(leaf, "__len__"):  # a Dataset of PyTorch
            raise DataError(
                f"{name} is a {type(leaf).__name__}, which has single examples in the place of batches: give "
                "torch.utils.data.DataLoader(dataset, batch_size=...), or another re-iterable of batches."
            )
        else:
            raise DataError(
                f"{name} is a {type(leaf).__name__}; a batch holds arrays, in tuples, dictionaries and "
                "classes that JAX knows (jax.tree_util.register_dataclass)."
            )
        if array.dtype == object:
            raise DataError(f"{name} holds Python objects; pad or stack examples to one array.")
        return array

    check_alive(batch, f"{where}: leaf")
    plain = jax.tree.map(_plain, batch, is_leaf=_is_text)
    if isinstance(plain, (Text, Labels)):
        raise DataError(f"{where} is text, {batch!r}; a batch holds arrays.")
    batch = on_automatic_axes(jax.tree.map_with_path(one, plain))
    lengths = [leaf.shape[0] for leaf in jax.tree.leaves(batch) if leaf.ndim]
    if lengths and not any(lengths):
        raise DataError(f"{where}: the batch has no examples.")
    return batch


def _plain(leaf: Any) -> Any:
    """Text as nodes without leaves; tokenisers' mappings, which JAX takes for leaves, as dicts."""
    if _is_text(leaf):
        return Text(leaf) if isinstance(leaf, str) else Labels()
    if isinstance(leaf, Mapping):
        items = cast("Mapping[Any, Any]", leaf).items()
        return {key: jax.tree.map(_plain, value, is_leaf=_is_text) for key, value in items}
    return leaf


def _is_text(node: Any) -> bool:
    if isinstance(node, (list, tuple)):
        items = cast("list[Any]", node)
        return len(items) > 0 and all(isinstance(item, (str, bytes)) for item in items)
    if isinstance(node, np.ndarray):
        return cast("np.ndarray", node).dtype.kind in "US"
    return isinstance(node, (str, bytes))


def shared_leaves(batch: PyTree, shared: Shared) -> list[bool]:
    """For each leaf, whether it belongs to all examples alike.

    Raises:
        DataError: `shared` matches no leaf.
    """
    leaves = jax.tree.leaves(batch)
    chosen: set[int] = set()
    single = () if shared is None else (shared,)
    several = cast("Sequence[_paths.Select]", shared if isinstance(shared, (tuple, list)) else single)
    for select in several:
        try:
            chosen.update(_paths.select_leaves(batch, select))
        except StructureError as error:
            paths = ", ".join(_paths.leaf_paths(batch))
            raise DataError(f"shared={select!r} names no leaf of the batch; they are: {paths}.") from error
    return [index in chosen or np.ndim(leaf) == 0 for index, leaf in enumerate(leaves)]


def batch_size(batch: PyTree, shared: Shared = None, where: str = "data") -> int:
    """Number of examples; 1 for a loss without data.

    Raises:
        DataError: leaves that are not shared differ in their leading axis.
    """
    belongs = zip(jax.tree.leaves(batch), shared_leaves(batch, shared), strict=True)
    sizes = [None if whole else leaf.shape[0] for leaf, whole in belongs]
    known = {size for size in sizes if size is not None}
    if len(known) > 1:
        named = zip(_paths.leaf_paths(batch), sizes, strict=True)
        raise DataError(
            f"{where}: leaves differ in their number of examples: "
            f"{ {name: size for name, size in named if size is not None} }. A batch that is cut, or weighted "
            "by its size, needs a common leading axis: name the leaves that belong to all examples alike in "
            "shared= (a glob, a regex or a predicate on their paths), or leave the batch whole; for "
            "a list of such batches, weight_fn= says what each counts."
        )
    return known.pop() if known else 1


def weigh(weight_fn: Callable[[PyTree], Any], batch: PyTree) -> Any:
    """What `weight_fn` gives for a batch.

    Raises:
        StructureError: it isn't one real number.
    """
    weight = weight_fn(batch)
    plain = isinstance(weight, (bool, int, float))
    kind = np.dtype(type(weight)) if plain else getattr(weight, "dtype", None)
    real = kind is not None and any(jnp.issubdtype(kind, x) for x in (jnp.floating, jnp.integer, jnp.bool_))
    if real and np.shape(weight) == ():
        return weight
    found = type(weight).__name__ if kind is None else f"shape {np.shape(weight)} and dtype {kind}"
    raise StructureError(
        f"weight_fn returned {found}; it must return one real number, the weight of a whole batch, such as "
        "jnp.sum(mask)."
    )


def owned_leaves(batch: PyTree, shared: Shared) -> list[Any]:
    """The leaves that examples own, whose leading axis is theirs."""
    belongs = zip(jax.tree.leaves(batch), shared_leaves(batch, shared), strict=True)
    return [leaf for leaf, whole in belongs if not whole]


def replace_owned(batch: PyTree, shared: Shared, owned: list[Any]) -> PyTree:
    """The batch with other leaves in place of those that examples own."""
    leaves, treedef = jax.tree.flatten(batch)
    new = iter(owned)
    belongs = zip(leaves, shared_leaves(batch, shared), strict=True)
    return treedef.unflatten([leaf if whole else next(new) for leaf, whole in belongs])


def rows(batch: PyTree, start: int, stop: int, shared: Shared = None) -> PyTree:
    """The examples from `start` to `stop`, with what belongs to all of them."""
    return replace_owned(batch, shared, [x[start:stop] for x in owned_leaves(batch, shared)])


def describe(batch: PyTree) -> str:
    """The structure of a batch with dtypes and shapes in place of its arrays; of long lists the first few."""
    shapes = jax.tree.map(lambda x: _Shape(f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"), batch)
    short = reprlib.Repr()
    short.maxlist = short.maxtuple = 8
    short.maxdict, short.maxother = 40, 1000
    return short.repr(shapes)


class _Shape(str):
    """Text whose repr has no quotes."""

    def __repr__(self) -> str:
        return str(self)
