"""Weak scaling on paper: writes `docs/scaling.md` from the compiled figures and the chips' published ones.

python -m benchmarks.weak_scaling
"""

import dataclasses
import json
from pathlib import Path

from benchmarks.tpu.chips import CHIPS, Chip

ROOT = Path(__file__).parents[1]
STEPS, ROWS, VECTORS = 100, 104, 8
TOKENS = 1024
SIZES = (1e9, 1e10, 1e11)
PODS = {"v5e": (256,), "v5p": (256, 1024, 4096)}
PASSES = 6
"""A true float32 matrix product is six bfloat16 ones on the matrix unit."""
HOP = 1e-6
"""Seconds a small message takes from chip to chip; an assumption, it is not published."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the compiler says, in units of the model."""

    gram_schmidt: float  # HBM bytes of two passes over all rows / floor
    gathered: float  # bytes a product gathers / bytes of the parameters
    reduced: float  # bytes a product reduces / bytes of the parameters

    @classmethod
    def read(cls, chip: str) -> "Measured":
        known = json.loads((ROOT / "benchmarks/results/tpu.json").read_text()).values()
        rows = [r for r in known if r["topology"].startswith(chip) and "failed" not in r]
        passes = [
            r["hbm"] / (16 * r["rows"] * r["numbers_a_chip"])
            for r in rows
            if r["program"] == "orthogonalize" and r["numbers_a_chip"] > 1e6
        ]
        product = next(
            r for r in known if r["program"] == "product" and r["form"] == "shard_map" and "failed" not in r
        )
        moved, size = product["collectives"], product["parameters"]
        width = 2 if product["precision"] == "default" else 4  # weights are rounded before a gather
        return cls(max(passes), moved["all-gather"][1] / size / width, moved["all-reduce"][1] / size / 4)


def seconds(n: float, chips: int, chip: Chip, measured: Measured) -> dict[str, float]:
    """Parts of one Lanczos step, and bytes a chip."""
    flops = 24 * n * TOKENS * PASSES
    rows = 8 * n * STEPS / chips  # one pass, two reads of half the rows on average, 4 bytes
    moved = 4 * n * (measured.gathered + 2 * measured.reduced) * (chips - 1) / chips
    diameter = {"v5e": chips**0.5, "v5p": 1.5 * chips ** (1 / 3)}[chip.name]
    return {
        "product": flops / chip.flops,
        "gram_schmidt": measured.gram_schmidt * rows / chip.hbm,
        "weights": moved / chip.interconnect,
        "reductions": 2 * diameter * HOP,
        "memory": 4 * n * (ROWS + VECTORS) / chips,
    }


def table() -> list[str]:
    lines = [
        "| parameters | chips | basis and vectors per chip | product | Gram-Schmidt | weights over the links "
        "| reductions | step, nothing overlapped | 100 steps |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for n in SIZES:
        for name, pods in PODS.items():
            chip, measured = CHIPS[name], Measured.read(name)
            for chips in pods:
                t = seconds(n, chips, chip, measured)
                memory = t.pop("memory")
                total = sum(t.values())
                start = (
                    f"| {n:.0e} | {chips:,} {name} | {memory / 2**30:.1f} of {chip.memory / 2**30:.0f} GiB"
                )
                start = start.replace("e+0", "e").replace("e+", "e")
                if memory > 0.8 * chip.memory:  # parameters, activations and temporaries want the rest
                    steps = int(0.8 * chip.memory * chips / (4 * n)) - 8
                    fit = f"does not fit: {max(steps, 0)} steps do" if steps > 1 else "does not fit"
                    lines.append(f"{start} | {fit} | | | | | |")
                    bare = 4 * VECTORS * n / chips
                    sweep = bare / chip.hbm  # each vector once: the recurrence itself
                    total += sweep - t["gram_schmidt"]
                    t["gram_schmidt"] = sweep
                    share = f"{bare / 2**30:.1f} of {chip.memory / 2**30:.0f} GiB"
                    start = f'| ... with `basis="none"` | | {share}'
                lines.append(
                    f"{start} | {clock(t['product'])} | {clock(t['gram_schmidt'])} | {clock(t['weights'])} "
                    f"| {clock(t['reductions'])} | {clock(total)} | {clock(100 * total)} |"
                )
    return lines


def clock(t: float) -> str:
    unit, scale = next((u, s) for u, s in (("min", 60), ("s", 1), ("ms", 1e-3), ("µs", 1e-6)) if t >= s)
    return f"{t / scale:.3g} {unit}"


def text() -> str:
    e, p = Measured.read("v5e"), Measured.read("v5p")
    return PAGE.format(
        table="\n".join(table()),
        bare=compiled("1e11"),
        long=compiled("1e9, 32k"),
        gathered=p.gathered,
        reduced=p.reduced,
        v5e=e.gram_schmidt,
        v5p=p.gram_schmidt,
        sources="\n".join(
            f"* {c.name}: {c.flops / 1e12:.0f} TFLOP/s in bfloat16, {c.memory / 2**30:.0f} GB of HBM at "
            f"{c.hbm / 1e9:.0f} GB/s, links {2 * c.interconnect / 1e9:.0f} GB/s in both directions together\n"
            f"  (<{c.source}>)"
            for c in CHIPS.values()
        ),
        tokens=TOKENS,
        steps=STEPS,
        hop=HOP * 1e6,
        even=break_even(CHIPS["v5e"], e),
        even_p=break_even(CHIPS["v5p"], p),
    )


def compiled(size: str) -> float:
    """GiB a chip of a step without a basis."""
    known = json.loads((ROOT / "benchmarks/results/tpu.json").read_text()).values()
    return next(r["memory"] / 2**30 for r in known if r["program"] == "bare step" and r["size"] == size)


def break_even(chip: Chip, measured: Measured) -> float:
    """Tokens a chip at which arithmetic and links take equally long."""
    return 4 * (measured.gathered + 2 * measured.reduced) / chip.interconnect * chip.flops / (24 * PASSES)


PAGE = """\
# Scaling

This page estimates what a Lanczos run costs on a TPU pod, and says how to write a model so that it scales.
Nothing here was run on a TPU: the traffic of programs is read from the output of the TPU compiler
(`benchmarks/results/tpu.md`), and the rest is arithmetic with published figures of the chips. The page is
written by `python -m benchmarks.weak_scaling`.

## Write the model so that weights are gathered layer by layer

Vectors, basis and recurrence are split in the same way as the parameters. The product, however, is that of
your model, differentiated twice, so its communication depends on how the model is written. For fully sharded
parameters (FSDP), the compiler handles the explicit form best: the loss under `jax.shard_map`, with
`lax.all_gather` on the weights of a layer in the rematerialised body of the scan.

```py
def loss_fn(params, tokens):  # the mean over all devices of each one's mean
    return jax.shard_map(
        lambda p, t: lax.pmean(local_loss(p, t), "data"),
        mesh=mesh,
        in_specs=(specs, P("data")),
        out_specs=P(),
    )(params, tokens)


@jax.checkpoint
def layer(x, weights):  # the body of lax.scan; the transpose of a gather is a reduce-scatter
    weights = jax.tree.map(lambda w: lax.all_gather(w, "data", axis=0, tiled=True), weights)
    ...
```

`spectra.HessianOperator(loss_fn, params, tokens)` then gathers, in the forward and in the backward sweep,
each layer's weights and the same layer's part of the vector once, twice as much as the gradient; its
reductions are those of the gradient. `benchmarks/aot/model.py` is a complete example. Sharding constraints on
the same model compile to the same collectives, with somewhat more time and memory. Left to the partitioner
alone, even the gradient gathers five times as many bytes, and needs all-to-alls in addition.

Most of the compilation time goes into float32 matrix products: for one of 1024 x 2048 x 8192, the compiler
takes 7.7 s of CPU time, with `matmul_precision="high"` 1.7 s and with "default" 1.2 s.

## One step on C chips

With n parameters, T tokens per chip and m steps, the parts of a step take, in seconds:

    product       24 n T * 6 / F
    Gram-Schmidt  k * 8 n m / (C * B)
    weights       4 n (g + 2 r) (C - 1) / C / L
    reductions    2 * diameter of the torus * {hop:.0f} µs

* F, B and L are the bfloat16 operations, HBM bytes and link bytes (in one direction) per second and chip.
* 24 n T counts the operations of a product: 6 per parameter and token for a gradient, three times that for
  the jvp of the gradient, and 6 more for the recomputed forward sweep with its tangents. The factor 6 is
  there because one float32 product takes six bfloat16 passes.
* 8 n m counts the bytes of one Gram-Schmidt pass: two reads of the filled rows, m / 2 on average, 4 bytes per
  number. A second pass, which rounding requires now and then, doubles it. k is the worst ratio of the bytes
  that compiled passes move to this minimum: {v5e:.2f} on v5e, {v5p:.2f} on v5p.
* g = {gathered:.2f} and r = {reduced:.2f} are the numbers gathered and reduced, per parameter, in the
  compiled product of a small model: parameters and vector, each in the forward sweep and again in the
  backward one. r has a factor of two, because this compiler chooses an all-reduce where a reduce-scatter
  would suffice.
* T = {tokens} and m = {steps} in the table. The time of a message between neighbours is an assumption.

The memory in the table is that of 104 rows and 8 vectors (q, its predecessor, the product, parameters and
temporaries). Runs that need more than 80 % of a chip's memory are marked, with the number of steps that would
fit. The row below them shows the same run with `basis="none"`: 8 vectors for any number of steps, plus the
deflated ones, of which there are none here, and whatever the model keeps. With the outliers deflated, such a
run needs as many steps as one with a basis; without deflation, about three times as many.

Compiled whole, such a step for 1e11 parameters on 256 v5p chips takes {bare:.1f} GiB per chip, including the
model's activations and the weights of one layer. A step for 1e9 parameters with sequences of 32,768 tokens
takes {long:.1f} GiB on 256 v5e chips (`benchmarks/results/tpu.md`).

{table}

The batch grows with the pod, so the product takes the same time on any number of chips, while memory and
Gram-Schmidt fall like 1 / C. With fewer than about {even:.0f} tokens per chip on v5e, or {even_p:.0f} on v5p,
the links take longer than the product. The two reductions of a step, of at most m + 1 numbers each, are
negligible.

{sources}
"""


if __name__ == "__main__":
    page = ROOT / "docs" / "scaling.md"
    page.write_text(text())
    print(page.read_text())
