"""The functions of `torch.nn.functional`, control flow, and what no graph can have; see `torch_functions`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch_functions import CLASSES, IDS, MASK, SIGNS, like

ACTIVATIONS = (
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu silu "
    "softplus softshrink softsign tanhshrink"
)


MODES = "nearest nearest-exact area bilinear bicubic"


def resized(mode: str, antialias: bool = False) -> Callable[..., Any]:
    return lambda i: F.interpolate(i, (4, 9), mode=mode, antialias=antialias)


def applied(name: str) -> Callable[..., Any]:
    function = getattr(F, name)
    return lambda x: function(x)


LAYERS: dict[str, dict[str, Callable[..., Any]]] = {
    "nn.functional, activations": {
        **{name: applied(name) for name in ACTIVATIONS.split()},
        "glu": lambda x: F.glu(x),
        "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
        "log_softmax": lambda x: F.log_softmax(x, 1),
        "prelu": lambda x, p: F.prelu(x, p[0]),
        "rrelu": lambda x: F.rrelu(x),
        "softmax": lambda x: F.softmax(x, 1),
        "softmin": lambda x: F.softmin(x, 1),
        "threshold": lambda x: F.threshold(x, 0.1, 0.5),
        "alpha_dropout, evaluation": lambda x: F.alpha_dropout(x, 0.5, False),
        "dropout, evaluation": lambda x: F.dropout(x, 0.5, False),
        "feature_dropout, evaluation": lambda l: F.dropout1d(l, 0.5, False),
    },
    "nn.functional, layers": {
        "adaptive_avg_pool2d": lambda i: F.adaptive_avg_pool2d(i, 4),
        "adaptive_max_pool2d": lambda i: F.adaptive_max_pool2d(i, 4),
        "affine_grid": lambda x: F.affine_grid(x[:2, :3].reshape(1, 2, 3), [1, 1, 3, 4], align_corners=False),
        "avg_pool1d": lambda l: F.avg_pool1d(l, 3),
        "avg_pool2d": lambda i: F.avg_pool2d(i, 3, 2, 1),
        "avg_pool3d": lambda c: F.avg_pool3d(c, 2),
        "batch_norm": lambda l: F.batch_norm(l, None, None, training=True),
        "bilinear": lambda x, y, l: F.bilinear(x, y, l[:, :4, :4]),
        "channel_shuffle": lambda i: F.channel_shuffle(i, 2),
        "conv1d": lambda l: F.conv1d(l, l[:, :, :3]),
        "conv2d": lambda i: F.conv2d(i, i[:, :, :3, :2], padding=1),
        "conv3d": lambda c: F.conv3d(c, c[:, :, :2, :2, :2]),
        "conv_transpose1d": lambda l: F.conv_transpose1d(l, l[0, :, None, :3]),
        "conv_transpose2d": lambda i: F.conv_transpose2d(i, i[0, :, None, :3, :2], stride=2),
        "conv_transpose3d": lambda c: F.conv_transpose3d(c, c[0, :, None, :2, :2, :2]),
        "conv_tbc": lambda l: torch.conv_tbc(l, l[:, :, :].reshape(2, 8, 4), l[0, 0, :4]),
        "cosine_similarity": lambda x, y: F.cosine_similarity(x, y),
        "embedding": lambda t: F.embedding(IDS, t),
        "embedding_bag": lambda t: F.embedding_bag(IDS, t, mode="sum"),
        "fold": lambda l: F.fold(l, (3, 5), (2, 2)),
        "grid_sample": lambda i: F.grid_sample(
            i, torch.tanh(i[:, :2].permute(0, 2, 3, 1)), align_corners=False
        ),
        "grid_sample, 3d": lambda c, v: F.grid_sample(
            c, torch.tanh(c[:, 0, ..., None] * v[:3]), align_corners=True
        ),
        "grid_sample, nearest 3d": lambda c: F.grid_sample(
            c,
            torch.tanh(c[:, 0, ..., None].detach().expand(1, 4, 4, 4, 3)),
            mode="nearest",
            padding_mode="reflection",
            align_corners=False,
        ),
        "group_norm": lambda i: F.group_norm(i, 2),
        "instance_norm": lambda i: F.instance_norm(i),
        **{f"interpolate, {mode}": resized(mode) for mode in MODES.split()},
        **{f"interpolate, {mode}, antialiased": resized(mode, True) for mode in ("bilinear", "bicubic")},
        "interpolate, linear": lambda l: F.interpolate(l, 13, mode="linear"),
        "interpolate, trilinear": lambda c: F.interpolate(c, (3, 5, 6), mode="trilinear"),
        "layer_norm": lambda x: F.layer_norm(x, [4]),
        "linear": lambda x, t: F.linear(x, t.mT),
        "local_response_norm": lambda i: F.local_response_norm(i, 3),
        "lp_pool2d": lambda i: F.lp_pool2d(i, 2, 2),
        "max_pool1d": lambda l: F.max_pool1d(l, 3),
        "max_pool2d": lambda i: F.max_pool2d(i, 3, 2, 1),
        "max_pool3d": lambda c: F.max_pool3d(c, 2),
        "max_unpool2d": lambda i: F.max_unpool2d(*F.max_pool2d(i, 2, return_indices=True), 2),
        "multi_head_attention": lambda l: F.scaled_dot_product_attention(l, l, l, is_causal=True),
        "normalize": lambda x: F.normalize(x),
        "pad": lambda i: F.pad(i, (1, 2, 0, 1)),
        "pad, circular": lambda i: F.pad(i, (1, 2, 0, 1), "circular"),
        "pad, reflect": lambda i: F.pad(i, (1, 2, 0, 1), "reflect"),
        "pad, replicate": lambda i: F.pad(i, (1, 2, 0, 1), "replicate"),
        "pairwise_distance": lambda x, y: F.pairwise_distance(x, y),
        "pdist": lambda x: F.pdist(x),
        "pixel_shuffle": lambda i: F.pixel_shuffle(i, 2),
        "pixel_unshuffle": lambda i: F.pixel_unshuffle(i, 2),
        "rms_norm": lambda x: F.rms_norm(x, [4]),
        "scaled_dot_product_attention": lambda l: F.scaled_dot_product_attention(l, l * 2, l),
        "unfold": lambda i: F.unfold(i, 3),
    },
    "nn.functional, losses": {
        "binary_cross_entropy": lambda p, q: F.binary_cross_entropy(p / 2, q / 2),
        "binary_cross_entropy_with_logits": lambda x, p: F.binary_cross_entropy_with_logits(x, p),
        "cosine_embedding_loss": lambda x, y: F.cosine_embedding_loss(x, y, like(SIGNS, x)),
        "cross_entropy": lambda x: F.cross_entropy(x, CLASSES),
        "ctc_loss": lambda l: F.ctc_loss(
            l.permute(2, 0, 1).log_softmax(-1),
            torch.tensor([[1, 2], [3, 3]]),
            torch.tensor([8, 7]),
            torch.tensor([2, 2]),
        ),
        "gaussian_nll_loss": lambda x, y, p: F.gaussian_nll_loss(x, y, p),
        "hinge_embedding_loss": lambda x: F.hinge_embedding_loss(x, torch.sign(x.detach())),
        "huber_loss": lambda x, y: F.huber_loss(x, y),
        "kl_div": lambda x, p: F.kl_div(x, p),
        "l1_loss": lambda x, y: F.l1_loss(x, y),
        "margin_ranking_loss": lambda x, y: F.margin_ranking_loss(x, y, torch.sign(x.detach())),
        "mse_loss": lambda x, y: F.mse_loss(x, y),
        "multi_margin_loss": lambda x: F.multi_margin_loss(x, CLASSES),
        "multilabel_margin_loss": lambda x: F.multilabel_margin_loss(
            x, torch.tensor([[1, 2, -1, 0], [3, -1, 0, 0], [0, 1, 2, -1]])
        ),
        "multilabel_soft_margin_loss": lambda x: F.multilabel_soft_margin_loss(x, like(MASK, x)),
        "nll_loss": lambda x: F.nll_loss(x, CLASSES),
        "poisson_nll_loss": lambda x, p: F.poisson_nll_loss(x, p, full=True),
        "smooth_l1_loss": lambda x, y: F.smooth_l1_loss(x, y),
        "soft_margin_loss": lambda x: F.soft_margin_loss(x, torch.sign(x.detach())),
        "triplet_margin_loss": lambda x, y, p: F.triplet_margin_loss(x, y, p),
        "triplet_margin_with_distance_loss": lambda x, y, p: F.triplet_margin_with_distance_loss(x, y, p),
    },
    "control flow": {
        "torch.cond": lambda x: torch.cond(x.sum() > 0, lambda z: z.sin(), lambda z: z.exp(), (x,)),
        "vmap": lambda x, t: torch.vmap(lambda r: r @ t)(x),
        "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False),
    },
    "random": {
        "fractional_max_pool2d": lambda i: F.fractional_max_pool2d(i, 2, output_size=3),
        "bernoulli": lambda p: torch.bernoulli(p.detach() / 2) * p,
        "dropout": lambda x: F.dropout(x, 0.5, True),
        "gumbel_softmax": lambda x: F.gumbel_softmax(x),
        "multinomial": lambda p: torch.multinomial(p.detach(), 2) * p[:, :2],
        "normal": lambda x, p: torch.normal(x.detach(), p.detach()) * x,
        "poisson": lambda p: torch.poisson(p.detach()) * p,
        "rand": lambda x: torch.rand(3, 4) * x,
        "randn": lambda x: torch.randn(3, 4) * x,
        "randperm": lambda x: x[:, torch.randperm(4)],
    },
    "shapes that depend on values": {
        "masked_select": lambda x: torch.masked_select(x, x > 0),
        "nonzero": lambda x: torch.nonzero(x > 0) * x.sum(),
        "unique": lambda x: torch.unique(x.detach()).sum() * x,
        "unique_consecutive": lambda x: torch.unique_consecutive(x.detach()).sum() * x,
    },
}
