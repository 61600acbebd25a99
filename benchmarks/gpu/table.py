"""The page of what was compiled, from the figures in `results/gpu.json`."""

from collections.abc import Callable

from benchmarks.aot import text
from benchmarks.aot.programs import PRODUCTS
from benchmarks.gpu.cards import CARDS

INTRODUCTION = """\
# Lanczos on NVIDIA GPUs, as the compiler sees it

Programs of the package, compiled ahead of time by the CUDA compiler of jax 0.10.2 for cards that were not
there (`pip install 'spectra-jax[gpu-aot]'`, `JAX_PLATFORMS=cpu python -m benchmarks.gpu`). Nothing was run:
everything is read from the compiled program, and XLA, which on a card tries several kernels for a matrix
product and keeps the fastest, took its first choice. "h100:8" are eight cards in one machine.

{cards}

* **Memory**: arguments, results and temporaries of one card.
* **Kernels**: operations that the card starts, copies and collectives among them; of a conditional, its most
  expensive branch. For a step, one trip of the compiled loop.
* **Bytes**: what kernels read and write as a whole, as though no cache held anything; the most expensive
  branch, so all rows are read and the second Gram-Schmidt pass is taken. The floor is four reads of all rows,
  in float32.
* **Copies**: instructions anywhere in the program that copy a segment of the basis. The goal is none.
* **Conditionals**: those that a step meets, and those that the host decides anywhere in the program. The
  others lie in a command buffer, which is launched as one. The goal is none on the host.
* **Matrix products** by the precision that is asked for. They are cuBLAS's, as the package compiles them
  since it was measured on a card ([card](card.md)), so that no kernel of theirs is in the program:
  "highest" is true float32. With kernels of XLA's own a step of the larger networks started 7 to 17 %
  fewer.
* **Tensor cores**: their instructions in the machine code, by type; a true float32 product has none. float64
  would be listed beside them.
* **Collectives**: number of times, bytes on one card in all (the larger of what goes in and what comes out).
"""
STEP = """\
The body of `slq` and `lanczos`: product and recurrence in one loop, m = 100. `mlp` (85,002 parameters, 1,797
digits) and `transformer` (0.82M, 16 x 64 tokens) are those of `benchmarks/problems.py`; `small` and `1e9` the
transformers of `benchmarks/aot/model.py`, 8 layers of width 512 and 74 of width 1024, parameters and batch
split over the cards (FSDP). The vectors of the first two fit in a card's cache: there kernels count, and not
bytes.

Command buffers hold no collectives unless `XLA_FLAGS=--xla_gpu_enable_command_buffer=+COLLECTIVES` says so,
and none of the conditionals has a collective inside: reductions between cards come behind the conditionals of
the second Gram-Schmidt pass, and are made in every step. Before that, one conditional reached the host on
eight cards. The loop over steps is the host's, which reads one predicate a step.
Before a row was put by a scatter there were 15 copies in a step and 66 conditionals, and rows were swept one
segment at a time (1.32 times the floor, for 1e6 parameters on one card).
"""
REST = """\
`chain` is one step of `eigsh` with 88 rows of a basis, `restart` what combines them all into new ones,
`solve` one product of a linear system, in any of its modes, `attention` a Hessian product through causal
`spectra.attention` of 8192 positions, four heads of 16. The floor of a restart is one read and one write of
the basis; with kernels of XLA's own it took 3.00 times that, and takes 4.00 with cuBLAS.

Off a CPU `solve` computes all that a product may be followed by and chooses, with one preconditioner
product. As branches it was four conditionals that reached the host on eight cards, each with a sum over
them inside, and more bytes: 11.5 GB for the 10.9 on one card, since a branch copies what it passes on.

Attention takes blocks of 1024 positions on a card, of which 36 pairs are visible. With the blocks of 128
that are made for a CPU's cache, 2,080 pairs of them, it was 333,978 kernels and 80.8 GB.
"""

MANY = """\
`iteration` is a step of a loop of one's own around `LanczosIteration`, m = 100. The others take several
products, four side by side, as the package does by itself where a product evaluates the loss again, as
under `jax.checkpoint`: `trace, signs` eight probes of Hutchinson's trace, `trace, sketch` the sixteen
products of XTrace with eight probes, `diagonal, signs` a batch of the diagonal, `funm, vectors` and `solve,
sides` a step of sixteen vectors that share a Krylov space (of the rows that a step of `funm` appends, one
is counted).

What four vectors gather at once is more than twice the largest gather of the gradient, and 1.33 times that
of one product. It is so for any number of vectors, each of which gathers less than it would alone: the
parameters are gathered once for four. Before, all right-hand sides of a block were multiplied at once, up
to 64 of them.

`solve, sides` keeps 64 directions, and as many images, of which there was a copy in the order of a product's
collectives, with the split axis first (6.15 GiB in all). It is told the order of what it multiplies and of
the products, and holds them once: 3.77 GiB with kernels of XLA's own, 4.21 with cuBLAS.

Before, too, a step of `LanczosIteration` on eight cards gathered a whole vector (118 MB), copied nine
segments of the basis and left four conditionals to the host, since nothing said where its result lies and a
conditional was around all of it; and what sets the unit of an estimator's products was a conditional on the
host.
"""


def page(known: dict) -> str:
    """All sections as Markdown."""
    rows = list(known.values())

    def of(*programs: str) -> list[dict]:
        return [r for p in programs for r in rows if r["program"] == p]

    cards = "\n".join(f"* **{name}**: {card.name}, <{card.source}>" for name, card in CARDS.items())
    parts = [INTRODUCTION.format(cards=cards), "## One Lanczos step", "", STEP]
    parts += table(of("step"), STEP_COLUMNS)
    parts += ["", *checks(known), "", "## Orthogonalisation alone", ""]
    parts += table(of("orthogonalize"), ORTHOGONALIZE_COLUMNS)
    parts += ["", "## Gradients and products", ""]
    parts += table(of("gradient", "product"), PRODUCT_COLUMNS)
    parts += ["", "## Eigenpairs, attention, linear systems", "", REST]
    parts += table(of("chain", "restart", "attention", "solve"), REST_COLUMNS)
    parts += ["", "## Several products, and steps of one's own", "", MANY]
    parts += table(of("iteration", *PRODUCTS), REST_COLUMNS)
    parts += ["", *text.shares(known, ("iteration", *PRODUCTS), PRODUCTS)]
    return "\n".join(parts) + "\n"


Columns = dict[str, Callable[[dict], str]]


def table(rows: list[dict], columns: Columns) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for r in rows:
        if "failed" in r:
            cells = [r["topology"], text.short(r["failed"])] + [""] * (len(columns) - 2)
        else:
            cells = [cell(r) for cell in columns.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def size(r: dict) -> str:
    if r["layout"] == "spread":
        return f"{r['parameters']:,} numbers"
    return "" if r["program"] == "attention" else f"{r['size']}, {r['parameters']:,}"


def conditionals(r: dict) -> str:
    """Of those of a step, how many reach the host; of another program, those that do."""
    host = r["on_host"].get("kConditional", 0)
    return str(host) if r["conditionals"] is None else f"{r['conditionals']}, {host}"


def products(r: dict) -> str:
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(r["precisions"].items()))
    return found or "none"


def cores(r: dict) -> str:
    found = ", ".join(f"{count} {kind}" for kind, count in sorted(r["instructions"].items()))
    return found or "none"


def moved(r: dict) -> str:
    return f"{r['hbm'] / 1e9:.3g} GB"


def over_floor(r: dict) -> str:
    """Bytes over the floor, of what there is one for."""
    if r["program"] == "restart":
        return f"{2 * r['hbm'] / text.floor(r):.2f}"
    return f"{r['hbm'] / text.floor(r):.2f}" if r["program"] == "orthogonalize" else ""


def memory(r: dict) -> str:
    return text.memory(r, CARDS)


STEP_COLUMNS: Columns = {
    "cards": lambda r: r["topology"],
    "network, parameters": size,
    "memory": memory,
    "kernels": lambda r: f"{r['kernels']:,}",
    "bytes": moved,
    "recurrence / floor": lambda r: f"{r['hbm_recurrence'] / text.floor(r):.2f}",
    "copies": lambda r: str(r["copies"]),
    "conditionals, on the host": conditionals,
    "matrix products": products,
    "tensor cores": cores,
    "collectives": text.collectives,
}
ORTHOGONALIZE_COLUMNS: Columns = {
    "cards": lambda r: r["topology"],
    "parameters": size,
    "memory": memory,
    "kernels": lambda r: f"{r['kernels']:,}",
    "bytes / floor": over_floor,
    "copies": lambda r: str(r["copies"]),
    "conditionals on the host": conditionals,
    "matrix products": products,
    "tensor cores": cores,
    "collectives": text.collectives,
}
PRODUCT_COLUMNS: Columns = {
    "cards": lambda r: r["topology"],
    "network, parameters": size,
    "program": lambda r: f"{r['program']}, {r['precision']}",
    "memory": memory,
    "kernels": lambda r: f"{r['kernels']:,}",
    "bytes": moved,
    "matrix products": products,
    "tensor cores": cores,
    "collectives": text.collectives,
}
REST_COLUMNS: Columns = {
    "cards": lambda r: r["topology"],
    "program": lambda r: r["program"],
    "network, parameters": size,
    "memory": memory,
    "kernels": lambda r: f"{r['kernels']:,}",
    "bytes": moved,
    "bytes / floor": over_floor,
    "copies": lambda r: str(r["copies"]),
    "conditionals, on the host": conditionals,
    "tensor cores": cores,
    "collectives": text.collectives,
}


def checks(known: dict) -> list[str]:
    """How a step compares with the gradient, where both were compiled and anything is exchanged."""
    lines = []
    for step in known.values():
        if step["program"] != "step" or "failed" in step or not step["collectives"]:
            continue
        gradient = text.partner(known, step, "gradient")
        if gradient:
            lines.append(f"* {step['topology']}, {step['size']}: {text.gathers(step, gradient)}")
    return lines
