"""Compile for TPU topologies that need not exist, and write the table: `python -m benchmarks.tpu`.

Each case is a process of its own under a time limit, one after another. Figures are kept in
`results/tpu.json` as they come, so that a run which is cut short goes on where it ended.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.tpu.programs import Case, figures
from benchmarks.tpu.table import table

RESULTS = Path(__file__).parents[1] / "results"
FORMS = ("shard_map", "constrained", "auto", "explicit")
CASES = [
    *(Case("orthogonalize", t, "1e9") for t in ("v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x4", "v5p:4x4x8")),
    *(Case("orthogonalize", "v5e:4x4", n, "spread") for n in ("3e5", "5e6")),
    *(Case("orthogonalize", t, "3e5", "spread") for t in ("v5e:16x16", "v5p:4x4x8")),
    *(
        Case(p, "v5e:4x4", "small", form=f, precision="default")
        for f in FORMS
        for p in ("gradient", "product", "products", "linearized")
    ),
    *(Case("step", t, "small", precision="default") for t in ("v5e:4x4", "v5e:8x8", "v5e:16x16")),
    *(Case("product", t, "small", precision="default") for t in ("v5e:8x8", "v5e:16x16")),
    *(Case(p, t, "1e9") for t in ("v5e:8x8", "v5p:2x2x4") for p in ("step", "gradient", "product")),
    Case("step", "v5e:8x8", "1e9", precision="default"),
    Case("step", "v5e:16x16", "1e9"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help="parts of names of cases; all by default")
    parser.add_argument("--one", help="compile one case in this process and print its figures")
    parser.add_argument("--keep", help="with --one: write the compiled program here")
    parser.add_argument("--seconds", type=int, default=240, help="time limit of one compilation")
    parser.add_argument("--again", action="store_true", help="also cases that have figures already")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(figures(Case(**json.loads(args.one)), args.keep)))
        return
    store = RESULTS / "tpu.json"
    known = json.loads(store.read_text()) if store.exists() else {}
    for case in CASES:
        chosen = not args.cases or any(part in case.name for part in args.cases)
        if chosen and (args.again or case.name not in known or "failed" in known[case.name]):
            known[case.name] = compile_apart(case, args.seconds)
            store.write_text(json.dumps(known, indent=1) + "\n")
            print(case.name, json.dumps(known[case.name]), flush=True)
    (RESULTS / "tpu.md").write_text(table(known))


def compile_apart(case: Case, seconds: int) -> dict:
    """The figures of a case, or why there are none."""
    command = [sys.executable, "-m", "benchmarks.tpu", "--one", json.dumps(vars(case))]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return vars(case) | {"failed": f"more than {seconds} s"}
    lines = run.stdout.splitlines()
    if run.returncode == 0 and lines:
        return json.loads(lines[-1])
    reason = [line for line in run.stderr.splitlines() if "Error" in line or "RESOURCE" in line]
    return vars(case) | {"failed": (reason or ["unknown"])[-1][:300]}


if __name__ == "__main__":
    main()
