"""Where and how often a run is saved."""

import dataclasses
import os
import re
import zlib
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run is saved, so that the same call goes on with it.

    `slq`, `spectrum`, `eigsh`, `trace`, `diagonal` and `kpm` take one.

    Args:
        directory: a folder of its own, on a file system that all processes of the run share.
        minutes: at most so long between two checkpoints.
        steps: also after so many Lanczos steps, or products; never by count if None.

    A probe that is finished is always recorded. On SIGTERM or SIGINT (Ctrl-C) a run writes a last
    checkpoint after the steps under way (about 5 seconds of them, or one step; of streamed data about 5
    seconds of batches, or one batch) and raises `PreemptedError`; the command line then ends with code
    75, "try again", or 130 after Ctrl-C. If these were the last steps, the run is finished instead. A
    second Ctrl-C ends it at once.

    A checkpoint belongs to one operator (its functions, parameters and data) and one key; of another one it
    is refused. In `slq` steps, probes and `tol` may change, in `eigsh` `max_matvecs`: the call computes only
    what is missing. The other functions go on with the same arguments only. Probes recorded with fewer steps
    than asked for are computed anew.

    What is damaged is noticed by its checksum and computed anew, with a warning.

    Cost: one product more, by which a run knows its own operator; disk space of the basis of the probes
    in flight, in the dtype of the vectors. A run that goes on within a pass over a stream reads the batches
    behind it again, since streams cannot skip, and multiplies by the others only.

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

    directory: str | os.PathLike
    minutes: float = 10.0
    steps: int | None = None

    @classmethod
    def of(cls, value: "Checkpoint | str | os.PathLike | None") -> "Checkpoint | None":
        """A checkpoint from a folder's name."""
        return value if isinstance(value, Checkpoint) or value is None else cls(value)

    def child(self, name: str) -> "Checkpoint":
        """The checkpoint of one of several runs."""
        readable = re.sub(r"[^\w-]", "_", name)[:60]  # no two names share a folder, none leads elsewhere
        return dataclasses.replace(
            self, directory=Path(self.directory) / f"{readable}-{zlib.crc32(name.encode()):08x}"
        )
