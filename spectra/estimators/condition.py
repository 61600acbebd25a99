"""Condition numbers: counted from the dense matrix where it is small, between bounds from probes beyond."""

import dataclasses
from typing import Any

import jax
import numpy as np

from spectra.base import trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError, Status
from spectra.density import extremes
from spectra.density.slq import slq
from spectra.krylov.dense import matrix_error
from spectra.krylov.floors import relative_change
from spectra.krylov.matrices import Matrix, matrices_of, matrix_of
from spectra.krylov.plan import estimate, place_basis
from spectra.krylov.product_rounding import change_of_matrix
from spectra.operators.base import LinearOperator, require_operator
from spectra.quadrature.christoffel import Openness
from spectra.quadrature.christoffel import shift as shift_of
from spectra.quadrature.distribution import whole
from spectra.results import ConditionNumber, Interval, LayerConditions, Quadrature

METHODS = ("auto", "dense", "krylov")
DENSE = 5000
"""Up to this order all eigenvalues are computed: some 15 s and 0.4 GB at the limit, on two CPU cores, for a
number instead of a bound. Streamed data are read for each product, so there the limit is lower."""
DENSE_STREAM = 500
CLEAR = 100.0
"""A spectrum is cut between zero and not zero for sure if what is kept is this far above the cut."""
SURE = 1e-6
"""Probability with which an eigenvalue may lie where the probes leave no room for one."""
VALUE = 1.01
"""A matrix-free result is a value if upper and lower end differ by this factor at most, or else a bound."""
DENSE_VALUE = 1.5
"""The same where all eigenvalues were computed: the interval is the rounding, which is rarely as large."""
LOOSE = 0.05
"""Relative doubt about the smallest |λ| that is worth a longer run, though it will not give a value."""
LONGER = (2, 4, 8)
"""How many times num_steps a second run may take, of two probes."""
STEPS = 85.0
"""Steps of the second run for a value, in units of sqrt(κ), or of κ with eigenvalues on both sides of zero.

The Chebyshev polynomial of degree m in [λ, |H|] is cosh(2 m sqrt(δ / κ)) at (1 - δ) λ. An eigenvalue there
would need a mass below that to the power of -2, and with two probes is excluded, up to the chance SURE, from
m = log(2 sqrt(n / SURE)) / (2 sqrt(δ / κ)) on: 12 / (2 sqrt(0.005 / κ)) at n = 6000. On both sides of zero
it is one in H², whose condition number is κ². It only decides what is tried, not what is said."""
WORK = 2**35
"""Largest steps² n of the second run: its orthogonalisation takes some 10 s a probe on two CPU cores, and its
basis 0.3 GB at most."""


@automatic
def condition_number(
    op: LinearOperator,
    *,
    key: jax.Array,
    shift: float = 0.0,
    rank_tol: float | None = None,
    method: str = "auto",
    per_layer: bool = False,
    num_steps: int | None = None,
    num_probes: int | None = None,
) -> ConditionNumber | LayerConditions:
    """Compute the condition number of H + shift I, and state whether it is a value or only a bound.

    κ = |λ|max / |λ|min is infinite for a singular matrix, as the Hessian of a network usually is; `effective`
    is |λ|max over the smallest non-zero |λ|. An eigenvalue counts as zero if |λ| <= max(rank_tol |λ|max,
    noise): no algorithm that uses these products can see below the noise. The noise is the `noise_floor` of a
    dense matrix, or twice that of a Krylov run, because rounding also moves its Ritz values. A zero hides
    eigenvalues close to it, so next to one, those up to 100 times as large as the noise also count as zero,
    if a gap of another factor of 100 follows.

    **Dense.** Up to n = 5000 (500 for streamed data) all eigenvalues are computed, in float64. By Weyl's
    theorem each is within the spectral norm of the matrix error of the truth. That is the noise floor:
    precision times the Frobenius norm if the relative error of each product is small (`MatrixOperator`), 4
    precision sqrt(n) |H| if a product may subtract larger numbers (losses, sums, functions), plus n eps |H|
    in float64 for the eigenproblem. `effective` is a value within `effective_interval`. It is only a lower
    bound if that interval is wider than a factor of 1.5, or if eigenvalues come so close to the threshold
    that those below it may not be zero. `nullity_interval` then has those in doubt, on either side.

    **Krylov.** For larger n, random probes are used, and each statement rests on a theorem:

    * |λ|max is at least the largest |Ritz value|, a Rayleigh quotient.
    * The smallest non-zero |λ| is at most |θ| + r for any Ritz pair whose [θ - r, θ + r] excludes zero, since
      that interval contains an eigenvalue. So `effective` is always at least the ratio of the two.
    * Except with probability 1e-6, no eigenvalue lies where its mass would have shown in the probes
      (`spectra.quadrature.christoffel`): this limits |λ|max from above and the smallest |λ| from below, and
      shows that there are no zeros where that is so.

    If both sides agree to 1 %, `effective` is a value and `is_lower_bound` is False. If not, a second run of
    up to 8 num_steps with two probes follows, if it can help. Otherwise `effective` is a lower bound, and
    `effective_interval` has the upper end, infinite if there is none. `nullity` is estimated from the mass of
    the probes at zero, with its 95 % interval; it is certain where there are no zeros.

    Args:
        op: symmetric operator of order n.
        key: JAX random key.
        shift: added to every eigenvalue, like the damping of a preconditioner or trust region.
        rank_tol: threshold for zero relative to |λ|max, used where it exceeds the noise. Default: the noise
            alone.
        method: "dense", "krylov", or "auto".
        per_layer: compute one condition number for each diagonal block of `op.blocks(by="layer")`.
        num_steps: Lanczos steps per probe of the Krylov method, default 100. It has no effect where
            the matrix is formed: with "dense", and for small operators with "auto".
        num_probes: probes of the Krylov method, default 4; otherwise like num_steps.

    Returns:
        `ConditionNumber`; with per_layer=True a `LayerConditions`, which maps layer names to these and prints
        as a table.

    Raises:
        SpectraError: an argument out of range; called inside jit or vmap.
        MemoryLimitError: method="dense" for a matrix that does not fit.

    Cost: n products, or num_steps * num_probes and, up to about n = 10⁵, at most 16 num_steps more.

    References:
        Parlett, The Symmetric Eigenvalue Problem, 1998, sections 4.5 and 10.3 (residuals, Weyl).

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
    if trees.is_traced((op, key)):
        raise SpectraError("condition_number counts on the host: call it outside jit, vmap and grad.")
    options = {"num_steps": num_steps, "num_probes": num_probes}
    for name, value in options.items():
        if value is not None and value < 1:
            raise SpectraError(f"{name}={value}: use at least one.")
    if per_layer:
        op.require_finite()  # the loss, which is the same of all blocks
        blocks = op.blocks(by="layer")
        keys = jax.random.split(key, len(blocks))
        arguments: dict[str, Any] = {"shift": shift, "rank_tol": rank_tol, "method": method, **options}
        small = {name: block for name, block in blocks.items() if _is_dense(block, method)}
        layers: dict[str, Any] = {
            name: _dense(blocks[name], shift, rank_tol, matrix) for name, matrix in matrices_of(small)
        }
        for (name, block), one in zip(blocks.items(), keys, strict=True):
            if name not in layers:
                layers[name] = condition_number(block, key=one, **arguments)
        return LayerConditions({name: layers[name] for name in blocks})  # pyright: ignore[reportArgumentType]
    if _is_dense(op, method):
        return _dense(op, shift, rank_tol)
    steps, probes = (100 if num_steps is None else num_steps), (4 if num_probes is None else num_probes)
    return _krylov(op, key, shift, rank_tol, steps, probes)


def _is_dense(op: LinearOperator, method: str) -> bool:
    return method == "dense" or (method == "auto" and op.size <= (DENSE_STREAM if op.on_host else DENSE))


def _dense(
    op: LinearOperator, shift: float, rank_tol: float | None, matrix: Matrix | None = None
) -> ConditionNumber:
    matrix = matrix or matrix_of(op)
    values, n = np.linalg.eigvalsh(matrix.entries), op.size
    # Products resolve eigenvalues relative to |H|, whatever is added to them later.
    floor = matrix_error(op, matrix, values)
    sizes = np.sort(np.abs(values + shift))
    largest = float(sizes[-1])
    cut = max((rank_tol or 0.0) * largest, floor)
    rank = int(np.sum(sizes > cut))
    nullity = n - rank
    smallest = float(sizes[nullity]) if rank else 0.0
    # Rounding may have taken what is near the cut across it.
    surely = float(np.min(sizes[sizes > cut + floor], initial=largest)) if rank else 0.0
    crossed = cut > floor and bool(np.any((sizes > cut - floor) & (sizes <= cut)))
    near = bool(nullity and rank and (smallest < CLEAR * cut or crossed))
    least = nullity if cut == floor and not near else int(np.sum(sizes <= cut - floor))
    at_least, ends = 1.0, (1.0, 1.0)
    if rank:
        at_least = (largest - floor) / (smallest + floor)
        ends = (largest - floor) / (surely + floor), (largest + floor) / (smallest - floor)
    return _result(
        largest=Interval(largest - floor, largest, largest + floor),
        smallest=Interval(cut if crossed else max(smallest - floor, 0.0), smallest, surely + floor),
        ends=(max(ends[0], 1.0), np.inf if near else max(ends[1], 1.0)),
        singular=bool(nullity),
        at_least=at_least,
        nullity=Interval(float(least), float(nullity), float(np.sum(sizes <= cut + floor))),
        floor=floor,
        cut=cut,
        value_within=DENSE_VALUE,
        shift=shift,
        size=n,
        num_matvecs=n,
        method="dense",
        status=Status.COMPLETE,
    )


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the probes of some runs leave of the two ends of |λ|."""

    top: Interval
    bottom: Interval  # of the smallest |λ| above the cut
    smallest: float  # the smallest |λ|, zeros included, is not above this
    cut: float
    singular: bool  # some eigenvalue is within the cut
    regular: bool  # none is
    definite: bool  # all Ritz values have one sign
    doubt: float  # residual at the smallest |λ|, relative to it

    @property
    def ends(self) -> tuple[float, float]:
        """Lower and upper end of |λ|max over the smallest |λ| above the cut."""
        if not self.bottom.upper or not np.isfinite(self.bottom.upper):
            return 1.0, np.inf
        certain = self.singular or self.regular
        upper = self.top.upper / self.bottom.lower if certain and self.bottom.lower > self.cut else np.inf
        return max(self.top.lower / self.bottom.upper, 1.0), upper


def _look(runs: list[Quadrature], rank_tol: float | None, moved: float) -> _Found:
    theta, residuals = extremes.ritz_pairs(runs)
    low, high = float(theta.min()), float(theta.max())
    top = max(-low, high)
    cut = max((rank_tol or 0.0) * top, extremes.ZERO * moved)
    room = Openness(runs, SURE)
    least, most = room.end(low, -1.0), room.end(high, 1.0)
    around = np.concatenate([np.linspace(-cut, cut, 41), theta[np.abs(theta) <= cut]])
    regular = not room(around).any()
    # |A v| >= |λ|min for every unit vector, a Ritz vector too.
    smallest = float(np.min(np.hypot(theta, residuals))) + moved
    bound, size = extremes.nonzero_bound(theta, residuals, moved, cut)
    if least > cut or most < -cut:  # one sign: a Rayleigh quotient bounds without its residual
        size = min(abs(low), abs(high))
        smallest = min(smallest, size + moved)
    if regular:
        bound = min(bound, smallest)
        size = min(size, bound)
    singular = bool((np.abs(theta) + residuals + moved <= cut).any())
    if singular and np.isfinite(bound):
        cut = _wider(room, cut, bound)
    lowest = room.nearest(cut, bound) if np.isfinite(bound) and bound > cut else cut
    best = int(np.argmin(np.abs(np.abs(theta) - size))) if np.isfinite(size) else 0
    return _Found(
        top=Interval(max(top - moved, 0.0), top, max(top + moved, -least, most)),
        bottom=Interval(min(lowest, bound), min(max(size, lowest), bound), bound),
        smallest=max(smallest, cut),
        cut=cut,
        singular=singular,
        regular=regular,
        definite=low > 0 or high < 0,
        doubt=float(residuals[best] / size) if np.isfinite(size) and size else np.inf,
    )


def _wider(room: Openness, cut: float, bound: float) -> float:
    """What counts as zero beside a zero: up to CLEAR times the noise, if nothing follows in CLEAR times that.

    A zero hides what lies within some noise of it: the probes exclude no more.
    """
    edge = room.closes(cut, min(CLEAR * cut, bound / CLEAR))
    gap = min(CLEAR * edge, bound)
    return edge if np.isfinite(edge) and room.nearest(edge, gap) >= gap else cut


def _krylov(
    op: LinearOperator, key: jax.Array, shift: float, rank_tol: float | None, num_steps: int, num_probes: int
) -> ConditionNumber:
    n, shifted, rounding = op.size, op.shift(shift) if shift else op, relative_change(op)

    def run(key: jax.Array, num_steps: int, num_probes: int) -> Quadrature:
        q = slq(shifted, key=key, num_steps=num_steps, num_probes=num_probes)
        # In units of |H + shift I|, which may be smaller than |H|.
        ratio = max(abs(x - shift) for x in q.range) / (max(map(abs, q.range)) or 1.0)
        return dataclasses.replace(q, rounding=rounding * ratio)

    runs = [run(key, min(num_steps, n), num_probes)]
    # Where all products vanish, what rounding changes is no share of them.
    least = 0.0 if any(x != shift for x in runs[0].range) else change_of_matrix(op)
    found = _look(runs, rank_tol, max(least, *map(shift_of, runs)))
    steps = _second_run(shifted, runs[0], found)
    if steps:
        # Probe i comes from fold_in(key, i): this key is none of those.
        again = jax.random.fold_in(key, 2**31 - 1)
        runs.append(run(again, steps, 2))
        found = _look(runs, rank_tol, max(least, *map(shift_of, runs)))
    status = next((q.status for q in runs if q.status is Status.NOISY), Status.COMPLETE)
    return _result(
        largest=found.top,
        smallest=found.bottom if np.isfinite(found.bottom.upper) else Interval(0.0, 0.0, 0.0),
        ends=found.ends,
        singular=found.singular,
        at_least=max(found.top.lower / found.smallest, 1.0) if found.smallest else np.inf,
        nullity=Interval(0.0, 0.0, 0.0) if found.regular else _null_dimension(runs[0], found, n),
        floor=max(least, *map(shift_of, runs)),
        cut=found.cut,
        value_within=VALUE,
        shift=shift,
        size=n,
        num_matvecs=sum(q.num_matvecs for q in runs),
        method="krylov",
        status=status,
    )


def _null_dimension(quadrature: Quadrature, found: _Found, n: int) -> Interval:
    """n times the mass within the cut, with its 95 % interval; at least one where a zero is certain.

    The estimate takes the Ritz values that may be zero and are far below all that is not.
    """
    below, above = quadrature.cdf(np.nextafter(-found.cut, -np.inf)), quadrature.cdf(found.cut)
    shares = max(above.lower - below.upper, 0.0), min(above.upper - below.lower, 1.0)
    low, high = (np.round(n * share) for share in whole(*shares, n))
    low = max(float(found.singular), low)  # in this order -0.0 gives way to 0
    high = max(high, low)
    sizes, residuals = np.abs(np.asarray(quadrature.nodes, np.float64)), np.asarray(quadrature.residuals)
    small = (sizes - residuals <= found.cut) & (sizes + residuals <= 0.1 * found.bottom.upper)
    null = np.asarray((sizes <= found.cut) | small, bool)
    masses = np.asarray(quadrature.weights, np.float64) * null
    middle = n * float(masses.sum(axis=1).mean())
    return Interval(float(low), float(np.clip(np.round(middle), low, high)), float(high))


def _second_run(op: LinearOperator, first: Quadrature, found: _Found) -> int:
    """Steps of a second run of two probes that is worth its products; 0 if none is."""
    lower, upper = found.ends
    if upper <= VALUE * lower or not found.top.estimate or first.num_steps >= op.size:
        return 0
    possible = [steps for factor in LONGER if _fits(op, steps := min(factor * first.num_steps, op.size))]
    if not possible:
        return 0
    needed = STEPS * (np.sqrt(lower) if found.definite else lower)
    enough = [steps for steps in possible if steps >= min(needed, op.size)]
    if enough and not found.singular:
        return enough[0]
    # The error of an extreme Ritz value, (log(sqrt n) / 2 m)² |H|, or of an interior one, its residual.
    doubt = (6 / (2 * first.num_steps)) ** 2 * lower if found.definite else found.doubt
    if doubt <= LOOSE:
        return 0
    return possible[min(1, len(possible) - 1)] if found.singular else possible[-1]


def _fits(op: LinearOperator, steps: int) -> bool:
    return steps**2 * op.size <= WORK and estimate(op, place_basis(op), num_steps=steps, num_probes=2).fits


def _result(
    *,
    largest: Any,
    smallest: Any,
    ends: Any,
    singular: bool,
    at_least: Any,
    nullity: Any,
    floor: float,
    cut: float,
    value_within: Any,
    size: int,
    status: Status,
    **fields: Any,
) -> ConditionNumber:
    largest = Interval(*(max(0.0, float(end)) for end in largest))  # no negative zeros
    cut, zero = cut + 0.0, not largest.estimate  # A = 0: a multiple of an orthogonal matrix
    lower, upper = ends
    known = zero or upper <= value_within * lower
    ratio = 1.0 if zero or not smallest.estimate else largest.estimate / smallest.estimate
    effective = float(np.clip(ratio, lower, upper)) if known else float(lower)
    count = size if zero else int(nullity.estimate)
    infinite = zero or singular or nullity.lower >= 1
    return ConditionNumber(
        value=float("inf") if infinite else effective if known else max(effective, min(at_least, upper)),
        effective=effective,
        largest=largest.estimate,
        smallest_nonzero=smallest.estimate if known else smallest.upper,
        rank=size - count,
        nullity=count,
        nullity_interval=nullity,
        noise_floor=floor,
        is_lower_bound=not known,
        rank_tol=cut / largest.estimate if not zero else 0.0,
        size=size,
        largest_interval=largest,
        smallest_interval=smallest,
        effective_interval=Interval(float(lower), effective, float(upper)),
        status=status.beside(floor, largest.estimate),
        **fields,
    )
