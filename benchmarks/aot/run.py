"""Compile cases one after another and write their page: what `benchmarks.tpu` and `benchmarks.gpu` share.

Each case is a process of its own under a time limit. Figures are kept in a JSON file beside the page as they
come, so that a run which is cut short goes on where it ended.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.aot.programs import Case

RESULTS = Path(__file__).parents[1] / "results"


def main(
    name: str,
    cases: list[Case],
    figures: Callable[[Case, str | None], dict],
    page: Callable[[dict], str],
    description: str,
) -> None:
    """The command line of `benchmarks.NAME`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("cases", nargs="*", help="parts of names of cases; all by default")
    parser.add_argument("--one", help="compile one case in this process and print its figures")
    parser.add_argument("--keep", help="with --one: write the compiled program here")
    parser.add_argument("--seconds", type=int, default=240, help="time limit of one compilation")
    parser.add_argument("--again", action="store_true", help="also cases that have figures already")
    parser.add_argument("--page", action="store_true", help="write the page from the figures that there are")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(figures(Case(**json.loads(args.one)), args.keep)))
        return
    store = RESULTS / f"{name}.json"
    known = json.loads(store.read_text()) if store.exists() else {}
    for case in [] if args.page else cases:
        chosen = not args.cases or any(part in case.name for part in args.cases)
        if chosen and (args.again or case.name not in known or "failed" in known[case.name]):
            known[case.name] = compile_apart(name, case, args.seconds)
            store.write_text(json.dumps(known, indent=1) + "\n")
            print(case.name, json.dumps(known[case.name]), flush=True)
    (RESULTS / f"{name}.md").write_text(page(known))


def compile_apart(name: str, case: Case, seconds: int) -> dict:
    """The figures of a case, or why there are none."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--one", json.dumps(vars(case))]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return vars(case) | {"failed": f"more than {seconds} s"}
    lines = run.stdout.splitlines()
    if run.returncode == 0 and lines:
        return json.loads(lines[-1])
    reason = [line for line in run.stderr.splitlines() if "Error" in line or "RESOURCE" in line]
    return vars(case) | {"failed": (reason or ["unknown"])[-1][:300]}
