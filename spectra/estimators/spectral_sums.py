"""Traces of functions that have a name: log-determinant and effective dimension."""

from typing import Any

import jax
import numpy as np

from spectra.base import trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError
from spectra.estimators.functions import Source, module_of, trace_of
from spectra.results import Estimate


@automatic
def logdet(source: Source, shift: float = 0.0, *, key: jax.Array | None = None, **options: Any) -> Estimate:
    """Estimate log det(H + δI) = Σ_i log(λ_i + δ), with a bracket from Gauss and Gauss-Radau rules.

    Args:
        source: symmetric operator, or a `Quadrature` of it.
        shift: δ, more than the most negative eigenvalue of H.
        key: JAX random key; needed for an operator.
        options: keyword arguments of `trace_of`; `bounds` are those of H, without the shift.

    Returns:
        `Estimate`; see `trace_of`.

    Raises:
        SpectraError: H + δI has a Ritz value that is not positive; the shift is not finite.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(0.5 * jnp.eye(100))
        >>> round(spectra.logdet(op, key=jax.random.key(0)).value, 4)
        -69.3147
    """
    _require_finite(shift)
    return trace_of(source, lambda x: module_of(x).log(x + shift), key=key, one_signed=True, **options)


@automatic
def effective_dimension(
    source: Source, shift: float, *, key: jax.Array | None = None, **options: Any
) -> Estimate:
    """Estimate the effective dimension tr H(H + δI)⁻¹ = Σ_i λ_i / (λ_i + δ).

    It is a smooth count of the eigenvalues above δ.

    Args:
        source: symmetric operator, or a `Quadrature` of it.
        shift: δ, more than the most negative eigenvalue of H.
        key: JAX random key; needed for an operator.
        options: keyword arguments of `trace_of`; `bounds` are those of H.

    Returns:
        `Estimate`; see `trace_of`.

    Raises:
        SpectraError: H + δI has a Ritz value that is not positive; the shift is not finite.

    References:
        MacKay, Bayesian interpolation, doi:10.1162/neco.1992.4.3.415.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 200)))
        >>> estimate = spectra.effective_dimension(op, 1.0, key=jax.random.key(0))
        >>> lower, _, upper = estimate.interval()
        >>> bool(lower < 61.1 < upper)
        True
    """
    _require_finite(shift)

    def share(x: Any) -> Any:
        return module_of(x).where(x + shift > 0, x / (x + shift), np.nan)

    return trace_of(source, share, key=key, one_signed=True, **options)


def _require_finite(shift: Any) -> None:
    if not trees.is_traced(shift) and not np.isfinite(shift):
        raise SpectraError(f"shift={shift}: use a finite number.")
