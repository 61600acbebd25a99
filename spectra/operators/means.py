"""Whether a loss is the mean over examples that cutting its data takes for granted.

L is a (weighted) mean over examples exactly if L(A + B) = (w_A L(A) + w_B L(B)) / (w_A + w_B) for all pieces
A and B. One such pair shows a sum, a contrastive loss or batch statistics. Values may coincide at special
parameters, a last layer of zeros say, so a second pair is looked at with all parameters moved far.
"""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import itertools
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import programs, trees
from spectra.base.errors import DataError, warn_user
from spectra.base.files import array_digest
from spectra.base.trees import PyTree
from spectra.operators import differentiate
from spectra.operators.arguments import require_call
from spectra.operators.batches import batch_size, rows, weigh
from spectra.operators.jaxprs import drawn_shapes, largest_epsilon, rounding_of_sums
from spectra.operators.marks import unlike_pieces
from spectra.operators.redraws import PLACES, Cut, can_redraw, comparisons, neighbours, places, redrawn, salts
from spectra.operators.stochastic import explain_underflow

if TYPE_CHECKING:
    from spectra.operators.data import DataOperator

MAX_KINDS = 64
FAR = 0.3
"""How far the second look goes, relative to each parameter."""
MARGIN = 8
"""Multiple of the rounding that is expected of a value and of its sums, and of what is measured: the largest
of three differences between values that round as those compared do."""
KEYS = 16
"""Random keys that a loss with noise is evaluated with."""
STUDENT = 6
"""Standard errors of the mean of so many that it may be off by: Student's t with 15 degrees of freedom
exceeds them once in 4·10^4 times; skewed noise does it more often."""
MAX_TRIED = 8
"""Pairs of pieces that are tried for those of which both weigh something."""
known_means: set[Any] = set()  # by structure and examples: the next checkpoint is not looked at


def require_mean(op: "DataOperator", size: int | None = None) -> None:
    """Raise if the operator cuts its data, and its loss on a piece is not the mean of that on two halves.

    Where nothing is cut, nothing is looked at; nor where values are out of reach (tracing, shapes alone). A
    loss that draws random numbers for a batch as a whole draws others for its halves: other numbers, from
    wherever the keys come, tell how much that changes. If pieces into which a batch is cut all draw the same,
    a warning says so. Besides the first pieces, those are looked at whose labels and masks differ most.

    Args:
        op: the operator.
        size: examples a piece, where the data are about to be cut that the operator takes whole.

    Raises:
        DataError: the loss is not a mean over examples.
        StructureError: it takes no batch of `size` examples.

    Cost: about thirty evaluations of the loss on two pieces, 100 if it draws random numbers, once for the
    same structure and data.
    """
    if not trees.has_values((op.params, op.data)) or trees.is_traced(op):
        return
    if size is not None:
        require_call(_on(op, rows(op.data, 0, size, op.shared), op.params), f"A part of {size} examples")
    limit: Limit | None = None
    kinds: list[Any] = []
    for source in (places(op, size), neighbours(op)):
        for whole, first, second in itertools.islice(source, MAX_TRIED):
            if not (_weight(op, first) > 0 and _weight(op, second) > 0):
                continue  # padding says nothing, and may have no mean at all
            kind = op.microbatch, kind_of(op, whole)
            if kind in known_means:
                return
            limit, seen = _compare_pieces(op, whole, first, second, limit)
            if seen:
                kinds.append(kind)
            if len(kinds) == PLACES:
                break
        if kinds:
            break
    for whole, first, second in itertools.islice(unlike_pieces(op, size), PLACES):
        if _weight(op, first) > 0 and _weight(op, second) > 0:
            limit, _ = _compare_pieces(op, whole, first, second, limit)
    if limit is not None and kinds:
        remember(kinds[0])
        if limit.draws and (op.microbatch is not None or op.takes_single_examples):
            _warn_of_repeats(op)


def _compare_pieces(
    op: "DataOperator", whole: PyTree, first: PyTree, second: PyTree, limit: "Limit | None"
) -> tuple["Limit | None", bool]:
    """The limit, measured where it was None, and whether the loss could be compared on these pieces."""
    for cut in comparisons(op, whole, first, second):
        try:
            return _compare(op, cut, limit), True
        except _OtherSizesRefused:
            continue
    return limit, False


def remember(kind: Any) -> None:
    """Note operators of a kind as those of a mean."""
    if len(known_means) >= MAX_KINDS:
        known_means.clear()
    known_means.add(kind)


class _OtherSizesRefused(Exception):
    """The loss takes no batches of the size that the comparison needs."""


def _weight(op: "DataOperator", piece: PyTree) -> float:
    return float(batch_size(piece, op.shared) if op.weight_fn is None else weigh(op.weight_fn, piece))


def _on(op: "DataOperator", batch: PyTree, params: PyTree) -> "DataOperator":
    return op._with(data=batch, params=params, stream=None, microbatch=None)


def kind_of(op: "DataOperator", examples: PyTree) -> Any:
    """What a second look would see again: structure, shapes and examples, of which some have no padding."""
    leaves, treedef = jax.tree.flatten(_on(op, examples, op.params))
    return treedef, *map(jax.typeof, leaves), *map(_digest, jax.tree.leaves(examples))


def _digest(leaf: Any) -> int:
    """A checksum that compiles nothing where the host can read the array."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or not getattr(leaf, "is_fully_addressable", True):
        return array_digest(leaf)
    return zlib.crc32(np.ascontiguousarray(leaf).tobytes())


class Limit(NamedTuple):
    """What two ways of dividing may differ by: a share of their size, and what was measured."""

    relative: float
    absolute: float
    draws: bool = False  # pieces do not draw the numbers that the whole draws for their examples


def _compare(op: "DataOperator", cut: Cut, limit: Limit | None) -> Limit | None:
    """Raise if the two ways differ by more than `limit`, which is measured where it is None and returned.

    None where there is nothing to compare.
    """
    try:
        traces = [differentiate.loss.trace(_on(op, x, op.params)).jaxpr for x in (cut.here[0], cut.there[0])]
    except Exception as error:
        raise _OtherSizesRefused from error
    drawn = [drawn_shapes(trace) for trace in traces]
    noisy = bool(drawn[0]) and (drawn[0] != drawn[1] or len(cut.here) > 1)
    if noisy and not all(map(can_redraw, traces)):
        return None
    if limit is not None:
        _require_equal(op, cut, op.params, limit, noisy)
        return limit
    unit = max(largest_epsilon(traces[0]), op.precision)
    relative = MARGIN * (unit / 2 + rounding_of_sums(traces[0]))
    far = _moved(op, FAR)
    found: list[Limit] = []
    for params in (op.params, far):
        absolute = 0.0 if noisy else _rounding_of_value(op._with(params=params), cut, relative, unit)
        found.append(Limit(relative, absolute))
    pairs = zip((op.params, far), found, strict=True)
    shares = [_require_equal(op, cut, params, limit, noisy) for params, limit in pairs]
    return found[0]._replace(draws=max(shares) > 1) if any(x >= 0 for x in shares) else None


def _rounding_of_value(op: "DataOperator", cut: Cut, relative: float, unit: float) -> float:
    """What the loss may differ by between values that round otherwise, as measured.

    Parameters that are off by their precision, and examples in another order, round otherwise; a loss that
    the order changes by far more than that is no mean over them, and raises.
    """
    batches = ((op.params, cut.here), (op.params, cut.turned), (_moved(op, unit), cut.here))
    here, turned, rounded = (_means(op, *each)[0] for each in batches)
    size = max(abs(_means(op, op.params, [piece])[0]) for piece in (*cut.here, *cut.there))
    by_order, by_rounding = (x if np.isfinite(x) else 0.0 for x in (abs(turned - here), abs(rounded - here)))
    if by_order > MARGIN * (relative * size + MARGIN * by_rounding):
        count = sum(batch_size(piece, op.shared) for piece in cut.here)
        first, second = _apart(here, turned)
        raise DataError(
            _message(
                op, f"on {count} examples it is {first}, and {second} on the same in another order", size
            )
        )
    return MARGIN * max(by_order, by_rounding)


def _require_equal(op: "DataOperator", cut: Cut, params: PyTree, limit: Limit, noisy: bool) -> float:
    """Raise if the two ways differ at these parameters; their largest difference, in units of the limit.

    Of several values, with other random numbers each, the mean difference may be what Student's t allows.
    Values that say nothing, zeros and NaN, give -1.
    """
    here, there = _means(op, params, cut.here, noisy), _means(op, params, cut.there, noisy)
    size = max(np.abs(here).max(), np.abs(there).max())
    if op.takes_single_examples and np.isfinite(here).all() and np.isnan(there).any():
        raise DataError(_message(op, _difference(op, cut, here.mean(), there.mean())))  # it needs several
    if not np.isfinite(size) or size == 0:
        return -1.0
    differences, allowed = here - there, limit.relative * size + limit.absolute
    spread = np.std(differences, ddof=1) / len(differences) ** 0.5 if noisy else 0.0
    if abs(differences.mean()) > allowed + STUDENT * spread:
        raise DataError(_message(op, _difference(op, cut, here.mean(), there.mean()), size))
    return float(np.abs(differences).max() / allowed)


def _warn_of_repeats(op: "DataOperator") -> None:
    pieces = "single examples" if op.takes_single_examples else f"the pieces of microbatch={op.microbatch}"
    warn_user(
        f"the loss draws random numbers for the examples of a batch (dropout, noise), and {pieces} all draw "
        "the same: the matrix is that of this noise, repeated, not that of the whole batch. Give each "
        "example a key in the batch, jax.random.split(key, n), from which a jax.vmap over examples draws; or "
        + ("take a mask that all examples share." if op.takes_single_examples else "leave microbatch= out.")
        + " check_data=False takes the loss as it is.",
    )


def _means(op: "DataOperator", params: PyTree, batches: list[PyTree], noisy: bool = False) -> np.ndarray:
    """The loss over some batches, once or for each of several sets of random numbers."""
    weights = np.array([_weight(op, batch) for batch in batches])
    operators = [_on(op, batch, params) for batch in batches]
    values = jax.device_get([_redrawn_losses(x) if noisy else differentiate.loss(x) for x in operators])
    return np.atleast_1d(np.tensordot(weights / weights.sum(), np.asarray(values, float), 1))


@programs.jit
def _redrawn_losses(op: "DataOperator") -> jax.Array:
    jaxpr, leaves = jax.make_jaxpr(differentiate.loss)(op), jax.tree.leaves(op)
    return lax.map(lambda salt: redrawn(jaxpr, salt, *leaves)[0], salts(KEYS))


def _difference(op: "DataOperator", cut: Cut, here: float, there: float) -> str:
    counts = [batch_size(piece, op.shared) for piece in cut.there]
    first, second = _apart(here, there)
    if len(cut.here) == 1:
        return (
            f"on {sum(counts)} examples it is {first}, and the mean of its values on the first "
            f"{counts[0]} and the other {counts[1]} is {second}"
        )
    return f"its mean on two pieces of {counts[0]} is {first}, and {second} as they exchange examples"


def _apart(a: float, b: float) -> tuple[str, str]:
    """Two numbers in as many digits as tell them apart, six at least."""
    digits = next((n for n in range(6, 17) if f"{a:.{n}g}" != f"{b:.{n}g}"), 17)
    return f"{a:.{digits}g}", f"{b:.{digits}g}"


def _message(op: "DataOperator", found: str, size: float = np.inf) -> str:
    """What was found of a loss whose values reach `size`, and what to do about it."""
    if underflow := explain_underflow(float(size), op.dtype, "values"):
        return f"the loss is too small for its type: {found}. {underflow}"
    batches = 0 if op.stream is None else len(op.stream.weights)
    if op.takes_single_examples:
        where, whole = "this operator takes the gradients of single examples", "there is no such matrix"
    elif batches > 1:
        where, whole = f"the operator takes the mean over {batches} batches", "pass all data as one batch"
    else:
        where, whole = "microbatch= cuts the batch", "leave microbatch= out"
    return (
        f"the loss is not a mean over examples: {found}. But {where}. If it is a sum, divide it by the "
        "number of examples; if its terms count otherwise (tokens, masks, class weights), give each piece's "
        "weight by weight_fn=; if it sets examples against each other (contrastive losses, batch "
        f"statistics, neighbours in a sequence, steps of an adaptive solver), {whole}. If the mean of the "
        "pieces' own losses is what you want, pass check_data=False."
    )


def _moved(op: "DataOperator", amount: float) -> PyTree:
    """All parameters that vary moved by up to `amount` of themselves, zeros by that of their neighbours."""
    leaves, treedef = jax.tree.flatten(op.params)
    chosen = tuple(range(len(leaves))) if op.selected is None else op.selected
    new = waves([leaves[i] for i in chosen], amount)
    for index, leaf in zip(chosen, new, strict=True):
        leaves[index] = leaf
    return treedef.unflatten(leaves)


def waves(leaves: list[jax.Array], amount: float | jax.Array) -> list[jax.Array]:
    """x_i + amount cos(2 i + leaf) |x_i|: needs no random numbers, whose programs are large.

    Two programs: in one, XLA computes the sizes of all leaves anew for each of them, and compiles
    31 s for the 148 leaves of GPT-2.
    """
    return _waves(leaves, *_sizes(leaves), amount)


@programs.jit
def _sizes(leaves: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """The root mean square of each leaf, and the largest of them."""
    sizes = [trees.norm(trees.lift(x)) / max(x.size, 1) ** 0.5 for x in leaves]
    return sizes, jnp.max(jnp.stack(sizes))


@programs.jit
def _waves(
    leaves: list[jax.Array], sizes: list[jax.Array], largest: jax.Array, amount: float | jax.Array
) -> list[jax.Array]:
    def one(i: int, leaf: jax.Array) -> jax.Array:
        x = trees.lift(leaf)
        wave = jnp.cos(2 * jnp.arange(x.size, dtype=x.dtype) + i).reshape(x.shape)
        neighbours = jnp.where(sizes[i] > 0, sizes[i], jnp.where(largest > 0, largest, 1))
        return (x + amount * wave * jnp.where(x == 0, neighbours, jnp.abs(x))).astype(leaf.dtype)

    return [one(i, leaf) for i, leaf in enumerate(leaves)]
