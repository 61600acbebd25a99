"""Measuring side by side: alternate the contestants, report medians and the spread."""

import os
import platform
import statistics
import time
from collections.abc import Callable

import jax


def alternate(functions: dict[str, Callable], *, rounds: int = 7) -> dict[str, list[float]]:
    """Seconds of each call, one round after another, after one unmeasured call of each."""
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            times[name].append(time.perf_counter() - start)
    return times


def median_ms(times: list[float], steps: int = 1) -> float:
    return 1e3 * statistics.median(times) / steps


def spread(times: list[float]) -> float:
    """Half the range of the middle half, relative to the median."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / statistics.median(ordered)


def ratio(times: dict[str, list[float]], name: str, reference: str) -> float:
    """Median over rounds of the ratio within a round: load that comes and goes cancels."""
    pairs = zip(times[name], times[reference], strict=True)
    return statistics.median(a / b for a, b in pairs)


def machine() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        model = platform.processor()
    device = jax.devices()[0]
    return (
        f"{device.platform} {device.device_kind}; host {model}, {os.cpu_count()} cores; "
        f"jax {jax.__version__}, Python {platform.python_version()}"
    )
