"""The page of what was measured on a card, from the figures in `results/card.json`."""

from collections.abc import Callable

from benchmarks.settings import table

INTRODUCTION = """\
# Lanczos on a GPU, measured

Made by `python -m benchmarks.card` on the first device of the process: {machine}.

What the compiler promises for such programs is in [gpu](gpu.md). Times are medians of repeated
calls, compiled, in milliseconds; a first call compiles, and XLA tries several kernels for each
matrix product. GB is 10⁹ bytes.
"""
NOTES = """\
## What came of it

A card was at hand twice for a quarter of an hour, most of which went into compilation; Lanczos steps of
the transformer and of larger networks, peers on them, and whole calls were not reached.

* **XLA's own kernels for matrix products in true float32 are slow, and slower to find.** It generates
  several for each product with Triton and tries them out: 10 s for the first product of the MLP, 25 s for
  the transformer's. Taken from cuBLAS, by `xla_gpu_enable_triton_gemm=false`, the first products took 0.4
  and 2.4 s, and a later one of the MLP 0.16 ms for 0.42 to 0.47. The package has compiled its programs
  that way since. Except for those under "from cuBLAS", the figures above are of before; what came after
  has not run on a card.
* **GPT-2** says the same: of the 244 ms that a product took, 238 went into Triton's kernels, found without
  search at that (6 TFLOP/s of the card's 49). PyTorch, which asks cuBLAS, takes 91 ms.
* **Peers on the MLP**: of the 84 ms behind our figure, 38 to 43 are `slq`; the rest is the curve with its
  band, on the host. matfree's step takes 0.22 ms, with TF32 (its largest eigenvalue is off by 6e-5 of
  itself), a product half as long, and no checks, noise floor, saved basis or band.
* **Attention**: at 8,192 positions a product through `spectra.attention` takes 1.6 times as long as through
  the whole square, in 0.15 GiB instead of 7; at 32,768, where the square would need 110 GiB, 0.36 s.
* **The package's tests on the card** (Python 3.12, several processes at once, without XLA's search
  for kernels): of 882 tests of Lanczos, orthogonalisation, basis, breakdown, SLQ, eigenpairs,
  traces, diagonals, linear systems, matrix functions, precision, attention, KFAC, operators and
  others about 770 ran, in two runs. Four failed, each for a premise that holds on a CPU only: how
  many steps a program has, what shares memory with the compiler, convolutions outside of loops. The
  tests say so now. In the first run two more failed whose names were not kept.
* **Small networks are bound by launches**: the card was at work for 44 % of a run on the MLP, whose
  matrix products would take 0.04 ms at the card's rate.
  With all rows in one segment, which needs one scatter and no conditional, a step took 0.66 ms for
  0.73 (without the search). It is not done: a checkpoint written on a CPU could no longer go on
  there.
* **A step starts 102 kernels**, ten of them copies; the compiler of jax 0.10.2 had said 106 for an
  H100, and that none of them copies the basis.
* **Two passes over 2 GB of rows take 1.12 of a copy's time**; the compiler had said 1.05 of the
  floor in bytes. They are no matrix products to XLA, so that cuBLAS changes nothing there.
* **A process that merely holds a key takes three quarters of the memory**, as JAX does when it
  starts: a second one beside it failed to allocate 11 GiB of the card's 140.
* **Eighteen processes that compile side by side** on 16 cores took longer than one after another: single
  kernels by Triton took two minutes.
"""


def page(known: dict) -> str:
    machines = list(dict.fromkeys(cell["machine"] for cell in known.values()))
    lines = [INTRODUCTION.format(machine="; ".join(machines))]
    for section in (
        ceilings,
        steps,
        library,
        orthogonalisation,
        kernels,
        densities,
        estimates,
        attention,
        truth,
        gpt2,
    ):
        lines += section(known)
    return "\n".join(lines) + "\n" + NOTES


def chosen(known: dict, start: str) -> dict:
    """Cells by what follows `start` in their names."""
    return {name.removeprefix(start): cell for name, cell in known.items() if name.startswith(start)}


def cut(cells: dict, columns: dict[str, Callable]) -> list[str]:
    """A table with a row for each cell and a column for each function; what a cell lacks stays empty."""
    rows = []
    for name, cell in cells.items():
        row = [name]
        for value in columns.values():
            try:
                row.append(str(value(cell)))
            except (KeyError, TypeError, ZeroDivisionError):
                row.append("")
        rows.append(row)
    return table(["", *columns], rows)


def ceilings(known: dict) -> list[str]:
    cell = known.get("ceilings")
    if not cell or "GB/s" not in cell:
        return []
    return [
        "## What the card does at most",
        "",
        f"By XLA's own programs: a copy moves {cell['GB/s']:.0f} GB/s, read and written; a matrix product of "
        f"order 8192 runs at {cell['float32 TFLOP/s']:.0f} TFLOP/s in float32, "
        f"{cell['default TFLOP/s']:.0f} in tf32 and {cell['bfloat16 TFLOP/s']:.0f} in bfloat16.",
        "",
    ]


def section(title: str, cells: dict, columns: dict[str, Callable], *text: str) -> list[str]:
    """A heading, a text where there is one, and a table; nothing where there are no cells."""
    return (
        [f"## {title}", "", *(part for line in text for part in (line, "")), *cut(cells, columns), ""]
        if cells
        else []
    )


def steps(known: dict) -> list[str]:
    columns = {
        "parameters": lambda c: f"{c['n']:,}",
        "gradient": lambda c: f"{c['ms']['gradient']:.3f}",
        "product": lambda c: f"{c['ms']['product']:.3f}",
        "`jvp` of `grad`": lambda c: f"{c['ms']['jvp of grad']:.3f}",
        "product, tf32": lambda c: f"{c['ms']['product, tf32']:.3f}",
        "its error": lambda c: f"{c['error of tf32']:.1e}",
        "Lanczos step": lambda c: f"{c['ms']['step']:.3f}",
        "first product, s": lambda c: c["first product"],
        "first run, s": lambda c: c["first run"],
    }
    return section("Products and steps", chosen(known, "steps, "), columns)


def library(known: dict) -> list[str]:
    columns = {
        "parameters": lambda c: f"{c['n']:,}",
        "product, ms": lambda c: f"{c['ms']:.2f}",
        "first product, s": lambda c: c["first"],
    }
    text = (
        "True float32, without Triton. Two processes shared the card, and 20 products were started at once: "
        "a bound, not beside the figures above."
    )
    return section("Matrix products from cuBLAS", chosen(known, "library, "), columns, text)


def orthogonalisation(known: dict) -> list[str]:
    cells = {k: c for k, c in chosen(known, "orthogonalisation, ").items() if "ms" in c}
    rate = known.get("ceilings", {}).get("GB/s")
    columns = {
        "rows": lambda c: c["rows"],
        "GB of rows": lambda c: f"{c['GB of rows']:.3f}",
        "one pass": lambda c: f"{c['ms']['one pass']:.3f}",
        "two passes": lambda c: f"{c['ms']['two passes']:.3f}",
        "of a copy's time": lambda c: f"{c['ms']['two passes'] / (4e3 * c['GB of rows'] / rate):.2f}",
        "matrix-vector product": lambda c: f"{c['gemv']:.3f}",
    }
    text = (
        "Two passes read all rows four times; beside them is their time over that of a copy of as many "
        "bytes. The last column reads the rows once."
    )
    return section("Orthogonalisation against a full basis", cells, columns, text)


def kernels(known: dict) -> list[str]:
    columns = {
        "kernels a step": lambda c: f"{c['kernels'] / c['steps']:.0f}",
        "copies among them": lambda c: f"{c['copies'] / c['steps']:.0f}",
        "at work": lambda c: f"{c['busy']:.0%} of the time",
        "flags": lambda c: c.get("flags", ""),
    }
    return section("What a Lanczos step starts", chosen(known, "kernels, "), columns)


def densities(known: dict) -> list[str]:
    lines = []
    for name, cell in chosen(known, "density, ").items():
        products = cell.get("ms of a product", {})
        rows = [
            [t, f"{ms / cell['steps']:.2f}", f"{products.get(t, 0):.3f}"]
            for t, ms in cell.get("ms", {}).items()
        ]
        if rows:
            lines += [f"## Density of {name} beside peers", "", *table(["", "a step", "a product"], rows), ""]
            lines += ["; ".join(cell["notes"]) + ".", ""]
    return lines


def estimates(known: dict) -> list[str]:
    cell = known.get("estimates", {})
    calls = {k: c for k, c in cell.items() if isinstance(c, dict) and "ms" in c}
    columns = {
        "first call, s": lambda c: c["first"],
        "later": lambda c: f"{c['ms']:.1f}",
        "products": lambda c: c["products"] or "",
        "its products alone": lambda c: f"{c['products'] * cell['ms of a product']:.1f}",
    }
    return section("Calls", calls, columns)


def attention(known: dict) -> list[str]:
    rows = [
        [f"{cell['length']:,}", form, f"{own['ms']:.2f}", f"{own['peak'] / 2**30:.2f} GiB"]
        for cell in chosen(known, "attention, ").values()
        for form, own in cell.items()
        if isinstance(own, dict) and "ms" in own
    ]
    head = ["positions", "", "product", "peak so far"]
    return ["## Attention", "", *table(head, rows), ""] if rows else []


def truth(known: dict) -> list[str]:
    cell = known.get("truth", {})
    if "stated" not in cell:
        return []
    rows = [
        [f"{value:.6f}", f"{difference:.1e}", f"{stated:.1e}"]
        for value, difference, stated in zip(cell["values"], cell["differences"], cell["stated"], strict=True)
    ]
    again = "the same bits" if cell["same bits"] else "other bits"
    return [
        "## Eigenvalues in float32 beside float64",
        "",
        *table(["float64", "difference", "stated at most"], rows),
        "",
        f"`slq` has {again} in a second run.",
        "",
    ]


def gpt2(known: dict) -> list[str]:
    cell = known.get("gpt2", {})
    if "ms" not in cell:
        return []
    peer = f", PyTorch's {cell['torch']['ms']:.0f}" if "torch" in cell else ""
    held = f"; PyTorch {cell['torch']['peak'] / 1e9:.1f}" if "torch" in cell else ""
    step = f", a Lanczos step {cell['ms']['step']:.0f}" if "step" in cell["ms"] else ""
    return [
        "## GPT-2 through the bridge",
        "",
        f"{cell['examples']} sequences of {cell['sequence']}, {cell['n']:,} parameters: a product takes "
        f"{cell['ms']['product']:.0f} ms{peer}{step}. It held {cell['peak'] / 1e9:.1f} GB at most, with the "
        f"parameters twice{held}. {cell.get('flags', '')}".rstrip(),
        "",
    ]
