"""Spectra of the parts of a Gauss-Newton matrix that classes make."""

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError, Status
from spectra.base.trees import PyTree
from spectra.estimators import blocks
from spectra.estimators.trace import trace
from spectra.krylov.eigsh import eigsh
from spectra.operators.classes import class_means, parts_of, require_split
from spectra.operators.ggn import GGNOperator
from spectra.results import ClassSplit, Eigenpairs


@automatic
def class_split(
    op: GGNOperator, *, key: jax.Array, num_eigenvalues: int | None = None, num_matvecs: int = 64
) -> ClassSplit:
    """Split the Gauss-Newton matrix of a classifier by class, and compute the spectrum of each part.

    In a trained classifier the outliers of the spectrum are those of the class means, and variation within
    the classes forms the bulk. `class_operators` has the formulas, and the parts as operators.

    Args:
        op: `GGNOperator` of the mean softmax cross-entropy.
        key: JAX random key.
        num_eigenvalues: k, for the whole, within and same; default: the number of classes + 2.
        num_matvecs: products for each of the two traces.

    Returns:
        `ClassSplit`, which prints as a table. The traces of the class means and of the cross part are sums of
        squares of mean gradients and need no probes.

    Raises:
        StructureError, DataError, MemoryLimitError: as `class_operators`.
        SpectraError: k out of range.

    Cost: C² gradients, three times the products of `eigsh` for k pairs, and two traces.

    References:
        Papyan, arXiv:1901.08244.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def loss_fn(logits, labels):
        ...     return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])
        >>> x, y = jax.random.normal(jax.random.key(0), (60, 2)), jnp.arange(60) % 3
        >>> op = spectra.GGNOperator(lambda w, x: x @ w, loss_fn, jnp.zeros((2, 3)), (x, y))
        >>> split = spectra.class_split(op, key=jax.random.key(1), num_eigenvalues=2)
        >>> split.num_classes, split.class_means.shape, split.cross.shape
        (3, (3,), (6,))
    """
    require_split(op)
    trees.require_values("class_split", (op.params, op.data, key))
    means = class_means(op)
    parts, classes = parts_of(op, means), len(means.weights)
    k = min(classes + 2, op.size) if num_eigenvalues is None else num_eigenvalues
    if not 1 <= k <= op.size:
        raise SpectraError(f"num_eigenvalues={k} is not between 1 and the order of the operator, {op.size}.")
    found: dict[str, Eigenpairs] = {}
    for i, (name, part) in enumerate({"whole": op, "within": parts["within"], "same": parts["same"]}.items()):
        found[name] = eigsh(part, k, which="LA", key=jax.random.fold_in(key, i), tol=1e-4)
    traces = [
        trace(parts[name], key=jax.random.fold_in(key, 3 + i), num_matvecs=num_matvecs)
        for i, name in enumerate(("within", "same"))
    ]
    middles, cross = (_eigenvalues(parts[name].rows) for name in ("class_means", "cross"))
    pairs = found.values()
    return ClassSplit(
        **{name: np.asarray(x.values, float)[::-1] for name, x in found.items()},
        class_means=middles,
        cross=cross,
        class_trace=float(middles.sum()),
        cross_trace=float(cross.sum()),
        within_trace=traces[0],
        same_trace=traces[1],
        weights=means.weights,
        num_classes=classes,
        num_matvecs=sum(x.num_matvecs for x in pairs) + sum(x.num_matvecs for x in traces),
        status=Status.CONVERGED if all(np.all(x.converged) for x in pairs) else Status.NOT_CONVERGED,
    )


def _eigenvalues(rows: PyTree) -> np.ndarray:
    """Of Σ r rᵀ, descending: those of the Gram matrix of the rows."""
    gram = np.asarray(jnp.sum(blocks.gram(rows, rows), axis=0), float)
    return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0.0)
