"""JSON from files that may hold anything: its depth and the memory that it will take are bounded first."""

import json
from typing import Any

MAX_BYTES = 3 * 2**27
"""Bytes of memory that one text may take once it is read, which is up to eighty times its length."""
MAX_DEPTH = 100
"""Levels of nesting in what is saved: those of parameter trees are a tenth of it."""
# Bytes that CPython takes for what a character stands for: an object with its table, a list, a pair, an item.
_COSTS = {b"{": 240, b"[": 72, b":": 100, b",": 64}


class JsonError(ValueError):
    """A text is not JSON, or too deep or too large to be read."""


def memory_of(data: bytes) -> int:
    """A bound on the bytes that a JSON text takes once it is read."""
    letters = 3 if data.isascii() else 9  # itself, as text and in its values: up to four bytes a character
    return letters * len(data) + sum(data.count(mark) * size for mark, size in _COSTS.items())


def parse(data: bytes, *, max_bytes: int = MAX_BYTES, **hooks: Any) -> Any:
    """The value of a JSON text in UTF-8; `hooks` as for `json.loads`.

    Raises:
        JsonError: it is not JSON, too deep, or would take more than `max_bytes` of memory.
    """
    if (needed := memory_of(data)) > max_bytes:
        raise JsonError(f"its JSON would take {needed >> 20} MiB of memory, more than {max_bytes >> 20}")
    try:
        return json.loads(data.decode(), **hooks)
    except RecursionError:
        raise JsonError("it is nested too deeply") from None
    except ValueError as error:
        raise JsonError(f"it is not JSON: {str(error)[:200]}") from None
