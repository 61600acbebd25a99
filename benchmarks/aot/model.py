"""A decoder-only transformer, layers under `lax.scan` with remat, and the ways to split its product.

The parameters are split over one mesh axis (FSDP) and so is the batch. What differs is who says where
the weights of a layer are gathered:

* "auto": nobody; the partitioner chooses for every operation.
* "constrained": sharding constraints on the weights of a layer and on the activations.
* "explicit": the same, with the sharding in the types (`explicit_axes` around the loss).
* "shard_map": `all_gather` in the body of the scan, whose transpose is a reduce-scatter. The body is
  rematerialised, so the gathered weights are not saved.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, explicit_axes, reshard
from jax.sharding import PartitionSpec as P

import spectra

AXIS = "data"
CHUNK, BLOCKS = 1024, (1024, 1024)
"""Rows of logits of a long transformer: of words, and of its attention, which picks them by the device that
is there."""
FORMS = ("auto", "constrained", "explicit", "shard_map")


@dataclasses.dataclass(frozen=True)
class Size:
    """A transformer of width d with feed-forward layers of 4 d.

    A long one attends by `spectra.attention` and has its logits in chunks; with `groups`, activations are
    kept between groups of layers, and between the layers of one group at a time.
    """

    layers: int
    width: int
    heads: int
    vocabulary: int = 32768
    length: int = 1024
    groups: int = 1
    long: bool = False

    @property
    def shapes(self):
        d, n = self.width, self.layers
        layers = {
            "norm1": (n, d),
            "qkv": (n, d, 3 * d),
            "out": (n, d, d),
            "norm2": (n, d),
            "up": (n, d, 4 * d),
            "down": (n, 4 * d, d),
        }
        return {
            "embed": (self.vocabulary, d),
            "layers": layers,
            "norm": (d,),
            "head": (self.vocabulary, d),
        }


SIZES = {
    "1e9": Size(layers=74, width=1024, heads=8, length=256),
    "1e9, 32k": Size(layers=75, width=1024, heads=8, length=32768, groups=5, long=True),
    "1e11": Size(layers=124, width=8192, heads=64, length=1024),
    "small": Size(layers=8, width=512, heads=4, vocabulary=4096, length=256),
}
# Weights are split along their input features, tables along the vocabulary: shards keep long rows.
FSDP = {
    "embed": P(AXIS, None),
    "layers": {
        "norm1": P(None, AXIS),
        "qkv": P(None, AXIS, None),
        "out": P(None, AXIS, None),
        "norm2": P(None, AXIS),
        "up": P(None, AXIS, None),
        "down": P(None, AXIS, None),
    },
    "norm": P(AXIS),
    "head": P(AXIS, None),
}


def shape_structs(size: Size, mesh, specs=FSDP):
    """Parameters as placed shapes; nothing is allocated."""

    def one(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, size.shapes, specs, is_leaf=lambda x: type(x) is tuple)


def batch_struct(size: Size, mesh, per_device: int = 1):
    """A batch of token sequences, `per_device` a device."""
    shape = (per_device * mesh.size, size.length + 1)
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, P(AXIS, None)))


def make_loss(size: Size, form: str, mesh):
    """loss_fn(params, tokens) in one of `FORMS`."""
    if form == "shard_map":
        local = partial(_loss, size, _all_gather, lambda x: x)
        specs = (FSDP, P(AXIS, None))
        mean = lambda p, t: lax.pmean(local(p, t), AXIS)  # noqa: E731
        return jax.shard_map(mean, mesh=mesh, in_specs=specs, out_specs=P())
    if form == "auto":
        return partial(_loss, size, lambda w, axis: w, lambda x: x)
    if form == "explicit":
        loss = partial(
            _loss, size, lambda w, axis: reshard(w, P()), lambda x: reshard(x, P(AXIS)), rows=P(AXIS)
        )
        return explicit_axes(loss, axes=AXIS, in_sharding=(FSDP, P(AXIS)))

    def gather(w, axis):
        return lax.with_sharding_constraint(w, NamedSharding(mesh, P()))

    def split(x):
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(AXIS)))

    return partial(_loss, size, gather, split)


def _all_gather(w, axis):
    return lax.all_gather(w, AXIS, axis=axis, tiled=True)


def _loss(size: Size, gather, split, params, tokens, rows=None):
    """Mean cross-entropy of the next token; `rows` is the sharding of what is looked up, where asked for."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = split(gather(params["embed"], 0).at[inputs].get(mode="clip", out_sharding=rows))

    @jax.checkpoint
    def layer(x, p):
        p = jax.tree.map(lambda w: gather(w, 0), p)
        x = split(x + attention(_norm(x, p["norm1"]), p, size))
        hidden = jax.nn.gelu(jnp.einsum("bsd,df->bsf", _norm(x, p["norm2"]), p["up"]))
        return split(x + jnp.einsum("bsf,fd->bsd", hidden, p["down"])), None

    def group(x, p):
        return lax.scan(layer, x, p)

    if size.groups > 1:
        stacked = jax.tree.map(lambda w: w.reshape(size.groups, -1, *w.shape[1:]), params["layers"])
        x, _ = lax.scan(jax.checkpoint(group), x, stacked)
    else:
        x, _ = group(x, params["layers"])

    @jax.checkpoint
    def cross_entropy(x, norm, head):
        if size.long:
            in_chunks = spectra.VocabularyLoss(chunk=CHUNK)
            return in_chunks((_norm(x, gather(norm, 0)), gather(head, 0).T), targets)
        logits = jnp.einsum("bsd,vd->bsv", _norm(x, gather(norm, 0)), gather(head, 0))
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - chosen)

    return cross_entropy(x, params["norm"], params["head"])


def attention(x, p, size: Size):
    """Causal self-attention, written out where it isn't long: it can be differentiated twice."""
    batch, length, width = x.shape
    heads = size.heads
    qkv = jnp.einsum("bsd,df->bsf", x, p["qkv"]).reshape(batch, length, 3, heads, width // heads)
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    if size.long:
        mixed = spectra.attention(q, k, v, is_causal=True, block_sizes=BLOCKS).reshape(batch, length, width)
        return jnp.einsum("bsd,df->bsf", mixed, p["out"])
    scores = jnp.einsum("bqhc,bkhc->bhqk", q, k) / jnp.sqrt(width / heads)
    mask = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    mixed = jnp.einsum("bhqk,bkhc->bqhc", weights, v).reshape(batch, length, width)
    return jnp.einsum("bsd,df->bsf", mixed, p["out"])


def _norm(x, scale):
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * (1 + scale)
