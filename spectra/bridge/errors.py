"""Errors and warnings of the bridge, and how much work a graph may ask for while it is loaded."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from spectra.base.errors import SpectraError


class BridgeError(SpectraError):
    """Report a PyTorch module, file or input that the bridge cannot use.

    The message names what is wrong, where (file, node, tensor), and what to do. Every failure on a graph or
    weights file, however damaged, raises this class or a subclass of it.
    """


class NodeError(BridgeError):
    """Report an operator of a graph that refuses its operands, or whose result is not PyTorch's.

    Attributes:
        node: the operator's node, by which its line in the user's file is found.
    """

    def __init__(self, message: str, node: str):
        self.node = node
        super().__init__(message)


class UnsupportedOperatorError(BridgeError):
    """Report graph operators that have no JAX counterpart, each with the modules that use it.

    Attributes:
        operators: `{operator name: module paths}`.
    """

    def __init__(
        self,
        operators: dict[str, list[str]],
        hints: dict[str, str] | None = None,
        places: dict[tuple[str, str], str] | None = None,
    ):
        self.operators = operators
        hints, places = hints or {}, places or {}
        lines = []
        for name, paths in sorted(operators.items()):
            shown = ", ".join(path + places.get((name, path), "") for path in paths[:5])
            shown += f" and {len(paths) - 5} more" if len(paths) > 5 else ""
            hint = hints.get(name.rpartition(".")[0])  # by name, for all overloads
            reason = f" ({hint})" if hint else ""
            lines.append(f"  {name[:80]}{reason} in module {shown}")
        super().__init__(
            "these operators have no JAX counterpart in the bridge:\n"
            + "\n".join(lines)
            + "\nReplace them in the module, or move them out of the function whose curvature is wanted."
        )


class StaticBatchWarning(UserWarning):
    """Say that a module could only be exported for the example's batch size, or branches on a size of one."""


class FrozenParametersWarning(UserWarning):
    """Say which parameters had `requires_grad=False` and are constants of the model, not in its `params`."""


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
