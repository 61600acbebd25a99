"""What a program has the host and the cores of a card do, from what XLA writes beside its HLO.

The list of thunks is what the host runs. A command buffer is launched as one; what lies in it, conditionals
too, is decided on the card. Outside of it the host waits for the predicate of every conditional, and of every
trip of a loop.
"""

import collections
import re
from pathlib import Path

_THUNK = re.compile(r"^( *)\d+: (k\w+)")
_TENSOR_CORE = re.compile(r"\b(?:wgmma\.mma_async|wmma\.mma|mma)\.sync\S*")
_DOUBLE = re.compile(r"\b(?:add|sub|mul|fma|div|sqrt|rcp|cvt)\.\S*f64\S*")


def on_host(text: str) -> dict[str, int]:
    """Number of thunks that the host runs one by one, by kind; those of branches and bodies included."""
    found: collections.Counter[str] = collections.Counter()
    buffer: int | None = None  # the indentation of the command buffer around us
    for line in text.splitlines():
        thunk = _THUNK.match(line)
        if not thunk or (buffer is not None and len(thunk[1]) > buffer):
            continue
        buffer = len(thunk[1]) if thunk[2] == "kCommandBuffer" else None
        found[thunk[2]] += 1
    return dict(found)


def instructions(ptx: str) -> dict[str, int]:
    """Instructions of tensor cores by the types that they multiply, and float64 arithmetic."""
    found = collections.Counter(types(name) for name in _TENSOR_CORE.findall(ptx))
    found["f64"] += len(_DOUBLE.findall(ptx))
    return {kind: count for kind, count in found.items() if count}


def types(instruction: str) -> str:
    """The type that a tensor core reads: the last but one, f32.tf32.tf32.f32."""
    kinds = re.findall(r"\b(?:tf32|bf16|f16|f64|e4m3|e5m2|s8|u8|f32)\b", instruction)
    return next((kind for kind in kinds if kind != "f32"), "unknown")


def read(folder: Path) -> dict:
    """Both, from the folder into which XLA has written a program."""
    thunks = max(folder.glob("*thunk_sequence*.txt")).read_text()  # after all passes, where there were any
    ptx = "\n".join(path.read_text() for path in folder.glob("*.ptx"))
    return {"on_host": on_host(thunks), "instructions": instructions(ptx)}
