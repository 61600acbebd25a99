"""Audit what the package states on spectra that are known, and write `results/audit.md`.

Every cell is the share of random keys whose 95 % interval holds the truth, in percent, and beside it the mean
width over that of the ideal interval, ± 1.96 times the true root mean square error. Shares below 93 % are
bold. Among 400 keys a true rate of 95 % is seen as 95 ± 1.1 %. Of a bound, violations are counted. A band
for a whole curve holds where it holds everywhere, and is compared with the width that sampling alone leaves
to a normal law at the same number of tests. The exit code is 1 where a bound is violated, or where a share is
below 93 % by more than chance: so few that a true rate of 93 % would give them in 1 of 100 cases (binomial).
"""

import argparse
import sys
import time
from datetime import date
from pathlib import Path

import jax
import numpy as np
from scipy.stats import binom

from benchmarks import timing
from benchmarks.audit import curves, functions, laws, rounding, statements
from benchmarks.audit.matrices import cases
from benchmarks.audit.statements import ROUNDING, Statement
from benchmarks.settings import RESULTS, table

LEAST = 0.93
CHANCE = 0.01
"""That a cell whose true rate is LEAST fails: a share counts as below where it is less likely than this."""
STATEMENTS = statements.STATEMENTS + curves.STATEMENTS + functions.STATEMENTS


def fails(held: np.ndarray) -> bool:
    """Whether so few of the keys are below `LEAST` by more than chance: binomial, an entry of a diagonal
    counting as its key, since the entries of one key hang together."""
    share = float(np.mean(held))
    return bool(share * len(held) < binom.ppf(CHANCE, len(held), LEAST))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__)
    parts = sorted({s.part for s in STATEMENTS} | {"laws", "rounding"})
    parser.add_argument("--only", help=f"parts, with commas between them: {', '.join(parts)}")
    parser.add_argument("--cases", help="parts of the names of cases, with commas between them")
    parser.add_argument("--quick", action="store_true", help="40 keys: shows that everything runs")
    parser.add_argument("--keys", type=int, default=400)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "audit.md")
    args = parser.parse_args()
    only = args.only.split(",") if args.only else parts
    if unknown := [name for name in only if name not in parts]:
        parser.error(f"no part {unknown[0]}; there are {', '.join(parts)}")
    count = 40 if args.quick else args.keys
    chosen = str(args.cases or "").split(",")
    start, lines, below = time.perf_counter(), [], 0
    with jax.enable_x64(True):
        for statement in STATEMENTS:
            if statement.part in only:
                section, missed = audit(statement, count, chosen)
                lines, below = lines + section, below + missed
                print("\n".join(section), flush=True)
        if "laws" in only:
            section, missed = laws.audit(count, lambda name: any(part in name for part in chosen))
            lines, below = lines + section, below + missed
            print("\n".join(section), flush=True)
    if "rounding" in only:
        section, missed = rounding.audit(count)
        lines, below = lines + section, below + missed
        print("\n".join(section), flush=True)
    seconds = time.perf_counter() - start
    head = [
        f"# Audit, {date.today()}",
        "",
        f"{timing.machine()}. {seconds:.0f} s.",
        "",
        (__doc__ or "").strip(),
        "",
    ]
    args.output.write_text("\n".join([*head, *lines, ""]))
    return 1 if below else 0


def audit(statement: Statement, count: int, chosen: list[str]) -> tuple[list[str], int]:
    """The table of one statement, and how many of its cells are below what is required."""
    rows, below, shares, widths = [], 0, [], []
    count = min(count, statement.keys or count)
    for number, (name, case) in enumerate(cases().items()):
        cells = []
        for setting in statement.settings:
            if not any(part in name for part in chosen) or not statement.applies(case, setting):
                cells.append("")
                continue
            keys = jax.random.split(jax.random.key(1000 + number), count)
            found = statement.measure(case, setting, keys)
            slack = ROUNDING * float(np.abs(case.eigenvalues).sum())
            held = found.held(slack)
            if statement.bound:
                below += int(np.sum(~held))
                cells.append(f"{np.sum(~held)} of {held.size}")
                continue
            share, width = float(np.mean(held)), found.width_to_ideal(slack)
            shares.append(share)
            widths += [width] if np.isfinite(width) else []
            below += fails(held)
            text = f"{100 * share:.1f}" if share >= LEAST else f"**{100 * share:.1f}**"
            cells.append(f"{text}, {width:.2f}" if np.isfinite(width) else f"{text}, exact")
        if any(cells):
            rows.append([name, *cells])
    lines = [f"## {statement.name[0].upper()}{statement.name[1:]}", ""]
    lines += table(["spectrum", *map(str, statement.settings)], rows)
    if shares:
        lines += [
            "",
            f"{count} keys. Least share {100 * min(shares):.1f} %, mean {100 * np.mean(shares):.1f} %.",
        ]
    return [*lines, ""], below


if __name__ == "__main__":
    sys.exit(main())
