"""What users see of a run, and where it is saved: one way for all functions that iterate.

A `Journal` holds computations in parts, each of which is done once: what a run had computed when it ended is
read again. A run that draws the same probes and takes the same decisions calls `fold` in the same order with
the same parts. What lies between folds is recomputed, products within them are not; vectors to be multiplied
that are no probes are kept, see `Journal.keep`.
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from spectra.base import host, meshes, trees
from spectra.base.errors import SpectraError
from spectra.base.host import Progress
from spectra.base.trees import PyTree
from spectra.operators.base import LinearOperator
from spectra.runs.checkpoint import Checkpoint, describe
from spectra.runs.saver import Saver

Part = tuple[int, int]


@dataclasses.dataclass
class Fold:
    """How far one fold has come, and in which items that is."""

    done: int = 0  # parts
    state: PyTree = None
    outs: list[PyTree] = dataclasses.field(default_factory=list)
    saved: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # items of outs, oldest first


class Journal:
    """The folds of a run.

    Args:
        bar: shows the products.
        saver: where they are saved, if anywhere.
        op: the operator, whose vectors say how arrays are placed.
    """

    def __init__(self, bar: Progress, saver: Saver | None, op: LinearOperator):
        self.bar, self.saver, self.like = bar, saver, op.like
        self.mesh = meshes.mesh_of(op.like)
        self.everywhere = (
            SingleDeviceSharding(op.device)
            if self.mesh is None
            else NamedSharding(self.mesh, PartitionSpec())
        )
        self.folds: list[Fold] = []
        self.items: dict[str, int] = {}  # that were read
        self.products = self.side_by_side = 0
        flights = [record["flight"] for record in saver.saved] if saver else []
        self.flights = [flight for flight in flights if flight]

    def batch(self, batch: int) -> int:
        """Products side by side: as many as before, since the free memory may have changed."""
        self.side_by_side = self.flights[0]["batch"] if self.flights else batch
        return self.side_by_side

    def fold(
        self,
        step: Callable[[PyTree, int, int], tuple[PyTree, PyTree]],
        state: PyTree,
        parts: Sequence[Part],
        *,
        carried: PyTree = None,
        out: PyTree = None,
        products: int = 1,
        until: Callable[[PyTree], bool] | None = None,
    ) -> tuple[PyTree, list[PyTree]]:
        """state, out = step(state, start, stop) for each part in turn; the last state and all outs.

        Args:
            step: computes one part.
            state: before the first part.
            parts: (start, stop) of each.
            carried: what a state looks like, with arrays like the operator's vectors in place of vectors
                and of stacks of them, and zeros in place of small arrays.
            out: the same of an out.
            products: of a part from `start` to `stop`, for each number between them.
            until: whether a state needs no further part.
        """
        fold = self._restored(Fold(state=state), carried, out)
        self.folds.append(fold)
        self.count(sum(products * (stop - start) for start, stop in parts[: fold.done]))
        for start, stop in parts[fold.done :]:
            if until is not None and until(fold.state):
                break
            began = time.monotonic()
            state, found = step(fold.state, start, stop)
            fold.state, found = self._placed(state, carried), self._placed(found, out)
            fold.outs.append(found)
            fold.done += 1
            self.count(products * (stop - start))
            if self.saver is not None:
                jax.block_until_ready((fold.state, found))
                self._look(time.monotonic() - began)
        state, outs = fold.state, fold.outs
        if self.saver is None:
            self.folds[-1] = Fold()
        return state, outs

    def keep(self, make: Callable[[], PyTree], like: PyTree) -> PyTree:
        """make(), or what it gave when the products that depend on it were taken.

        Computed anew it might differ by rounding, where arrays lie elsewhere than before, and products of the
        one would be taken for those of the other.
        """

        def step(state: PyTree, start: int, stop: int) -> tuple[PyTree, PyTree]:
            return state, make()

        return self.fold(step, None, [(0, 1)], out=like, products=0)[1][0]

    def save(self) -> None:
        """Save the run as it is, where it is saved at all."""
        if self.saver is not None:
            self._save()

    def count(self, products: int) -> None:
        """Note products that were taken."""
        self.products += products
        self.bar.update(products)

    def _look(self, seconds: float) -> None:
        """Save the run where it is time to, and end it where it was asked to."""
        assert self.saver is not None
        signal, due, _ = self.saver.due(self.products, seconds)
        if due:
            self._save()
        self.saver.end(signal, f"after {self.products} products")

    def _save(self) -> None:
        """Write the outs and the states that are new."""
        assert self.saver is not None
        trees: dict[str, Callable[[], PyTree]] = {}
        described = []
        for i, fold in enumerate(self.folds):
            first = sum(part["count"] for part in fold.saved)
            new = [jax.tree.leaves(out) for out in fold.outs[first:]]
            if any(new):
                name = f"item-{i:05d}-out-{first:06d}-{fold.done:06d}"
                fold.saved.append({"name": name, "first": first, "count": len(new), "kinds": _kinds(new)})
            for part in fold.saved:
                chosen = fold.outs[part["first"] : part["first"] + part["count"]]
                trees[part["name"]] = partial(_leaves, chosen)
            known = None
            if state := jax.tree.leaves(fold.state):
                known = {"name": f"item-{i:05d}-state-{fold.done:06d}", "kinds": _kinds([state])}
                trees[known["name"]] = partial(_leaves, [fold.state])
            described.append({"done": fold.done, "outs": fold.saved, "state": known})
        self.saver.write(trees, {"folds": described, "batch": self.side_by_side}, self.products)

    def _restored(self, fold: Fold, carried: PyTree, out: PyTree) -> Fold:
        """The next fold as far as it was saved, by the newest record that can be read."""
        while self.flights and self.saver is not None:
            flight, i = self.flights[0], len(self.folds)
            if i >= len(flight["folds"]):
                return fold
            saved = flight["folds"][i]
            outs = [self._item(flight, part, out) for part in saved["outs"]]
            state = self._item(flight, saved["state"], carried) if saved["state"] else [fold.state]
            if state is not None and all(part is not None for part in outs):
                names = [part["name"] for part in (*saved["outs"], saved["state"]) if part]
                self.items |= {name: flight["items"][name] for name in names}
                self.saver.flight, self.saver.saved_step = flight | {"items": dict(self.items)}, self.products
                found = [x for part in outs for x in part or ()]
                found += [None] * (saved["done"] - len(found))
                return Fold(saved["done"], state[0], found, list(saved["outs"]))
            del self.flights[0]  # an older one holds as much of the folds before, or less
        return fold

    def _item(self, flight: dict[str, Any], part: dict[str, Any], like: PyTree) -> list[PyTree] | None:
        """The trees in an item, each of the form of `like`."""
        assert self.saver is not None
        leaves, treedef = jax.tree.flatten(like)
        shapes = [
            [
                jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=self._place(leaf, len(shape)))
                for leaf, (shape, dtype) in zip(leaves, kinds, strict=True)
            ]
            for kinds in part["kinds"]
        ]
        found = self.saver.item(part["name"], shapes, flight["items"][part["name"]])
        return None if found is None else [treedef.unflatten(tree) for tree in found]

    def _placed(self, tree: PyTree, like: PyTree) -> PyTree:
        """Arrays where reading would put them: the compiler may have split them over a mesh in another way,
        and what is computed of them then rounds in another way."""
        if self.saver is None or self.mesh is None:
            return tree
        return jax.tree.map(lambda leaf, x: jax.device_put(x, self._place(leaf, x.ndim)), like, tree)

    def _place(self, leaf: Any, rank: int) -> Any:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            return self.everywhere
        return NamedSharding(sharding.mesh, PartitionSpec(*[None] * (rank - leaf.ndim), *sharding.spec))


def _leaves(trees: list[PyTree]) -> list[list[Any]]:
    return [jax.tree.leaves(tree) for tree in trees]


def _kinds(trees: list[list[Any]]) -> list[list[Any]]:
    """Shape and dtype of each leaf of each tree."""
    return [[[list(leaf.shape), str(leaf.dtype)] for leaf in tree] for tree in trees]


@dataclasses.dataclass(frozen=True)
class Watch:
    """The bar of a run, and its checkpoint if it has one."""

    bar: Progress
    checkpoint: Checkpoint | None
    name: str
    arguments: dict[str, Any] | Callable[[], dict[str, Any]]

    @contextlib.contextmanager
    def saver(self, op: LinearOperator, key: Any) -> Iterator[Saver | None]:
        """Where the run of an operator is saved, in a folder held while the block lasts, if anywhere."""
        if self.checkpoint is None:
            yield None
            return
        arguments = self.arguments() if callable(self.arguments) else self.arguments
        own = {"function": self.name} | arguments
        key = jax.random.key(0) if key is None else key
        saver = Saver(self.checkpoint, describe(op, key, None) | own, op.precision)
        with saver.running():
            yield saver

    @contextlib.contextmanager
    def journal(self, op: LinearOperator, key: Any) -> Iterator[Journal | None]:
        """The journal of a run, while the block lasts; None where nobody watches it.

        Raises:
            SpectraError: it is to be saved, inside `jit` or `vmap`.
        """
        if trees.is_traced((op, key)):
            if self.checkpoint is not None:
                raise SpectraError("checkpoint= needs values, which do not exist inside jit or vmap.")
            yield None
            return
        with self.saver(op, key) as saver:
            yield Journal(self.bar, saver, op) if saver or self.bar.bar is not None else None


@contextlib.contextmanager
def watched(
    name: str,
    progress: bool,
    checkpoint: Checkpoint | str | os.PathLike[str] | None,
    total: int | None,
    arguments: dict[str, Any] | Callable[[], dict[str, Any]],
) -> Iterator[Watch]:
    """Around a run: shows its products, and notes signals where there is a checkpoint to save it in.

    Args:
        name: of the function.
        progress: whether to show the products.
        checkpoint: as users give it.
        total: products of the run, None where they are not known before.
        arguments: what changes the answer, as JSON has it, or a function that returns that: a checkpoint
            belongs to one set of them.
    """
    signals = contextlib.nullcontext()
    if checkpoint is not None:
        checkpoint, signals = Checkpoint.of(checkpoint), host.watching()
    with signals, Progress(progress, total, name) as bar:
        yield Watch(bar, checkpoint, name, arguments)
