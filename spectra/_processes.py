"""What the processes of a run agree on; with one process nothing is exchanged."""

import functools
import operator

import jax
import numpy as np


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def largest(*values: float) -> tuple[float, ...]:
    """The largest of each number over all processes, which must all call this."""
    if jax.process_count() == 1:
        return values
    from jax.experimental.multihost_utils import process_allgather

    gathered = np.asarray(process_allgather(np.asarray(values, np.float32)))
    return tuple(float(x) for x in gathered.reshape(jax.process_count(), -1).max(axis=0))


def combined(value: int) -> int:
    """The exclusive or of a 32-bit number over all processes, which must all call this."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import process_allgather

    gathered = np.asarray(process_allgather(np.asarray(value, np.uint32))).ravel()
    return functools.reduce(operator.xor, map(int, gathered))
