import contextlib
import tempfile

import jax
import pytest

# Many tests make the same program from functions of their own: it is compiled once a process. Before the
# tests are imported, since JAX looks for its cache once, at the first program.
_programs = tempfile.TemporaryDirectory(prefix="spectra-programs-")
jax.config.update("jax_compilation_cache_dir", _programs.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


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
