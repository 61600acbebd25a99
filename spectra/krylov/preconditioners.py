"""Preconditioners of a linear system as users ask for them: by name, as known pairs, as an approximation."""

from typing import Any

import jax
import jax.numpy as jnp

from spectra.base import draws, trees
from spectra.base.errors import SpectraError, StructureError
from spectra.base.files import program_digest, tree_digest
from spectra.base.trees import PyTree
from spectra.krylov.nystrom import deflation, nystrom
from spectra.operators.base import LinearOperator
from spectra.operators.dense import FunctionOperator
from spectra.operators.kfac import EKFACOperator, KFACOperator
from spectra.results import Eigenpairs
from spectra.runs.watch import Journal

ERROR_KEY = 41
UNKNOWN = 0.3
"""Of the largest eigenvalue of H, times the relative error of K: below that the eigenvalues of K say nothing
of those of H, and 1 / (K + δ) with a smaller δ multiplies by noise. Products of textbook CG at a shift of
1e-3 λ₁ of the Gauss-Newton matrix, without K and with 0.03, 0.1 and 0.3: 70 and 78, 69, 59 (85,002
parameters, K wrong by 0.8); 66 and 75, 66, 64 (890 parameters, by 0.9; with the exact blocks 60)."""
UNRELATED = 1e-3
"""Cosine of the angle between H and K that is taken where they show none: little is left of K then."""


def as_preconditioner(
    preconditioner: Any,
    op: LinearOperator,
    shift: Any,
    key: jax.Array | None,
    traced: bool,
    *,
    sides: int = 1,
    tol: float = 1e-5,
    journal: Journal | None = None,
) -> tuple[LinearOperator | None, int]:
    """What was asked for as an operator near (H + shift I)⁻¹, and the products that it took."""
    if preconditioner is None:
        return None, 0
    if isinstance(preconditioner, str):
        if preconditioner != "nystrom":
            raise SpectraError(
                f"preconditioner={preconditioner!r}: use 'nystrom', Eigenpairs, or an operator, such as "
                "spectra.KFACOperator(model_fn, loss_fn, params, data)."
            )
        if key is None:
            raise SpectraError("preconditioner='nystrom' draws a sketch: pass key, say jax.random.key(0).")
        return nystrom(op, shift, key, traced, sides, tol, journal)
    if isinstance(preconditioner, Eigenpairs):
        return deflation(op, preconditioner, shift), 0
    if not isinstance(preconditioner, LinearOperator):
        function = preconditioner if callable(preconditioner) else getattr(preconditioner, "mv", None)
        if function is None:
            raise StructureError(
                f"preconditioner is a {type(preconditioner).__name__}: pass 'nystrom', Eigenpairs, or an "
                "operator or a function that multiplies with an approximate inverse."
            )
        preconditioner = FunctionOperator(function, op.like)
    trees.check_structure(preconditioner.structure, op.structure, "the preconditioner's vector")
    if isinstance(preconditioner, KFACOperator | EKFACOperator):  # of H, not of its inverse
        if not trees.is_traced(shift) and not float(shift) > 0:
            raise SpectraError(
                f"shift={shift}: {type(preconditioner).__name__} as a preconditioner is damped by the shift, "
                "which has to be positive; pass kfac.inverse(damping) with a damping of your own."
            )
        return _factored(preconditioner, op, shift)
    if preconditioner.on_host:
        raise SpectraError("a preconditioner cannot stream its data, because it is applied in every step.")
    return preconditioner, 0


def _factored(
    kfac: KFACOperator | EKFACOperator, op: LinearOperator, shift: Any
) -> tuple[LinearOperator, int]:
    """(K + δ/s)⁻¹, near a multiple of (H + shift)⁻¹, from two products.

    The first, with a random vector v, shows the scale s at which sK is nearest to H in Frobenius norm, and
    how far off it still is. The second, with Hv, shows |H|: about the largest eigenvalue, from below. Both
    are of H. K may miss that eigenvalue, which layers share: on a decoder, that of K was 1/30 of it.
    """
    v = draws.unit_vector(jax.random.key(ERROR_KEY), op)
    (size, image), (own, guess) = _length_and_direction(op @ v), _length_and_direction(kfac @ v)
    cosine = jnp.clip(trees.vdot(image, guess), UNRELATED, 1)
    error = trees.norm(jax.tree.map(lambda x, y: x - (cosine * y).astype(x.dtype), image, guess))
    largest = trees.norm(op @ image)
    scale = jnp.where((size > 0) & (own > 0), cosine * size / jnp.where(own > 0, own, 1), 1)
    damping: Any = jnp.maximum(shift, UNKNOWN * jnp.minimum(error, 1) * largest) / scale
    return kfac.inverse(damping), 2


def _length_and_direction(v: PyTree) -> tuple[jax.Array, PyTree]:
    length = trees.norm(v)
    return length, trees.scale(jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0), v)


def identity(preconditioner: Any, structure: PyTree) -> Any:
    """What tells one preconditioner from another, for a checkpoint: its name, its numbers and its program."""
    if preconditioner is None or isinstance(preconditioner, str):
        return preconditioner
    if isinstance(preconditioner, Eigenpairs):
        return [preconditioner.which, tree_digest((preconditioner.values, preconditioner.vectors))]
    if isinstance(preconditioner, LinearOperator):
        if preconditioner.on_host:  # refused before the run
            return None
        program = jax.make_jaxpr(type(preconditioner).mv)(preconditioner, structure)
        return [type(preconditioner).__name__, tree_digest(preconditioner), program_digest(program)]
    function = preconditioner if callable(preconditioner) else getattr(preconditioner, "mv", None)
    return None if function is None else program_digest(jax.make_jaxpr(function)(structure))
