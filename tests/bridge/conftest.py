"""Shared set-up of the bridge's tests; all of them need PyTorch for the truth, and are skipped without it."""

import logging

import jax
import pytest

try:
    import torch
except ModuleNotFoundError:
    torch = None
# torch.export logs every graph it makes, which would bury the output of a failing test.
logging.getLogger("torch.__trace").addFilter(lambda record: False)


class WithoutTorch(pytest.Module):
    def collect(self):
        pytest.skip("PyTorch is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    # An `importorskip` above would be an error of pytest's when it is given this folder: it reads this file
    # before there is anything to skip.
    return None if torch else WithoutTorch.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(autouse=True, scope="module")
def _quickly():
    """On programs of this size, optimisation costs more time than it saves."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, True)
    yield
    jax.config.update(name, before)
