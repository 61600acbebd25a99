"""Measuring side by side: alternate the contestants, report medians and the spread."""

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import jax

Times = dict[str, list[float]]
BURST = 0.2
"""Seconds for which a short call is repeated; see `seconds`."""


def seconds(function: Callable, burst: float = BURST) -> float:
    """Seconds of one call in its steady state.

    The first call wakes the threads of its framework while those of the one before still spin on the cores,
    some 10 ms: it only says how often to repeat what is short. What lasts longer counts as it is.
    """

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(function())
        return (time.perf_counter() - start) / count

    first = run(1)
    return first if first >= burst else run(math.ceil(burst / first))


def alternate(
    functions: dict[str, Callable],
    *,
    rounds: int = 7,
    warm: dict[str, Callable] | None = None,
    once: tuple[str, ...] = (),
    quiet: bool = False,
    burst: float = BURST,
) -> Times:
    """Seconds of each call, one round after another, after one unmeasured call of each.

    `warm` replaces the unmeasured call by a shorter one that compiles as much; those in `once` take part in
    the first round only, for peers that take minutes.
    """
    for name, function in functions.items():
        jax.block_until_ready((warm or {}).get(name, function)())
    times: Times = {name: [] for name in functions}
    for turn in range(rounds):
        for name, function in functions.items():
            if turn and name in once:
                continue
            times[name].append(seconds(function, burst))
            if not quiet and times[name][-1] > 1:
                print(f"  {name}: {times[name][-1]:.3g} s", file=sys.stderr, flush=True)
    return times


def median_ms(times: list[float], steps: int = 1) -> float:
    return 1e3 * statistics.median(times) / steps


def spread(times: list[float]) -> float:
    """Half the range of the middle half, relative to the median."""
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / statistics.median(ordered)


def ratio(times: Times, name: str, reference: str) -> float:
    """Median over rounds of the ratio within a round: load that comes and goes cancels."""
    pairs = zip(times[name], times[reference], strict=False)
    return statistics.median(a / b for a, b in pairs)


def machine() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            model = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        model = platform.processor()
    device = jax.devices()[0]
    kind = "" if device.device_kind == device.platform else f" {device.device_kind}"
    return f"{device.platform}{kind}; host {model}, {os.cpu_count()} cores; " + ", ".join(
        [f"Python {platform.python_version()}", *versions("jax", "torch")]
    )


def versions(*packages: str) -> list[str]:
    """Those that are installed, with their versions."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found
