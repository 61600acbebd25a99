"""Small dense problems on one thread.

OpenBLAS keeps its threads spinning for a tenth of a second after an eigenproblem of order 32, on the cores
that XLA computes with next: between the steps of a Krylov method that costs more than the problem itself.
"""

import contextlib
import functools
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_users = 0  # of the limit; the first one sets it and the last one lifts it, whatever the thread
_limit = None


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Hold the BLAS of NumPy and SciPy to one thread; also a decorator. The caller's number comes back."""
    global _users, _limit
    with _lock:
        _users += 1
        if _users == 1:
            _limit = _pools().limit(limits=1, user_api="blas")
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                assert _limit is not None
                _limit.restore_original_limits()


@functools.cache
def _pools():
    import scipy.linalg  # noqa: F401 - brings a BLAS of its own, which JAX calls as well
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
