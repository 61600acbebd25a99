"""What all results share: how they are registered with JAX, printed, saved, drawn and made plain."""

import dataclasses
import importlib
import math
import os
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

import jax
import numpy as np
from jax.core import Tracer

from spectra.base.errors import SpectraError, Status
from spectra.base.paths import leaf_paths
from spectra.results.text import contained, directed, html_grid, html_table, text_grid, told, within


def plain(value: Any) -> Any:
    """A value as numbers, texts, lists and dicts, which `json.dumps(..., allow_nan=False)` takes.

    Raises:
        SpectraError: it holds values of a trace, or what is neither number, text nor container.
    """
    if isinstance(value, Tracer):
        raise SpectraError("inside jit a result has no numbers yet: return it from the function first.")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Status):
        return value.code
    if dataclasses.is_dataclass(value):
        bulky = getattr(value, "_BULKY", ())
        names = [field.name for field in dataclasses.fields(value) if field.name not in bulky]
        return {name: plain(getattr(value, name)) for name in names}
    if (names := getattr(value, "_fields", None)) is not None:  # an Interval
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    if hasattr(value, "__array__"):
        return _numbers(np.asarray(value))
    leaves = jax.tree.leaves(value)
    if leaves and all(hasattr(leaf, "__array__") for leaf in leaves):  # a module, or a state of Flax
        return {name: plain(leaf) for name, leaf in zip(leaf_paths(value), leaves, strict=True)}
    raise SpectraError(f"a {type(value).__name__} has no plain form.")


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The single numbers and texts of a plain value by their path; lists are left out."""
    if isinstance(value, dict):
        parts = (flat(part, f"{prefix}/{name}" if prefix else name) for name, part in value.items())
        return {name: part for found in parts for name, part in found.items()}
    return {} if isinstance(value, list) else {prefix: value}


def _numbers(array: np.ndarray) -> Any:
    if array.dtype.kind in "biuU":
        return array.tolist()
    array = array.astype(np.float64)
    return array.tolist() if np.isfinite(array).all() else plain(array.tolist())


Array = Any
F = TypeVar("F", bound=Callable[..., Any])

_SERVICES: dict[str, Callable[..., Any]] = {}


def provides(service: str) -> Callable[[F], F]:
    """Decorator of a function of a later layer: results call it by the name of the service."""

    def register(function: F) -> F:
        _SERVICES[service] = function
        return function

    return register


def call(service: str, *args: Any, **kwargs: Any) -> Any:
    """Call what a later layer provides."""
    if service not in _SERVICES:  # only parts of the package were imported, as unpickling does
        importlib.import_module("spectra.public")
    return _SERVICES[service](*args, **kwargs)


class Result:
    """What every result can do: be saved, drawn and turned into plain values.

    Results are frozen dataclasses and pytrees, and have a `status`: how the computation came to its end.
    """

    _BULKY: ClassVar[tuple[str, ...]] = ()  # fields as large as the parameters, which `to_dict` leaves out

    def save(self, path: str | os.PathLike[str]) -> Any:
        """Write the result to a file, atomically; returns its path. See `spectra.save`."""
        return call("save", self, path)

    def plot(self, ax: Any = None, **options: Any) -> Any:
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

    def metrics(self) -> dict[str, float]:
        """The numbers of `records` by name, as loggers of experiments take them.

        Of several rows each name begins with that of its row, or with its place: `hidden/largest`, `0/value`.
        """
        rows = self.records()
        if len(rows) == 1:
            return _numbers_of(rows[0], "")
        return {
            name: value
            for i, row in enumerate(rows)
            for name, value in _numbers_of(row, f"{_title(row, i)}/").items()
        }

    def to_dataframe(self) -> Any:
        """`records` as a `pandas.DataFrame`, which needs pandas.

        Raises:
            ImportError: pandas is not installed.
        """
        import pandas

        return pandas.DataFrame(
            [{name: _number(value) for name, value in record.items()} for record in self.records()]
        )


def _title(row: dict[str, Any], place: int) -> str:
    """What a row is called: its first column where that is a text or the step of training."""
    name, first = next(iter(row.items()))
    return str(first) if isinstance(first, str) or name == "step" else str(place)


def _numbers_of(row: dict[str, Any], prefix: str) -> dict[str, float]:
    numbers = {name: _number(value) for name, value in row.items()}
    return {
        f"{prefix}{name}": float(value)
        for name, value in numbers.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _number(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value


class Named(Result):
    """Results by name, in the first field; prints as a table."""

    @property
    def _parts(self) -> dict[str, Any]:
        return getattr(self, dataclasses.fields(self)[0].name)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, name: str) -> Any:
        return self._parts[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def keys(self) -> KeysView[str]:
        """The names."""
        return self._parts.keys()

    def values(self) -> ValuesView[Any]:
        """The results."""
        return self._parts.values()

    def items(self) -> ItemsView[str, Any]:
        """Pairs of a name and its result."""
        return self._parts.items()

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
        inherited = cls.__repr__ is not object.__repr__  # such as a table: better than a list of fields
        cls = dataclasses.dataclass(frozen=True, repr=not inherited)(cls)
        data = [f.name for f in dataclasses.fields(cls) if f.name not in meta]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(meta))

    return register


def worst(statuses: Iterable[Status]) -> Status:
    """The first status that is something to be wary of; the first of all where none is."""
    found = list(statuses) or [Status.COMPLETE]
    return next((status for status in found if not status.ok), found[0])


def notebook_view(result: Any, title: str, rows: list[tuple[str, str]]) -> str:
    """The table with the picture of the result under it."""
    return html_table(title, rows) + call("image", result)


class Interval(NamedTuple):
    """A number or a curve with its band: `lower <= estimate <= upper`, each of the shape of the input.

    An interval iterates as three numbers, so that `low, value, high = interval` unpacks it. The function that
    returns it says what it guarantees: a probability or a theorem. [What is guaranteed](guarantees.md) lists
    all of them.

    Examples:
        >>> from spectra import Interval
        >>> low, value, high = Interval(0.9, 1.0, 1.2)
        >>> round((high - low) / 2, 2)
        0.15
    """

    lower: Array
    estimate: Array
    upper: Array


def is_converged(value: Interval, end: int) -> bool:
    """Whether the outer end of an extreme eigenvalue is as near as rounding, or within a tenth of it."""
    low, estimate, high = map(float, value)
    inner, outer = (high - estimate, estimate - low) if end == 0 else (estimate - low, high - estimate)
    return outer <= max(10 * inner, 0.1 * abs(estimate))


def extreme_text(value: Interval, end: int, level: float | None) -> str:
    """The smallest (end=0) or largest (end=-1) eigenvalue in words; level None: a residual ball."""
    low, estimate, high = map(float, value)
    error = max(high - estimate, estimate - low)
    if level is None:
        number, reach = contained(estimate, error)
        return f"an eigenvalue within {reach} of {number}"
    chance, converged = f"({100 * level:g} %)", is_converged(value, end)
    if converged and error <= max(0.01 * abs(estimate), 10 * min(high - estimate, estimate - low)):
        return f"{within(estimate, error)} {chance}"
    bound, other = (high, low) if end == 0 else (low, high)
    words = ("at most", "at least") if end == 0 else ("at least", "at most")
    text = f"{words[0]} {directed(bound, up=end == 0, digits=4 if converged else 3)}"
    if math.isfinite(other):
        text += f", {words[1]} {directed(other, up=end != 0)} {chance}"
    return text if converged else text + "; not converged"


def extreme_cell(value: Interval, end: int, level: float | None, digits: int = 3) -> str:
    """The same for a table: a number, with ≤ or ≥ in front where it is only a bound, in so many digits."""
    low, estimate, high = map(float, value)
    error = max(high - estimate, estimate - low)
    if level is None or is_converged(value, end):
        return told(estimate, error)
    bound = high if end == 0 else low
    return ("≤ " if end == 0 else "≥ ") + directed(bound, up=end == 0, digits=digits)
