"""How much memory the device of an array has left."""

import os
from typing import Any

import jax


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
    free = []
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
