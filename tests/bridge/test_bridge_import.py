"""The bridge is there without PyTorch, and costs next to nothing to import."""

import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_bridge_imports_no_torch():
    code = (
        "import sys, spectra; assert spectra.bridge.load and spectra.from_torch; "
        "print([n for n in ('torch', 'transformers', 'flax', 'sympy') if n in sys.modules])"
    )
    assert run(code).strip() == "[]"


def test_importing_the_bridge_is_quick():
    """On top of JAX and SciPy: thirty small modules, tens of milliseconds of processor time."""
    code = (
        "import time, jax, jax.numpy, jax.scipy.special, scipy.stats, scipy.linalg, numpy; "
        "start = time.process_time(); import spectra; print(time.process_time() - start)"
    )
    assert min(float(run(code)) for _ in range(2)) < 1.0
