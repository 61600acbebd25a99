"""Linear systems."""

from collections.abc import Callable
from typing import Any

def custom_linear_solve(
    matvec: Callable[[Any], Any],
    b: Any,
    solve: Callable[[Any, Any], Any],
    transpose_solve: Callable[[Any, Any], Any] | None = ...,
    symmetric: bool = ...,
    has_aux: bool = ...,
) -> Any: ...
def __getattr__(name: str) -> Any: ...
