"""Limits of floating-point numbers, which NumPy's `finfo` does not know of all of JAX's dtypes."""

from typing import Any

import numpy as np

class finfo:
    dtype: np.dtype[Any]
    bits: int
    nexp: int
    nmant: int
    maxexp: int
    minexp: int
    eps: Any  # a NumPy scalar of the dtype itself
    epsneg: Any
    tiny: Any
    smallest_normal: Any
    smallest_subnormal: Any
    max: Any
    min: Any
    def __init__(self, dtype: Any) -> None: ...

def __getattr__(name: str) -> Any: ...
