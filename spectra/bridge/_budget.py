"""How much work a graph may ask for while it is loaded: in proportion to its nodes, whatever they say.

A few operators become one step of the trace for each part or each entry of a window. One of them has a
bound of its own, but a file of a few kilobytes could name hundreds.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from spectra.bridge._errors import BridgeError

STEPS, STEPS_A_NODE = 2**14, 8
"""A step takes a tenth of a millisecond; each part that a model uses is a node of its own, too."""
_left: ContextVar[list[int] | None] = ContextVar("_left", default=None)


@contextlib.contextmanager
def limited(num_nodes: int) -> Iterator[None]:
    """Let the graph with so many nodes take no more than its steps inside the block."""
    token = _left.set([STEPS + STEPS_A_NODE * num_nodes])
    try:
        yield
    finally:
        _left.reset(token)


def spend(steps: int) -> None:
    """Take steps from what is left; outside of `limited`, where a graph is checked already, nothing counts.

    Raises:
        BridgeError: there are not so many left.
    """
    left = _left.get()
    if left is None:
        return
    left[0] -= steps
    if left[0] < 0:
        raise BridgeError(
            "the graph asks for more work than its size allows: it cuts arrays into too many parts"
        )
