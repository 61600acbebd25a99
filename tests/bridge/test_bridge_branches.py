"""`torch.cond` in a graph file: what is evaluated and differentiated, and hostile branches."""

import copy
import json

import bridge_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from spectra import bridge
from spectra.bridge import BridgeError, UnsupportedOperatorError, schema


class Choice(nn.Module):
    """Either branch has no derivative, or NaN, where the other is taken."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self, x):
        y = self.w * x
        chosen = torch.cond(y.sum() > 0, lambda z: z.sqrt(), lambda z: (-z).log(), (y,))
        return chosen + torch.view_as_real(y * 2j).sum(-1)


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choice")
    bridge.export(Choice(), (torch.ones(2),), folder, batch_axis=None)
    return folder, json.loads((folder / "graph.json").read_text())


def test_the_branch_that_is_taken_counts(document):
    model = bridge.load(document[0])
    vector = jnp.array([1.0, -1.0])

    @jax.jit
    def derivatives(params, x):
        gradient = jax.grad(lambda p: model.apply(p, x).sum())
        return gradient(params), jax.jvp(gradient, (params,), ({"w": vector},))[1]

    compiled = derivatives.lower(model.params, jnp.ones(2)).compile(reference.FAST)
    w, v = np.array([0.5, 2.0]), np.array([1.0, -1.0])
    # One or two roundings in each operation.
    gradient, product = compiled(model.params, jnp.ones(2))
    np.testing.assert_allclose(gradient["w"], 0.5 * w**-0.5 + 2, rtol=1e-6)
    np.testing.assert_allclose(product["w"], -0.25 * w**-1.5 * v, rtol=1e-6)
    gradient, product = compiled(model.params, -jnp.ones(2))
    np.testing.assert_allclose(gradient["w"], 1 / w - 2, rtol=1e-6)
    np.testing.assert_allclose(product["w"], -v / w**2, rtol=1e-6)


def _branch(document):
    (node,) = (n for n in document["nodes"] if n["op"] == "spectra.cond")
    return node["args"][1]["graph"]


def _outside_name(document):
    _branch(document)["nodes"][0]["args"] = [{"ref": document["inputs"][0]["name"]}]


def _no_graph(document):
    _branch(document).pop("nodes")


def _twice(document):
    branch = _branch(document)
    branch["nodes"].append(branch["nodes"][0])


def _other_inputs(document):
    _branch(document)["inputs"].append("another")


def _huge(document):
    branch = _branch(document)
    branch["nodes"].append(
        {"name": "huge", "op": "aten.zeros.default", "args": [[2**30, 2**30]], "kwargs": {}, "module": "",
         "dtype": None, "shape": None}
    )  # fmt: skip


def _bad_complex(document):
    (node,) = (n for n in document["nodes"] if {"complex": [0.0, 2.0]} in n["args"])
    node["args"] = [node["args"][0], {"complex": [0.0, "2"]}]


@pytest.mark.parametrize("damage", [_outside_name, _no_graph, _twice, _other_inputs, _huge, _bad_complex])
def test_a_damaged_branch_is_refused(document, damage):
    with pytest.raises(BridgeError):
        _assembled(document, damage)


def test_an_unknown_operator_in_a_branch_is_named(document):
    def unknown(changed):
        _branch(changed)["nodes"][0]["op"] = "os.system"

    with pytest.raises(UnsupportedOperatorError, match=r"os\.system"):
        _assembled(document, unknown)


def _assembled(document, damage):
    folder, content = document
    changed = copy.deepcopy(content)
    damage(changed)
    changed["digest"] = schema.digest(changed)
    other = folder.parent / f"{folder.name}-{damage.__name__}"
    other.mkdir(exist_ok=True)
    (other / "graph.json").write_text(json.dumps(changed))
    (other / "weights.safetensors").write_bytes((folder / "weights.safetensors").read_bytes())
    return bridge.load(other)


@pytest.mark.slow
def test_an_unsupported_operator_in_a_branch_is_named_at_export():
    class Sampled(nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda z: torch.poisson(z), lambda z: z * 2, (x,))

    with pytest.raises(UnsupportedOperatorError, match="random numbers"):
        bridge.from_torch(Sampled(), (torch.ones(3),), batch_axis=None)
