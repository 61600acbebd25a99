"""Time, memory and kernels on the first device of this process."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from benchmarks.timing import Times, alternate

BURST, ROUNDS = 0.1, 5
REHEARSAL = "SPECTRA_CARD_REHEARSAL"
"""Of the environment: compile, and measure nothing."""


def first(function: Callable, name: str = "first") -> dict[str, float]:
    """Seconds of a call that compiles, under a name; nothing where its programs may be kept ones."""
    start = time.perf_counter()
    jax.block_until_ready(function())
    kept = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return {} if kept else {name: round(time.perf_counter() - start, 2)}


def times(functions: dict[str, Callable], rounds: int = ROUNDS, burst: float = BURST) -> Times:
    """Seconds of calls in turn, after one of each; their programs are compiled side by side."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda function: jax.block_until_ready(function()), functions.values()))
    if os.environ.get(REHEARSAL):
        rounds, burst = 1, 0.0
    return alternate(functions, rounds=rounds, burst=burst, quiet=True)


def milliseconds(
    functions: dict[str, Callable], rounds: int = ROUNDS, burst: float = BURST
) -> dict[str, float]:
    """The medians of `times`."""
    return {
        name: round(1e3 * statistics.median(own), 4) for name, own in times(functions, rounds, burst).items()
    }


def peak() -> int | None:
    """Bytes of the device that this process has held at most so far; None where the device keeps no books."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def kernels(function: Callable) -> dict[str, float]:
    """What the device started during one call, and for which part of the call it was at work.

    A launched graph counts as what it holds where the profiler sees into it.
    """
    jax.block_until_ready(function())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            start = time.perf_counter()
            jax.block_until_ready(function())
            elapsed = time.perf_counter() - start
        found = next(Path(folder).rglob("*.xplane.pb"), None)
        planes = [] if found is None else list(jax.profiler.ProfileData.from_file(str(found)).planes)
        events = [
            (event.start_ns, event.start_ns + event.duration_ns, event.name)
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    copies = sum("memcpy" in name.lower() for _, _, name in events)
    return {
        "kernels": len(events),
        "copies": copies,
        "busy": round(_covered(events) / 1e9 / elapsed, 4),
        "lasted": round(elapsed, 5),
    }


def _covered(events: list[tuple[float, float, str]]) -> float:
    """Nanoseconds in which at least one was running."""
    total, until = 0.0, float("-inf")
    for start, end, _ in sorted(events):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
