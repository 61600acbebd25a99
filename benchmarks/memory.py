"""Peak memory of a run against `spectra.plan`, in a process of its own each.

Goal: within 15 % of the plan. On the CPU the peak is the growth of the resident set between the prepared
problem and the end of the run, after one that has compiled; what the allocator keeps for itself counts too.
"""

import json
import subprocess
import sys

from benchmarks.settings import Goal, Report, Settings

CODE = """
import ctypes, gc, json, sys
import jax, jax.numpy as jnp
import spectra
from benchmarks import problems

name, steps = sys.argv[1], int(sys.argv[2])
if name == "diagonal":
    d = jnp.linspace(0.0, 1.0, 8_000_000)
    op = spectra.FunctionOperator(lambda v: d * v, d)
else:
    op = spectra.HessianOperator(*getattr(problems, name)())

def resident():
    with open("/proc/self/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmRSS"].split()[0]) * 1024

def peak():
    with open("/proc/self/status") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["VmHWM"].split()[0]) * 1024

# The same run first: compiled code, the compiler and thread pools are not the run's memory.
plan = spectra.plan(op, num_steps=steps, num_probes=1)
spectra.slq(op, key=jax.random.key(0), num_steps=steps, num_probes=1)
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
before = resident()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
spectra.slq(op, key=jax.random.key(0), num_steps=steps, num_probes=1)
print(json.dumps({"plan": plan.total, "basis": plan.basis, "linearization": plan.linearization,
                  "workspace": plan.workspace, "peak": peak() - before}))
"""


CASES = (("diagonal", 96), ("mlp", 800), ("transformer", 200))


def main(settings: Settings) -> Report:
    head = [
        "| problem | steps | basis | saved | workspace | plan | measured | measured / plan |",
        "|---|---|---|---|---|---|---|---|",
    ]
    report = Report(head)
    for name, steps in settings.choose(CASES, (("mlp", 16),)):
        done = subprocess.run(
            [sys.executable, "-c", CODE, name, str(steps)],
            capture_output=True,
            text=True,
            check=True,
        )
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        mib = {key: f"{value / 2**20:.0f} MiB" for key, value in figures.items()}
        share = figures["peak"] / figures["plan"]
        report.goals.append(Goal(f"peak memory of {name}, of the plan", share, 1.15))
        report.lines.append(
            f"| {name} | {steps} | {mib['basis']} | {mib['linearization']} | {mib['workspace']} | "
            f"{mib['plan']} | {mib['peak']} | {share:.2f} |"
        )
    return report


if __name__ == "__main__":
    print("\n".join(main(Settings()).lines))
