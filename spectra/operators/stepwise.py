"""Products called one by one from the host, where a compiled loop would slow them down."""

from typing import Any

from spectra import _stacks
from spectra.operators.arithmetic import Derived
from spectra.operators.base import LinearOperator, operator, product
from spectra.operators.diagnose import slow_in_loops

PyTree = Any


@operator(leaves=("base",))
class StepwiseOperator(Derived):
    """An operator each of whose products is a program of its own; made by `outside_loops`, for one run."""

    base: LinearOperator

    @property
    def on_host(self) -> bool:
        """True: that is what it is for."""
        return True

    def mv(self, v: PyTree) -> PyTree:
        """The compiled product."""
        return product(self.base, v)

    def mv_batch(self, vectors: PyTree) -> PyTree:
        """Compiled products, one after the other."""
        return _stacks.stacked([self.mv(v) for v in _stacks.split(vectors)])


def outside_loops(op: LinearOperator) -> LinearOperator:
    """The operator itself, or driven from the host if its products are slow in compiled loops."""
    return StepwiseOperator(op) if slow_in_loops(op) else op
