"""What all results share: how they are registered with JAX and printed."""

import dataclasses
from typing import Any, NamedTuple, dataclass_transform

import jax

PyTree = Any
Array = Any


@dataclass_transform(frozen_default=True)
def result(*meta: str):
    """Class decorator: a frozen dataclass that is a pytree, with the fields named in `meta` static."""

    def register(cls):
        cls = dataclasses.dataclass(frozen=True)(cls)
        data = [f.name for f in dataclasses.fields(cls) if f.name not in meta]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(meta))

    return register


def text_table(title: str, rows: list[tuple[str, str]]) -> str:
    """Labels and values in two columns under a title."""
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def html_table(title: str, rows: list[tuple[str, str]]) -> str:
    """The same for notebooks."""
    import html

    left = " style='text-align:left'"
    cells = "".join(
        f"<tr><th{left}>{html.escape(name)}</th><td{left}>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"


def notebook_view(result: Any, title: str, rows: list[tuple[str, str]]) -> str:
    """The table with the picture of the result under it."""
    from spectra.plotting.gallery import png_tag

    return html_table(title, rows) + png_tag(result)


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
