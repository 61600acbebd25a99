"""The Frobenius norm of an operator, from the products that a trace takes."""

import math

import jax

from spectra._mesh import automatic
from spectra._status import Status
from spectra.estimators import exact, leave_one_out
from spectra.estimators.hutchinson import sample_norms
from spectra.estimators.low_rank import with_rounding
from spectra.estimators.run import adaptive, begin
from spectra.estimators.sketch import MIN_SKETCH, SketchRun
from spectra.estimators.trace import STACKS, choose
from spectra.operators.base import LinearOperator
from spectra.results import Estimate


@automatic
def frobenius_norm(
    op: LinearOperator,
    *,
    key: jax.Array | None,
    num_matvecs: int = 64,
    tol: float | None = None,
    probe_batch: int | None = None,
) -> Estimate:
    """Estimate the Frobenius norm ‖H‖_F = sqrt(Σ_ij H_ij²), the root of the sum of squared eigenvalues.

    ‖H‖_F² = tr H² is estimated as `trace` does with method="auto", from products with H alone: XTrace of
    H² has the same sketch, and |Hv|² takes the place of vᵀHv. The error is carried through the root to
    first order.

    Args:
        op: symmetric operator of order n.
        key: JAX random key.
        num_matvecs: budget of products; exact if it covers n.
        tol: stop as soon as stderr <= tol value.
        probe_batch: products side by side; changes the result by rounding only.

    Returns:
        `Estimate` with value and stderr.

    Raises:
        SpectraError: as `trace`.

    Cost: at most num_matvecs products, memory as `trace`.

    References:
        Epperly, Tropp and Webber, arXiv:2301.07825.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.array([[3.0, 0.0], [0.0, -4.0]]))
        >>> spectra.frobenius_norm(op, key=jax.random.key(0)).value
        5.0
    """
    method, reason = choose(op, "auto", num_matvecs)
    run = begin(
        op,
        key=key,
        by=None,
        tol=tol if tol is None else 2 * tol,  # of the square
        num_matvecs=num_matvecs,
        probe_batch=probe_batch,
        count=op.size if method == "exact" else num_matvecs,
        stacks=math.ceil(STACKS.get(method, 0) * num_matvecs),
        needs_key=method != "exact",
    )
    if method == "exact":
        square, error = run.xp.sum(run.host(exact.columns(run)[1])), 0.0
        status, dof, count = Status.COMPLETE, None, op.size
    elif method == "hutchinson":
        square, error, status, count = sample_norms(run, num_matvecs)
        dof = float(max(count - 1, 1))
    else:
        sketch, found = SketchRun(run, "normal"), []

        def step(count):
            sketch.extend(count)
            inner = sketch.inner_products()
            values, pairs = leave_one_out.xtrace_values(
                sketch.squared(inner),
                sketch.directions(inner),
                op.size,
                resphere=True,
                xp=run.xp,
            )
            mean, error = with_rounding(run, values, pairs, 0.0)
            found[:] = [mean[-1], run.xp.hypot(error[-1], 2 * run.op.precision * mean[-1])]
            return found

        status = adaptive(run, step, num_matvecs // 2, least=MIN_SKETCH)
        (square, error), count = found, 2 * sketch.num_probes
        dof = float(sketch.num_probes - 1)
    value = run.xp.sqrt(run.xp.maximum(square, 0))
    stderr = error / run.xp.where(value > 0, 2 * value, 1)
    return run.estimate(
        run.xp.asarray([value]),
        run.xp.asarray([stderr]),
        num_matvecs=count,
        method=method,
        status=status,
        reason=reason,
        dof=dof,
    )
