"""What a quadrature leaves open of a smoothed measure, against measures that have the same coefficients.

A Jacobi matrix whose first rows are those of a run has a measure with the same coefficients, whatever its
other rows are: each is a measure that the probe may have, known to rounding, and all limits hold for it.
"""

import numpy as np
import pytest
from scipy.linalg import eigh_tridiagonal

import spectra
from spectra.density.hats import smooth
from spectra.density.kernels import Width, complex_hat_means
from spectra.density.smoothing import _curves, _default_grid

STEPS = 16


def measure(alpha, beta):
    """Nodes and masses of the measure of a Jacobi matrix."""
    nodes, vectors = eigh_tridiagonal(alpha, beta)
    return nodes, vectors[0] ** 2


def run_of(alpha, beta):
    """The quadrature of a run of so many steps, one for each β."""
    nodes, vectors = eigh_tridiagonal(alpha, beta[:-1])
    return spectra.Quadrature(
        nodes=nodes[None],
        weights=vectors[:1] ** 2,
        residuals=np.abs(beta[-1] * vectors[-1:]),
        lengths=np.array([len(nodes)]),
        asymmetry=np.zeros(1),
        size=1000,
        num_matvecs=len(nodes),
        precision=np.finfo(float).eps,
        status=spectra.Status.COMPLETE,
    )


BULK = np.zeros(STEPS), np.full(STEPS, 0.5)  # a semicircle on [-1, 1]
SPIKED = np.append(20.0, np.linspace(1.0, 0.5, STEPS - 1)), np.linspace(1.0, 0.2, STEPS)


def extensions(alpha, beta, rng):
    """Measures with these coefficients: with one row more, whatever its entry, and with many random ones."""
    for x in np.sinh(np.linspace(-4.0, 4.0, 41)):
        yield measure(np.append(alpha, x), beta)
    for rows in (2, 5, 40):
        for scale in (1e-2, 0.5, 3.0):
            more = scale * rng.standard_normal(rows), scale * rng.random(rows - 1)
            yield measure(np.append(alpha, more[0]), np.append(beta, more[1]))


@pytest.mark.parametrize(("run", "share"), [(BULK, 0.0), (SPIKED, 0.0), (SPIKED, 0.05)])
@pytest.mark.parametrize("width", [0.2, 0.5])
def test_every_measure_with_the_same_coefficients_is_within_limits_that_are_no_wider(run, share, width):
    """None is outside but for rounding and for kernels cut off at 1e-9 of their peak. And between them they
    reach to most of what is left, so that no limits could be narrower by much."""
    found = run_of(run[0], run[1])
    h = Width(width * float(np.median(np.diff(found.nodes[0]))), share)
    grid = _default_grid(found.nodes[0], h)
    lower, middle, upper = _curves(found, grid, h, found.noise_floor, None)
    curves = [
        smooth(grid, nodes, masses[None], h(nodes))[0][0]
        for nodes, masses in extensions(run[0], run[1], np.random.default_rng(0))
    ]
    curves, slack = np.array(curves), 1e-8 * middle.max()
    assert (lower - slack <= curves).all()
    assert (curves <= upper + slack).all()
    reached = np.trapezoid(curves.max(axis=0) - curves.min(axis=0), grid)
    left = np.trapezoid(upper - lower, grid)
    assert reached >= 0.75 * left


def test_means_of_complex_kernels_under_hats_are_those_of_quadrature():
    from numpy.polynomial.legendre import leggauss

    grid, z, squares = np.array([-1.0, -0.9, 0.3, 2.0, 6.0]), np.array([0.1 + 0.5j, -0.4 + 0.9j]), 0.2 + 0.03j
    place, weight = leggauss(80)
    rising, cells = (place + 1) / 2, np.diff(grid)[:, None]
    x = grid[:-1, None] + cells * rising
    kernel = np.exp(-((x[..., None] - z) ** 2) / 2 / squares) / np.sqrt(2 * np.pi * squares)
    up, down = (np.einsum("q,gqc->gc", weight / 2 * hat, kernel) * cells for hat in (rising, 1 - rising))
    total = np.concatenate([down[:1], up[:-1] + down[1:], up[-1:]])
    area = np.concatenate([cells[:1], cells[:-1] + cells[1:], cells[-1:]]) / 2
    expected = total / area
    found = complex_hat_means(grid, z, np.full(2, squares))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())
    # Where cells are narrow: the value itself, but for (cell / width)² / 12.
    narrow = complex_hat_means(0.3 + 1e-9 * np.arange(3), z, np.full(2, squares))
    value = np.exp(-((0.3 - z) ** 2) / 2 / squares) / np.sqrt(2 * np.pi * squares)
    np.testing.assert_allclose(narrow, np.broadcast_to(value, (3, 2)), rtol=1e-6)
