"""What people hold, as what a function works on: a report stands for its quadrature, a list for a mapping."""

from collections.abc import Iterable, Mapping
from typing import Any

from spectra._errors import SpectraError
from spectra.results.density import Density
from spectra.results.quadrature import Moments, Quadrature


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
    else:
        hint = "`slq` and `spectrum` make one of an operator."
    raise SpectraError(f"a Quadrature or a report is needed, not {_called(held)}. {hint}")


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


def _called(held: Any) -> str:
    name = type(held).__name__
    return f"an {name}" if name[:1] in "AEIOU" else f"a {name}"
