"""The cross entropy of a large vocabulary, whose logits are made in chunks of tokens and forgotten."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import arrays
from spectra.base.errors import SpectraError, StructureError
from spectra.base.trees import PyTree


@dataclasses.dataclass(frozen=True)
class VocabularyLoss:
    """Mean cross entropy of tokens under softmax(h W + b), in the memory of `chunk` rows of logits.

    With T tokens and V words, the logits, their softmax and the tangents of both take T V numbers each. Here
    a loop over chunks of tokens computes and uses them one chunk at a time, and recomputes them for every
    derivative. Instead of logits, the model returns (h, W) or (h, W, b): hidden states (..., d), the last
    layer's kernel (d, V), and its bias (V,). All JAX transformations work, for both orders of derivative.

    As the `loss_fn` of a `GGNOperator`, it gives the matrix with respect to the *logits*, Jᵀ ∇²ℓ J with W and
    b among the parameters, as if the model had returned logits. For a Hessian, call it in the loss:
    `loss_fn(params, batch) = vocabulary(model_fn(params, batch[0]), batch[1])`.

    Args:
        chunk: number of tokens whose logits are held at once.
        ignore_index: target value to ignore; the mean is over all others.

    Raises:
        SpectraError: chunk < 1.
        StructureError: outputs and targets do not match.

    Cost: the operations of the logits once more for every derivative; memory chunk V numbers.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def model_fn(params, x):
        ...     return jnp.tanh(x @ params["in"]), params["words"]
        >>> key = jax.random.key(0)
        >>> params = {"in": jnp.eye(4), "words": jax.random.normal(key, (4, 50))}
        >>> batch = jax.random.normal(key, (10, 4)), jnp.arange(10)
        >>> op = spectra.GGNOperator(model_fn, spectra.VocabularyLoss(chunk=4), params, batch)
        >>> (op @ params)["words"].shape
        (4, 50)
    """

    chunk: int = 256
    ignore_index: int = -100

    def __post_init__(self) -> None:
        if not isinstance(self.chunk, int) or self.chunk < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise SpectraError(f"chunk={self.chunk!r}: use a positive number of tokens.")

    def __call__(self, outputs: PyTree, targets: jax.Array) -> jax.Array:
        """The mean over tokens that count; zero where there are none."""
        hidden, kernel, bias = _parts(outputs, targets)

        @jax.checkpoint
        def body(total: jax.Array, piece: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            rows, labels = piece
            logits = _logits(rows, kernel, bias)
            counts = labels != self.ignore_index
            own = jnp.take_along_axis(logits, jnp.where(counts, labels, 0)[:, None], 1)[:, 0]
            return total + jnp.sum(jnp.where(counts, jax.nn.logsumexp(logits, 1) - own, 0)), None

        start = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
        start = arrays.carried(start, hidden, kernel, bias, targets)
        total, _ = lax.scan(body, start, self._pieces(hidden, targets))
        return total / jnp.maximum(self._count(targets), 1).astype(total.dtype)

    def gauss_newton(self, outputs: PyTree, targets: jax.Array, u: PyTree) -> PyTree:
        """Jᵀ ∇²ℓ J u for the Jacobian J of the logits with respect to (h, W) or (h, W, b)."""
        hidden, kernel, bias = _parts(outputs, targets)
        moved, kernel_moved, bias_moved = _parts(u, targets)
        share = 1 / jnp.maximum(self._count(targets), 1).astype(hidden.dtype)

        @jax.checkpoint
        def body(sums: Any, piece: Any) -> Any:
            (rows, labels), (tangents, _) = piece
            logits, push = jax.linearize(_logits, rows, kernel, bias)
            softmax = jax.nn.softmax(logits, 1)
            along = push(tangents, kernel_moved, bias_moved)
            back = softmax * (along - jnp.sum(softmax * along, 1, keepdims=True))
            back = back * (labels != self.ignore_index)[:, None] * share
            own, *rest = jax.linear_transpose(push, rows, kernel, bias)(back)
            return jax.tree.map(jnp.add, sums, rest), own

        zero = jax.tree.map(jnp.zeros_like, [kernel, bias])
        zero = arrays.carried(zero, hidden, kernel, bias, targets, moved, kernel_moved, bias_moved)
        pieces = self._pieces(hidden, targets), self._pieces(moved, targets)
        (kernel_back, bias_back), back = lax.scan(body, zero, pieces)
        back = back.reshape(-1, hidden.shape[-1])[: targets.size].reshape(hidden.shape)
        return jax.tree.structure(outputs).unflatten((back, kernel_back, bias_back)[: len(outputs)])

    def weight(self, batch: PyTree) -> jax.Array:
        """The number of tokens not ignored: the weight of a batch (inputs, targets) in a mean."""
        return self._count(batch[1])

    def _count(self, targets: jax.Array) -> jax.Array:
        return jnp.sum(targets != self.ignore_index)

    def _pieces(self, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Chunks of tokens along a new leading axis; those added to fill the last one do not count."""
        rows, labels = hidden.reshape(-1, hidden.shape[-1]), jnp.ravel(targets)
        size = max(1, min(self.chunk, len(labels)))
        more = -len(labels) % size
        rows = arrays.pad(rows, ((0, more), (0, 0)))
        labels = arrays.pad(labels, [(0, more)], self.ignore_index)
        return rows.reshape(-1, size, rows.shape[-1]), labels.reshape(-1, size)


def _logits(rows: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return rows @ kernel + bias


def _parts(outputs: PyTree, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states, kernel and bias, zeros where there is none."""
    parts: list[Any] = list(cast("list[Any]", outputs)) if isinstance(outputs, (tuple, list)) else []
    if len(parts) not in (2, 3):
        name = type(cast("Any", outputs)).__name__
        raise StructureError(
            f"VocabularyLoss takes (hidden, kernel) or (hidden, kernel, bias), not {name}: "
            "return hidden states and the last layer's weights instead of logits."
        )
    hidden, kernel, *rest = parts
    bias: jax.Array = rest[0] if rest else jnp.zeros(kernel.shape[-1:], kernel.dtype)
    if (
        kernel.ndim != 2
        or hidden.shape != (*targets.shape, kernel.shape[0])
        or bias.shape != kernel.shape[1:]
    ):
        raise StructureError(
            f"VocabularyLoss of hidden states {hidden.shape}, kernel {kernel.shape}, bias {bias.shape} and "
            f"targets {targets.shape}: give (..., d), (d, V), (V,) and (...)."
        )
    return hidden, kernel, bias
