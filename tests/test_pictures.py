"""Pictures, compared with stored ones and read as a reader does: labels apart, nothing cut off.

The results drawn are made of NumPy numbers, so that a picture changes only when the drawing does. Text is
compared apart from the image: glyphs differ between versions of FreeType and matplotlib.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest
from cases import Ridge, slow_but
from matplotlib.legend import Legend

import spectra
from spectra import Status
from spectra.density.smoothing import default_points, smoothed
from spectra.report.plots import gallery
from spectra.report.plots.history import in_colour
from spectra.report.plots.style import NAME, short_names, wrapped
from spectra.report.sections import sections

# Root mean square of the differences of all pixels, from 0 to 255. On these pictures outlier ticks in another
# colour give 2.5 to 3, solid in the place of dashed lines 5 to 17, a band that is gone 4 to 13. What the
# version of matplotlib changes, glyphs and the room that they take, is left out.
TOLERANCE = 1.5


def compared(draw):
    """Compare what `draw` returns with the stored picture, without its text."""

    @pytest.mark.mpl_image_compare(
        baseline_dir="baseline", style="default", tolerance=TOLERANCE, savefig_kwargs={"dpi": 100}
    )
    @functools.wraps(draw)
    def test():
        figure = draw().figure
        figure.canvas.draw()
        figure.set_layout_engine("none")  # what was laid out around the text
        for ax in figure.axes:
            ax.set_position(ax.get_subplotspec().get_position(figure))
        for artist in [*figure.findobj(plt.Text), *figure.findobj(Legend)]:
            artist.set_visible(False)
        return figure

    return test


def quadrature(scale=1.0, probes=3, seed=0, size=500):
    """A bulk around zero, a tail and three outliers, with the residuals of a run of 24 steps."""
    rng = np.random.default_rng(seed)
    bulk = np.linspace(-0.01, 0.05, 15) + rng.uniform(-1, 1, (probes, 15)) / 500
    tail = np.logspace(-1, 0, 6) * (1 + rng.uniform(-1, 1, (probes, 6)) / 50)
    outliers = np.tile([4.0, 7.0, 11.0], (probes, 1))
    weights = np.array([12.0] * 15 + [2.0] * 6 + [1 / size * 190] * 3) * rng.uniform(0.8, 1.2, (probes, 24))
    residuals = np.array([1e-3] * 15 + [1e-2] * 6 + [1e-6] * 3) * np.ones((probes, 24))
    return spectra.Quadrature(
        nodes=scale * np.sort(np.concatenate([bulk, tail, outliers], axis=1)),
        weights=weights / weights.sum(axis=1, keepdims=True),
        residuals=scale * residuals,
        lengths=np.full(probes, 24),
        asymmetry=np.full(probes, 1e-7),
        size=size,
        num_matvecs=24 * probes,
        precision=1.2e-7,
        status=Status.COMPLETE,
    )


def density(**options):
    return spectra.spectral_density(quadrature(**options))


def pairs(k=5, layers=4):
    rng = np.random.default_rng(1)
    vectors = {
        f"layer_{i}": {
            "kernel": rng.standard_normal((k, 6, 4)) * (i + 1),
            "bias": rng.standard_normal((k, 4)),
        }
        for i in range(layers)
    }
    size = np.sqrt(sum(np.sum(x.reshape(k, -1) ** 2, axis=1) for x in jax.tree.leaves(vectors)))
    vectors = jax.tree.map(lambda x: x / size.reshape(-1, *[1] * (x.ndim - 1)), vectors)
    return spectra.Eigenpairs(
        values=np.linspace(1.0, 8.0, k),
        vectors=vectors,
        residuals=np.linspace(1.0, 0.01, k),
        converged=np.arange(k) > 0,
        which="LA",
        size=28 * layers,
        num_matvecs=40,
        num_restarts=1,
        missed=0.01,
        noise_floor=1e-6,
        status=Status.NOT_CONVERGED,
    )


def history(count=8):
    snapshots = []
    for i in range(count):
        scale = 1 - np.exp(-(i + 1) / 3)
        q = quadrature(scale, seed=i, probes=1)
        top = float(q.nodes.max())
        ends = [spectra.Interval(x - 0.01, x, x + 0.01) for x in (top, float(q.nodes.min()))]
        snapshots.append(
            spectra.Snapshot(
                step=50 * i,
                eigenvalues=np.array([top]),
                residuals=np.array([0.01]),
                largest=ends[0],
                smallest=ends[1],
                trace=spectra.Estimate(10.0 * scale, 1.0, 24, "slq"),
                quadrature=q,
                scalars={"learning_rate": 0.25, "loss": 1 / (i + 1)},
                num_matvecs=26,
                seconds=0.1,
                trained=float(i),
            )
        )
    return spectra.SpectrumHistory(tuple(snapshots), {"name": "a synthetic network"})


def plane():
    x = np.linspace(-1, 1, 21)
    along, across = np.meshgrid(x, x)
    quadratic = 0.2 + 0.1 * along + 2 * along**2 + across**2 / 2
    return spectra.LossSlice(
        x, x, quadratic + 0.8 * along**3 + 0.4 * across**4, quadratic, np.array([0.1, 0.0]),
        np.array([4.0, 1.0]), 0.2, 441,
    )  # fmt: skip


@compared
def test_density():
    return spectra.plot_density(density(), learning_rate=0.1)


@pytest.mark.slow
@compared
def test_density_loglog():
    return spectra.plot_density(density(), xscale="loglog")


@pytest.mark.slow
@compared
def test_density_linear():
    bulk = spectra.spectral_density(quadrature(), grid=np.linspace(-0.05, 0.12, 200))
    return spectra.plot_density(bulk, xscale="linear", yscale="linear")


@pytest.mark.slow
@compared
def test_comparison():
    results = {"wide": quadrature(), "narrow": density(scale=0.1, seed=3), "small": quadrature(1e-2, seed=4)}
    return spectra.plot_comparison(results, learning_rate=0.1)


@pytest.mark.slow
@compared
def test_blocks():
    results = {f"layer_{i}": quadrature(10.0**-i, seed=i) for i in range(5)}
    return spectra.plot_blocks(results)[0]


@pytest.mark.slow
@compared
def test_cdf():
    return spectra.plot_cdf(quadrature())


@compared
def test_eigenvalues():
    return spectra.plot_eigenvalues(pairs())


@pytest.mark.slow
@compared
def test_density_over_time():
    return spectra.plot_density_over_time(history(), learning_rate=True, limit=14.0)


@pytest.mark.slow
@compared
def test_eigenvector_mass():
    return spectra.plot_eigenvector_mass(pairs(), by="leaf")


@pytest.mark.slow
@compared
def test_landscape():
    return spectra.plot_landscape(plane())


@pytest.mark.slow
@compared
def test_cdf_complement():
    return spectra.plot_cdf(quadrature(), yscale="complement")


@pytest.mark.slow
@compared
def test_many_blocks():
    return spectra.plot_blocks({f"layer_{i}": density(scale=10 ** (-i / 7), seed=i) for i in range(21)})[0]


PICTURES = {
    "density": lambda ax: spectra.plot_density(density(), ax, learning_rate=0.1),
    "loglog": lambda ax: spectra.plot_density(density(), ax, xscale="loglog"),
    "comparison": lambda ax: spectra.plot_comparison({"a": quadrature(), "b": quadrature(0.1)}, ax),
    "counts": lambda ax: spectra.plot_density(density(), ax, counts=True, title="layer $x"),
    "cdf": lambda ax: spectra.plot_cdf(quadrature(), ax),
    "cdf from above": lambda ax: spectra.plot_cdf(quadrature(), ax, yscale="complement"),
    "eigenvalues": lambda ax: spectra.plot_eigenvalues(pairs(), ax),
    "time": lambda ax: spectra.plot_density_over_time(history(), ax, learning_rate=0.25),
    "mass": lambda ax: spectra.plot_eigenvector_mass(pairs(k=20, layers=9), ax),
    "landscape": lambda ax: spectra.plot_landscape(plane(), ax),
    "landscape with long numbers": lambda ax: spectra.plot_landscape(
        dataclasses.replace(
            plane(),
            x=0.123 * plane().x,
            y=0.123 * plane().y,
            loss=plane().loss / 200,
            eigenvalues=np.array([0.60901, 0.46914]),
        ),
        ax,
    ),
}


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("name", slow_but(PICTURES, "eigenvalues", "mass", "landscape"))
def test_a_picture_of_8_cm_is_legible(name):
    """No two labels of an axis touch, no text is below 5 points, nothing lies outside the figure."""
    figure = PICTURES[name](None).figure
    assert figure.get_size_inches()[0] * 2.54 == pytest.approx(8.0, abs=0.01)
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    page = figure.bbox
    for ax in [*figure.axes, *(child for parent in figure.axes for child in parent.child_axes)]:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
            boxes = [
                label.get_window_extent(renderer)
                for place, label in ticks
                if low <= place <= high and label.get_text() and label.get_visible()
            ]
            for one, other in itertools.combinations(boxes, 2):
                assert not one.overlaps(other)
            boxes += [axis.label.get_window_extent(renderer)] if axis.label.get_text() else []
            for box in boxes:
                assert page.x0 <= box.x0 < box.x1 <= page.x1 + 1
                assert page.y0 <= box.y0 < box.y1 <= page.y1 + 1
    for legend in figure.findobj(Legend):
        box = legend.get_window_extent(renderer)
        assert page.x0 <= box.x0 < box.x1 <= page.x1
    texts = [t for t in figure.findobj(plt.Text) if t.get_text() and t.get_visible()]
    assert min(t.get_fontsize() for t in texts) >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_go_into_axes_that_are_given_and_leave_the_settings_alone(name):
    before = dict(plt.rcParams)
    _, (left, right) = plt.subplots(1, 2)
    assert PICTURES[name](right) is right
    assert not left.has_data()
    assert PICTURES[name](None) is not right
    assert dict(plt.rcParams) == before


def test_a_log_log_picture_leaves_no_part_of_the_spectrum_out():
    ax = spectra.plot_density(density(), xscale="loglog", label="H")
    assert [line.get_label() for line in ax.get_lines()[:2]] == ["H", "H, negative"]
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_xlabel() == "|eigenvalue|"


def test_what_a_density_shows_is_a_choice():
    held = density()
    full = spectra.plot_density(held)
    _, stems = full.collections
    tops = np.array([segment[-1] for segment in stems.get_segments()])
    widths = 0.05 * np.hypot(held.outliers, held.linear_scale)  # the kernel of `spectral_density`
    np.testing.assert_allclose(tops[:, 0], held.outliers)
    np.testing.assert_allclose(tops[:, 1], 1 / (500 * widths * np.sqrt(2 * np.pi)), rtol=1e-3)
    bare = spectra.plot_density(held, band=False, outliers=False, title="$x")
    assert bare.collections[0].get_alpha() == 0
    assert len(bare.collections) == 1
    assert bare.get_title() == "$x"
    wide = spectra.plot_density(quadrature(), bandwidth=0.1, band=False)
    assert np.ptp(wide.lines[0].get_ydata()[wide.lines[0].get_ydata() > 1e-3]) < np.ptp(
        full.lines[0].get_ydata()
    )
    with pytest.raises(spectra.SpectraError, match="a density has one already"):
        spectra.plot_density(held, bandwidth=0.1)


def bars(ax):
    """The ends of the bars of kernel widths."""
    return [(text.xyann[0], text.xy[0]) for text in ax.texts if text.get_gid() == "kernel"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"xscale": "linear"}, {"xscale": "loglog"}, {"learning_rate": 0.1}, {"learning_rate": 1e-3}],
)
def test_the_bar_is_a_kernel_width_to_each_side(options):
    held = density()
    ax = spectra.plot_density(held, **options)
    ((left, right),) = bars(ax)
    middle = (left + right) / 2
    # The bar ends at a given place, so its middle is iterated on: a relative width of 0.05 leaves 0.05³.
    assert (right - left) / 2 == pytest.approx(np.interp(middle, held.grid, held.bandwidth), rel=1e-3)
    assert ax.get_xlim()[0] < left < right < ax.get_xlim()[1]
    assert right < 2 / options.get("learning_rate", 1e-9)  # left of its line
    assert not bars(spectra.plot_density(held, kernel=False))
    assert not bars(spectra.plot_blocks([held])[0])


def mirrored(held):
    parts = ("density", "lower", "upper", "bandwidth")
    turned = {name: getattr(held, name)[::-1] for name in parts}
    return dataclasses.replace(held, grid=-held.grid[::-1], outliers=-held.outliers, **turned)


def test_the_bar_of_a_negative_spectrum_on_log_axes_is_that_of_its_mirror_image():
    held = density()
    drawn = [spectra.plot_density(each, xscale="loglog") for each in (held, mirrored(held))]
    np.testing.assert_allclose(bars(drawn[1]), bars(drawn[0]), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"xscale": "linear", "yscale": "linear"}, {"xscale": "loglog"}])
def test_marks_keep_away_from_what_is_written_and_from_the_frame(options):
    """A tenth of the axis is for the kernel's width; a peak at the right end, as of a wholly negative
    spectrum, or next to the peak of one 1e20 times as wide, would cross it."""
    wide, tiny = density(), density(scale=1e-20, seed=3)
    for ax in (
        spectra.plot_density(mirrored(wide), **options),
        spectra.plot_comparison({"wide": wide, "tiny": tiny}, **options),
    ):
        place = ax.transScale.transform
        (left, bottom), (right, top) = place(ax.viewLim.get_points())
        drawn = [place(line.get_xydata()) for line in ax.lines if not line.get_label().startswith("_")]
        assert max((curve[:, 1].max() - bottom) / (top - bottom) for curve in drawn) < 0.901
        stems = [c for c in ax.collections if "eigenvalues" in c.get_label()]
        for x, y in [path.vertices[0] for stem in stems for path in stem.get_paths()]:
            across = (place((x, max(y, 1e-300)))[0] - left) / (right - left)
            assert 0.015 < across < 0.985
        plt.close(ax.figure)


@pytest.mark.slow
def test_kernels_of_two_widths_are_two_bars_and_of_one_width_one():
    q = quadrature()
    widths = {"relative": density(), "fixed": spectra.spectral_density(q, bandwidth=0.2)}
    (left, right), fixed = bars(spectra.plot_comparison(widths))
    assert (right - left) / (right + left) == pytest.approx(0.05, rel=1e-3)
    assert fixed[1] - fixed[0] == pytest.approx(2 * 0.2, rel=1e-3)
    assert len(bars(spectra.plot_comparison([density(), density(seed=1)]))) == 1


@pytest.mark.slow
def test_a_figure_of_its_own_says_what_its_marks_are():
    def marks(figure):
        return {text.get_text() for legend in figure.legends for text in legend.get_texts()}

    ax = spectra.plot_density(density(), learning_rate=0.1)
    assert marks(ax.figure) == {"density", "95 % band", "isolated eigenvalues", "2 / learning rate"}
    known = dataclasses.replace(density(), single=np.ones(len(density().outliers), bool))
    assert "single eigenvalues" in marks(spectra.plot_density(known).figure)
    assert marks(spectra.plot_density(density(), band=False, outliers=False).figure) == {"density"}
    assert marks(spectra.plot_landscape(plane()).figure) == {
        "parameters",
        "quadratic model, every second level",
    }
    assert marks(spectra.plot_landscape(plane(), quadratic=False).figure) == {"parameters"}
    _, own = plt.subplots()
    spectra.plot_density(density(), own, label="H")
    assert own.get_legend_handles_labels()[1] == ["H"]  # the caller's legend holds the caller's words
    assert spectra.plot_eigenvector_mass(pairs()).get_xlabel().endswith("(all: share of the parameters)")


LONG = "encoder/layers_11/self_attention/query_projection/kernel_of_head"


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 6, 20])
@pytest.mark.parametrize("name", ["a", LONG])
def test_a_legend_fits_its_figure(count, name):
    ax = spectra.plot_comparison({f"{name}{i}": density(scale=1 + i) for i in range(count)})
    ax.figure.canvas.draw()
    (legend,) = ax.figure.legends
    box, page = legend.get_window_extent(), ax.figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert ax.bbox.height > 1.1 * ax.figure.dpi  # an inch: the figure grows with its legend
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.get_lines()}) == count


@pytest.mark.slow
def test_no_band_hides_the_edges_of_another():
    ax = spectra.plot_comparison({"a": density(), "b": density(seed=1)})
    assert len(ax.collections) == 2
    for band in ax.collections:
        assert band.get_edgecolor()[0, 3] > 3 * band.get_facecolor()[0, 3] > 0
        assert band.get_linewidth()[0] > 0
        assert band.get_zorder() < min(line.get_zorder() for line in ax.get_lines())


@pytest.mark.slow
def test_many_spectra_are_shades_in_their_order_and_no_band_is_cut():
    ax = spectra.plot_comparison([density(scale=1 + i) for i in range(8)])
    greys = [plt.matplotlib.colors.to_rgb(line.get_color()) for line in ax.get_lines()]
    assert np.all(np.diff(np.dot(greys, [0.299, 0.587, 0.114])) > 0)
    assert not any(band.get_alpha() for band in ax.collections)
    held = density()
    wide = dataclasses.replace(held, upper=held.density + 9 * held.density.max())
    for yscale in ("linear", "log"):
        for ax in (
            spectra.plot_comparison([held, wide], yscale=yscale),
            spectra.plot_density(wide, yscale=yscale),
        ):
            assert ax.get_ylim()[1] > wide.upper.max()
        assert spectra.plot_density(wide, yscale=yscale, band=False).get_ylim()[1] < wide.upper.max()


def spectrum_of(values, weights=None):
    """A quadrature of one probe with these nodes, of which nothing is resolved."""
    values = np.atleast_2d(np.asarray(values, float))
    size = values.shape[1]
    weights = np.full(size, 1 / size) if weights is None else weights
    return spectra.Quadrature(
        nodes=values,
        weights=np.atleast_2d(weights),
        residuals=np.full_like(values, np.ptp(values) / size + 1e-3),
        lengths=np.array([size]),
        asymmetry=np.array([1e-7]),
        size=1000,
        num_matvecs=size,
        precision=1.2e-7,
        status=Status.COMPLETE,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        [2.0],
        [2.0, 2.2],
        [-2.2, -2.0],
        [0.2, 0.5, 1.3],
        [3e-20, 4e-20],
    ],
)
@pytest.mark.parametrize("xscale", ["auto", "symlog", "loglog"])
def test_axes_of_any_spectrum_have_labels_that_do_not_touch(values, xscale):
    ax = spectra.plot_density(spectrum_of(values), xscale=xscale)
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    labels = [*ax.get_xticklabels(), *ax.get_xticklabels(minor=True)]
    shown = [text for text in labels if text.get_text() and low <= text.get_position()[0] <= high]
    assert len(shown) >= 2
    boxes = sorted((text.get_window_extent() for text in shown), key=lambda box: box.x0)
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))


@pytest.mark.slow
def test_steps_are_whole_and_open_circles_are_explained():
    first = tuple(dataclasses.replace(snapshot, step=i) for i, snapshot in enumerate(history(2)))
    ax = spectra.plot_density_over_time(spectra.SpectrumHistory(first, {}))
    assert all(float(tick).is_integer() for tick in ax.get_xticks())
    found = pairs()
    ax = spectra.plot_eigenvalues(dataclasses.replace(found, converged=np.arange(5) > 1))
    (legend,) = ax.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["not converged, ± residual"]
    assert not spectra.plot_eigenvalues(dataclasses.replace(found, converged=np.full(5, True))).figure.legends


@pytest.mark.slow
def test_eigenvalues_and_distributions_of_several_results_are_told_apart():
    q, found = quadrature(), dataclasses.replace(pairs(), converged=np.full(5, True))
    doubled = dataclasses.replace(found, values=2 * np.asarray(found.values), converged=np.arange(5) > 1)
    ax = spectra.plot_eigenvalues({"a": found, "b": doubled})
    (legend,) = ax.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "b, not converged"]
    drawn = np.concatenate([line.get_ydata() for line in ax.lines if line.get_label() == "a"])
    np.testing.assert_array_equal(drawn, np.asarray(found.values)[::-1])
    further = dataclasses.replace(q, nodes=np.asarray(q.nodes) + 5)
    ax = spectra.plot_cdf({"q": q, "further": further})
    assert [line.get_label() for line in ax.lines] == ["q", "further"]
    for line in ax.lines:  # to both ends of the axis
        x, y = line.get_data()
        assert x[0] <= ax.get_xlim()[0] <= ax.get_xlim()[1] <= x[-1]
        assert y[0] == 0
        assert y[-1] == pytest.approx(1)
    assert len(spectra.plot_eigenvalues({"q": q, "further": further}).lines) == 2


@pytest.mark.slow
def test_what_is_no_picture_is_refused_in_words():
    q, (figure, axes) = quadrature(), plt.subplots(1, 2)
    for words, draw in {
        "ax is a Figure, not an Axes": lambda: spectra.plot_density(q, figure),
        "ax is a ndarray, not an Axes": lambda: spectra.plot_cdf(q, axes),
        "learning_rate='0.1': use a real number": lambda: spectra.plot_density(q, learning_rate="0.1"),
        "not a str. `spectra.load` reads one": lambda: spectra.plot_density("spectrum.npz"),
        "Eigenpairs are needed, which `eigsh` returns, not a Quad": lambda: spectra.plot_eigenvector_mass(q),
        "no results to draw": lambda: spectra.plot_eigenvalues({}),
        "no spectra to draw": lambda: spectra.plot_comparison({}),
        "q is no Eigenpairs": lambda: spectra.plot_eigenvalues({"q": q, "pairs": pairs()}),
        "there are no eigenpairs": lambda: spectra.plot_eigenvalues(
            jax.tree.map(lambda x: np.asarray(x)[:0] if np.ndim(x) else x, pairs())
        ),
        "columns=-1: use 1 or more": lambda: spectra.plot_blocks([q], columns=-1),
    }.items():
        with pytest.raises(spectra.SpectraError, match=re.escape(words)):
            draw()


@pytest.mark.slow
def test_what_surrounds_a_figure_of_its_own_is_heeded():
    with spectra.plot_style(axes_labelsize=11):
        assert spectra.plot_density(density()).xaxis.label.get_size() == 11
    assert spectra.plot_density(density()).xaxis.label.get_size() == 8
    with plt.style.context("dark_background"):
        ax = spectra.plot_density_over_time(history(), learning_rate=True)
    assert ax.get_lines()[1].get_color() == "white"  # on black ground


def test_the_second_axis_counts_the_eigenvalues_beyond():
    q = quadrature()
    ax = spectra.plot_density(q, counts=True)
    (other,) = [twin for twin in ax.figure.axes if twin is not ax]
    x, count = other.lines[0].get_data()
    # At 2 and -1, twenty kernel widths from any eigenvalue, smoothing moves nothing across.
    np.testing.assert_allclose(np.interp(2.0, x, count), q.size * (1 - q.cdf(2.0).estimate), rtol=1e-6)
    assert np.interp(-1.0, x, count) < 1e-6


def test_the_distribution_from_above_counts_what_is_above():
    q = quadrature()
    ax = spectra.plot_cdf(q, yscale="complement")
    x, count = ax.lines[0].get_data()
    at = np.searchsorted(x, 2.0, side="right") - 1  # steps
    lower, middle, upper = q.cdf(2.0)
    assert q.size * (1 - upper) - 1e-9 <= count[at] <= q.size * (1 - lower) + 1e-9
    np.testing.assert_allclose(count[at], q.size * (1 - middle), rtol=1e-6)
    assert ax.get_yscale() == "log"
    with pytest.raises(spectra.SpectraError, match="yscale='cubic'"):
        spectra.plot_cdf(q, yscale="cubic")


@pytest.mark.slow
def test_more_than_twenty_blocks_are_rows_of_colours():
    results = {f"layer_{i}": density(seed=0) for i in range(21)}
    (ax,) = spectra.plot_blocks(results)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(results)
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first above
    panels = spectra.plot_blocks(dict(list(results.items())[:3]), own_x=True)
    assert len(panels) == 3
    assert panels[0].get_title() == "layer_0, n = 500"
    (long,) = spectra.plot_blocks({"encoder.layers.0.self_attention": results["layer_0"]})
    assert long.get_title() == "encoder.layers.0.self_attention,\nn = 500"
    name = "encoder.transformer.layers.0.self_attention.query_key_value"
    assert wrapped(f"{name}, of 16", 34) == (
        "encoder.transformer.layers.0.\nself_attention.query_key_value,\nof 16"
    )
    assert wrapped(f"{name}/bias", 52) == f"{name[:44]}\n{name[44:]}/bias"
    assert not panels[0].get_shared_x_axes().joined(panels[0], panels[1])
    assert len(spectra.plot_blocks(dict(list(results.items())[:3]), heat_map=True)) == 1


@pytest.mark.slow
def test_blocks_are_drawn_into_the_axes_of_the_caller():
    results = {f"layer_{i}": density(scale=10.0**i, seed=i) for i in range(3)}
    figure, grid = plt.subplots(2, 2)
    panels = spectra.plot_blocks(results, grid.ravel()[:3])
    assert list(panels) == list(grid.ravel()[:3])
    alone = spectra.plot_blocks(results)
    for panel, own, (name, held) in zip(panels, alone, results.items(), strict=True):
        assert panel.get_title().startswith(name)
        assert (panel.get_xlim(), panel.get_ylim()) == (own.get_xlim(), own.get_ylim())
        assert panel.get_xlabel() == "eigenvalue"
        np.testing.assert_array_equal(panel.lines[0].get_data(), own.lines[0].get_data())
        spectra.plot_blocks({name: held}, panel)  # a single Axes for a single result is a panel
        assert len(panel.lines) == 2
    spectra.plot_blocks(results, grid[1, 1])  # and for several a heat map
    assert [label.get_text() for label in grid[1, 1].get_yticklabels()] == list(results)
    assert set(plt.get_fignums()) == {figure.number, alone[0].figure.number}
    for options, text in (
        ({"ax": grid}, "ax holds 4 Axes, and 3 are drawn"),
        ({"ax": grid[0, 0], "heat_map": False}, "ax holds 1 Axes, and 3 are drawn"),
        ({"ax": grid.ravel()[:3], "columns": 2}, "columns= is for a new figure"),
        ({"ax": figure}, "ax is a Figure"),
    ):
        with pytest.raises(spectra.SpectraError, match=text):
            spectra.plot_blocks(results, **options)


@pytest.mark.slow
def test_the_cdf_shows_the_bracket_inside_the_band():
    q = quadrature()
    ax = spectra.plot_cdf(q)
    band, bracket = [np.concatenate([p.vertices for p in c.get_paths()]) for c in ax.collections]
    assert [text.get_text() for text in ax.figure.legends[0].get_texts()] == [
        "95 % band",
        "bracket",
        "estimate",
    ]
    lower, _, upper = q.cdf(0.02)
    inside = np.abs(bracket[:, 0] - 0.02) < 0.005
    assert lower - 0.1 <= bracket[inside, 1].min() <= bracket[inside, 1].max() <= upper + 0.1
    assert np.ptp(band[:, 1]) >= np.ptp(bracket[inside, 1])


@pytest.mark.slow
def test_the_heat_map_shows_the_recorded_sharpness_and_limits():
    recorded = history()
    ax = spectra.plot_density_over_time(recorded, learning_rate=True, limit=np.linspace(12, 14, 8))
    sharpness, edge, limit = ax.get_lines()
    np.testing.assert_array_equal(sharpness.get_ydata(), recorded.sharpness)
    np.testing.assert_array_equal(edge.get_ydata(), 8.0)
    np.testing.assert_array_equal(limit.get_ydata(), np.linspace(12, 14, 8))
    assert ax.get_ylim()[1] >= 14
    assert ax.get_yscale() == "symlog"
    assert recorded.plot(colorbar=False).child_axes == []


@pytest.mark.slow
def test_a_long_history_is_drawn_without_what_is_not_seen(monkeypatch):
    """A page of 2,000 snapshots took half an hour, most of it for the bands of densities in colour."""
    few = history(4)
    for snapshot in few:
        full = spectra.spectral_density(snapshot.quadrature)
        scale, grid, widths = default_points(snapshot.quadrature)
        np.testing.assert_array_equal(grid, full.grid)
        np.testing.assert_array_equal(widths, full.bandwidth)
        assert scale == full.linear_scale
        np.testing.assert_array_equal(smoothed(snapshot.quadrature, grid), full.density)
    recorded = spectra.SpectrumHistory(
        tuple(dataclasses.replace(few[i % 4], step=i) for i in range(2000)), {}
    )
    monkeypatch.setattr(spectra.density.bands, "limits", lambda *_: pytest.fail("a band that is not drawn"))
    ax = spectra.plot_density_over_time(recorded)
    np.testing.assert_array_equal(ax.get_lines()[0].get_xdata(), np.arange(2000))
    (mesh,) = ax.collections
    assert mesh.get_array().shape == (300, 300)
    chosen = in_colour(2000)
    assert (len(chosen), chosen[0], chosen[-1]) == (300, 0, 1999)
    assert set(np.diff(chosen)) == {6, 7}
    np.testing.assert_array_equal(in_colour(8), np.arange(8))
    words = sections(recorded)[1].body
    assert "at 300 of the 2,000 snapshots, evenly chosen, and the largest of them at each snapshot" in words


@pytest.mark.slow
def test_rows_of_long_names_are_told_apart():
    """Their ends alone are the same for all layers of a transformer."""
    assert short_names(["a/kernel", "b/bias"]) == ["a/kernel", "b/bias"]
    apart = [f"encoder/layers/all_heads/{kind}_projection/kernel" for kind in ("query", "key")]
    assert short_names(apart) == [f"…{name[-25:]}" for name in apart]
    alike = [f"transformer/encoder/layer_{i}/attention/query_key_value/kernel" for i in range(200)]
    short = short_names(alike)
    assert short[17] == "…layer_17/att…value/kernel"
    assert len(set(short)) == 200
    assert max(map(len, short)) == NAME
    hidden = [f"first_part_{'x' * 20}_{i}_{'y' * 40}" for i in range(3)]  # wider than the room, if need be
    assert len(set(short_names(hidden))) == 3
    (ax,) = spectra.plot_blocks({name: density(seed=0) for name in alike[:21]})
    assert [label.get_text() for label in ax.get_yticklabels()] == short_names(alike[:21])


def test_the_mass_of_eigenvectors_adds_up_to_one():
    found = pairs()
    ax = spectra.plot_eigenvector_mass(found, by="layer")
    table = np.asarray(ax.get_images()[0].get_array().filled(np.nan))
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"layer_{i}" for i in range(4)]
    np.testing.assert_allclose(table[:, 0], 0.25)  # shares of the parameters
    assert np.isnan(table[:, 1]).all()
    np.testing.assert_allclose(table[:, 2:].sum(axis=0), 1.0)
    largest = np.sum(found.vectors["layer_3"]["kernel"][-1] ** 2) + np.sum(
        found.vectors["layer_3"]["bias"][-1] ** 2
    )
    np.testing.assert_allclose(table[3, 2], largest)


@pytest.mark.slow
def test_the_loss_in_a_plane_is_that_of_numpy(x64):
    ridge = Ridge()
    values, vectors = np.linalg.eigh(ridge.hessian())
    for data in (None, ridge.parts(4)):
        op = ridge.operator(data)
        found = spectra.eigsh(op, 2, which="LM", key=jax.random.key(0))
        plane = spectra.loss_slice(op, found, extent=0.5, num_points=5)
        first, second = vectors[:, np.argsort(-np.abs(values))[:2]].T
        x = np.column_stack([np.ones(13), ridge.inputs])
        start = np.concatenate([[ridge.b], ridge.w])

        def loss(p, x=x):
            return np.mean(np.tanh(x @ p) ** 2)

        # Eigenvectors have no sign: take those of the result.
        first *= np.sign(first @ found.matrix()[:, np.argsort(-np.abs(found.values))[0]])
        second *= np.sign(second @ found.matrix()[:, np.argsort(-np.abs(found.values))[1]])
        expected = [[loss(start + a * first + b * second) for a in plane.x] for b in plane.y]
        np.testing.assert_allclose(plane.loss, expected, atol=1e-10)
        np.testing.assert_allclose(plane.center, loss(start), rtol=1e-12)
        # Near the centre the quadratic model holds to third order.
        near = spectra.loss_slice(op, found, extent=1e-3, num_points=3)
        np.testing.assert_allclose(near.loss, near.quadratic, atol=1e-8)
        assert np.abs(near.loss - near.center).max() > 1e-5


@pytest.mark.slow
def test_the_slice_of_a_block_moves_that_block_only():
    ridge = Ridge()
    block = ridge.operator().block("w")
    found = spectra.eigsh(block, 2, key=jax.random.key(0))
    plane = spectra.loss_slice(block, found, num_points=3)
    assert plane.loss[1, 1] == pytest.approx(float(block.loss()), rel=1e-6)
    # Default extent: the largest eigenvalue alone would double the loss.
    assert abs(plane.eigenvalues[0]) * plane.x[-1] ** 2 / 2 == pytest.approx(plane.center, rel=1e-6)
    assert "441" not in repr(plane)


def test_a_learning_rate_that_warms_up_from_zero_has_no_limit_at_first():
    recorded = history()
    recorded[0].scalars["learning_rate"] = 0.0
    ax = spectra.plot_density_over_time(recorded, learning_rate=True)
    line = next(line for line in ax.get_lines() if line.get_label() == "2 / learning rate")
    np.testing.assert_array_equal(line.get_ydata(), [np.nan, *[2 / 0.25] * 7])
    assert np.isfinite(ax.get_ylim()).all()


def test_several_densities_take_a_title_and_a_bandwidth():
    held = {"a": quadrature(), "b": quadrature(seed=1)}
    ax = spectra.plot_density(held, bandwidth=0.5, title="two")
    assert ax.get_title() == "two"
    drawn = spectra.spectral_density(held["b"], bandwidth=0.5)
    np.testing.assert_allclose(ax.get_lines()[1].get_ydata().max(), drawn.density.max())


@pytest.mark.slow
def test_what_cannot_be_drawn_is_refused():
    for rate in (0.0, -0.1, np.nan):
        with pytest.raises(spectra.SpectraError, match=f"learning_rate={rate}: use a positive number"):
            spectra.plot_density(density(), learning_rate=rate)
        with pytest.raises(spectra.SpectraError, match=f"learning_rate={rate}: use a positive number"):
            spectra.plot_density_over_time(history(), learning_rate=rate)
    with pytest.raises(spectra.SpectraError, match="of one density or of a history only"):
        gallery.draw(pairs(), learning_rate=0.1)
    with pytest.raises(spectra.SpectraError, match="plot_blocks draws any number"):
        spectra.plot_comparison([density()] * 21)
    with pytest.raises(spectra.SpectraError, match="yscale='cubic'"):
        spectra.plot_density(density(), yscale="cubic")
    with pytest.raises(spectra.SpectraError, match="1 snapshots are no history"):
        spectra.plot_density_over_time(history(1))
    bare = history()
    for snapshot in bare:
        snapshot.scalars.clear()
    with pytest.raises(spectra.SpectraError, match="no learning rate was recorded"):
        spectra.plot_density_over_time(bare, learning_rate=True)
    with pytest.raises(spectra.SpectraError, match=r"limit has shape \(3,\): .* one for each of the 8 snap"):
        spectra.plot_density_over_time(history(), limit=np.ones(3))
    op = spectra.MatrixOperator(jnp.eye(3))
    found = spectra.eigsh(op, 2, key=jax.random.key(0))
    with pytest.raises(spectra.StructureError, match="a MatrixOperator has no loss"):
        spectra.loss_slice(op, found)
    with pytest.raises(spectra.SpectraError, match="num_points=4"):
        spectra.loss_slice(Ridge().operator(), pairs(), num_points=4)
    with pytest.raises(spectra.StructureError, match="an eigenvector"):
        spectra.loss_slice(Ridge().operator(), pairs())


def test_the_style_can_be_used_for_other_figures():
    with spectra.plot_style(font_size=9):
        assert plt.rcParams["font.size"] == 9
        assert not plt.rcParams["axes.spines.top"]


NAMES = ("a$_$b", "$x", "$_$", r"a\$b$^", "_orig_mod.fc", "a$" * 20 + "/w")


@pytest.mark.slow
def test_names_of_parameters_are_no_formulas(tmp_path):
    """Each is drawn letter by letter; what is a formula in a legend of one's own stays one."""
    vectors = {name: {"w": np.ones((1, 2))} for name in NAMES}
    mass = spectra.plot_eigenvector_mass(
        dataclasses.replace(pairs(1), vectors=vectors, size=2 * len(NAMES)), by="leaf"
    )
    blocks = spectra.plot_blocks({name: density() for name in NAMES})[0]
    legend = spectra.plot_comparison({name: density() for name in (*NAMES[:5], r"$\lambda$")})
    for ax in (mass, blocks, legend):
        ax.figure.savefig(tmp_path / "x.svg")
        plt.close(ax.figure)
    titles = [text.get_text() for text in blocks.figure.findobj(plt.Text) if ", n = 500" in text.get_text()]
    assert {title.removesuffix(", n = 500") for title in titles} >= set(NAMES[:5])
    shown = [text.get_text() for text in legend.figure.legends[0].get_texts()]
    assert shown == [r"a\$_\$b", r"\$x", r"\$_\$", r"a\\$b\$^", " _orig_mod.fc", r"$\lambda$"]
