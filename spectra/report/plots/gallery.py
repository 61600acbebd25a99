"""The picture that belongs to a result, for notebooks, reports and the command line."""

import base64
import hashlib
import html
import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from spectra.base.errors import SpectraError
from spectra.report.plots.blocks import plot_blocks
from spectra.report.plots.density import plot_density
from spectra.report.plots.eigenvalues import plot_eigenvalues
from spectra.report.plots.history import plot_density_over_time
from spectra.report.plots.landscape import plot_landscape
from spectra.report.plots.style import COLORS, plot_style
from spectra.report.spectrum import SpectrumReport
from spectra.report.summary import Summary
from spectra.results import (
    Density,
    Eigenpairs,
    LossSlice,
    Moments,
    Quadrature,
    Snapshot,
    SpectrumHistory,
    called,
    provides,
)

INK = "#0b0c0d"  # stands for the colour of text, which a page knows
PIXELS = 200  # an inch in notebooks: two for one of a usual screen


@provides("plot")
def plot(result: Any, ax: Any = None, **options: Any) -> Any:
    """The Axes with the picture that suits a result.

    Raises:
        SpectraError: there is none for results of its kind.
    """
    if isinstance(result, SpectrumHistory):
        return plot_density_over_time(result, ax, **options)
    if isinstance(result, Eigenpairs):
        return plot_eigenvalues(result, ax, **options)
    if isinstance(result, LossSlice):
        return plot_landscape(result, ax, **options)
    if isinstance(result, (SpectrumReport, Quadrature, Moments, Density, Snapshot)):
        return plot_density(result, ax, **options)
    if isinstance(result, Summary):
        return plot_blocks(result.quadratures, ax, **options)
    raise SpectraError(f"{called(result)} has no picture: print it, or take its `to_dict()`.")


def draw(result: Any, *, learning_rate: float | None = None) -> Any:
    """The Axes of the picture that shows a result; None for those that are best read as a table.

    Raises:
        SpectraError: a learning rate for a picture that has no place for it, or one that is not positive.
    """
    if isinstance(result, Summary):
        result = result.quadratures
    if learning_rate is not None and isinstance(result, (Mapping, Eigenpairs, LossSlice)):
        raise SpectraError("a learning rate is a line in the picture of one density or of a history only.")
    if isinstance(result, Mapping):
        spectra = all(isinstance(part, (SpectrumReport, Quadrature, Density)) for part in result.values())
        return plot_blocks(result)[0] if result and spectra else None
    if isinstance(result, SpectrumHistory):
        return plot_density_over_time(result, learning_rate=learning_rate) if len(result) > 1 else None
    if isinstance(result, Eigenpairs) and not len(result.values):
        return None
    if isinstance(result, (Eigenpairs, LossSlice)):
        return plot(result)
    if isinstance(result, (SpectrumReport, Quadrature, Moments, Density, Snapshot)):
        return plot(result, learning_rate=learning_rate)
    return None


@provides("image")
def png_tag(result: Any) -> str:
    """The picture of a result as an HTML image that holds its data; empty for results without one."""
    import matplotlib.pyplot as plt

    ax = draw(result)
    if ax is None:
        return ""
    stream = io.BytesIO()
    ax.figure.savefig(stream, format="png", dpi=PIXELS, facecolor="white")
    plt.close(ax.figure)  # or a notebook would show it a second time
    width = int(ax.figure.get_size_inches()[0] * PIXELS / 1.5)
    data = base64.b64encode(stream.getvalue()).decode()
    return f'<img alt="" width="{width}" style="max-width:100%" src="data:image/png;base64,{data}">'


def svg(make, label: str) -> str:
    """What `make()` draws (Axes or an array of them) as SVG for the inside of a page.

    Ink becomes the page's text colour and the first colours become its variables `--c0`, `--c1`, ...: the
    picture is legible on light and on dark ground.
    """
    import matplotlib.pyplot as plt

    ink = dict.fromkeys(
        ("text_color", "axes_edgecolor", "axes_labelcolor", "xtick_color", "ytick_color"), INK
    )
    stream = io.StringIO()
    with plot_style(**ink):
        figure = np.ravel(np.asarray(make(), object))[0].figure
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]  # pictures of one page share no ids
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{mark}-", text)
    text = re.sub(INK + "|#000000", "currentColor", text)
    for i, color in enumerate(COLORS):
        text = text.replace(color.lower(), f"var(--c{i})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label, quote=True)}"', 1)
