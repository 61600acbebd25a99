"""Where and how often a run is saved, and what makes it the one it is.

A checkpoint of another run is refused.
"""

import dataclasses
import os
import re
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spectra.base import draws, programs, trees
from spectra.base.calls import checked_fields
from spectra.base.errors import SpectraError
from spectra.base.files import program_digest, tree_digest
from spectra.operators.base import LinearOperator, product
from spectra.operators.composed import DeflatedOperator
from spectra.operators.data import DataOperator


@checked_fields
@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run is saved, so that the same call resumes it.

    `slq`, `spectrum`, `eigsh`, `solve`, `funm`, `trace`, `diagonal` and `kpm` take one.

    Args:
        directory: a folder for this run alone, on a file system that all its processes share.
        minutes: maximum time between two checkpoints.
        steps: also save after this many Lanczos steps, or products; default: save by time only.

    A finished probe is always recorded. On SIGTERM or SIGINT (Ctrl-C) a run writes a last checkpoint after
    the current chunk of steps (about 5 seconds, or one step; with streamed data about 5 seconds of batches,
    or one batch) and raises `PreemptedError`; the command line then exits with code 75, "try again", or 130
    after Ctrl-C. If these were the last steps, the run finishes instead. A second Ctrl-C stops it at once.

    A checkpoint belongs to one operator (its functions, parameters and data) and one key; with any other it
    is refused. Some arguments may change between calls: steps, probes and `tol` of `slq`, and `max_matvecs`
    of `eigsh` and `solve`. The call then computes only what is missing; probes recorded with fewer steps than
    requested are recomputed. The other functions resume only with the same arguments.

    On another number of devices, or with another version of JAX, programs cannot be compared. A product tells
    them apart then (and on other devices the data, which may be cut otherwise): another loss or other data
    are refused, but a change as small as the rounding of a product, such as that of one example among
    thousands, is not noticed.

    Damage is detected by checksums; damaged parts are recomputed, with a warning.

    Cost: one additional product, which identifies the operator; disk space for the basis of the probes in
    progress, in the dtype of the vectors. A run that resumes within a pass over a stream re-reads the batches
    already processed, since streams cannot skip, but multiplies only by the others.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra, tempfile
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 200)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = spectra.Checkpoint(folder, minutes=5)
        ...     first = spectra.slq(op, key=jax.random.key(0), num_steps=20, checkpoint=saved)
        ...     again = spectra.slq(op, key=jax.random.key(0), num_steps=20, checkpoint=saved)  # one product
        >>> bool((first.nodes == again.nodes).all())
        True
    """

    directory: str | os.PathLike[str]
    minutes: float = 10.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.minutes >= 0:
            raise SpectraError(f"minutes={self.minutes}: use the most minutes between two checkpoints.")
        if self.steps is not None and self.steps < 1:
            raise SpectraError(f"steps={self.steps}: use a positive number of steps, or None.")

    @classmethod
    def of(cls, value: "Checkpoint | str | os.PathLike[str] | None") -> "Checkpoint | None":
        """A checkpoint from a folder's name."""
        if isinstance(value, Checkpoint) or value is None:
            return value
        if not isinstance(value, str | os.PathLike) or value == "":  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SpectraError(f"checkpoint={value!r}: pass the name of a folder, or a Checkpoint.")
        return cls(value)

    def child(self, name: str) -> "Checkpoint":
        """The checkpoint of one of several runs."""
        readable = re.sub(r"[^\w-]", "_", name)[:60]  # no two names share a folder, none leads elsewhere
        return dataclasses.replace(
            self, directory=Path(self.directory) / f"{readable}-{zlib.crc32(name.encode()):08x}"
        )


ELSEWHERE = (("program",), ("data", "program"))
"""What another version of JAX may write otherwise, and what other devices may cut otherwise."""
LATER = ("draws", "leaves")
"""What the descriptions of older versions lack."""
ROUNDINGS, COARSE = 1000.0, 0.02
"""By which two products of one operator may differ: so many roundings of its precision, and at most such a
share of the product, or four roundings where that is more. Elsewhere a model in bfloat16 makes 1e-4 of it."""


def describe(op: LinearOperator, key: jax.Array, row_dtype: Any) -> dict[str, Any]:
    """What makes a run the one it is, in words and checksums.

    Parameters and data are known by their bits (of a stream: of every batch), functions by the operations
    that they trace to and the numbers that they close over. One product with a fixed vector stands for
    what cannot be seen so: host functions, and programs that another version of JAX writes otherwise.

    Steps, probes and tolerance are not part of it: they say how much of the run is wanted.
    """
    u = draws.unit_vector(jax.random.key(0), op)
    found = op @ u
    data = jax.random.key_data(key) if jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    product, leaves = _numbers(u, found)
    return {
        "operator": f"{type(op).__name__} of order {op.size}",
        "parameters": [tree_digest(params) for params in _parameters(op)],
        "data": [_data(part) for part in _parts(op)],
        "program": _program(op, u),
        "place": [jax.__version__, _num_devices(op)],
        "key": np.asarray(data).ravel().tolist(),
        "draws": np.asarray(jax.random.bits(jax.random.fold_in(key, 1), (2,), np.uint32)).tolist(),
        "basis_dtype": str(row_dtype or op.dtype),
        "product": [float(x) for x in product],
        "leaves": [float(x) for x in leaves],
    }


def differences(mine: dict[str, Any], saved: dict[str, Any], precision: float) -> list[str]:
    """Names of what differs; products may differ by rounding."""
    loose = {"product", "leaves", "place"} | {name for name in LATER if name not in saved}
    for one, other, names in zip(mine["place"], saved["place"], ELSEWHERE, strict=True):
        loose |= set(names) if one != other else set()
    names = [name for name in mine | saved if name not in loose and mine.get(name) != saved.get(name)]
    if not _are_near(mine, saved, precision):
        names.append("product (loss function or data)")
    return names


def _are_near(mine: dict[str, Any], saved: dict[str, Any], precision: float) -> bool:
    """Whether the products are one but for rounding: along the vector, in length, and in shares of leaves.

    The part along a random vector alone tells little of a large operator: it is a sum of so many terms of any
    sign that another operator's is as near as 1 / √n of the length.
    """
    tolerance = min(ROUNDINGS * precision, max(COARSE, 4 * precision))
    (value, size), (other, length) = mine["product"], saved["product"]
    near = [abs(value - other) <= tolerance * size, abs(size - length) <= tolerance * size]
    if len(saved.get("leaves", ())) == len(mine["leaves"]):
        pairs = zip(mine["leaves"], saved["leaves"], strict=True)
        near += [abs(a - b) <= 2 * tolerance for a, b in pairs]
    return all(near)


def _is_part(node: Any) -> bool:
    return isinstance(node, DataOperator)


def _parts(op: LinearOperator) -> list[Any]:
    """The operators on data inside an operator, and its other leaves.

    The vectors of a deflation are left out: recomputed they differ by rounding.
    """
    if isinstance(op, DeflatedOperator):
        return _parts(op.base)
    return jax.tree.leaves(op, is_leaf=_is_part)


_PARAMS = jax.tree_util.GetAttrKey("params")


def _parameters(op: LinearOperator) -> list[Any]:
    """Those of operators on data, frozen ones included; of another operator, its vector if it has values."""
    found = [part.params for part in _parts(op) if isinstance(part, DataOperator)]
    return found or ([op.like] if trees.has_values(op.like) else [])


def _data(part: Any) -> int:
    if isinstance(part, LinearOperator) and not isinstance(part, DataOperator):  # opaque to JAX
        return tree_digest([x for x in jax.tree.leaves(vars(part)) if isinstance(x, (jax.Array, np.ndarray))])
    if not isinstance(part, DataOperator):
        return tree_digest(part)
    if (stream := part.stream) is not None:
        return tree_digest((np.array(stream.digests), np.array(stream.weights)))
    leaves = jax.tree_util.tree_flatten_with_path(part)[0]
    return tree_digest([leaf for path, leaf in leaves if path[0] != _PARAMS])


def _program(op: LinearOperator, u: Any) -> int:
    """Of a product on the whole data or the first batch; how it is cut into pieces changes no answer."""

    def plain(part):
        return part.first_piece()._with(microbatch=None) if isinstance(part, DataOperator) else part

    if isinstance(op, DeflatedOperator):
        op = op.base
    op = jax.tree.map(plain, op, is_leaf=_is_part)
    return 0 if op.on_host else program_digest(product.trace(op, u).jaxpr)


def _num_devices(op: LinearOperator) -> int:
    """Over how many devices parameters and data in memory are spread."""
    arrays = [leaf for leaf in jax.tree.leaves(op) if isinstance(leaf, jax.Array)]
    return max((len(leaf.sharding.device_set) for leaf in arrays), default=1)


@programs.jit
def _numbers(u, product):
    """uᵀ H u and |H u|, and the share that each leaf has of the square of the latter."""
    size = trees.norm(product)
    unit = jax.numpy.where(size > 0, size, 1)
    leaves = [jax.numpy.sum((x / unit) ** 2, dtype=unit.dtype) for x in jax.tree.leaves(product)]
    return (trees.vdot(u, product), size), leaves
