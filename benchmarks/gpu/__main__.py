"""Compile for NVIDIA GPUs that need not be there, and write the page: `python -m benchmarks.gpu`.

Needs `pip install '.[gpu-aot]'`, which is not CUDA, and JAX_PLATFORMS=cpu.
"""

from pathlib import Path

from benchmarks.aot import programs, run
from benchmarks.aot.hlo import Program
from benchmarks.aot.programs import Case
from benchmarks.gpu import machine_code
from benchmarks.gpu.cards import mesh
from benchmarks.gpu.table import page

ONE, EIGHT = ("h100:1", "rtx4090:1"), ("h100:8", "rtx4090:8")
CASES = [
    *(Case("step", t, s) for t in ONE for s in ("mlp", "transformer")),
    *(Case(p, t, "small") for t in EIGHT for p in ("step", "gradient", "product")),
    *(Case(p, "h100:8", "1e9") for p in ("step", "gradient", "product")),
    *(Case("orthogonalize", t, "5e6", "spread") for t in (*ONE, *EIGHT)),
    *(Case("restart", t, "small", steps=82) for t in (*ONE, *EIGHT)),
    *(Case("chain", t, "small", steps=82) for t in ("h100:1", "rtx4090:8")),
    *(Case("attention", t, "8192") for t in ONE),
    *(Case("solve", t, "small") for t in ("h100:1", "rtx4090:8")),
    *(Case(p, "h100:8", "small") for p in ("iteration", *programs.PRODUCTS)),
    *(Case("product", t, "transformer") for t in ONE),
    Case("product", "h100:1", "transformer", precision="default"),
    *(Case("step", t, "small") for t in ONE),
    Case("orthogonalize", "h100:8", "1e9"),
]


def figures(case: Case, keep: str | None = None) -> dict:
    """What the compiler makes of a case for its card."""

    def more(folder: Path, program: Program) -> dict:
        traffic = program.step() if case.program in programs.STEPWISE else program.traffic()
        return {
            "kernels": traffic.kernels,
            "conditionals": program.conditionals() if case.program in programs.STEPWISE else None,
            **machine_code.read(folder),
        }

    return programs.figures(case, mesh(case.topology), keep, more)


if __name__ == "__main__":
    run.main("gpu", CASES, figures, page, __doc__)
