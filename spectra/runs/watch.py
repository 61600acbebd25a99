"""What users see of a run, and where it is saved: one way for all functions that iterate."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

from spectra import _signals
from spectra._progress import Progress
from spectra.checkpoint import Checkpoint
from spectra.operators.base import LinearOperator
from spectra.runs.identity import describe
from spectra.runs.saver import Saver


@dataclasses.dataclass(frozen=True)
class Watch:
    """The bar of a run, and its checkpoint if it has one."""

    bar: Progress
    checkpoint: Checkpoint | None
    name: str
    arguments: Callable[[], dict[str, Any]]

    @contextlib.contextmanager
    def saver(self, op: LinearOperator, key: Any) -> Iterator[Saver | None]:
        """Where the run of an operator is saved, in a folder held while the block lasts, if anywhere."""
        if self.checkpoint is None:
            yield None
            return
        own = {"function": self.name} | self.arguments()
        key = jax.random.key(0) if key is None else key
        saver = Saver(self.checkpoint, describe(op, key, None) | own, op.precision)
        with saver.running():
            yield saver


@contextlib.contextmanager
def watched(
    name: str,
    progress: bool,
    checkpoint: Checkpoint | str | os.PathLike | None,
    total: int | None,
    arguments: Callable[[], dict[str, Any]],
) -> Iterator[Watch]:
    """Around a run: shows its products, and notes signals where there is a checkpoint to save it in.

    Args:
        name: of the function.
        progress: whether to show the products.
        checkpoint: as users give it.
        total: products of the run, None where they are not known before.
        arguments: makes what changes the answer, as JSON has it: a checkpoint belongs to one set of them.
    """
    checkpoint = Checkpoint.of(checkpoint)
    signals = _signals.watching() if checkpoint else contextlib.nullcontext()
    with signals, Progress(progress, total, name) as bar:
        yield Watch(bar, checkpoint, name, arguments)
