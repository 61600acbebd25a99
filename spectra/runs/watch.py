"""What users see of a run, and where it is saved: one way for all functions that iterate."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

from spectra.base import progress as _signals
from spectra.base import trees
from spectra.base.errors import SpectraError
from spectra.base.progress import Progress
from spectra.operators.base import LinearOperator
from spectra.runs.checkpoint import Checkpoint, describe
from spectra.runs.journal import Journal
from spectra.runs.saver import Saver


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
    checkpoint = Checkpoint.of(checkpoint)
    signals = _signals.watching() if checkpoint else contextlib.nullcontext()
    with signals, Progress(progress, total, name) as bar:
        yield Watch(bar, checkpoint, name, arguments)
