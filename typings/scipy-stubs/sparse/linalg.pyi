"""Operators and iterations on them."""

from collections.abc import Callable
from typing import Any

import numpy as np

class LinearOperator:
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    def __init__(
        self,
        shape: tuple[int, int],
        matvec: Callable[[np.ndarray], Any],
        rmatvec: Callable[[np.ndarray], Any] | None = ...,
        dtype: Any = ...,
    ) -> None: ...
    def matvec(self, x: Any) -> Any: ...
    def matmat(self, X: Any) -> Any: ...
    def __matmul__(self, x: Any) -> Any: ...
    def __getattr__(self, name: str) -> Any: ...

def __getattr__(name: str) -> Any: ...
