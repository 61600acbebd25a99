"""From nothing to a first density, in a fresh process: imports, data, set-up, compilation, first result.

The demo's network with given weights, 100 steps and 8 probes as `spectra demo` takes; the second call of the
same shows what compilation costs. Peers do the same job in processes of their own: 80 steps, 8 probes each
would take minutes, so they run 100 steps and 1 probe, as does a row of spectra beside them. The last row is
the command itself, training included.
"""

import functools
import json
import subprocess
import sys
import tempfile
import time

from benchmarks.settings import Goal, Report, Settings, table
from benchmarks.timing import quietest

CODE = """
import json, sys, time
start = time.perf_counter()
tool, steps, probes, examples = sys.argv[1], *map(int, sys.argv[2:])
import jax
import spectra
from benchmarks import peers, problems
spectra.slq  # the first name imports the others
imported = time.perf_counter()
problem = problems.get("mlp", examples or None)
jax.block_until_ready(problem[1:])
made = time.perf_counter()
tool = getattr(peers, tool)("mlp", problem)
ready = time.perf_counter()
tool.density(steps, probes)
first = time.perf_counter()
tool.density(steps, probes)
second = time.perf_counter() - first
print(json.dumps([imported - start, made - imported, ready - made, first - ready, second]))
"""


def fresh(tool: str, steps: int, probes: int, examples: int, timeout: int = 240) -> list[float] | str:
    """Seconds of imports, problem, set-up, first and second density; or why there are none."""
    command = [sys.executable, "-c", CODE, tool, str(steps), str(probes), str(examples)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return f"over {timeout} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["killed"])[-1][:80]
    return json.loads(done.stdout.strip().splitlines()[-1])


def demo() -> float:
    """Seconds of the command, training, report and picture included."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [
            sys.executable,
            "-c",
            "from spectra.cli.commands import main; main()",
            "demo",
            "--out",
            folder,
        ]
        subprocess.run(command, capture_output=True, check=True, timeout=240)
        return time.perf_counter() - start


def main(settings: Settings) -> Report:
    steps, probes = settings.choose((100, 8), (4, 1))
    examples = settings.choose(0, 4)
    jobs = [("Spectra", probes), ("Spectra", 1), ("Matfree", 1), ("HessianEigenthings", 1), ("Curvlinops", 1)]
    rows, report = [], Report([])
    for tool, count in settings.choose(jobs, jobs[:2]):
        print(f"  {tool}, {count} probes", file=sys.stderr, flush=True)
        found = quietest(functools.partial(fresh, tool, steps, count, examples))
        if isinstance(found, str):
            rows.append([f"{tool}, {count} probes", found, *[""] * 6])
            continue
        total = sum(found[:4])
        compiled = f"{found[3] - found[4]:.2f}"
        rows.append([f"{tool}, {count} probes", *(f"{x:.2f}" for x in found), compiled, f"{total:.1f}"])
        if tool == "Spectra" and count == probes:
            report.goals.append(
                Goal("from nothing to the first density of the demo's network", total, 25, " s")
            )
    head = ["", "imports", "data, weights", "set-up", "first", "second", "compilation", "all, s"]
    report.lines = table(head, rows)
    if not settings.tiny:
        seconds = quietest(demo)
        report.lines += ["", f"`spectra demo`, training, report and picture included: {seconds:.1f} s."]
    return report


if __name__ == "__main__":
    print("\n".join(main(Settings()).lines))
