"""How the tests compile, quickly unless SPECTRA_TEST_PROGRAMS says "optimised"; how many programs they keep.

Most of a cold run is XLA's optimisation of small programs that run once. Without it, and without the
emitters of fusions, they compile in a third of the time and compute the same up to rounding, on which no
test may depend. What users run is the optimised form: SPECTRA_TEST_PROGRAMS=optimised tests that.
"""

import contextlib
import ctypes
import functools
import gc
import os
from pathlib import Path

import jax
from jax._src.interpreters import mlir

LEAST_RESIDENT, MOST_RESIDENT, MOST_MAPS = 3 * 2**29, 3 * 2**30, 40_000
"""Bytes and memory maps of a process beyond which it releases its programs, and compiles or reads them anew:
half of the machine's memory, divided by the processes, within these two. Linux allows 65,530 maps."""
SWITCH = "SPECTRA_TEST_PROGRAMS"
CHOICES = ("quick", "optimised")
# A program in several parts compiles on several cores, which other tests need, and takes longer in all.
QUICK: dict[str, bool | int] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
}
OPTIMISED: dict[str, bool | int] = {
    "xla_backend_optimization_level": 3,
    "xla_cpu_parallel_codegen_split_count": 32,
}
"""XLA's defaults, as `compiler_options` of a test that reads from a program what users get."""
OFTEN: dict[str, bool | int] = {"xla_backend_optimization_level": 1}
"""As `compiler_options` of a program that runs thousands of times: convolutions are 15 times faster."""
if jax.__version_info__ < (0, 11):  # XLA has had no choice since, and ends at a flag that it does not know
    QUICK["xla_cpu_use_fusion_emitters"] = False
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True


def choose() -> str:
    """The form of this run, "quick" or what the environment says."""
    chosen = os.environ.get(SWITCH) or "quick"
    if chosen not in CHOICES:
        raise ValueError(f"{SWITCH}={chosen}: use one of {CHOICES}.")
    return chosen


def as_flags(options: dict[str, bool | int]) -> list[str]:
    """The options as XLA_FLAGS has them."""
    return [f"--{name}={str(value).lower()}" for name, value in options.items()]


def set_flags(chosen: str) -> None:
    """Choose for this process and those that it starts; XLA reads its flags at the first program.

    Of two values of a flag XLA takes the later one: what the user has set stays as it is.
    """
    os.environ[SWITCH] = chosen
    own = os.environ.get("XLA_FLAGS", "").split()
    quick = as_flags(QUICK)
    rest = [flag for flag in own if flag not in quick]
    os.environ["XLA_FLAGS"] = " ".join([*quick, *rest] if chosen == "quick" else own)


def share_context() -> None:
    """One context of MLIR for all programs of this process, until `release`.

    JAX makes one for each program, which takes 3 ms, and a megabyte for as long as the program is kept.
    """
    if hasattr(mlir, "make_ir_context"):
        mlir.make_ir_context = functools.cache(mlir.make_ir_context)


def seldom_collect() -> None:
    """Look for garbage less often, and not among what was imported: tracing makes objects by the million.

    Each look asks XLA, too; together they took more than a tenth of a run's processor time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 5)


def release() -> None:
    """Let go of all programs where they are so many that the process is large, or may be."""
    if not _many():
        return
    jax.clear_caches()
    getattr(mlir.make_ir_context, "cache_clear", lambda: None)()  # it keeps all constants it has seen
    gc.collect()
    # What is free goes back to the system. Otherwise the process stays as large as it was, and lets go of its
    # programs after every file that follows.
    with contextlib.suppress(AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _many() -> bool:
    process = Path("/proc/self")
    if not process.exists():
        return True
    page, processes = os.sysconf("SC_PAGE_SIZE"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    share = page * os.sysconf("SC_PHYS_PAGES") // (2 * processes)
    resident = int((process / "statm").read_text().split()[1]) * page
    limit = min(max(share, LEAST_RESIDENT), MOST_RESIDENT)
    return resident > limit or (process / "maps").read_bytes().count(b"\n") > MOST_MAPS
