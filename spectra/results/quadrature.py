"""Spectral measures: Gauss quadratures of probes, Chebyshev moments, smoothed densities.

Functions of a measure take what people hold: a report stands for its quadrature, a list for a mapping.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.core import Tracer
from numpy.typing import ArrayLike

from spectra.base import trees
from spectra.base.errors import SpectraError, Status
from spectra.base.reals import RealFunction, real_numbers
from spectra.quadrature import distribution, rules
from spectra.quadrature.resolved import Parts, parts
from spectra.results.base import Array, Interval, Result, notebook_view, result

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


EXPONENT = 300
"""Of two: beyond 1e±90 bands, brackets and counts lose what they are computed from. All hold at 300, and the
band of the density does not at 350."""


def require_one(values: Array, what: str) -> None:
    """Raise where `vmap` or `scan` has stacked results: what is read as probes and steps would be others."""
    if np.ndim(values) > 2:
        raise SpectraError(
            f"these are {'×'.join(map(str, values.shape[:-2]))} {what}, as vmap and scan return them: take "
            "one of them, jax.tree.map(lambda x: x[i], result)."
        )


def require_scale(values: Array, what: str) -> None:
    """Raise where cubes of eigenvalues or their inverses are not in float64: bands are made of them."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest and abs(int(np.frexp(largest)[1])) > EXPONENT:
        raise SpectraError(
            f"the eigenvalues reach {largest:.2g}, and the {what} needs their cubes, which leave the range "
            "of float64: multiply the operator by a power of two, 2.0**k * op, and take the factor off again."
        )


@result("size", "num_matvecs", "precision", "status", "coupling", "rounding")
class Quadrature(Result):
    """Gauss quadratures of the spectral measures of k random probes.

    Row i integrates f against the measure of probe v_i: v_iᵀ f(H) v_i ≈ Σ_j weights[i, j] f(nodes[i, j]),
    exactly for polynomials of degree below 2 lengths[i]. The mean over rows estimates tr f(H) / n. Rows
    are sorted by node and sum to one; entries beyond a row's length have weight zero.

    After a run without reorthogonalisation (`basis="none"`), nodes and weights are those of T with copies of
    eigenvalues merged; T itself, from which all brackets and limits are computed, is in `coefficients`.

    Returned by `slq`, whose page states the cost and the sources; everything else is read from it without
    further products.

    The [glossary](glossary.md#quadrature) defines Ritz value, bracket, band, atom,
    copy and noise floor.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.DiagonalOperator(jnp.linspace(0.0, 1.0, 200))
        >>> found = spectra.slq(op, num_steps=20, num_probes=4, key=jax.random.key(0))
        >>> found.nodes.shape, found.num_matvecs
        ((4, 20), 80)
        >>> low, share, high = found.cdf(0.5)
        >>> bool(low <= 0.5 <= high)
        True
    """

    nodes: Float[Array, "probes steps"]  # Ritz values
    weights: Float[Array, "probes steps"]  # squared first components of the eigenvectors of T
    residuals: Float[Array, "probes steps"]  # an eigenvalue of H lies within this distance of the node
    lengths: Int[Array, " probes"]  # true number of nodes
    asymmetry: Float[Array, " probes"]  # see Tridiagonal
    size: int  # n, order of the operator
    num_matvecs: int
    precision: float  # relative error of one product, as stated by the operator
    status: Status
    bulk: Quadrature | None = None  # of the complement of deflated eigenvectors, of order n - r
    atoms: Float[Array, " atoms"] | None = None  # deflated eigenvalues: columns of weight 1/n in every row
    coupling: float = 0.0  # how far an eigenvalue can be moved by the residuals of the deflated ones
    rounding: float = (
        0.0  # change of H by one rounding, over |H| (itself if all products are 0); 0: not known
    )
    coefficients: Float[Array, "probes 2 steps"] | None = None  # α and β, where copies were merged
    sketches: Float[Array, "probes steps 8"] | None = None  # of Ritz vectors: tell copies apart
    links: Float[Array, " atoms"] | None = None  # residuals of atoms that are Ritz values, converged or not

    @functools.cached_property
    def parts(self) -> Parts:
        """Eigenvalues that are known, deflated or resolved by every probe, and the quadrature of the rest."""
        require_scale(self.nodes, "quadrature's error")
        return parts(self)

    @property
    def resolved(self) -> Float[np.ndarray, " resolved"]:
        """Eigenvalues without sampling error: deflated, or simple and resolved by every probe."""
        return self.parts.eigenvalues

    @property
    def num_probes(self) -> int:
        """k, the number of probes."""
        require_one(self.nodes, "quadratures")
        return self.nodes.shape[0]

    @property
    def num_steps(self) -> int:
        """m, the number of Lanczos steps of each probe."""
        return self.nodes.shape[1]

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest Ritz value."""
        return float(np.min(self.nodes)), float(np.max(self.nodes))

    @property
    def spread(self) -> float:
        """How far copies are from their eigenvalue, in units of a product's rounding: √m; 1 with a basis."""
        rest = self.bulk or self
        return 1.0 if rest.coefficients is None else rules.spread(rest.coefficients.shape[-1])

    @property
    def noise_floor(self) -> float:
        """Magnitude below which an eigenvalue is not resolved: measured asymmetry or rounding times |H|.

        It is never below 4 precision * |H|, because the product, both terms that a step subtracts and the
        normalisation each round a coefficient once. Without reorthogonalisation, it is `spread` times as
        large. Of eigenvalues of the dense matrix, which no step has touched, it is what rounding did to the
        matrix. Where all products of a loss are zero, it is what rounding changes them by.

        Of `slq` it is what asymmetry shows of rounding, which for deep networks in float32 may be a hundredth
        of it: `spectrum` and `summary` measure it.
        """
        scale = self.spread * max(map(abs, self.range))
        if not scale:
            return self.rounding
        steps = 0.0 if self.status is Status.EXACT else 4 * self.precision
        return scale * max(float(np.max(self.asymmetry)), steps, self.rounding)

    @property
    def judged(self) -> Status:
        """The status, or NOISY where rounding, as far as it was measured, leaves no digit of |H|.

        Results that are made from a quadrature have it for their status. `status` itself says how the run
        ended, and so which theorems hold.
        """
        return self.status.beside(self.noise_floor, max(map(abs, self.range)))

    @property
    def settings(self) -> str:
        """What was run, in words."""
        if self.status is Status.EXACT:
            return f"none: all eigenvalues from {self.num_matvecs:,} products"
        return f"{self.num_steps} steps x {self.num_probes} probes, {self.num_matvecs:,} products"

    def cdf(self, x: ArrayLike, *, level: float = 0.95) -> Interval:
        """Share of eigenvalues at or below `x`, with a band that holds for the whole curve.

        The band has two parts. For each probe, the Chebyshev-Markov-Stieltjes inequalities bracket the true
        weighted CDF: at x between the sums, without and with its mass at x, of the Gauss-Radau rule with a
        node there. This part is deterministic, is as narrow as the coefficients of the run allow, and shrinks
        with more steps. The other part is statistical and shrinks with more probes: the share that a probe
        uniform on the sphere sees of a true share F is distributed as Beta(nF/2, n(1-F)/2). With probability
        at least `level`, the true CDF lies in the band at all x at once (Bonferroni over the nodes).

        Args:
            x: points, any shape, in units of the eigenvalues.
            level: probability that the whole curve lies in the band.

        Returns:
            Interval(lower, estimate, upper), float64 arrays of the shape of `x`.

        Raises:
            SpectraError: `x` holds no real numbers, or `level` is not between 0 and 1.

        References:
            Golub and Meurant, Matrices, Moments and Quadrature, 2010, ch. 6; Chen, Trogdon and Ubaru,
            arXiv:2105.06595.

        Examples:
            >>> import jax, jax.numpy as jnp, spectra
            >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(-1.0, 3.0, 400)))
            >>> quadrature = spectra.slq(op, key=jax.random.key(0), num_steps=60, num_probes=4)
            >>> lower, estimate, upper = quadrature.cdf(0.0)
            >>> bool(lower < 0.25 < upper)
            True
        """
        self._require_numbers("cdf")
        return Interval(*distribution.cdf_band(self, real_numbers(x, "x"), level))

    def mean(self, f: Callable[[np.ndarray], Any]) -> float:
        """Estimate of tr f(H) / n for a vectorised function of eigenvalues, of NumPy or JAX, in float64."""
        self._require_numbers("mean")
        weights, values = np.asarray(self.weights), RealFunction(f)(self.nodes)
        return float(np.mean(np.sum(weights * np.where(weights > 0, values, 0.0), axis=1)))

    def band_width(self, *, level: float = 0.95) -> float:
        """Mean width of the CDF's band over the spectral range: the share of eigenvalues in doubt.

        Multiplied by the range, it bounds the Wasserstein-1 distance between estimate and truth.
        """
        self._require_numbers("band_width")
        return sum(distribution.band_width_parts(self, level))

    def _require_numbers(self, method: str) -> None:
        """Raise inside `jit`, and where several are stacked."""
        trees.require_values(f"Quadrature.{method}", self.nodes)
        require_one(self.nodes, "quadratures")

    def __repr__(self) -> str:
        if np.ndim(self.nodes) > 2:
            return f"Quadrature(several of a vmap or scan, shape={self.nodes.shape}, size={self.size})"
        text = f"Quadrature(num_probes={self.num_probes}, num_steps={self.num_steps}, size={self.size}"
        if isinstance(self.nodes, (Tracer, jax.ShapeDtypeStruct)):
            return f"{text}, {self.status.code})"
        low, high = self.range
        return f"{text}, range=({low:.6g}, {high:.6g}), {self.judged.code})"

    def _repr_html_(self) -> str | None:
        if np.ndim(self.nodes) > 2 or not trees.has_values(self.nodes):  # a notebook takes the text for None
            return None
        low, high = self.range
        rows = [
            ("parameters", f"{self.size:,}"),
            ("Lanczos", self.settings),
            ("range", f"{low:.6g} to {high:.6g}"),
            ("CDF in doubt", f"{100 * self.band_width():.2g} % on average over the range (95 % band)"),
            ("noise floor", f"{self.noise_floor:.1e}"),
            ("status", str(self.judged)),
        ]
        return notebook_view(self, "Quadrature of the spectral measure", rows)


@result("size", "num_matvecs", "precision", "status")
class Moments(Result):
    """Chebyshev moments of the spectral measures of k random probes.

    moments[i, j] = v_iᵀ T_j(A) v_i with |v_i| = 1 and A = (2 H - a - b) / (b - a), so that [a, b], which
    contains the spectrum, becomes [-1, 1].

    Returned by `kpm`, whose page has an example, the cost and the source.

    The [glossary](glossary.md#moments) defines probe and moments.
    """

    moments: Float[Array, "probes moments"]  # within [-1, 1]
    bounds: Float[Array, " 2"]  # a and b
    size: int  # n, order of the operator
    num_matvecs: int  # with those that found the bounds
    precision: float  # relative error of one product
    status: Status

    @property
    def num_probes(self) -> int:
        """k, the number of probes."""
        require_one(self.moments, "results of kpm")
        return self.moments.shape[0]

    @property
    def num_moments(self) -> int:
        """Moments of each probe, that of degree zero included."""
        return self.moments.shape[1]

    def __repr__(self) -> str:
        low, high = map(float, self.bounds)
        return (
            f"Moments(num_probes={self.num_probes}, num_moments={self.num_moments}, size={self.size}, "
            f"bounds=({low:.6g}, {high:.6g}), {self.status.code})"
        )

    def _repr_html_(self) -> str:
        low, high = map(float, self.bounds)
        rows = [
            ("parameters", f"{self.size:,}"),
            ("moments", f"{self.num_moments} x {self.num_probes} probes, {self.num_matvecs:,} products"),
            ("bounds", f"{low:.6g} to {high:.6g}"),
            ("status", str(self.status)),
        ]
        return notebook_view(self, "Chebyshev moments of the spectral measure", rows)


@result("linear_scale", "size", "level", "status")
class Density(Result):
    """A spectral density smoothed by a kernel of location-dependent width.

    ∫ density = 1 by the trapezoidal rule on `grid`, without renormalising, as far as the grid covers the
    spectrum. `lower` and `upper` enclose the exact spectrum smoothed by the same kernel, on the whole grid
    simultaneously, with confidence `level`; they include the errors of the quadrature and of the probes.

    Returned by `spectral_density`, whose page has an example and the sources. It costs no products.

    The [glossary](glossary.md#density) defines density, band, outlier and bulk.
    """

    grid: Float[Array, " grid"]  # eigenvalues
    density: Float[Array, " grid"]  # per unit of eigenvalue
    lower: Float[Array, " grid"]
    upper: Float[Array, " grid"]
    bandwidth: Float[Array, " grid"]  # width of the kernel for mass at each grid point
    linear_scale: float  # |eigenvalue| below which a signed-log axis should be linear
    outliers: Float[Array, " outliers"]  # mean positions of eigenvalues that stand alone
    size: int  # n
    level: float
    status: Status = Status.COMPLETE  # of the quadrature or the moments that it shows
    single: Bool[Array, " outliers"] | None = None  # known to be one eigenvalue, not several; None: not known

    @property
    def num_single(self) -> int:
        """How many of the outliers are known to be one eigenvalue each, and not several at one place."""
        return 0 if self.single is None else int(np.sum(self.single))

    def integral(self) -> float:
        """Mass on the grid by the trapezoidal rule; below one where the grid cuts the spectrum off."""
        return float(np.trapezoid(self.density, self.grid))

    def __repr__(self) -> str:
        return (
            f"Density(points={len(self.grid)}, range=({self.grid[0]:.4g}, {self.grid[-1]:.4g}), "
            f"integral={self.integral():.6f}, outliers={len(self.outliers)})"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("parameters", f"{self.size:,}"),
            ("range", f"{self.grid[0]:.4g} to {self.grid[-1]:.4g}"),
            ("integral", f"{self.integral():.6f}"),
            ("eigenvalues resolved one by one", f"{self.num_single:,}"),
            ("band", f"{100 * self.level:g} % on the whole grid"),
        ]
        return notebook_view(self, "Spectral density", rows)


def as_quadrature(held: Any) -> Quadrature:
    """A quadrature as it is; that of a report or of a snapshot.

    Raises:
        SpectraError: it is something else, and says what to pass.
    """
    found = getattr(held, "quadrature", held)
    if isinstance(found, Quadrature):
        return found
    if isinstance(found, Density):
        hint = "A Density is its smoothed picture: pass the quadrature that it was made from."
    elif isinstance(found, Mapping):
        hint = "Pass one of its values."
    elif isinstance(held, (str, os.PathLike)):
        hint = "`spectra.load` reads one from a file."
    else:
        hint = "`slq` and `spectrum` make one of an operator."
    raise SpectraError(f"a Quadrature or a report is needed, not {called(held)}. {hint}")


def as_spectrum(held: Any) -> Quadrature | Moments | Density:
    """What a density is drawn of: the density of a report, a quadrature, moments, or a density itself.

    Raises:
        SpectraError: it is something else.
    """
    density = getattr(held, "density", None)  # of a report; a Density has an array there
    if isinstance(density, Density):
        return density
    return held if isinstance(held, (Moments, Density)) else as_quadrature(held)


def by_name(held: Any) -> dict[str, Any]:
    """Results by name: a mapping as it is, a list by the names of its reports or by number, one by itself."""
    held = getattr(held, "quadratures", held)  # of a summary
    if isinstance(held, Mapping):
        return {str(name): part for name, part in held.items()}
    if isinstance(held, (list, tuple)):
        return _named(held)
    return _named([held])


def _named(parts: Iterable[Any]) -> dict[str, Any]:
    """Equal names are numbered, so that nothing is lost."""
    named: dict[str, Any] = {}
    for number, part in enumerate(parts, 1):
        name = str(getattr(part, "name", number))
        named[name if name not in named else f"{name} ({number})"] = part
    return named


def called(held: Any) -> str:
    """The kind of a value with its article."""
    name = type(held).__name__
    return f"an {name}" if name[:1] in "AEIOU" else f"a {name}"
