"""What Lanczos steps leave open of a smoothed measure: Weyl's discs, by Cauchy's formula.

A kernel K is smooth, and a Gauss rule of m nodes is exact up to degree 2m - 1, so that its error for K
falls exponentially as soon as the kernel is wider than the spacing of the nodes. How much it is at most
follows from what is known for certain of the measure μ of a probe. The Stieltjes transform of any measure
with the same recurrence coefficients α_1, β_1, ..., α_m, β_m is, at z in the upper half plane,

    Σ_j w_j / (θ_j - z) + g(z)² / D,    g(z) = Σ_j sqrt(w_j) r_j / (θ_j - z),    -Im D >= b(z),

with b(z) = Im z (1 + Σ_j r_j² / |θ_j - z|²) and r_j with the signs of s_1j s_mj. So 1 / D lies in the disc
about i / 2b through zero: the transform lies in a disc (Weyl's) of radius |g|² / 2b about the Gauss rule's
value plus i g² / 2b. K is analytic, so by Cauchy's formula on a contour above the axis and its mirror image

    |∫ K dμ - Σ_j w_j K(θ_j) - (1/2π) Re ∫ K(z) g² / b dz| <= (1/2π) ∫ |K(z)| |g|² / b |dz|.

What is left is close to the least possible: where kernels are 0.2 to 0.5 spacings of the nodes wide, measures
in question differ by 0.8 to 0.96 of it.

References:
    Akhiezer, The Classical Moment Problem, 1965, ch. 1 and 2 (the discs).
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from spectra.density.kernels import REACH, Width, chunks, complex_hat_means
from spectra.quadrature.brackets import Origin, dropped, rules
from spectra.results import Quadrature

HEIGHTS = (0.5, 1.0, 2.0, 3.0)
"""Of the contours, in kernel widths: |K| grows as exp(y² / 2), and discs shrink as exp(-2 π y / spacing)."""
_PER_WIDTH = 4.0
"""Points of a contour in a width of the kernel: features there are half a width wide, or more."""
_SUMS = 1e-4
"""Of a radius: more than sums over these points are off by."""
_NONE = 1e-3  # of the density: an error that is no error to speak of
_TOGETHER = 32  # points of a grid
_BLOCK = 2_000_000  # numbers of a contour and the nodes side by side


@dataclasses.dataclass(frozen=True)
class Contour:
    """Points above the axis, a number of kernel widths high, for the kernels N(x; z, h(z)²) of all x."""

    z: NDArray[np.complex128]
    dz: NDArray[np.complex128]
    squares: NDArray[np.complex128]  # h(z)²

    @classmethod
    def at(cls, places: np.ndarray, height: float, widths: Width) -> "Contour":
        """Through the points that are so many widths from zero."""
        t = widths.place(places)
        h = widths(t)
        z = t + 1j * height * h
        slope = 1 + 1j * height * widths.share**2 * t / h
        return cls(z, h / _PER_WIDTH * slope, widths.squared(z))

    @functools.cached_property
    def sizes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Centers, factors and widths of the Gaussians |K_x(z)|.

        With 1 / h(z)² = a + i b and z = t + i y, |K_x(z)| = N(x; t - y b / a, 1 / a) times
        exp(a y² (1 + b² / a²) / 2) / sqrt(a |h(z)²|).
        """
        t, y, a, b = self.z.real, self.z.imag, (1 / self.squares).real, (1 / self.squares).imag
        growth = np.exp(a * y**2 * (1 + (b / a) ** 2) / 2) / np.sqrt(a * np.abs(self.squares))
        return t - y * b / a, growth, 1 / np.sqrt(a)

    @property
    def masses(self) -> np.ndarray:
        """|K_x(z)| |dz| / π over the Gaussians of `sizes`."""
        return self.sizes[1] * np.abs(self.dz) / np.pi

    def real_parts(self, grid: np.ndarray, wanted: np.ndarray, masses: NDArray[np.complex128]) -> np.ndarray:
        """Re Σ K_x(z) times complex masses, as means under the hats of the wanted points of a grid."""
        (centers, _, widths), found = self.sizes, np.zeros(len(grid))
        for target, points, inner in chunks(grid, _TOGETHER):
            if wanted[target].any():
                near = (centers + REACH * widths >= points[0]) & (centers - REACH * widths <= points[-1])
                kernel = complex_hat_means(points, self.z[near], self.squares[near])[inner]
                found[target] = np.sum((kernel * masses[near]).real, axis=1)
        return found


def open_errors(
    quadrature: Quadrature,
    grid: np.ndarray,
    fine: np.ndarray,
    widths: Width,
    moved: float,
    density: np.ndarray,
    smooth: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    origin: Origin | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(middle, error) of what smoothed quadratures miss, at the fine points of the grid.

    Arguments as those of `bands.limits`. Each point has the contour with the least error. Centers cost more
    than radii: where an error is no error to speak of, the disc of twice the radius about zero will do.
    """
    places = _places(widths.count(grid), fine)
    found: list[tuple[Contour, NDArray[np.complex128]]] = []
    radii: list[np.ndarray] = []
    for height in HEIGHTS:
        contour = Contour.at(places, height, widths)
        center, *parts = _discs(quadrature, contour, moved, origin)
        centers, _, h = contour.sizes
        found.append((contour, center * contour.dz / np.pi))
        radii.append((1 + _SUMS) * smooth(centers, contour.masses * np.stack(parts), h))
    own, around = np.stack(radii, axis=1)  # (heights, grid)
    best = np.argmin(own + around, axis=0)
    own, around = (np.take_along_axis(part, best[None], axis=0)[0] for part in (own, around))
    middle, seen = np.zeros(len(grid)), fine & (own + around > _NONE * density)
    for number, (contour, masses) in enumerate(found):
        mine = seen & (best == number)
        middle[mine] = contour.real_parts(grid, mine, masses)[mine]
    return middle, np.where(seen, 1.0, 2.0) * own + around


def _places(counts: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Points of a contour, as widths from zero, that the hats of the fine grid points can see."""
    left = np.append(counts[0], counts[:-1])[fine] - REACH - 1
    right = np.append(counts[1:], counts[-1])[fine] + REACH + 1
    first, last = np.floor(left * _PER_WIDTH).astype(int), np.ceil(right * _PER_WIDTH).astype(int)
    first = np.maximum(first, np.append(first[0], last[:-1] + 1))  # both grow with the grid
    pieces: list[np.ndarray] = [np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]
    return np.concatenate(pieces) / _PER_WIDTH


def _discs(
    quadrature: Quadrature, contour: Contour, moved: float, origin: Origin | None
) -> tuple[NDArray[np.complex128], np.ndarray, np.ndarray]:
    """Centers of the discs, less the Gauss rule's values and over i, their radii, and what rounding adds to
    these, as means over probes.

    Where H is known to within `moved` = δ, the transform vᵀ(H - z)⁻¹v changes by
    δ |(H - z)⁻¹v| |(H + E - z)⁻¹v| at most, and |(H - z)⁻¹v|² is its imaginary part over Im z.
    """
    t, y = contour.z.real, contour.z.imag
    middle, radius, around = np.zeros(len(t), complex), np.zeros(len(t)), np.zeros(len(t))
    behind = dropped(origin.whole if origin else quadrature)
    blocks = np.array_split(np.arange(len(t)), 1 + len(t) * quadrature.num_steps // _BLOCK)
    # Of the rest of a measure as much is open as of the measure, in units of the mass that is left.
    none = np.zeros(0, int)
    shares = origin.rules() if origin else ((rule, none) for rule in rules(quadrature))
    for ((theta, w, r), taken), part in itertools.product(shares, blocks):
        share = (1 - w[taken].sum()) * quadrature.num_probes
        away, above, half = theta[:, None] - t[part], y[part], np.zeros(len(part))
        seen = 1 / (away**2 + above**2)  # |θ - z|⁻²; the inverse itself is (θ - t + i y) times that
        far = (moved if r.any() else moved + behind) / above
        if r.any():
            rows = np.sqrt(w) * r
            g = rows @ (away * seen) + 1j * above * (rows @ seen)
            square = g**2 / (2 * above * (1 + r**2 @ seen))
            half = np.abs(square)
            middle[part] += square / share
        radius[part] += half / share
        around[part] += far * (1 + far) * (above * (w @ seen) + 2 * half) / share
    return middle, radius, around
