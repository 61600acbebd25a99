"""Pictures of what lies at the edge: a line far outside, a single rank, no name, a long title, no numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import spectra
from spectra.report.plots.style import symlog

KEY = jax.random.key(0)


@functools.cache
def _spiked():
    """A bulk around zero and ten eigenvalues up to 20."""
    values = jnp.concatenate([jnp.linspace(-0.1, 0.1, 90), jnp.linspace(2.0, 20.0, 10)])
    return spectra.slq(spectra.MatrixOperator(jnp.diag(values)), key=KEY, num_steps=20, num_probes=2)


@pytest.mark.slow
def test_the_line_of_a_small_learning_rate_leaves_the_spectrum_visible():
    """2 / 1e-4 is a thousand times the largest eigenvalue: a linear axis would show the line alone."""
    ax = spectra.plot_density(_spiked(), learning_rate=1e-4)
    place = ax.transAxes.inverted().transform
    ends = [place(ax.transData.transform((x, 1.0)))[0] for x in (0.0, 20.0)]
    assert ends[1] - ends[0] > 0.3
    both = spectra.plot_comparison({"a": _spiked(), "b": _spiked()}, learning_rate=1e-4)
    assert both.get_xscale() == ax.get_xscale() == "symlog"


@pytest.mark.parametrize("sign", [1, -1])
def test_a_narrow_axis_on_one_side_of_zero_is_labelled_by_powers_of_ten(sign):
    """Four labels on three decades name every second power, of which only 1 lies on this axis."""
    ax = plt.subplots()[1]
    low, high = sorted((sign * 0.06, sign * 5.5))
    symlog(ax.xaxis, 6e-3, low, high, labels=4)
    ticks = ax.get_xticks()
    np.testing.assert_allclose(sorted(abs(ticks[(low <= ticks) & (ticks <= high)])), [0.1, 1.0])


@pytest.mark.slow
def test_ranks_are_whole_numbers():
    for k in (1, 2, 5):
        pairs = spectra.eigsh(spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 40))), k, key=KEY)
        ax = pairs.plot()
        low, high = ax.get_xlim()
        ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
        assert ticks
        assert all(tick == int(tick) >= 1 for tick in ticks)


@pytest.mark.slow
def test_a_spectrum_without_a_name_is_in_the_legend():
    ax = spectra.plot_comparison({"": _spiked(), "_a": _spiked(), "b": _spiked()})
    assert len(ax.figure.legends[0].get_texts()) == 3


@pytest.mark.slow
def test_a_long_title_stays_in_the_picture():
    ax = spectra.plot_density(_spiked(), title="a title of many words " * 4)
    ax.figure.canvas.draw()
    box = ax.title.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= ax.figure.bbox.x1


def test_nodes_that_are_no_numbers_have_no_density():
    """As a run inside jit gives them where an operator is not symmetric."""
    quadrature = dataclasses.replace(_spiked(), nodes=np.full((2, 20), np.nan))
    for draw in (spectra.plot_density, spectra.plot_cdf, spectra.spectral_density):
        with pytest.raises(spectra.SpectraError, match="NaN or infinite"):
            draw(quadrature)
