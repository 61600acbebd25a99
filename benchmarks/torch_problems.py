"""The networks of `problems` as PyTorch modules with the same weights.

Attention is written out: PyTorch's fused attention has no second derivative.
"""

import itertools
import os

import numpy as np
import torch
from torch import nn

from benchmarks import problems

THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width, eps=1e-6) for _ in range(2)])
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, mask):
        batch, length, width = x.shape
        y = self.norms[0](x)

        def heads(layer):
            return layer(y).reshape(batch, length, self.heads, -1).transpose(1, 2)

        q, k, v = heads(self.query), heads(self.key), heads(self.value)
        scores = (q @ k.transpose(2, 3)) / (width // self.heads) ** 0.5
        weights = torch.softmax(scores.masked_fill(~mask, torch.finfo(x.dtype).min), -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(batch, length, width))
        y = self.norms[1](x)
        return x + self.down(nn.functional.gelu(self.up(y), approximate="tanh"))


class Decoder(nn.Module):
    """Logits (batch, vocabulary, length), the order that `CrossEntropyLoss` takes."""

    def __init__(self, like: problems.Decoder, length: int):
        super().__init__()
        self.embed = nn.Embedding(like.vocabulary, like.width)
        self.positions = nn.Parameter(torch.zeros(length, like.width))
        self.blocks = nn.ModuleList([Block(like.width, like.heads) for _ in range(like.depth)])
        self.norm, self.head = nn.LayerNorm(like.width, eps=1e-6), nn.Linear(like.width, like.vocabulary)

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = torch.tril(torch.ones(length, length, dtype=torch.bool, device=tokens.device))
        x = self.embed(tokens) + self.positions
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x)).transpose(1, 2)


class CNN(nn.Module):
    def __init__(self, widths):
        super().__init__()
        pairs = itertools.pairwise((1, *widths))
        self.convolutions = nn.ModuleList([nn.Conv2d(a, b, 3, padding=1) for a, b in pairs])
        self.head = nn.Linear(4 * widths[-1], 10)

    def forward(self, x):
        x = x.reshape(-1, 1, 8, 8)
        for layer in self.convolutions:
            x = nn.functional.avg_pool2d(torch.tanh(layer(x)), 2)
        return self.head(x.permute(0, 2, 3, 1).flatten(1))


def mlp(widths=(64, 256, 256, 10)):
    layers = [x for a, b in itertools.pairwise(widths) for x in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def build(name: str, params, batch):
    """(module, criterion, (inputs, targets)) of the problem with this name, with these weights."""
    torch.set_num_threads(THREADS)
    params = {k: _numpy(v) for k, v in params.items()}
    if name in ("transformer", "large"):
        like = problems.DECODER if name == "transformer" else problems.LARGE
        tokens = torch.tensor(np.asarray(batch)).long()
        model, data = Decoder(like, tokens.shape[1] - 1), (tokens[:, :-1], tokens[:, 1:])
        _fill_decoder(model, params)
    else:
        inputs, labels = (torch.tensor(np.asarray(x)) for x in batch)
        data = (inputs, labels.long())
        if name == "cnn":
            model = CNN(problems.CONVOLUTIONS.widths)
            for i, layer in enumerate(model.convolutions):
                _set(layer.weight, params[f"Conv_{i}"]["kernel"].transpose(3, 2, 0, 1))
                _set(layer.bias, params[f"Conv_{i}"]["bias"])
            _dense(model.head, params["Dense_0"])
        elif name == "small":
            model = mlp((64, 16, 10))
            for i, layer in enumerate((model[0], model[2]), 1):
                _dense(layer, {"kernel": params[f"w{i}"], "bias": params[f"b{i}"]})
        else:
            model = mlp()
            for i, layer in enumerate(x for x in model if isinstance(x, nn.Linear)):
                _dense(layer, params[f"Dense_{i}"])
    return model, nn.CrossEntropyLoss(), data


def _numpy(x):
    return {k: _numpy(v) for k, v in x.items()} if isinstance(x, dict) else np.asarray(x)


def _set(parameter, value) -> None:
    parameter.data = torch.tensor(np.ascontiguousarray(value)).reshape(parameter.shape)


def _dense(layer, params) -> None:
    """Flax's kernel has shape (in, out); attention's has (in, heads, depth) or (heads, depth, out)."""
    _set(layer.weight, params["kernel"].reshape(layer.in_features, layer.out_features).T)
    _set(layer.bias, params["bias"])


def _norm(layer, params) -> None:
    _set(layer.weight, params["scale"])
    _set(layer.bias, params["bias"])


def _fill_decoder(model, params) -> None:
    _set(model.embed.weight, params["Embed_0"]["embedding"])
    _set(model.positions, params["positions"])
    _norm(model.norm, params["LayerNorm_0"])
    _dense(model.head, params["Dense_0"])
    for i, block in enumerate(model.blocks):
        own = params[f"Block_{i}"]
        attention = own["MultiHeadDotProductAttention_0"]
        for j, norm in enumerate(block.norms):
            _norm(norm, own[f"LayerNorm_{j}"])
        for name in ("query", "key", "value", "out"):
            _dense(getattr(block, name), attention[name])
        _dense(block.down, own["Dense_0"])
        _dense(block.up, own["Dense_1"])
