"""Measure spectra beside its peers and write tables, plots and a summary.

Every section runs in a process of its own and writes `results/<section>.md` when it is done; one that fails
or runs out of time is reported, and the next one starts. One section alone runs in this process.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from datetime import date
from pathlib import Path

from benchmarks.settings import RESULTS, Goal, Report, Settings

SECTIONS = {
    "density": 3600,
    "product": 600,
    "gradient": 400,
    "convolution": 400,
    "startup": 600,
    "scaling": 800,
    "reorthogonalization": 600,
    "memory": 240,
    "streaming": 400,
    "vocabulary": 400,
    "attention": 600,
    "differences": 800,
    "eigenpairs": 900,
    "smallest": 400,
    "solve": 1800,
    "traces": 1200,
    "certainty": 1800,
    "no_basis": 600,
    "dense": 600,
    "layers": 600,
}
"""Sections in the order in which they run, and the seconds that each is given, with room for turns that are
measured again."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: shows that everything runs")
    parser.add_argument("--quick", action="store_true", help="compare ratios with the stored ones, 3 minutes")
    parser.add_argument("--store", action="store_true", help="with --quick: store the ratios")
    parser.add_argument("--spectral-density", type=Path, help="checkout of google/spectral-density")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    if args.quick:
        from benchmarks import quick

        return quick.main(store=args.store)
    if unknown := [name for name in args.sections if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    settings = Settings(args.tiny, args.spectral_density, args.output)
    settings.results.mkdir(parents=True, exist_ok=True)
    names = args.sections or list(SECTIONS)
    failed = {}
    if len(names) == 1:
        failed = run_here(names[0], settings)
    else:
        for name in names:
            failed |= run_apart(name, settings)
            summary(settings, failed)
    summary(settings, failed)
    return 1 if failed else 0


def run_here(name: str, settings: Settings) -> dict[str, str]:
    """Run a section in this process and write its page; {name: reason} if it fails."""
    from benchmarks import timing

    start = time.perf_counter()
    try:
        module = importlib.import_module(f"benchmarks.{name}")
        found = module.main(settings)
    except Exception as error:
        traceback.print_exc()
        return {name: f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    report = found if isinstance(found, Report) else Report(found)
    seconds = time.perf_counter() - start
    run = f"{timing.machine()}. {seconds:.0f} s. {timing.unrest()}".rstrip()
    head = [f"# {name.capitalize()}, {date.today()}", "", run, ""]
    text = [*head, (module.__doc__ or "").strip(), "", *report.lines, ""]
    if report.goals:
        text += ["## Goals", "", *goal_table(report.goals), ""]
    (settings.results / f"{name}.md").write_text("\n".join(text))
    stored = load(settings)
    stored[name] = {
        "date": str(date.today()),
        "machine": timing.machine(),
        "seconds": round(seconds),
        "goals": [vars(goal) for goal in report.goals],
    }
    (settings.results / "goals.json").write_text(json.dumps(stored, indent=1))
    print("\n".join(text), flush=True)
    return {}


def run_apart(name: str, settings: Settings) -> dict[str, str]:
    """The same in a process of its own, with a limit on its time."""
    command = [sys.executable, "-m", "benchmarks", name, "-o", str(settings.results)]
    command += ["--tiny"] if settings.tiny else []
    command += ["--spectral-density", str(settings.spectral_density)] if settings.spectral_density else []
    print(f"== {name}", file=sys.stderr, flush=True)
    limit = SECTIONS[name]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its own processes, too
        process.communicate()
        return {name: f"stopped after {limit} s"}
    sys.stderr.write(errors)
    if process.returncode:
        last = [line for line in errors.strip().splitlines() if line.strip()] or [
            f"exit {process.returncode}"
        ]
        return {name: last[-1][:120]}
    return {}


def load(settings: Settings) -> dict:
    path = settings.results / "goals.json"
    return json.loads(path.read_text()) if path.exists() else {}


def goal_table(goals: list[Goal]) -> list[str]:
    return ["| what | measured | goal | |", "|---|---|---|---|", *(goal.row() for goal in goals)]


def summary(settings: Settings, failed: dict[str, str]) -> None:
    """`results/README.md`: all goals with their figures, and what could not be measured."""
    stored = load(settings)
    lines = ["# Results", "", "Made by `python -m benchmarks`; each page says on which machine and when.", ""]
    rows = [
        Goal(**goal).row() + f" [{name}]({name}.md) |" for name in stored for goal in stored[name]["goals"]
    ]
    lines += ["| what | measured | goal | | section |", "|---|---|---|---|---|", *rows, ""]
    lines += [
        f"* [{name}]({name}.md): {entry['date']}, {entry['seconds']} s, {entry['machine']}"
        for name, entry in stored.items()
    ]
    lines += [f"* {name} failed: {reason}" for name, reason in failed.items()]
    (settings.results / "README.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    sys.exit(main())
