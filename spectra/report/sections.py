"""What a page says about each kind of result: tables, pictures, and in words what the bands mean."""

import dataclasses
import html
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from spectra.base.errors import Status
from spectra.report.plots.blocks import plot_blocks
from spectra.report.plots.density import as_density
from spectra.report.plots.eigenvalues import plot_cdf, plot_eigenvalues, plot_eigenvector_mass
from spectra.report.plots.gallery import svg
from spectra.report.plots.history import LARGEST, in_colour, plot_course, plot_density_over_time
from spectra.report.plots.landscape import plot_landscape
from spectra.report.reading import choosable, readable
from spectra.report.spectrum import SpectrumReport
from spectra.report.summary import Summary
from spectra.results import (
    Density,
    Eigenpairs,
    Estimate,
    LayerConditions,
    LossSlice,
    Moments,
    Quadrature,
    SpectrumHistory,
)
from spectra.results.base import extreme_cell
from spectra.results.text import measured

_ROWS = 24  # of a table of snapshots
_CHOICES = 200  # blocks whose curves a page holds, of some 25 kB each
_COURSES = 24  # pictures of recorded numbers


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands under it, as HTML."""

    title: str
    body: str


def sections(result: Any) -> list[Section]:
    """The sections on the result itself."""
    if isinstance(result, SpectrumReport):
        return [
            Section("In numbers", pairs_table(result.rows())),
            *_spectrum(result.quadrature, result.density),
        ]
    if isinstance(result, Quadrature):
        return _spectrum(result, as_density(result))
    if isinstance(result, (Moments, Density)):
        density = as_density(result)
        return [_density_section(density)]
    if isinstance(result, Eigenpairs):
        return _eigenpairs(result)
    if isinstance(result, SpectrumHistory):
        return _history(result)
    if isinstance(result, LossSlice):
        picture = _figure(lambda: plot_landscape(result), _words_landscape(result))
        return [Section("The loss around the parameters", picture)]
    if isinstance(result, LayerConditions):
        return [Section("Condition numbers of the layers", table(result.table()))]
    if isinstance(result, Mapping):
        return _blocks(dict(result))
    if isinstance(result, Estimate) or not hasattr(result, "rows"):
        return [Section("In numbers", f"<pre>{html.escape(repr(result))}</pre>")]
    return [Section("In numbers", pairs_table(result.rows()))]


def table(rows: list[list[str]]) -> str:
    """An HTML table, the head first."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs_table(rows: list[tuple[str, str]]) -> str:
    """Labels and values in two columns."""
    cells = "".join(f"<tr><th>{html.escape(a)}</th><td>{html.escape(str(b))}</td></tr>" for a, b in rows)
    return f'<table class="pairs">{cells}</table>'


def paragraph(text: str) -> str:
    """Text as a paragraph."""
    return f"<p>{html.escape(text)}</p>"


def _figure(make: Callable, caption: str) -> str:
    return f"<figure>{svg(make, caption[:200])}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _spectrum(quadrature: Quadrature, density: Density) -> list[Section]:
    low, high = quadrature.range
    steps, probes = quadrature.num_steps, quadrature.num_probes
    doubt = 100 * quadrature.band_width()
    cdf = (
        f"The share of the {quadrature.size:,} eigenvalues at or below each point. The strong colour shows "
        f"what the {steps} Lanczos steps leave open for the {probes} probes drawn; there is no chance in it. "
        "The faint colour adds what this number of probes leaves open. With probability 95 %, the whole true "
        f"curve lies in the coloured area. On average over the range from {low:.4g} to {high:.4g}, this area "
        f"leaves {doubt:.2g} % of the eigenvalues in doubt: more steps narrow the strong part, more probes "
        "the faint part."
    )
    if quadrature.status is Status.EXACT:
        cdf = (
            f"The share of the {quadrature.size:,} eigenvalues at or below each point, from {low:.4g} to "
            f"{high:.4g}. All of them were computed: nothing but rounding, the noise floor, is left open."
        )
    trust = str(quadrature.judged) + "."
    floor = (
        f"Eigenvalues smaller than {quadrature.noise_floor:.2g} in magnitude, the noise floor of the "
        "products, cannot be distinguished from zero."
    )
    return [
        _density_section(density, quadrature),
        Section("Cumulative distribution", _figure(lambda: plot_cdf(quadrature), cdf)),
        Section("How far to trust it", paragraph(f"The run ended as {trust}") + paragraph(floor)),
    ]


def _density_section(density: Density, quadrature: Quadrature | None = None) -> Section:
    words = (
        f"The density of the eigenvalues, smoothed by a kernel {_width_in_words(density)}. "
        "The shaded band contains the true spectrum, smoothed by the same kernel, with probability "
        f"{100 * density.level:g} % on the whole axis at once. The vertical axis ends at a tenth of the peak "
        f"that a single one of the {density.size:,} eigenvalues would make."
    )
    if count := len(density.outliers):
        words += _words_stems(count, density.num_single)
    return Section("Density", readable(density, quadrature, words))


def _width_in_words(density: Density) -> str:
    """Of the kernel, as its widths on the grid show it."""
    widths = np.asarray(density.bandwidth)[np.argsort(np.abs(density.grid), kind="stable")]
    if np.ptp(widths) <= 1e-9 * widths.max():
        return f"of the width {widths[0]:.3g}"
    if (np.diff(widths) >= -1e-9 * widths.max()).all():
        return "whose width grows with the distance from zero"
    return "that is narrower near both ends of the axis"  # Jackson's


def _words_stems(count: int, single: int) -> str:
    if single == count:
        which = "the eigenvalue that is" if count == 1 else f"the {count} eigenvalues that are"
        return f" Orange stems are {which} resolved individually."
    which = f"; {single} of them are resolved individually" if single else ""
    return (
        f" Orange stems are {count} places where eigenvalues stand alone{which}. "
        f"{'The others' if single else 'Each'} may be several equal ones."
    )


def _eigenpairs(pairs: Eigenpairs) -> list[Section]:
    words = (
        "Bars are residuals and rounding: an eigenvalue lies within each of them, whatever the random start. "
        "Open circles mark pairs that have not converged to the tolerance."
    )
    mass = (
        "Where the eigenvectors live: the sum of squares of their entries in each layer. The first column "
        "is the share of the parameters in the layer, which is what a random vector would show."
    )
    return [
        Section("In numbers", pairs_table(pairs.rows())),
        Section("Eigenvalues", _figure(lambda: plot_eigenvalues(pairs), words)),
        Section("Mass by layer", _figure(lambda: plot_eigenvector_mass(pairs), mass)),
    ]


def runs(histories: Mapping[str, SpectrumHistory]) -> list[Section]:
    """The sections on several runs: what they recorded on common axes, then the density of each."""
    rows = [["run", "snapshots", "last step", "largest eigenvalue", "trace"]]
    for name, history in histories.items():
        last = history[-1] if len(history) else None
        cells = (
            [f"{last.step:,}", last.largest_cell, measured(last.trace.value, last.trace.stderr)]
            if last
            else ["", "", ""]
        )
        rows.append([name, f"{len(history):,}", *cells])
    found = [Section("Runs", table(rows)), *courses(histories, LARGEST)]
    for name, history in histories.items():
        if len(history) > 1:
            words = _words_over_time(len(history))
            picture = _figure(lambda history=history: plot_density_over_time(history), words)
            found.append(Section(name, picture))
    return found


def courses(histories: Mapping[str, SpectrumHistory], *more: str) -> list[Section]:
    """A picture of each number that was recorded in more than one snapshot, and of others by name."""
    longer = {name: history for name, history in histories.items() if len(history) > 1}
    names = dict.fromkeys([*more, *(k for h in longer.values() for s in h for k in s.scalars)])
    pictures = [
        _figure(lambda name=name: plot_course(longer, name), f"{name}, as recorded with each snapshot.")
        for name in list(names)[:_COURSES]
        if longer
    ]
    return [Section("Recorded", "".join(pictures))] if pictures else []


def _history(history: SpectrumHistory) -> list[Section]:
    found = [Section("In numbers", pairs_table(history.rows()))]
    if len(history) > 1:
        known = any(s.scalars.get("learning_rate", 0.0) > 0 for s in history)
        words = _words_over_time(len(history))
        if known:
            words += " Dashed: 2 / learning rate, above which gradient descent is unstable."
        picture = _figure(lambda: plot_density_over_time(history, learning_rate=known or None), words)
        found.append(Section("Along training", picture))
        found += courses({"": history})
    stride = max(1, -(-len(history) // _ROWS))
    rows = [["step", "largest", "smallest", "trace"]]
    rows += [
        [
            f"{s.step:,}",
            s.largest_cell,
            extreme_cell(s.smallest, 0, s.level),
            measured(s.trace.value, s.trace.stderr),
        ]
        for s in history.snapshots[::stride]
    ]
    note = "" if stride == 1 else paragraph(f"Every {stride}th of {len(history)} snapshots.")
    found.append(Section("Snapshots", table(rows) + note))
    return found


def _blocks(results: dict[str, Any]) -> list[Section]:
    found = []
    spectra = {name: q for name, q in results.items() if isinstance(q, Quadrature)}
    rows = []
    if spectra:
        head, *cells = Summary(spectra).table()
        doubts = (f"{100 * q.band_width():.2g} %" for q in spectra.values())
        rows = [[*head, "in doubt"], *([*row, doubt] for row, doubt in zip(cells, doubts, strict=True))]
        choice = dict(itertools.islice(spectra.items(), _CHOICES))
        words = (
            "The density of the block whose row is chosen below, on axes that all blocks share: its line, "
            "its 95 % band, and in orange eigenvalues that stand alone."
        )
        if len(spectra) > len(choice):
            words += f" The first {len(choice)} rows have such a curve."
        found.append(
            Section("In numbers", f'<div class="choice">{choosable(choice, words)}</div>{table(rows)}')
        )
    if results and all(isinstance(r, (Quadrature, Density)) for r in results.values()):
        words = (
            "The densities of all blocks on common axes, each with its 95 % band. “In doubt” is the mean "
            "width of the band of a block's cumulative distribution, over the block's own range."
        )
        found.append(Section("Densities", _figure(lambda: plot_blocks(results), words)))
    for name, part in results.items():
        if not isinstance(part, (Quadrature, Density)):
            found += [dataclasses.replace(s, title=f"{name}: {s.title}") for s in sections(part)]
    return found


def _words_over_time(count: int) -> str:
    shown = len(in_colour(count))
    which = "each snapshot" if shown == count else f"{shown} of the {count:,} snapshots, evenly chosen"
    also = "" if shown == count else " at each snapshot"
    return f"The density of the eigenvalues at {which}, and the largest of them{also} as a line."


def _words_landscape(plane: LossSlice) -> str:
    if plane.of_eigenvectors:
        first, second = plane.eigenvalues
        where = (
            f"of the plane spanned by two unit eigenvectors, with eigenvalues {first:.4g} and {second:.4g}"
        )
    else:
        each = zip(plane.names, plane.eigenvalues, strict=True)
        where = "along " + " and ".join(f"{name}, where the curvature is {x:.4g}" for name, x in each)
    lines = "every second line of the quadratic model" if len(plane.y) > 1 else "the quadratic model"
    return (
        f"The loss at {plane.num_evaluations} points {where}. Dashed: {lines}, the prediction from the "
        f"curvature at the centre. The loss at the centre is {plane.center:.4g}."
    )
