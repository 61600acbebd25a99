"""What the host gives: memory that is left, threads for small dense problems, other processes of a run."""

import contextlib
import functools
import importlib
import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController


def available_bytes(device: Any = None) -> int | None:
    """Free bytes of a device, of the machine for a CPU device, None where neither can be asked."""
    device = device or jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    machine = _machine_bytes()  # which all CPU devices of this process share
    return None if machine is None else machine // jax.local_device_count(device.platform)


def _machine_bytes() -> int | None:
    """MemAvailable of the machine, or what its control group leaves, whichever is less."""
    free: list[int] = []
    try:
        with open("/proc/meminfo") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        free.append(int(fields["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError):
        try:
            free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except (OSError, ValueError, AttributeError):
            return None
    try:
        with (
            open("/sys/fs/cgroup/memory.max") as limit,
            open("/sys/fs/cgroup/memory.current") as used,
        ):
            free.append(int(limit.read()) - int(used.read()))
    except (OSError, ValueError):  # no control group, or no limit ("max")
        pass
    return max(0, min(free))


def resident_bytes() -> int | None:
    """What this process holds in memory; None where the system doesn't say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def one_thread() -> Generator[None]:
    """Hold the BLAS of NumPy and SciPy to one thread; also a decorator. The caller's number comes back."""
    with _pools().limit(limits=1, user_api="blas"):  # of several Python threads the first one decides
        yield


@functools.cache
def _pools() -> "ThreadpoolController":
    from threadpoolctl import ThreadpoolController

    importlib.import_module("scipy.linalg")  # brings a BLAS of its own, which JAX calls as well

    return ThreadpoolController()


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def largest(*values: float) -> tuple[float, ...]:
    """The largest of each number over all processes, which must all call this."""
    if jax.process_count() == 1:
        return values
    from jax.experimental.multihost_utils import process_allgather

    gathered = np.asarray(process_allgather(np.asarray(values, np.float32)))
    return tuple(float(x) for x in gathered.reshape(jax.process_count(), -1).max(axis=0))


def combined(value: int) -> int:
    """The exclusive or of a 32-bit number over all processes, which must all call this."""
    if jax.process_count() == 1:
        return value
    from jax.experimental.multihost_utils import process_allgather

    gathered = np.asarray(process_allgather(np.asarray(value, np.uint32))).ravel()
    return functools.reduce(int.__xor__, map(int, gathered))
