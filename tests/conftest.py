import contextlib
import gc
import hashlib
import os
import platform
import shutil
import signal
import sys
from pathlib import Path

import jax
import jaxlib
import programs
import pytest
import scipy.linalg  # noqa: F401 - brings a BLAS of its own
from threadpoolctl import threadpool_limits

LARGEST = 4 * 2**30
"""Bytes of compiled programs that are kept; beyond, they are thrown away and made anew."""


def _kept_programs() -> Path:
    """A folder of this user's for programs of these versions and this kind of processor."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    features = [line for line in lines if line.startswith(("flags", "Features", "model name"))][:2]
    host = hashlib.sha256("\n".join([platform.machine(), platform.processor(), *features]).encode())
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    name = f"jax{jax.__version__}-jaxlib{jaxlib.__version__}-{python}-{host.hexdigest()[:12]}"
    return home / "spectra-tests" / name


# A run of the tests is mostly the compilation of small programs. They are kept from one run to the next,
# for all workers and the processes that tests start. Before the tests are imported, since JAX looks for its
# cache once, at the first program.
_folder = Path(os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_kept_programs())))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")
jax.config.update("jax_compilation_cache_dir", str(_folder))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
# Of each operation JAX writes down ten frames of the stack, which no test reads.
jax.config.update("jax_traceback_in_locations_limit", 0)
programs.share_context()
# Tests and their processes take all cores already: threads of BLAS and of PyTorch, which is not imported yet,
# beside them wait for each other, spinning.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
threadpool_limits(int(os.environ["OPENBLAS_NUM_THREADS"]), "blas")
# What a shell starts in the background ignores Ctrl-C, and so would runs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    """Before the workers start: how programs are compiled, and no more of them than the limit."""
    programs.set_flags(programs.choose())
    if hasattr(config, "workerinput") or _folder != _kept_programs() or not _folder.exists():
        return
    if sum(path.stat().st_size for path in _folder.iterdir()) > LARGEST:
        shutil.rmtree(_folder)


def pytest_xdist_auto_num_workers(config):
    """All cores, but none beside this process for a single file: a worker takes seconds to start."""
    single = len(config.args) == 1 and ".py" in config.args[0]
    return 0 if single else os.cpu_count()


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported is no garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        programs.seldom_collect()


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Working precision; float64 switches x64 on for this test alone."""
    with jax.enable_x64(True) if request.param == "float64" else contextlib.nullcontext():
        yield request.param


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optimised(monkeypatch):
    """The package's own programs with one level of optimisation, for problems of millions of numbers."""
    from spectra.base import programs as package  # not before the settings above

    monkeypatch.setitem(package.OPTIONS, "cpu", {})
    monkeypatch.setattr(package, "options", lambda *_: programs.OFTEN)


@pytest.fixture(autouse=True, scope="module")
def _release():
    """Figures that a file left open, of which matplotlib warns; programs where a process holds many.

    Files of tests share programs, which cost memory and maps of it: thousands exceed what Linux allows.
    """
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    programs.release()
