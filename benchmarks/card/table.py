"""The page of what was measured on a card, from the figures in `results/card.json`."""

from collections.abc import Callable

from benchmarks.settings import table

INTRODUCTION = """\
# Lanczos on a GPU, measured

Made by `python -m benchmarks.card` on the first device of the process: {machine}.

What the compiler promises for such programs is in [gpu](gpu.md). Times are medians of repeated
calls, compiled, in milliseconds; a first call compiles. All programs, those of peers too, have their matrix
products from cuBLAS. GB is 10⁹ bytes.
"""
NOTES = """\
## What came of it

A card was at hand three times for a quarter of an hour. Not reached: Lanczos steps on GPT-2, peers on the
transformer, the calls of users one by one. "Before" and "with search" are earlier runs on the same kind of
card, in which XLA generated kernels for matrix products with Triton and, unless it says otherwise, tried
them out.

* **Matrix products from cuBLAS.** In true float32 XLA's own kernels are slow to find: the first product of
  the MLP took 10 s, the transformer's 25 s, now 0.4 and 2.2 s. The package has compiled its programs with
  `xla_gpu_enable_triton_gemm=false` since. A product of GPT-2 takes 49 ms, where kernels taken without
  search took 244 and PyTorch takes 90. What a search finds is not always worse: a step of the MLP took 0.50
  ms with it and takes 0.57, attention over 8,192 positions, whose heads have 16 numbers, 25 ms instead of
  33, over 32,768 359 instead of 486. For such a model set `XLA_FLAGS=--xla_gpu_enable_triton_gemm=true`,
  which holds for the package, too.
* **Rounding is measured in float64** on cards that have it at half the rate of float32, as on a CPU: the
  Hessian of the MLP has the noise floor 4.5e-6 instead of 2.0e-5 by products rounded at random, in the same
  time (`eigsh`, 21 products, 0.10 s). For twelve confident classifiers at a time the floor was 28 to 67
  times the true error in the median, and is at most 8 times now.
* **Small eigenvalue problems by QR.** JAX decomposes them on a GPU with Jacobi's rotations: the eight
  matrices of order 24 here came back with errors of 48 roundings, 7 by QR, in float32 and float64 alike.
  XNysTrace of a matrix of rank 5 in float64 was off by 2e-12 for one of 64 keys, now 6e-14. The package
  asks for QR.
* **Peers on the MLP**: of the 83 ms behind our figure, 38 to 43 were `slq` before; the rest is the curve
  with its band, on the host. matfree's step takes 0.23 ms, with TF32 (its largest eigenvalue is off by 6e-5
  of itself), and no checks, noise floor, saved basis or band.
* **Attention**: at 8,192 positions a product through `spectra.attention` takes 2.2 times as long as through
  the whole square, in 0.18 GiB instead of 5; at 32,768, where the square would need 80 GiB, 0.49 s.
* **Large networks are bound by memory**: with 29 million parameters a step takes 14 ms, of which a product
  is 10.5. Two passes over 12.5 GB of rows take 0.89 of the time of a copy of as many bytes, over 2 GB 1.19.
* **Small networks are bound by launches**: the card is at work for 29 % of a run on the MLP, whose matrix
  products would take 0.04 ms at its rate, and for 59 % of one on the transformer. Command buffers help:
  without them a step of the MLP takes 0.92 ms instead of 0.57. With all rows in one segment, which needs
  one scatter and no conditional, it took 0.66 ms for 0.73 (without search, before). That is not done: a
  checkpoint written on a CPU could no longer go on there.
* **A step starts** 96 kernels on the MLP, ten of them copies, and 474 on the transformer; the compiler of
  jax 0.10.2 had said 101 and 586 for an H100, and that none of them copies the basis.
* **Memory**: a process that runs 100 steps of the network with 29 million parameters held 13.5 GB at most,
  two vectors of its own among them; `plan` had said 13.2 and the compiler 13.0. Small networks hold more
  than planned: 0.2 GB for 0.1 on the MLP.
* **The package's tests on the card** (14 processes at once): of the numerical files 1,293 tests passed. Of
  the failures, five were faults: the floors, Jacobi's rotations in two of them, a count whose lower limit
  lay above it by rounding, a value of float64 that had moved by 1.03 of its floor after 14 restarts. The
  others had premises that hold on a CPU only, such as JAX's default precision. All are mended; the last two
  of Jacobi's rotations did not run on the card again.
* **A process that merely holds a key takes three quarters of the memory**, as JAX does when it starts: a
  second one beside it failed to allocate 11 GiB of the card's 140.
* **Eighteen processes that compile side by side** on 16 cores took longer than one after another: single
  kernels by Triton took two minutes.
"""


def page(known: dict) -> str:
    machines = list(dict.fromkeys(cell["machine"] for cell in known.values()))
    lines = [INTRODUCTION.format(machine="; ".join(machines))]
    for section in (
        ceilings,
        steps,
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
        "held at most, GB": lambda c: f"{c['peak'] / 1e9:.2f}",
        "planned": lambda c: f"{c['plan'] / 1e9:.2f}",
        "first product, s": lambda c: c["first product"],
        "first run, s": lambda c: c["first run"],
    }
    return section("Products and steps", chosen(known, "steps, "), columns)


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
