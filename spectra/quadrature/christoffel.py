"""Where a spectrum has no eigenvalue, for what random probes have seen of it.

Let v be a probe, θ_j and r_j the nodes and residuals of its Gauss rule, p_0, ..., p_m the orthonormal
polynomials of its measure. At an eigenvalue λ with unit eigenvector u the measure has at least the mass
w = |uᵀv|². No measure with the same first 2m moments has more at a point x than the Gauss-Radau rule with
a node there, which is the Christoffel function

    Λ(x) = 1 / Σ_{j<=m} p_j(x)² = 1 / (p_m(x)² (1 + Σ_j r_j² / (x - θ_j)²)),   p_m(x) = Π_j (x - θ_j) / β_j,

so w <= Λ(λ). For v uniform on the sphere w has the law Beta(1/2, (n-1)/2), with distribution function F:
F(w) is uniform on [0, 1], and for k probes Π F(Λ_i(λ)) >= Π F(w_i), a product of k independent uniform
numbers, whose law is known. An eigenvalue that is named without looking at the probes, such as the smallest,
therefore lies with probability 1 - α at a point that is *open*: one where that product is not below the
α-quantile of the law. Between clusters Λ falls exponentially with the number of steps.

References:
    Golub and Meurant, Matrices, Moments and Quadrature, 2010, ch. 2 and 6 (Λ); Fisher, Statistical Methods
    for Research Workers, 1932, section 21.1 (the law of the product).
"""

from collections.abc import Iterable

import numpy as np

from spectra.quadrature import Measures
from spectra.quadrature.brackets import alike, exhausted, rules
from spectra.quadrature.rules import breakdown_noise, log_betas

MARGIN = 4.0
"""The noise floor is what is seen of rounding, and not all is: converged Ritz values of float32 Hessians of
networks were up to 3 floors from eigenvalues in float64 (sine layers of gain 3, the worst of five)."""
SMALLEST = 1e-15
"""Components of eigenvectors of T are known to this, in units of the largest."""
RATIO = 1.02
"""Of magnitudes that are looked at one after another; a jump is then halved down to a hundredth of that."""


class Openness:
    """Which points the probes of a quadrature leave open for an eigenvalue, at probability 1 - `alpha`."""

    def __init__(self, quadratures: Iterable[Measures], alpha: float):
        from scipy.special import gammainccinv

        self.rules = [rule for q in quadratures for rule in _rules(q)]
        self.threshold = float(gammainccinv(sum(count for _, count in self.rules), alpha))
        self.scale = max(max(abs(t[0]), abs(t[-1])) for (t, *_), _ in self.rules) or 1.0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Whether an eigenvalue may lie at each of the points."""
        x = np.atleast_1d(np.asarray(x, np.float64))
        return -np.sum([count * _log_chance(x, *rule) for rule, count in self.rules], axis=0) < self.threshold

    def end(self, start: float, sign: float) -> float:
        """The last open point outside all nodes, going from the outermost, `start`, in one direction."""
        # Beyond all nodes every p_j² grows with the distance: what is closed stays closed.
        inner, outer = 0.0, np.inf
        steps = self.scale * np.geomspace(1e-17, 1e6, 93)  # a factor 1.8
        for _ in range(3):  # then 1.006, then 1.0001
            closed = ~self(start + sign * steps)
            if not closed.any():
                return float(sign * np.inf)
            first = int(np.argmax(closed))
            outer, inner = steps[first], steps[first - 1] if first else inner
            steps = np.linspace(inner, outer, 93)[1:]
        return float(start + sign * outer)

    def closes(self, low: float, high: float) -> float:
        """The smallest magnitude in [low, high] at which neither sign is open; infinite if there is none."""
        if not 0 < low < high:
            return np.inf
        sizes = np.geomspace(low, high, int(np.ceil(np.log(high / low) / np.log(RATIO))) + 1)
        closed = ~(self(sizes) | self(-sizes))
        return float(sizes[np.argmax(closed)]) if closed.any() else np.inf

    def nearest(self, low: float, high: float) -> float:
        """The smallest magnitude in [low, high] at which either sign is open; `high` if there is none."""
        if low >= high:
            return high
        count = int(np.ceil(np.log(high / low) / np.log(RATIO))) + 2
        nodes = np.abs(np.concatenate([theta for (theta, *_), _ in self.rules]))
        sizes = np.unique([*np.geomspace(low, high, count), *nodes[(nodes > low) & (nodes < high)]])
        for _ in range(2):
            free = self(sizes) | self(-sizes)
            if not free.any():
                return high
            first = int(np.argmax(free))
            if not first:
                return low
            sizes = np.geomspace(sizes[first - 1], sizes[first], 100)
        return float(sizes[max(int(np.argmax(self(sizes) | self(-sizes))) - 1, 0)])


def _rules(quadrature):
    """(nodes, residuals, log Π β, log of the factor of F, log of the least mass, shift) of each probe.

    With how many probes agree in that, see `alike`.
    """
    rest = quadrature.bulk or quadrature
    moved, factor = shift(quadrature), _log_factor(rest.size)
    least = 2 * float(np.log(rest.precision))
    start = 0
    for (theta, weights, r), count in alike(rules(rest)):
        if rest.coefficients is None:
            product = _log_betas(theta, weights, np.abs(r), dropped(rest))
        else:
            product = log_betas(rest.coefficients[start], dropped(rest))
        start += count
        yield (theta, r, product, factor, least, moved), count


def chance(x: float, alpha: np.ndarray, beta: np.ndarray, size: int, moved: float) -> float:
    """F(Λ(x)) for m Lanczos steps from one vector: at most α with probability α, if x is an eigenvalue.

    Λ bounds the mass at x after any number of steps: the same holds for the least of all that a run passes.

    Args:
        x: the point, outside of the Ritz values; the chance is 1 inside.
        alpha: (m,), the diagonal of T.
        beta: (m,), what is beside it, and the residual behind the last step.
        size: order of the operator.
        moved: how far rounding can have moved an eigenvalue.
    """
    from scipy.linalg import eigh_tridiagonal

    theta, vectors = eigh_tridiagonal(alpha, beta[:-1])
    if not theta[0] - moved > x and not theta[-1] + moved < x:
        return 1.0
    rule = theta, beta[-1] * vectors[-1], float(np.sum(np.log(beta)))
    return float(np.exp(_log_chance(np.array([x]), *rule, _log_factor(size), -np.inf, moved)[0]))


def _log_factor(size: int) -> float:
    """F(w) <= 2 sqrt(w) / B(1/2, (n-1)/2), with equality as w falls; for n = 2 F(w) = 2 asin(sqrt w) / π."""
    from scipy.special import betaln

    return float(np.log(2) - betaln(0.5, (size - 1) / 2)) if size > 2 else 0.0


def _log_betas(theta, weights, residuals, last: float) -> float:
    """log of β_1 ... β_m, from sqrt(w_j) r_j = Π β / Π_{i≠j} |θ_j - θ_i|, which holds for every j.

    The component that rounding has hurt least decides, and none is taken for less than rounding. After a
    breakdown β_m is at most `last`, what was taken for zero, and the sum of (r_j / β_m)² is one.
    """
    scale = max(abs(theta[0]), abs(theta[-1])) or 1.0
    apart = np.maximum(np.abs(theta[:, None] - theta), np.spacing(scale))
    np.fill_diagonal(apart, 1.0)
    apart, roots = np.sum(np.log(apart), axis=1), np.sqrt(weights)
    if not residuals.any():
        parts = np.log(np.maximum(roots, SMALLEST)) + apart
        return float(np.log(last or scale * SMALLEST) - np.logaddexp.reduce(-2 * parts) / 2)
    j = int(np.argmax(roots * residuals))
    return float(np.log(max(roots[j] * residuals[j], SMALLEST * scale)) + apart[j])


def _log_chance(x, theta, residuals, log_betas, factor, least, moved) -> np.ndarray:
    """log F(Λ) of one probe, from above: the largest within `moved` of each point.

    1/Λ grows with each |x - θ_j|, so that what rounding has moved is taken off them. A mass below the
    rounding of a vector may have been lost, so no chance is smaller than that of such a mass.
    """
    distance = np.maximum(np.abs(x[:, None] - theta) - moved, np.finfo(float).tiny)
    inside = distance.min(axis=1) <= np.finfo(float).tiny
    terms = 2 * (np.sum(np.log(distance), axis=1) - log_betas)
    with np.errstate(over="ignore"):
        mass = np.maximum(-terms - np.log1p(np.sum((residuals / distance) ** 2, axis=1)), least)
    return np.where(inside, 0.0, np.minimum(mass / 2 + factor, 0.0))


def dropped(quadrature: Measures) -> float:
    """The largest β that a breakdown takes for zero by its size alone."""
    return breakdown_noise(quadrature.size, quadrature.precision) * max(map(abs, quadrature.range))


def shift(quadrature: Measures) -> float:
    """How far rounding can have moved an eigenvalue.

    The run is exact for a matrix this near to H, in the spectral norm: MARGIN noise floors of a product, what
    copies differ by, and what a breakdown dropped or the residuals of deflated pairs couple.
    """
    floor = quadrature.noise_floor
    moved = floor + (MARGIN - 1) * floor / quadrature.spread + quadrature.coupling
    rest = quadrature.bulk or quadrature
    if exhausted(rest):
        moved += 2 * dropped(quadrature)
    return float(moved)
