"""Preconditioners of a linear system as users ask for them: by name, as known pairs, as an approximation."""

from typing import Any

import jax
import jax.numpy as jnp

from spectra.base import draws, meshes, trees
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
UNKNOWN = 0.1
"""Of the largest eigenvalue of K, times the relative error of K: below that its eigenvalues say nothing of
those of H, and 1 / (K + δ) with a smaller δ multiplies by noise. Products counted on three trained networks
of 870 parameters, where K was wrong by 0.4 to 1.0, at a shift of 1e-3 λ₁ of the Gauss-Newton matrix: 43, 45
and 45 without K, 44 to 104 with the shift as δ, 31 to 38 with 0.05 to 0.2, and 32, 32 and 31 with the exact
blocks that K approximates."""


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
                f"preconditioner={preconditioner!r}: use 'nystrom', Eigenpairs or an operator."
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
    """(K + δ)⁻¹ with a damping δ that grows with the error of K, which one product shows."""
    v = draws.sphere_sample(jax.random.key(ERROR_KEY), op.structure, meshes.places(op.like))
    image = op @ v
    size, wrong = trees.norm(image), trees.norm(jax.tree.map(jnp.subtract, image, kfac @ v))
    error = jnp.where(wrong < size, wrong / jnp.where(size > 0, size, 1), 1)
    damping: Any = jnp.maximum(shift, UNKNOWN * error * kfac.eigenvalues()[-1])
    return kfac.inverse(damping), 1


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
