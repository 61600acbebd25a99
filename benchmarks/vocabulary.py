"""The Gauss-Newton matrix of a language model with a large vocabulary, in the memory of its gradient.

The estimate is the compiler's, from shapes alone: a decoder of 163 million parameters and 50,257 tokens
in its vocabulary, one sequence of 512 tokens a microbatch. Nothing of that size is allocated. A model
with the same vocabulary and 1/8 of the width is then run, and its peak measured.
"""

import functools
import resource

import jax
import jax.numpy as jnp
import optax

import spectra
from benchmarks.problems import Decoder
from benchmarks.settings import Settings
from spectra.base.host import available_bytes

VOCABULARY, TOKENS = 50257, 512
LARGE = Decoder(vocabulary=VOCABULARY, width=768, depth=12, heads=12)
SMALL = Decoder(vocabulary=VOCABULARY, width=96, depth=4, heads=4)


@functools.cache
def model_fn_of(module):
    return lambda params, tokens: module.apply({"params": params}, tokens)


def loss_fn(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def shapes(module, batch):
    tokens = jax.ShapeDtypeStruct((batch, TOKENS), jnp.int32)
    params = jax.eval_shape(lambda t: module.init(jax.random.key(0), t)["params"], tokens)
    return params, (tokens, tokens)


def gradient_bytes(model_fn, params, batch) -> int:
    """Temporaries and result of one compiled gradient."""
    one = jax.tree.map(lambda s: jax.ShapeDtypeStruct((1, *s.shape[1:]), s.dtype), batch)
    gradient = jax.grad(lambda p, b: loss_fn(model_fn(p, b[0]), b[1]))
    analysis = jax.jit(gradient).lower(params, one).compile().memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


def row(name: str, module, batch: int, steps: int = 2) -> str:
    model_fn = model_fn_of(module)
    params, data = shapes(module, batch)
    options = {"microbatch": 1, "linearize": False, "mode": "forward-over-reverse"}
    op = spectra.GGNOperator(model_fn, loss_fn, params, data, **options)
    plan = spectra.plan(op, num_steps=steps, num_probes=1)
    product = plan.workspace + plan.vector
    gradient = gradient_bytes(model_fn, params, data)
    return (
        f"| {name} | {op.size:,} | {gradient / 2**30:.2f} | {product / 2**30:.2f} | "
        f"{product / gradient:.2f} | {TOKENS * VOCABULARY**2 * 4 / 2**40:.1f} TiB |"
    )


def run_small(batch: int = 4) -> str:
    """One product of the small model; peak memory of the process beyond what it had before."""
    model_fn = model_fn_of(SMALL)
    tokens = jax.random.randint(jax.random.key(0), (batch, TOKENS), 0, VOCABULARY)
    params = SMALL.init(jax.random.key(1), tokens[:1])["params"]
    op = spectra.GGNOperator(model_fn, loss_fn, params, (tokens, tokens), microbatch=1, linearize=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    v = jax.tree.map(jnp.ones_like, params)
    product = op @ v
    curvature = float(sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (v, product)), strict=True)))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        f"Run: one product of the small model over {batch} sequences, vᵀGv = {curvature:.4g} >= 0; "
        f"peak of the process {(after - before) / 2**20:.2f} GiB above what it held before."
    )


def main(settings: Settings) -> list[str]:
    if settings.tiny:
        return [row("small, 4 layers, width 96", SMALL, 4)]
    free = available_bytes()
    return [
        "| model | parameters | gradient, GiB | GGN product, GiB | ratio | output Hessians, if formed |",
        "|---|---|---|---|---|---|",
        row("163M, 12 layers, width 768", LARGE, 8),
        row("small, 4 layers, width 96", SMALL, 4),
        "",
        run_small(),
        f"Memory free when this was run: {(free or 0) / 2**30:.1f} GiB.",
    ]


if __name__ == "__main__":
    print("\n".join(main(Settings())))
