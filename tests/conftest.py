import contextlib

import jax
import pytest


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Working precision; float64 switches x64 on for this test alone."""
    with jax.enable_x64(True) if request.param == "float64" else contextlib.nullcontext():
        yield request.param


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def _release_compiled_code():
    """Thousands of compiled programs in one process exceed the memory maps that Linux allows it."""
    yield
    jax.clear_caches()
