"""How far rounding moves the outputs and the gradient of a graph, by rounding every number in it at random.

Where tanh or a softmax is one to rounding, a gradient is what rounding leaves of its slope, and two correct
evaluations have nothing in common. Parameters that move by a rounding each do not show that.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectra.bridge import interpreter
from spectra.bridge.model import TorchModel
from spectra.operators.stochastic import SPREAD, rounded_at_random

DRAWS = 4
FURTHER, HALF_FURTHER = 256.0, 16.0
"""Numbers are also moved by so many roundings, and what that changes is divided by as much. The smaller of
both counts: at ties decisions change whatever the size of a rounding, which would hide another derivative."""
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

Noise = tuple[Mapping[int, float], Mapping[str, float]]
"""Root mean squares of what rounding changes: of outputs by position, of gradients by name."""


def noise_of(
    model: TorchModel,
    params: Mapping[str, jax.Array],
    inputs: Sequence[Any],
    cotangents: Sequence[Any],
    wanted: Sequence[str],
    half: bool,
) -> Noise:
    """What rounding changes, or nothing where the graph cannot be evaluated as one program.

    Args:
        model: what is evaluated.
        params: its parameters.
        inputs: one array for each input of the graph.
        cotangents: of each output, None where there is none.
        wanted: the parameters whose gradient counts.
        half: numbers have half precision.
    """
    arrays = [x for x in cotangents if x is not None]
    weighted = [i for i, x in enumerate(cotangents) if x is not None]
    fixed = {**model.buffers, **model.constants, **{k: v for k, v in params.items() if k not in wanted}}

    def outputs(chosen: Any, fixed: Any, inputs: Any) -> list[jax.Array]:
        # With a check, attention stays as it is written.
        found = interpreter.evaluate(model.graph, {**fixed, **chosen}, inputs, lambda *_: None)
        return [found[i] for i in weighted]

    def both(chosen: Any, fixed: Any, inputs: Any, cotangents: Any) -> Any:
        found, pullback = jax.vjp(lambda chosen: outputs(chosen, fixed, inputs), chosen)
        return found, pullback(cotangents)[0]

    chosen = {k: params[k] for k in wanted}
    structure = jax.tree.structure((arrays, chosen))

    def rounded(salt: Any, *args: Any, spread: float) -> list[Any]:
        return rounded_at_random(both, salt, *args, spread=spread)

    sizes: list[np.ndarray] = []
    try:
        for scale in (1.0, HALF_FURTHER if half else FURTHER):
            program = jax.jit(partial(rounded, spread=scale * SPREAD), compiler_options=QUICK)
            draws = [program(jnp.uint32(i), chosen, fixed, inputs, arrays) for i in range(DRAWS)]
            sizes.append(np.array([_spread(list(leaves)) / scale for leaves in zip(*draws, strict=True)]))
    except Exception:  # as where shapes depend on values: the comparison says what is wrong without it
        return {}, {}
    found, gradients = structure.unflatten(np.minimum(*sizes).tolist())
    return dict(zip(weighted, found, strict=True)), gradients


def _spread(draws: list[Any]) -> float:
    """Root mean square of the distance of an evaluation from another, each evaluation being as far off."""
    x = np.stack([np.asarray(draw, np.complex128).ravel() for draw in draws])
    deviation = np.where(np.isfinite(x).all(axis=0), x - np.where(np.isfinite(x), x, 0).mean(axis=0), 0)
    return float(np.sqrt(2 * (np.abs(deviation) ** 2).sum() / (len(x) - 1)))


def moved(x: jax.Array, eps: float, rng: np.random.Generator) -> jax.Array:
    """Every entry moved by a rounding of its own size and of the array's.

    Those that stand for infinity, as a mask has them, stay.
    """
    if not jnp.issubdtype(x.dtype, jnp.inexact) or not x.size:
        return x
    wide = np.array(x.astype(jnp.promote_types(x.dtype, jnp.float32)), order="C")
    largest = float(jnp.finfo(x.dtype).max) / 4

    def ordinary(piece: np.ndarray) -> np.ndarray:
        return np.abs(piece) < largest  # no NaN

    # In float64: a square of 1e19 is none of float32's numbers.
    numbers = (np.abs(piece[ordinary(piece)]).astype(np.float64) for (piece,) in pieces(wide))
    mean = norm(list(numbers)) / x.size**0.5
    for (piece,) in pieces(wide):
        kept = ordinary(piece)
        own = piece[kept]
        piece[kept] = own + eps * (np.abs(own) + mean) * rng.standard_normal(own.shape)
    return jnp.asarray(wide).astype(x.dtype)


def pieces(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Flat views of a million numbers: a vocabulary's table thrice in complex128 takes gigabytes."""
    flat = [x.reshape(-1) for x in arrays]
    for start in range(0, flat[0].size, 2**20):
        yield tuple(x[start : start + 2**20] for x in flat)


def norm(arrays: Sequence[np.ndarray]) -> float:
    """The Euclidean norm of all finite entries."""
    finite = [np.linalg.norm(np.where(np.isfinite(x), x, 0).ravel()) for x in arrays]
    return float(np.linalg.norm(finite)) if finite else 0.0
