"""Measuring side by side: alternate the contestants, report medians and the spread.

A host may give a virtual machine's processors to other machines for a while; Linux counts that time as
stolen. A turn that lost more than the share `QUIET` of its time is taken again, whatever it measured, at most
`TRIES` times or for `PATIENCE` seconds, and the turn that lost least counts. Elsewhere every turn counts.
"""

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import TypeVar

import jax

T = TypeVar("T")
Times = dict[str, list[float]]
BURST = 0.2
"""Seconds for which a short call is repeated; see `seconds`."""
QUIET, TRIES, PATIENCE = 0.02, 8, 60.0
stolen: list[float] = []
"""The share of its processors' time that every turn lost that counted."""


def quietest(measure: Callable[[], T], tries: int = TRIES) -> T:
    """What `measure` finds in the quietest of a few turns."""
    turns, start = [], time.perf_counter()
    while len(turns) < tries and time.perf_counter() - start < PATIENCE:
        before = _processor_time()
        found = measure()
        busy, lost = (now - then for now, then in zip(_processor_time(), before, strict=True))
        turns.append((lost / max(1, lost + busy), found))
        if turns[-1][0] <= QUIET:
            break
    share, found = min(turns, key=lambda turn: turn[0])
    stolen.append(share)
    return found


def _processor_time() -> tuple[int, int]:
    """Ticks since the machine's start in which its processors worked, and in which they were taken away."""
    try:
        with open("/proc/stat") as lines:
            user, nice, system, _, _, irq, softirq, steal = map(int, next(lines).split()[1:9])
    except OSError:
        return 0, 0
    return user + nice + system + irq + softirq, steal


def seconds(function: Callable, burst: float = BURST, tries: int = TRIES) -> float:
    """Seconds of one call in its steady state, in the quietest of a few turns.

    The first call wakes the threads of its framework while those of the one before still spin on the cores,
    some 10 ms: it only says how often to repeat what is short. What lasts longer counts as it is.
    """

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            jax.block_until_ready(function())
        return (time.perf_counter() - start) / count

    def turn() -> float:
        first = run(1)
        return first if first >= burst else run(math.ceil(burst / first))

    return quietest(turn, tries)


def alternate(
    functions: dict[str, Callable],
    *,
    rounds: int = 7,
    warm: dict[str, Callable] | None = None,
    once: tuple[str, ...] = (),
    quiet: bool = False,
    burst: float = BURST,
    tries: int = TRIES,
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
            times[name].append(seconds(function, burst, tries))
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


def unrest() -> str:
    """What the host took in the turns that counted so far; empty where nothing says so."""
    if not any(stolen):
        return ""
    return (
        f"Of the processors' time the host took at most {max(stolen):.0%}, in the median "
        f"{statistics.median(stolen):.1%}, in the turns that count."
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
