"""The complete table: importing this module registers every operator."""

from spectra.bridge.operators import (  # noqa: F401
    create,
    factors,
    index,
    layers,
    order,
    pointwise,
    products,
    recurrent,
    reduce,
    resize,
    shape,
    special,
    windows,
)
from spectra.bridge.operators.registry import ABSENT, OPERATORS, SIGNATURES

__all__ = ["ABSENT", "OPERATORS", "SIGNATURES"]
