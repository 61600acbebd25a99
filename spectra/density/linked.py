"""What a smoothed density may be off by where Ritz vectors were taken out: see `spectra.quadrature.links`."""

import numpy as np

from spectra.density import bands
from spectra.density.bands import Width
from spectra.quadrature import rules
from spectra.results import Quadrature


def coupling_of_kernels(quadrature: Quadrature, grid: np.ndarray, widths: Width) -> np.ndarray:
    """How far the coupling to the rest can move the density at the grid.

    By parts, 1/n ∫ |K'| |N_H - N_{T ⊕ B}|: the variation of the kernel, twice its peak, times what is in
    doubt within its reach; or the slope of the kernel, below (0.61 + 2 η) peak / h, times 2 β.
    """
    links = quadrature.parts.links
    assert links is not None
    places = np.sort(np.append(grid, np.ravel(quadrature.nodes)))
    open_ = rules.doubt(quadrature, places)
    reach = bands.REACH * widths(np.abs(grid) + bands.REACH * widths(grid))
    first = np.maximum(np.searchsorted(places, grid - reach) - 1, 0)
    last = np.minimum(np.searchsorted(places, grid + reach) + 1, len(places))
    largest = np.array([np.max(open_[a:b]) for a, b in zip(first, last, strict=True)])
    near = np.maximum(np.abs(grid) - np.gradient(grid), 0.0)
    slope = (0.61 + 2 * widths.share) * 2 * links.beta / widths(near)
    return bands.peak(grid, widths) * np.minimum(2 * largest, slope) / quadrature.size
