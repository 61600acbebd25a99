"""Measure on the card that is there, and write its page: `python -m benchmarks.card`.

Each group is a process of its own, so that its peak memory is its own, and one that fails leaves the others.
Figures are written as they come.

Nearly all of the time is compilation. `--rehearse` runs every cell once, all of them side by side, and keeps
their programs in JAX_COMPILATION_CACHE_DIR, where a run that measures finds them.
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
    parser.add_argument("--cell", help="of --one, this cell only")
    parser.add_argument("--rehearse", action="store_true", help="compile the programs of all cells at once")
    parser.add_argument("--seconds", type=int, default=120, help="time limit of a group")
    parser.add_argument("--page", action="store_true", help="write the page from the figures that there are")
    parser.add_argument(
        "-o", "--output", type=Path, default=RESULTS / "card.json", help="file of the figures"
    )
    args = parser.parse_args()
    if args.one:
        here(args.one, args.cell)
        return
    from benchmarks.card.cells import GROUPS

    if args.rehearse:
        rehearse(args.groups or list(GROUPS), args.seconds)
        return
    if not args.page:
        for group in args.groups or GROUPS:
            apart(group, args.seconds, args.output)
    from benchmarks.card.table import page

    args.output.with_suffix(".md").write_text(page(json.loads(args.output.read_text())))


def here(group: str, chosen: str | None) -> None:
    """A line of JSON for each cell of a group, again with every figure that comes."""
    import jax

    from benchmarks.card.cells import GROUPS
    from benchmarks.timing import machine

    card = {"card": jax.devices()[0].device_kind, "machine": machine()}
    for name, cell in GROUPS[group]:
        if chosen not in (None, name):
            continue
        found, start = dict(card), time.perf_counter()
        try:
            for figures in cell():
                found |= figures | {"after": round(time.perf_counter() - start, 1)}
                print(json.dumps({name: found}), flush=True)
        except Exception as error:
            found["error"] = f"{type(error).__name__}: {str(error)[:600]}"
            print(json.dumps({name: found}), flush=True)


def started(group: str, *more: str, **environment: str) -> subprocess.Popen:
    """A process with a group's cells."""
    from benchmarks.card.cells import FLAGS

    # What stands in this process's way would stand in its children's: it never touches the card.
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS.get(group, '')}".strip()
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.card", "--one", group, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": flags} | environment,
    )


def rehearse(groups: list[str], seconds: int) -> None:
    """Compile what the cells run; they share the card's memory, which nobody takes beforehand."""
    from benchmarks.card.cells import GROUPS
    from benchmarks.card.measure import REHEARSAL

    start = time.perf_counter()
    processes = {
        name: started(group, "--cell", name, **{REHEARSAL: "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"})
        for group in groups
        for name, _ in GROUPS[group]
    }
    for name, process in processes.items():
        try:
            out, err = process.communicate(timeout=max(0.1, start + seconds - time.perf_counter()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        failed = process.returncode != 0 or '"error"' in out
        print(f"{name}: rc {process.returncode}, {time.perf_counter() - start:.0f} s", flush=True)
        print((out[-600:] + err[-600:]) if failed else "", end="", flush=True)


def apart(group: str, seconds: int, output: Path) -> None:
    """Add a group's figures to the file."""
    start = time.perf_counter()
    process = started(group)
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
    known = json.loads(output.read_text()) if output.exists() else {}
    for line in out.splitlines():
        if line.startswith("{"):
            for name, found in json.loads(line).items():
                # What compiling takes is not seen by a process that finds its programs.
                older = known.get(name, {}) if known.get(name, {}).get("machine") == found["machine"] else {}
                known[name] = older | found
    output.write_text(json.dumps(known, indent=1) + "\n")
    print(f"{group}: rc {process.returncode}, {time.perf_counter() - start:.0f} s")
    print(out[-3000:] if process.returncode == 0 else out[-3000:] + err[-1500:], flush=True)


if __name__ == "__main__":
    main()
