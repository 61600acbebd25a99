"""The lines of the user's own files, in tracebacks and in running code."""

import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

_OURS = str(Path(__file__).parents[1])
_LIBRARIES = (str(Path(torch.__file__).parent), _OURS, sysconfig.get_paths()["stdlib"])
_PACKAGES = tuple({sysconfig.get_paths()[name] for name in ("purelib", "platlib")})


def _rank(file: str) -> int:
    """2 for the user's files, 1 for other packages', 0 for PyTorch's, Python's and ours."""
    if file.startswith(_PACKAGES) and not file.startswith(_LIBRARIES[:2]):
        return 1
    return 0 if file.startswith(_LIBRARIES) or file.startswith("<") else 2


def place_of(error: BaseException) -> str:
    """Return ` (FILE, line N: CODE)`, the deepest line of the user's in the traceback, or nothing.

    Without one, the deepest line of a package that is neither PyTorch nor this one.
    """
    found: list[tuple[int, traceback.FrameSummary]] = []
    link: Any = error
    while link is not None:
        found += [(_rank(f.filename), f) for f in traceback.extract_tb(link.__traceback__)]
        link = link.__cause__ or link.__context__
    return _describe(found)


def current_place(frame: FrameType | None) -> str:
    """Return the same of a running frame and its callers, outermost first."""
    return _describe([(_rank(f.filename), f) for f in traceback.extract_stack(frame)])


def _describe(found: Iterable[tuple[int, traceback.FrameSummary]]) -> str:
    found = list(found)
    best = max((rank for rank, _ in found), default=0)
    if best == 0:
        return ""
    frame = [f for rank, f in found if rank == best][-1]
    code = f": {frame.line}" if frame.line else ""
    return f" ({frame.filename}, line {frame.lineno}{code})"
