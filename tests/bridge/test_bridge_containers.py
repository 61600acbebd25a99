"""What modules return and take beside tensors: records, caches, distributions, packed sequences."""

import dataclasses
from typing import Any, NamedTuple

import bridge_reference as reference
import jax
import numpy as np
import pytest
import torch
from torch import distributions as D
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from spectra import bridge
from spectra.bridge import BridgeError

# Sums of a few hundred terms of order one in float64, and as many again in each derivative.
TOLERANCE = 1e-9


class Pair(NamedTuple):
    logits: torch.Tensor
    hidden: torch.Tensor


@dataclasses.dataclass
class Record:
    logits: torch.Tensor
    rest: Any = None


class _Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.layer, self.make = nn.Linear(4, 2), make

    def forward(self, x):
        return self.make(self.layer(x))


RESULTS = {
    "named tuple": (
        lambda h: Pair(h, 2 * h),
        lambda out: [out.logits, out.hidden, out[0], out[1]],
        [1, 2, 1, 2],
    ),
    "data class": (lambda h: Record(h, [h]), lambda out: [out["logits"], out["rest"][0]], [1, 1]),
    "integers as keys": (lambda h: {0: h, 1: 2 * h}, lambda out: [out[0], out[1]], [1, 2]),
    "distribution": (lambda h: D.Normal(h, 1.0), lambda out: [out["loc"]], [1]),
    "independent": (lambda h: D.Independent(D.Normal(h, 1.0), 1), lambda out: [out["base_dist"]["loc"]], [1]),
}


@pytest.mark.slow
def test_results_in_containers(tmp_path):
    """One module with all of them, in memory and from files."""
    module = _Returns(lambda h: {name: make(h) for name, (make, _, _) in RESULTS.items()})
    bridge.export(module, torch.ones(3, 4), tmp_path)
    x = torch.randn(5, 4)
    expected = module.layer(x).detach().numpy()
    for model in (bridge.from_torch(module, torch.ones(3, 4)), bridge.load(tmp_path)):
        out = model.apply(model.params, x.numpy())
        for name, (_, parts, factors) in RESULTS.items():
            for part, factor in zip(parts(out[name]), factors, strict=True):
                np.testing.assert_allclose(part, factor * expected, atol=1e-6)
        assert jax.tree.structure(out) == jax.tree.structure(model.apply(model.params, x.numpy()))


@pytest.mark.parametrize("fields", [["logits", "class"], ["_x", "y"], ["a b", "y"], ["x", "x"], [1, 2]])
def test_fields_in_a_file_are_identifiers(fields):
    from spectra.bridge import graph

    tree = {
        "type": "namedtuple",
        "name": "Pair",
        "keys": fields,
        "items": [{"type": "leaf", "index": i} for i in (0, 1)],
    }
    with pytest.raises(BridgeError, match=r"identifiers|twice"):
        graph.check(tree, 2, "file")


@pytest.mark.slow
def test_distributions_and_complex_numbers_inside(x64, monkeypatch):
    monkeypatch.setattr(D.Distribution, "_validate_args", True)  # torch.compile has switched it off, if used

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            h = self.layer(x)
            entropy = D.Categorical(logits=h).entropy()
            return D.Normal(h, h.exp()).log_prob(x[:, :3]), entropy, (torch.exp(1j * h) + 2).abs()

    _agrees(Inside().double(), (torch.randn(3, 4).double(),), (torch.randn(5, 4).double(),))
    assert D.Distribution._validate_args


def _agrees(module, example, inputs, tolerance=TOLERANCE, twin=None):
    """Outputs, gradient and a product with the Hessian against PyTorch's double backward."""
    model = bridge.from_torch(module, example)
    rng = np.random.default_rng(0)
    vector = {k: rng.standard_normal(p.shape).astype(p.dtype) for k, p in model.params.items()}
    theirs = reference.torch_derivatives(module.eval(), inputs, vector, twin)
    ours = reference.jax_derivatives(model, reference.numpy_tree(inputs), vector)
    for a, b in zip(ours, theirs, strict=True):
        assert reference.relative(a, b) < tolerance
    return model


class _Packed(nn.Module):
    def __init__(self, kind, batch_first=True, enforce_sorted=False, bidirectional=True, depth=2):
        super().__init__()
        self.embed = nn.Embedding(9, 3)
        self.layers = getattr(nn, kind)(3, 2, depth, batch_first=batch_first, bidirectional=bidirectional)
        self.batch_first, self.enforce_sorted = batch_first, enforce_sorted

    def forward(self, ids, lengths):
        x = self.embed(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        packed = pack_padded_sequence(x, lengths.cpu(), self.batch_first, self.enforce_sorted)
        out, state = self.layers(packed)
        padded, sizes = pad_packed_sequence(out, self.batch_first, padding_value=0.5)
        return padded, padded.sum(1 if self.batch_first else 0) / sizes[:, None], state


PACKED = {
    "RNN, one layer": _Packed("RNN", depth=1),
    "LSTM": _Packed("LSTM"),
    "GRU, time first": _Packed("GRU", batch_first=False),
    "RNN, sorted": _Packed("RNN", enforce_sorted=True, bidirectional=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name, x64):
    module = PACKED[name].double()
    ids = torch.randint(0, 9, (4, 7))
    lengths = torch.tensor([7, 5, 3, 1] if module.enforce_sorted else [3, 7, 1, 5])
    model = _agrees(module, (torch.randint(0, 9, (3, 5)), torch.tensor([5, 4, 2])), (ids, lengths))
    # PyTorch would end with the longest sequence: no number stands for an array of another size.
    assert np.isnan(model.apply(model.params, ids.numpy(), lengths.clamp(max=6).numpy())[0]).all()


@pytest.mark.slow
def test_recurrent_layers_take_any_number_of_steps(x64):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.gru = nn.LSTM(3, 2, batch_first=True), nn.GRU(2, 2, batch_first=True)

        def forward(self, x):
            return self.gru(self.lstm(x)[0])[0][:, -1]

    _agrees(Last().double(), (torch.randn(3, 3, 3).double(),), (torch.randn(2, 5, 3).double(),))


@pytest.mark.slow
def test_several_free_axes():
    model = bridge.from_torch(nn.Conv1d(4, 2, 3), torch.ones(3, 4, 8), batch_axis=[(0, 2)])
    assert model.apply(model.params, np.ones((2, 4, 11), np.float32)).shape == (2, 2, 9)


SMALL = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 16,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
DECODERS = {
    "GPT2": {
        "vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16,
        "bos_token_id": 1, "eos_token_id": 2,
    },
    "Llama": SMALL,
    "Mixtral": {**SMALL, "num_local_experts": 3},
    "Olmoe": {**SMALL, "num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {**SMALL, **EXPERTS, "shared_expert_intermediate_size": 8},
    "Qwen3Moe": {**SMALL, **EXPERTS, "head_dim": 8},
    "DeepseekV3": {
        **SMALL, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 0, "n_shared_experts": 1, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
}  # fmt: skip


def _decoder(name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**DECODERS[name])
    assert config.use_cache
    return getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")(config).eval()


@pytest.mark.slow
def test_a_decoder_with_its_cache():
    """The default call returns keys and values for the next token, too."""
    module, ids = _decoder("GPT2"), torch.randint(0, 30, (3, 6))
    model = bridge.from_torch(module, {"input_ids": ids[:2]})
    result = model.apply(model.params, input_ids=ids.numpy())
    assert list(result) == ["logits"]
    # A dozen sums of sixteen terms of order one, in float32.
    np.testing.assert_allclose(result["logits"], module(ids).logits.detach(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_as_they_are(name, x64):
    """With the default configuration: a cache among the outputs, experts in loops over those chosen."""
    module = _decoder(name).double()
    example, inputs = ({"input_ids": torch.randint(0, 30, (n, 6))} for n in (2, 3))
    if name == "GPT2":
        _agrees(module, example, inputs, twin=_logits)
        return
    before = module.get_experts_implementation()
    # Rotary angles, norms and routers are computed in float32, whatever the weights are.
    _agrees(module, example, inputs, 1e-6, twin=_logits)
    assert module.get_experts_implementation() == before


def _logits(module, **inputs):
    """PyTorch's second derivative exists for the loop over experts only."""
    if hasattr(module, "set_experts_implementation"):
        before = module.get_experts_implementation()
        module.set_experts_implementation("eager")
        try:
            return module(**inputs).logits
        finally:
            module.set_experts_implementation(before)
    return module(**inputs).logits
