"""Small dense problems on one thread.

OpenBLAS keeps its threads spinning for a tenth of a second after an eigenproblem of order 32, on the cores
that XLA computes with next: between the steps of a Krylov method that costs more than the problem itself.
"""

import contextlib
import functools
from collections.abc import Iterator


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Hold the BLAS of NumPy and SciPy to one thread; also a decorator. The caller's number comes back."""
    with _pools().limit(limits=1, user_api="blas"):  # of several Python threads the first one decides
        yield


@functools.cache
def _pools():
    import scipy.linalg  # noqa: F401 - brings a BLAS of its own, which JAX calls as well
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
