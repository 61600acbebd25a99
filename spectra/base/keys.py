"""JAX random keys as users pass them: checked where they come in, so that errors name the argument."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base.errors import SpectraError

BESIDE_PAIRS = 2**31 - 3
"""Of keys beside eigenpairs; no probe and no start vector reaches it."""
ADVICE = "pass a JAX random key, for example jax.random.key(0)."


def require_key(key: jax.Array | None, name: str = "key") -> jax.Array:
    """One JAX random key, in the typed form; raises for anything else.

    Args:
        key: what a user passed: a typed key, or the numbers of one as `jax.random.PRNGKey` makes them.
        name: of the argument.

    Raises:
        SpectraError: no key, or several.
    """
    if key is None:
        raise SpectraError(f"{name}=None: random probes need a key; {ADVICE}")
    if not isinstance(key, jax.Array | np.ndarray):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise SpectraError(f"{name}={key!r} is no random key: {ADVICE}")
    found: Any = key
    if not jnp.issubdtype(found.dtype, jax.dtypes.prng_key):
        refusal = SpectraError(
            f"{name} is an array of {key.dtype} of shape {key.shape}, and no random key: {ADVICE}"
        )
        if found.dtype != jnp.uint32:  # 64 bits would be cut
            raise refusal
        try:  # JAX knows how many numbers a key has: that depends on its configuration
            found = cast("Any", jax.random.wrap_key_data)(jnp.asarray(found))
        except (TypeError, ValueError) as error:
            raise refusal from error
    if found.shape:
        raise SpectraError(
            f"{name} is an array of keys of shape {found.shape}: pass one of them, or jax.vmap over them."
        )
    return found


def beside_pairs(key: jax.Array, count: int, use: int) -> jax.Array:
    """A key for vectors outside of eigenpairs that may have been found with the same key.

    Where an eigenvalue repeats, its eigenvectors are what a random start has of its space: the same start has
    nothing left there beside them.

    Args:
        key: what a user passed.
        count: of the pairs: a chain of calls takes out more each time.
        use: of the random numbers; 0 for start vectors, 1 for probes.
    """
    for number in (BESIDE_PAIRS, use, count):
        key = jax.random.fold_in(key, number)
    return key


def key_check(fn: Callable[..., Any]) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """What checks `key=` among the keyword arguments of a call of `fn`; None where it takes no key.

    A key that may be left out, or may be None by its annotation, is checked where it is given: not every way
    of computing draws numbers.
    """
    parameter = inspect.signature(fn).parameters.get("key")
    if parameter is None:
        return None
    may_be_none = "None" in str(parameter.annotation)

    def checked(kwargs: dict[str, Any]) -> dict[str, Any]:
        if "key" not in kwargs or (kwargs["key"] is None and may_be_none):
            return kwargs
        return kwargs | {"key": require_key(kwargs["key"])}

    return checked
