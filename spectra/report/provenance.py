"""Where a report comes from: versions, devices, key and time."""

import platform
from datetime import UTC, datetime
from typing import Any

import jax
import numpy as np

from spectra.operators.base import LinearOperator


def environment() -> dict[str, Any]:
    """Versions, device and date, for the provenance of a result."""
    import spectra  # the package's own version, which is complete only when everything has been imported

    device = jax.local_devices()[0]
    return {
        "spectra": spectra.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{device.platform}: {device.device_kind}",
        "num_devices": jax.device_count(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def provenance_of(op: LinearOperator, key: jax.Array, seconds: float) -> dict[str, Any]:
    """What made a report of an operator, and how long it took."""
    return {
        **environment(),
        "seconds": seconds,
        "operator": type(op).__name__,
        "dtype": str(op.dtype),
        "computes_in": op.computes_in,
        "mode": getattr(op, "mode", ""),
        "linearized": bool(getattr(op, "linearized", False)),
        "matmul_precision": getattr(op, "matmul_precision", "highest"),
        "key": np.asarray(jax.random.key_data(key) if _is_typed(key) else key).ravel().tolist().__str__(),
    }


def _is_typed(key) -> bool:
    return jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key)
