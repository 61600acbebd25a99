"""Shared set-up of the bridge's tests; all of them need PyTorch for the truth."""

import logging

import pytest

torch = pytest.importorskip("torch")
# torch.export logs every graph it makes, which would bury the output of a failing test.
logging.getLogger("torch.__trace").addFilter(lambda record: False)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32
