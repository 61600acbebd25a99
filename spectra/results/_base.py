"""What all results share: how they are registered with JAX, printed, saved, drawn and made plain."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import jax

from spectra._status import Status
from spectra.results._plain import flat, plain

PyTree = Any
Array = Any

_SERVICES: dict[str, Callable[..., Any]] = {}


def provides(service: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a function of a later layer: results call it by the name of the service."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _SERVICES[service] = function
        return function

    return register


def call(service: str, *args: Any, **kwargs: Any) -> Any:
    """Call what a later layer provides."""
    return _SERVICES[service](*args, **kwargs)


class Result:
    """What every result can do: be saved, drawn and turned into plain values.

    Results are frozen dataclasses and pytrees, and have a `status`: how the computation came to its end.
    """

    _BULKY: ClassVar[tuple[str, ...]] = ()  # fields as large as the parameters, which `to_dict` leaves out

    def save(self, path) -> Any:
        """Write the result to a file, atomically; returns its path. See `spectra.save`."""
        return call("save", self, path)

    def plot(self, ax=None, **options) -> Any:
        """Draw the result with the function that suits it best, and return the Axes.

        Args:
            ax: where to draw; default: a new figure of 8 cm width.
            **options: of the function: `plot_density` for quadratures, moments, densities and reports,
                `plot_eigenvalues` for eigenpairs, `plot_landscape` for slices of the loss,
                `plot_density_over_time` for histories.

        Raises:
            SpectraError: a result of this kind has no picture.
        """
        return call("plot", self, ax, **options)

    def to_dict(self) -> dict[str, Any]:
        """The result as numbers, texts, lists and dicts by name of field, ready for `json.dumps`.

        Statuses become their codes and arrays nested lists. JSON knows no infinity and no NaN: they become
        "inf", "-inf" and "nan", which `float` reads. Vectors of the parameters' size are left out.
        """
        return plain(self)

    def records(self) -> list[dict[str, Any]]:
        """The result as rows of a table, each a dict of plain numbers and texts by column.

        One row for each layer, eigenpair or snapshot; of other results one, with the single numbers.
        """
        return [flat(self.to_dict())]

    def to_dataframe(self) -> Any:
        """`records` as a `pandas.DataFrame`, which needs pandas.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(
            [{name: _number(value) for name, value in record.items()} for record in self.records()]
        )


def _number(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value


class Named(Result):
    """Results by name, in the first field; prints as a table."""

    @property
    def _parts(self) -> dict[str, Any]:
        return getattr(self, dataclasses.fields(self)[0].name)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    def __iter__(self):
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def status(self) -> Status:
        """The first of the parts' that is something to be wary of."""
        return worst(part.status for part in self._parts.values())

    def table(self) -> list[list[str]]:
        """Cells of the printed table, the head first."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return text_grid(self.table())

    def _repr_html_(self) -> str:
        return html_grid(self.table())


@dataclass_transform(frozen_default=True)
def result(*meta: str):
    """Class decorator: a frozen dataclass that is a pytree, with the fields named in `meta` static."""

    def register(cls):
        shown = cls.__repr__ is not object.__repr__  # by the class or one above it
        cls = dataclasses.dataclass(frozen=True, repr=not shown)(cls)
        data = [f.name for f in dataclasses.fields(cls) if f.name not in meta]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(meta))

    return register


def worst(statuses: Iterable[Status]) -> Status:
    """The first status that is something to be wary of; the first of all where none is."""
    found = list(statuses) or [Status.COMPLETE]
    return next((status for status in found if not status.ok), found[0])


def text_table(title: str, rows: list[tuple[str, str]]) -> str:
    """Labels and values in two columns under a title."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def text_grid(rows: list[list[str]]) -> str:
    """Rows of cells in columns as wide as they need, the head first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(f"{x:<{width}}" for x, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def html_table(title: str, rows: list[tuple[str, str]]) -> str:
    """Labels and values for notebooks."""
    import html

    left = " style='text-align:left'"
    cells = "".join(
        f"<tr><th{left}>{html.escape(name)}</th><td{left}>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"


def html_grid(rows: list[list[str]]) -> str:
    """Rows of cells for notebooks, the head first."""
    import html

    lines = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def notebook_view(result: Any, title: str, rows: list[tuple[str, str]]) -> str:
    """The table with the picture of the result under it."""
    return html_table(title, rows) + call("image", result)


def format_bytes(count: int) -> str:
    """`1536` as `1.5 KiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


class Interval(NamedTuple):
    """A number or a curve with its band: `lower <= estimate <= upper`, each of the shape of the input."""

    lower: Array
    estimate: Array
    upper: Array
