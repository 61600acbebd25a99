"""How many eigenvalues lie beyond a threshold, from the distribution that a quadrature gives."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from spectra.base.calls import automatic
from spectra.base.errors import SpectraError, Status
from spectra.estimators.functions import Source, quadrature_of
from spectra.quadrature import distribution
from spectra.quadrature.distribution import share_interval
from spectra.results import Estimate, Quadrature

MISTAKEN = 5e-5
"""Probability on each side of a count that is called known."""


@automatic
def count_above(
    source: Source,
    threshold: float,
    *,
    key: jax.Array | None = None,
    num_steps: int | None = None,
    num_probes: int | None = None,
    tol: float | None = None,
    probe_batch: int | None = None,
) -> Estimate:
    """Estimate the number of eigenvalues above a threshold.

    n (1 - F(threshold)) with the CDF of `Quadrature.cdf`. `lower` and `upper` are the
    Chebyshev-Markov-Stieltjes bracket, certain for the probes drawn. The share that a probe sees is
    distributed as Beta(nF/2, n(1-F)/2): the interval inverts it at both ends of the bracket, so it stays
    within [0, n], and `stderr` is that of this distribution at the point of the bracket where it is widest. A
    count is a whole number: if the probes exclude all numbers but one, up to a probability of 1e-4, that
    number is the value and both ends of the interval.

    Args:
        source: symmetric operator, or a `Quadrature` of it.
        threshold: the threshold, in units of the eigenvalues.
        key: JAX random key; needed for an operator.
        num_steps: Lanczos steps per probe; default 100, or n for smaller operators.
        num_probes: probes, default 8; with `tol`, num_steps x num_probes is the maximum number of products.
        tol: stop as soon as the 95 % interval is within ±tol n, in the way of `trace_of`; `status` says
            whether this was reached. One probe may be enough.
        probe_batch: see `slq`.

    Returns:
        `Estimate` with lower and upper.

    Raises:
        SpectraError: as `slq`.

    Cost: num_probes x num_steps products, memory as `slq`.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(-1.0, 3.0, 400)))
        >>> lower, _, upper = spectra.count_above(op, 2.0, key=jax.random.key(0)).interval()
        >>> bool(lower < 100 < upper)
        True
    """

    if math.isnan(threshold):
        raise SpectraError(f"threshold={threshold}: use a real number.")

    def count(q: Quadrature) -> Estimate:
        return _count(q, threshold, above=True, unit=q.size)

    options = {"key": key, "num_steps": num_steps, "num_probes": num_probes, "probe_batch": probe_batch}
    return _within(source, count, tol, lambda q: q.size, options)


@automatic
def negative_share(
    source: Source,
    *,
    key: jax.Array | None = None,
    num_steps: int | None = None,
    num_probes: int | None = None,
    tol: float | None = None,
    probe_batch: int | None = None,
) -> Estimate:
    """Estimate the share of negative eigenvalues: of those below minus the noise floor.

    Args:
        source: symmetric operator, or a `Quadrature` of it.
        key: JAX random key; needed for an operator.
        num_steps: Lanczos steps per probe; default 100, or n for smaller operators.
        num_probes: probes, default 8; with `tol`, num_steps x num_probes is the maximum number of products.
        tol: stop as soon as the 95 % interval is within ±tol, as in `count_above`.
        probe_batch: see `slq`.

    Returns:
        `Estimate` of a number in [0, 1], as in `count_above`.

    Raises:
        SpectraError: as `slq`.

    Cost: num_probes x num_steps products, memory as `slq`.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(-1.0, 3.0, 400)))
        >>> lower, _, upper = spectra.negative_share(op, key=jax.random.key(0)).interval()
        >>> bool(lower < 0.25 < upper)
        True
    """

    def share(q: Quadrature) -> Estimate:
        below = float(np.nextafter(-q.noise_floor, -np.inf))  # the zero operator has no floor
        return _count(q, below, above=False, unit=1)

    options = {"key": key, "num_steps": num_steps, "num_probes": num_probes, "probe_batch": probe_batch}
    return _within(source, share, tol, lambda _: 1, options)


def _within(
    source: Source,
    estimate: Callable[[Quadrature], Estimate],
    tol: float | None,
    unit: Callable[[Quadrature], int],
    options: dict[str, Any],
) -> Estimate:
    """The estimate from a quadrature with these options, or from one that `tol` has decided on."""
    if tol is None:
        return estimate(quadrature_of(source, **options))
    if not 0 < tol < 1:
        raise SpectraError(f"tol={tol} is a share of all eigenvalues: use a number in (0, 1).")

    def open_share(q: Quadrature) -> float:
        low, _, high = estimate(q).interval()
        return float(high - low) / (2 * tol * unit(q))

    q = quadrature_of(source, **options, error=open_share, least=1)
    found = estimate(q)
    if found.status is Status.NOISY:  # a tolerance that is reached makes products no more symmetric
        return found
    status = Status.CONVERGED if open_share(q) <= 1 else Status.BUDGET_EXHAUSTED
    return dataclasses.replace(found, status=status)


def _count(q: Quadrature, x: float, *, above: bool, unit: float) -> Estimate:
    point = np.asarray(x, np.float64)
    rest, share, known, sampled = distribution.split(q, point)  # atoms are not sampled
    size = rest.size if rest is not None else 0
    widest = float(min(max(0.5, sampled[0]), sampled[2]))
    variance = widest * (1 - widest)
    low, middle, high = (float(share * part + atoms) for part, atoms in zip(sampled, known, strict=True))
    least, most = float(known[0]), float(known[2]) + share  # none of the sampled ones, or all
    least, most = max(least, 0.0), min(most, 1.0)
    if above:
        low, middle, high, least, most = 1 - high, 1 - middle, 1 - low, 1 - most, 1 - least
    low, high, normals = max(low, least), min(high, most), float(q.num_probes * size)
    low, high = min(low, high), max(low, high)  # limits that are equal are sums in different orders
    middle = min(max(middle, low), high)  # n times a share is rounded, as its limits are
    in_doubt = max(round((most - least) * q.size), 1)  # with atoms too close to tell the side
    stderr = float(unit * share * np.sqrt(2 * variance / (size + 2) / q.num_probes))
    reason = "the bracket is that of Chebyshev, Markov and Stieltjes"
    ends = share_interval(low, high, (least, most), normals, MISTAKEN, in_doubt)
    if round(q.size * (ends[1] - ends[0])) == 0:
        low = middle = high = least = most = round(q.size * ends[0]) / q.size
        stderr, reason = 0.0, f"known but for a probability of {2 * MISTAKEN:g}"
    return Estimate(
        value=_whole(unit * middle),
        stderr=stderr,
        num_matvecs=q.num_matvecs,
        method="slq",
        status=q.judged,
        reason=reason,
        lower=_whole(unit * low),
        upper=_whole(unit * high),
        least=_whole(unit * least),
        most=_whole(unit * most),
        normals=normals,
        num_sampled=in_doubt,
    )


def _whole(count: float) -> float:
    """A count without the rounding of n times a share."""
    return float(round(count)) if abs(count - round(count)) <= 1e-9 * max(abs(count), 1.0) else count
