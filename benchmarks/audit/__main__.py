"""Audit what the package states on spectra that are known, and write `results/audit.md`.

Every cell is the share of random keys whose 95 % interval holds the truth, in percent, and beside it the mean
width over that of the ideal interval, ± 1.96 times the true root mean square error. Shares below 93 % are
bold; "exact" says that no value missed the truth by more than rounding. Among 400 keys a true rate of 95 % is
seen as 95 ± 1.1 %. Of bounds and limits, violations are counted. A band for a whole curve holds where it
holds everywhere, and is compared with the width that sampling alone leaves to a normal law at the same number
of tests. A few steps cannot tell all spectra apart, however many probes there are: in brackets is, where it
is more than one, the width over the ideal that an interval needs to hold for all those that have the same
coefficients (see `benchmarks/audit/left_open.py`); it may be off by a few percent. The exit code is 1 where a
bound is violated, or where a share is below 93 %, or a limit violated, by more than chance: so few that a
true rate of 93 % (of a limit its own) would give them in 1 of 100 cases (binomial).
"""

import argparse
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import jax
import numpy as np

from benchmarks import timing
from benchmarks.audit import cells, curves, extremes, functions, laws, rounding, statements
from benchmarks.audit.matrices import NAMES, case
from benchmarks.audit.statements import ROUNDING, Statement
from benchmarks.settings import RESULTS

STATEMENTS = statements.STATEMENTS + curves.STATEMENTS + functions.STATEMENTS + extremes.STATEMENTS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit",
        description=__doc__,
        epilog="What is measured replaces the same cells of an earlier run; the others stay.",
    )
    parts = sorted({s.part for s in STATEMENTS} | {"laws", "rounding"})
    parser.add_argument("--only", help=f"parts, with commas between them: {', '.join(parts)}")
    parser.add_argument("--statements", help="parts of the names of statements, with semicolons between them")
    parser.add_argument("--cases", help="parts of the names of spectra, with semicolons between them")
    parser.add_argument("--settings", help="settings, as the page heads its columns, with semicolons")
    parser.add_argument("--quick", action="store_true", help="40 keys: shows that everything runs")
    parser.add_argument("--keys", type=int, default=400)
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "audit.md")
    args = parser.parse_args()
    only = args.only.split(",") if args.only else parts
    if unknown := [name for name in only if name not in parts]:
        parser.error(f"no part {unknown[0]}; there are {', '.join(parts)}")
    store = args.output.with_suffix(".json")
    known = cells.read(store)
    for found in () if args.page else measured(only, 40 if args.quick else args.keys, args):
        print(" | ".join([*found.place, found.text(0)]), flush=True)
        known[found.place] = found
        cells.write(store, known.values())
    args.output.write_text("\n".join(page(list(known.values()))))
    return 1 if any(found.fails for found in known.values()) else 0


def measured(only: list[str], count: int, args: argparse.Namespace) -> Iterator[cells.Cell]:
    """The cells of these parts, one by one; quadratures of a setting serve all statements on a spectrum."""
    with jax.enable_x64(True):
        for statement in STATEMENTS:
            if statement.part in only and chosen(args.statements, statement.name):
                yield from audit(statement, count, args)
        if "laws" in only:
            yield from laws.audit(count, lambda name: chosen(args.cases, name))
    if "rounding" in only:
        yield from rounding.audit(count)


def chosen(parts: str | None, name: str) -> bool:
    return parts is None or any(part in name for part in parts.split(";"))


def audit(statement: Statement, count: int, args: argparse.Namespace) -> Iterator[cells.Cell]:
    """The cells of one statement."""
    count = min(count, statement.keys or count)
    for number, name in enumerate(NAMES):
        for setting in statement.settings if chosen(args.cases, name) else ():
            spectrum = case(name)
            if not chosen(args.settings, str(setting)) or not statement.applies(spectrum, setting):
                continue
            keys = jax.random.split(jax.random.key(1000 + number), count)
            found = statement.measure(spectrum, setting, keys)
            slack = ROUNDING * float(np.abs(spectrum.eigenvalues).sum())
            held, place = found.held(slack), (statement.name, name, str(setting))
            width = np.nan if statement.bound else found.width_to_ideal(slack)
            least = found.least_to_ideal(slack)
            yield cells.cell(place, held, width, statement.bound, least, statement.misses)


def page(known: list[cells.Cell]) -> list[str]:
    """The whole page from the cells that are known."""
    lines = [f"# Audit, {date.today()}", "", f"{timing.machine()}.", "", (__doc__ or "").strip(), ""]
    layouts = [(s.name, NAMES, tuple(map(str, s.settings)), s.note) for s in STATEMENTS]
    for name, rows, columns, note in [*layouts, laws.layout(), rounding.layout()]:
        if mine := [found for found in known if found.section == name]:
            lines += cells.section(name, mine, rows, columns, note)
    return lines


if __name__ == "__main__":
    sys.exit(main())
