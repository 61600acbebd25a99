"""What was measured, cell by cell: kept in `results/audit.json`, so that the page can grow in pieces."""

import collections
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy.stats import binom

from benchmarks.settings import table

LEAST = 0.93
FAR = 100.0
"""Widths beyond are those of intervals about values without an error to speak of."""
CHANCE = 0.01
"""That a cell whose true rate is LEAST fails: a share counts as below where it is less likely than this."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One statement on one spectrum, over random keys."""

    section: str
    row: str
    column: str
    keys: int
    share: float  # of what was stated that holds, over keys and entries
    width: float | None  # over that of the ideal interval; None where the result is exact
    broken: int | None = None  # of a bound: how often it failed
    least: float | None = None  # of widths over the ideal one: what the steps alone leave open; None: nothing
    misses: float = 0.0  # of a bound: the probability that it may fail with

    @property
    def place(self) -> tuple[str, str, str]:
        return self.section, self.row, self.column

    @property
    def fails(self) -> bool:
        """Whether a bound is violated, or so few of the keys hold that it is no chance: binomial, a diagonal
        counting as its key, since the entries of one key hang together. A limit may be violated by chance."""
        if self.broken is not None:
            return bool(self.broken > (binom.isf(CHANCE, self.keys, self.misses) if self.misses else 0))
        return bool(round(self.share * self.keys, 6) < binom.ppf(CHANCE, self.keys, LEAST))

    def text(self, usual: int) -> str:
        """As the page shows it, with the number of keys where it is not the usual one."""
        if self.broken is not None:
            return f"{self.broken} of {self.keys}"
        share = f"{100 * self.share:.1f}" if self.share >= LEAST else f"**{100 * self.share:.1f}**"
        keys = f" ({self.keys:,})" if self.keys != usual else ""
        return f"{share}, {self._width}{keys}"

    @property
    def _width(self) -> str:
        if self.width is None:
            return "exact"
        least = f" [{self.least:.2f}]" if self.least and 1.005 <= self.least < FAR else ""
        return (f"{self.width:.2f}" if self.width < FAR else f"> {FAR:g}") + least


def cell(
    place: tuple[str, str, str],
    held: np.ndarray,
    width: float,
    bound: bool = False,
    least: float = 0.0,
    misses: float = 0.0,
) -> Cell:
    """The cell of what held; an axis of entries may follow that of keys."""
    finite = bool(np.isfinite(width)) and not bound
    broken = int(np.sum(~held)) if bound else None
    widths = float(width) if finite else None, float(least) if finite and least > 0 else None
    return Cell(*place, len(held), float(np.mean(held)), widths[0], broken, widths[1], misses)


def read(path: Path) -> dict[tuple[str, str, str], Cell]:
    """The cells of a file by their places; none where there is no file."""
    if not path.exists():
        return {}
    return {found.place: found for found in (Cell(**row) for row in json.loads(path.read_text()))}


def _fields(found: Cell) -> dict:
    """What is not as by default, and the width, which is None where a result is exact."""
    always = dataclasses.asdict(found)
    return {f.name: always[f.name] for f in dataclasses.fields(found) if always[f.name] != f.default}


def write(path: Path, cells: Iterable[Cell]) -> None:
    """One cell a line, so that differences can be read."""
    rows = [json.dumps(_fields(found), ensure_ascii=False) for found in cells]
    path.write_text("[\n" + ",\n".join(rows) + "\n]\n")


def section(
    name: str, cells: list[Cell], rows: Iterable[str], columns: Iterable[str], note: str
) -> list[str]:
    """The table of one statement, and what is below it."""
    by_place = {(found.row, found.column): found for found in cells}
    rows = [row for row in rows if any(found.row == row for found in cells)]
    columns = [column for column in columns if any(found.column == column for found in cells)]
    usual = collections.Counter(found.keys for found in cells).most_common(1)[0][0]
    body = [
        [row, *(by_place[row, column].text(usual) if (row, column) in by_place else "" for column in columns)]
        for row in rows
    ]
    head = ["spectrum", *(column.replace("|", "\\|") for column in columns)]
    lines = [f"## {name[0].upper()}{name[1:]}", "", *table(head, body), ""]
    shares = [found.share for found in cells if found.broken is None]
    if shares:
        others = " unless a cell says otherwise" if any(found.keys != usual for found in cells) else ""
        least, mean = 100 * min(shares), 100 * float(np.mean(shares))
        lines.append(f"{usual:,} keys{others}. Least share {least:.1f} %, mean {mean:.1f} %.")
    return [*lines, *([note] if note else []), ""]
