"""What a result takes from the program that exported the graph: PyTorch's release and default dtype.

Releases of PyTorch differ where a derivative jumps. A model keeps the choices of the release that
exported it, wherever and whenever it is evaluated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class Exporter:
    """The program that exported a graph; `torch` is (major, minor), by default the latest known."""

    torch: tuple[int, int] = (2, 14)
    default_dtype: str = "float32"


_LATEST = Exporter()
_CURRENT: ContextVar[Exporter] = ContextVar("exporter", default=_LATEST)


@contextmanager
def exported_by(exporter: Exporter) -> Iterator[None]:
    """Evaluate operators as they were in the program that exported them."""
    token = _CURRENT.set(exporter)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def exporter() -> Exporter:
    """Return the program whose graph is being evaluated."""
    return _CURRENT.get()
