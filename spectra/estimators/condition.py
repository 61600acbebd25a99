"""Condition numbers: counted from the dense matrix where it is small, bounded from Krylov spaces beyond."""

import jax
import numpy as np

from spectra import _tree
from spectra._errors import SpectraError
from spectra._mesh import automatic
from spectra._status import Status
from spectra.density.slq import slq
from spectra.krylov.eigsh import eigsh
from spectra.operators.base import LinearOperator, require_operator
from spectra.results import ConditionNumber, Interval, LayerConditions

METHODS = ("auto", "dense", "krylov")
DENSE = 5000
"""Up to this order all eigenvalues are computed: some 15 s and 0.4 GB at the limit, on two CPU cores, for a
number instead of a bound. Streamed data are read for each product, so there the limit is lower."""
DENSE_STREAM = 500
CLEAR = 100.0
"""A spectrum is cut between zero and not zero for sure if what is kept is this far above the cut."""
FILTER_SHARE = 20
"""The filter near zero is tried if it needs at most this many times the products of the quadrature."""


@automatic
def condition_number(
    op: LinearOperator,
    *,
    key: jax.Array,
    shift: float = 0.0,
    rank_tol: float | None = None,
    method: str = "auto",
    per_layer: bool = False,
    num_steps: int = 100,
    num_probes: int = 4,
) -> ConditionNumber | LayerConditions:
    """Compute the condition number of H + shift I, and say what of it can be known.

    κ = |λ|max / |λ|min is infinite for a singular matrix, which the Hessian of a network is more often
    than not; `effective` is |λ|max over the smallest |λ| that is not zero. Zero means
    |λ| <= max(rank_tol |λ|max, noise floor), with the noise floor precision sqrt(n) |λ|max of the
    products (or their measured asymmetry), below which no algorithm that uses them sees anything.

    Up to n = 5000 (500 for streamed data) all eigenvalues are counted. Beyond that, `largest` comes from
    `eigsh`, `nullity` from the mass that `slq` finds at zero, with its 95 % interval, and the smallest |λ|
    from

    * the quadrature itself, if its Krylov space ended: it holds every distinct eigenvalue then;
    * `eigsh` at the other end, if all eigenvalues have one sign (as with a large enough `shift`);
    * the filter of `eigsh(which="SM")`, if its degree is affordable;
    * otherwise the smallest Ritz value and its residual: the condition number is a lower bound then,
      and `is_lower_bound` says so. It is also one where the kept eigenvalues come within a factor 100
      of the cut, so that those beneath may not be zero.

    Args:
        op: symmetric operator of order n.
        key: JAX random key.
        shift: added to every eigenvalue: the damping of a preconditioner or trust region.
        rank_tol: relative to |λ|max; default n times `op.precision`, as in `numpy.linalg.matrix_rank`.
        method: "dense", "krylov", or "auto".
        per_layer: one condition number for each diagonal block `op.blocks(by="layer")`.
        num_steps: Lanczos steps a probe of the matrix-free method.
        num_probes: its probes.

    Returns:
        `ConditionNumber`; with per_layer=True `LayerConditions`, which maps names to those and prints as
        a table.

    Raises:
        SpectraError: an argument out of range; called inside jit or vmap.
        MemoryLimitError: method="dense" for a matrix that does not fit.

    Cost: n products, or num_steps * num_probes and what `eigsh` takes for one pair at each end.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([0.0, 1.0, 4.0])))
        >>> result = spectra.condition_number(op, key=jax.random.key(0))
        >>> result.value, result.effective, result.rank
        (inf, 4.0, 2)
        >>> spectra.condition_number(op, key=jax.random.key(0), shift=1.0).value
        5.0
    """
    require_operator(op)
    if method not in METHODS:
        raise SpectraError(f"method={method!r}: use one of {METHODS}.")
    if not np.isfinite(shift):
        raise SpectraError(f"shift={shift}: use a finite number.")
    if rank_tol is not None and not 0 <= rank_tol < 1:
        raise SpectraError(f"rank_tol={rank_tol} is relative to |λ|max: use a number in [0, 1), or None.")
    if _tree.is_traced((op, key)):
        raise SpectraError("condition_number counts on the host: call it outside jit and vmap.")
    options = {"num_steps": num_steps, "num_probes": num_probes}
    if per_layer:
        blocks = op.blocks(by="layer")
        keys = jax.random.split(key, len(blocks))
        arguments = {"shift": shift, "rank_tol": rank_tol, "method": method, **options}
        layers = {
            name: condition_number(block, key=one, **arguments)
            for (name, block), one in zip(blocks.items(), keys, strict=True)
        }
        return LayerConditions(layers)  # pyright: ignore[reportArgumentType]
    rank_tol = op.size * op.precision if rank_tol is None else rank_tol
    if method == "dense" or (method == "auto" and op.size <= (DENSE_STREAM if op.on_host else DENSE)):
        return _dense(op, shift, rank_tol)
    return _krylov(op, key, shift, rank_tol, **options)


def _dense(op: LinearOperator, shift: float, rank_tol: float) -> ConditionNumber:
    values = np.linalg.eigvalsh(np.asarray(op.as_matrix(), np.float64))
    n = len(values)
    # Products resolve eigenvalues relative to |H|, whatever is added to them later.
    floor = op.precision * np.sqrt(n) * float(np.abs(values).max())
    sizes = np.sort(np.abs(values + shift))
    cut = max(rank_tol * sizes[-1], floor)
    rank = int(np.sum(sizes > cut))
    nullity = n - rank
    smallest = float(sizes[nullity]) if rank else 0.0
    return _result(
        largest=float(sizes[-1]),
        smallest=smallest,
        nullity=Interval(*[float(nullity)] * 3),
        floor=floor,
        bound=bool(nullity and rank and smallest < CLEAR * cut),
        shift=shift,
        rank_tol=rank_tol,
        size=n,
        num_matvecs=n,
        method="dense",
        status=Status.COMPLETE,
    )


def _krylov(op: LinearOperator, key, shift, rank_tol, num_steps, num_probes) -> ConditionNumber:
    n, shifted = op.size, op.shift(shift) if shift else op
    quadrature = slq(shifted, key=key, num_steps=min(num_steps, n), num_probes=num_probes)
    products, floor = quadrature.num_matvecs, quadrature.noise_floor * np.sqrt(n)
    low, high = quadrature.range
    largest, residual = max(-low, high), 0.0
    exact = quadrature.status is Status.INVARIANT
    status = quadrature.status
    if not exact:
        top = eigsh(shifted, 1, which="LM", key=key, tol=1e-6, verify=False)
        products, status = products + top.num_matvecs, top.status
        largest = max(largest, float(np.abs(top.values[0])))
    cut = max(rank_tol * largest, floor)
    live = np.arange(quadrature.num_steps) < np.asarray(quadrature.lengths)[:, None]
    nodes = np.asarray(quadrature.nodes)
    sizes = np.abs(nodes) + np.asarray(quadrature.residuals)
    kept = live & (np.abs(nodes) > cut)
    smallest = float(sizes[kept].min()) if kept.any() else 0.0
    nullity = _null_dimension(quadrature, cut, n)
    bound = not exact
    if exact and not (live & ~kept).any():
        nullity = Interval(0.0, 0.0, 0.0)  # a random vector has a part in every eigenspace
    elif not exact and nullity.lower == 0:
        which, steps = _way_to_zero(low, high, cut, smallest, largest, products)
        if which is not None:
            end = eigsh(shifted, 1, which=which, key=key, tol=1e-4, verify=False, max_matvecs=steps)
            products += end.num_matvecs
            residual = float(end.residuals[0])
            found = float(np.abs(end.values[0]))
            if bool(end.converged[0]) and found > max(cut, 10 * residual):
                smallest, bound, nullity = found, False, Interval(0.0, 0.0, 0.0)
    some_null = nullity.estimate > 0
    return _result(
        largest=largest,
        smallest=smallest,
        nullity=nullity,
        floor=floor,
        bound=bound or bool(some_null and smallest and smallest < CLEAR * cut),
        shift=shift,
        rank_tol=rank_tol,
        size=n,
        num_matvecs=products,
        method="krylov",
        status=status if status in (Status.NOISY, Status.NOT_CONVERGED) else Status.COMPLETE,
    )


def _null_dimension(quadrature, cut: float, n: int) -> Interval:
    """n times the mass within the cut, with its 95 % interval."""
    below, above = quadrature.cdf(np.nextafter(-cut, -np.inf)), quadrature.cdf(cut)
    return Interval(
        float(np.ceil(n * max(above.lower - below.upper, 0.0))),
        float(np.round(n * (above.estimate - below.estimate))),
        float(np.floor(n * (above.upper - below.lower))),
    )


def _way_to_zero(low, high, cut, smallest, largest, products) -> tuple[str | None, int]:
    """How to look for the eigenvalue nearest zero, and the products allowed."""
    allowed = FILTER_SHARE * products
    if low > cut or high < -cut:
        return ("SA" if low > 0 else "LA"), allowed
    block, degree = 6, 5 * largest / max(smallest, cut)
    return ("SM", allowed) if 8 * block * degree <= allowed else (None, 0)


def _result(*, largest, smallest, nullity: Interval, floor, bound, size, **fields) -> ConditionNumber:
    count = int(nullity.estimate)
    ratio = largest / smallest if smallest > 0 else 1.0  # A = 0: a multiple of an orthogonal matrix
    return ConditionNumber(
        value=float("inf") if count or not largest else ratio,
        effective=ratio,
        largest=largest,
        smallest_nonzero=smallest,
        rank=size - count,
        nullity=count,
        nullity_interval=nullity,
        noise_floor=floor,
        is_lower_bound=bound,
        size=size,
        **fields,
    )
