"""Measure on the card that is there, and write its page: `python -m benchmarks.card`.

Each group is a process of its own, so that its peak memory is its own, and one that fails leaves the others.
Figures are written as they come.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.settings import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.card", description=__doc__)
    parser.add_argument("groups", nargs="*", help="these only")
    parser.add_argument("--one", help="measure one group in this process, and print its figures")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of a group")
    parser.add_argument("--page", action="store_true", help="write the page from the figures that there are")
    parser.add_argument(
        "-o", "--output", type=Path, default=RESULTS / "card.json", help="file of the figures"
    )
    args = parser.parse_args()
    if args.one:
        here(args.one)
        return
    if not args.page:
        from benchmarks.card.cells import GROUPS

        for group in args.groups or GROUPS:
            apart(group, args.seconds, args.output)
    from benchmarks.card.table import page

    args.output.with_suffix(".md").write_text(page(json.loads(args.output.read_text())))


def here(group: str) -> None:
    """A line of JSON for each cell of a group, again with every figure that comes."""
    import jax

    from benchmarks.card.cells import GROUPS
    from benchmarks.timing import machine

    card = {"card": jax.devices()[0].device_kind, "machine": machine()}
    for name, cell in GROUPS[group]:
        found, start = dict(card), time.perf_counter()
        try:
            for figures in cell():
                found |= figures | {"after": round(time.perf_counter() - start, 1)}
                print(json.dumps({name: found}), flush=True)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {str(error)[:600]}"
            print(json.dumps({name: found}), flush=True)


def apart(group: str, seconds: int, output: Path) -> None:
    """Add a group's figures to the file."""
    from benchmarks.card.cells import FLAGS

    # What stands in this process's way would stand in its children's: it never touches the card.
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS.get(group, '')}".strip()
    command = [sys.executable, "-m", "benchmarks.card", "--one", group]
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags},
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    known = json.loads(output.read_text()) if output.exists() else {}
    for line in out.splitlines():
        if line.startswith("{"):
            known |= json.loads(line)
    output.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{group}: rc {process.returncode}, {time.perf_counter() - start:.0f} s")
    print(out[-3000:] if process.returncode == 0 else out[-3000:] + err[-1500:], flush=True)


if __name__ == "__main__":
    main()
