"""What makes a run the one it is: a checkpoint of another one is refused."""

from typing import Any

import jax
import numpy as np

from spectra import _tree
from spectra._digest import tree_digest
from spectra.operators.base import LinearOperator


def describe(op: LinearOperator, key: jax.Array, num_steps: int, row_dtype: Any) -> dict[str, Any]:
    """What makes a run the one it is, in words and checksums that do not depend on the devices.

    One product with a fixed vector stands for the loss function and the data: it shows a change in
    either, which their names would not.
    """
    u = _tree.sphere_sample(jax.random.key(0), op.structure)
    product = op @ u
    data = jax.random.key_data(key) if jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return {
        "operator": f"{type(op).__name__} of order {op.size}",
        "parameters": tree_digest(op.like) if _tree.has_values(op.like) else 0,
        "key": np.asarray(data).ravel().tolist(),
        "num_steps": num_steps,
        "basis_dtype": str(row_dtype or op.dtype),
        "product": [float(x) for x in _numbers(u, product)],
    }


@jax.jit
def _numbers(u, product):
    return _tree.vdot(u, product), _tree.norm(product)


def differences(mine: dict[str, Any], saved: dict[str, Any], precision: float) -> list[str]:
    """Names of what differs; products may differ by rounding."""
    names = [name for name in mine if name != "product" and mine[name] != saved.get(name)]
    (value, size), (other, _) = mine["product"], saved.get("product", (np.inf, 0.0))
    if not abs(value - other) <= 1000 * precision * size:
        names.append("product (loss function or data)")
    return names
