"""The bridge is there without PyTorch, and costs next to nothing to import."""

import subprocess
import sys


def test_importing_the_bridge_is_quick_and_imports_no_torch():
    """On top of JAX and SciPy: some sixty small modules, a tenth of a second of processor time."""
    code = (
        "import sys, time, jax, jax.numpy, jax.scipy.special, numpy; "
        "start = time.process_time(); import spectra; spent = time.process_time() - start; "
        "assert spectra.bridge.load and spectra.from_torch; assert spent < 1.0, spent; "
        "print([n for n in ('torch', 'transformers', 'flax', 'sympy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
