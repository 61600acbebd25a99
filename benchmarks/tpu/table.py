"""The table of what was compiled, from the figures in `results/tpu.json`."""

from benchmarks.aot import text
from benchmarks.aot.model import SIZES
from benchmarks.aot.programs import PRODUCTS, REPEATS
from benchmarks.tpu.chips import CHIPS

LIBTPU = "0.0.42"
"""Of which the rows are that do not say otherwise: jax 0.10.2 installs it."""
DEFAULT_TRACE = ("trace, sweep", "trace, row", "trace, direction", "trace, samples")
REPEATED = {"products": "product in a loop", "linearized": "linearised product in a loop"}

INTRODUCTION = """\
# Lanczos on TPU, as the compiler sees it

Programs of the package, compiled ahead of time by libtpu for topologies that were not there
(`pip install 'spectra-jax[tpu-aot]'`, `python -m benchmarks.tpu`). Nothing was run: bytes and collectives are
read from the compiled program, seconds are of compiling, on two shared CPU cores (CPU seconds beside them).

Memory is arguments, results and temporaries of one chip. Bytes are what one chip moves between HBM and
its cores in one run of the program; the most expensive branch of every conditional is counted, so all 104
rows are read and the second Gram-Schmidt pass is always taken. XLA's own "bytes accessed" also counts
what lies in VMEM, both ends of a prefetch and the operands of conditionals; it stands beside. The floor
of two passes is 4 reads of all rows: 16 x 104 bytes a number of the vector that the chip holds. A sweep
of inner products reads seven segments of eight rows and the vector once, one that subtracts five
segments. Collectives: number of times, bytes on one device in all (the larger of what goes in and what
comes out).

Not all rows are by one compiler. They are by libtpu 0.0.42, which jax 0.10.2 installs, but for the six that
say 0.0.52, which is newer: steps and the product alone on v5e 8x8, the step on 16x16, and both steps without
a basis. 0.0.42 had not come to the end of that product after 40 minutes on a busy machine, some 220 seconds
of a processor; the others were not compiled again. What differs by the older one: orthogonalisation alone
was at 1.06 in place of 1.03 of the floor on v5e, the rows of 300,000 numbers a chip, of which half lay in
VMEM by the newer one, read more of HBM, a gradient read 3.2 GB for 2.0, and a step takes up to 2 % more
memory.

0.0.42 lays out the rows of a basis in another order than they come in, and copies all of them to it and
back: a step of 1e9 parameters on v5p 2x2x4 took 49.6 GiB and 1.67 times the floor, of "small" on v5e 4x4
1.47 GiB and 1.59. Told the order (`Layout.in_order`), it holds the basis once. Each chip has to be told of
its own rows: told of the whole array, 0.0.42 gathered the basis on every chip, and took that out again on
16 chips, but not on 64 and 128 of v5p, where orthogonalisation of 1e9 parameters would have taken 122.9 GiB
of each.

Nor are all by today's recurrence, but the step on v5p 2x2x4 and the programs of the default trace. The
others are of before a sweep subtracted five segments, and a second pass left out the square of the vector.
By both, orthogonalisation of 1e9 parameters came down from 1.060 to 1.048 of the floor on v5p 2x2x4, by the
first alone to 1.051 on v5e 8x8. Six or seven segments at once were 1.28 and more: there segments are copied.

Within a caller's jit, where nobody knows how arrays are split, nothing is said of the order. Of `lanczos`
with 24 steps on v5e 4x4, with leaves of one, two or three axes, temporaries were 1.25 to 1.34 times the
basis, which is one of them: too little for a second one. That no segment is copied was read for leaves of
one axis only. 100 steps were not compiled.
"""


def table(known: dict) -> str:
    """All sections as Markdown."""
    rows = list(known.values())
    parts = [INTRODUCTION, "## Orthogonalisation alone", ""]
    parts += orthogonalisation([r for r in rows if r["program"] == "orthogonalize"])
    parts += ["", "## One Lanczos step of a transformer of 1e9 parameters", "", STEP]
    parts += programs([r for r in rows if r["size"] == "1e9" and r["program"] != "orthogonalize"])
    parts += extrapolated(known)
    parts += ["", *checks(known), "", "## The default trace", "", TRACE]
    parts += several([r for r in rows if r["program"] in DEFAULT_TRACE])
    parts += ["", "## Several products", "", MANY]
    parts += several([r for r in rows if r["program"] in ("solve", *PRODUCTS)])
    parts += ["", *text.shares(known, ("solve", *PRODUCTS), PRODUCTS)]
    parts += ["", "## Any size: one step without a basis", "", BARE]
    parts += bare([r for r in rows if r["program"] == "bare step"])
    parts += ["", "## Ways to write the product", "", FORMS]
    others = ("solve", *PRODUCTS, *DEFAULT_TRACE)
    parts += programs([r for r in rows if r["size"] == "small" and r["program"] not in others])
    return "\n".join(parts) + "\n"


STEP = """\
Decoder-only: 74 layers of width 1024 under `lax.scan` with remat, vocabulary 32,768, one sequence of 256
tokens a chip, parameters and batch split over one axis (FSDP), weights gathered in the body of the scan by
`shard_map`, m = 100. The step is the body of `slq` and `lanczos`: product and recurrence in one loop.
Products inside the model are in float32, the package's default, but where a row says "default": there they
are at JAX's own, one pass of bfloat16. The recurrence is the same in both, and multiplies rows with vectors
on the vector unit, in float32: the matrix products listed are the model's. On v5e 4x4 the basis does not
fit (see above).

On 8x8 and 16x16 the gathers of layers, 16 and 4 rows of weights a chip, are all-reduces in the compiled
program; that they are gathers in another form is inferred from their size: parameters and vector in both
sweeps, 4 x 931M numbers of the layers in float32 (14.9 GB), their gradient once (3.7 GB) and those of the two
tables (0.27 GB) are the 18.9 GB below. On v5p 2x2x4, with 64 rows a chip, they are gathers.

Below the table the step's bytes are told apart: the product is what lies in the loops over layers, bears
the name of a derivative or is a collective, the recurrence is all the rest. Of the 13 conditionals that put a
row into its segment one writes, and one is counted. The product inside a step is not compiled like one alone:
on v5p two weights of all layers (58 MB each) are copied to another layout for every layer there, which is in
neither the model nor the recurrence.

The 1.10 of v5p are 457.4 vectors where the floor is 416. It was 1.13, 469 vectors. Of them four were sweeps
that subtracted four segments, not five; two a pad behind the concatenation of a panel, whose zeros now
are one more operand of it; four were relayouts of the whole vector, for layer norms, (74, 64) on a chip, and
for a table of words, (2048, 1024), each of which XLA cut out of a vector that it had given the tiles of the
leaf (a barrier behind the cut keeps it from that); one was the square of the vector in a second pass, which
nobody uses. Left are 431 in the sweeps, two for a copy of q into the place of the vector before, and the rest
in the step's own arithmetic and where leaves are read and written. All 13 segments in one sweep of inner
products take off two more, and compile for twice as long: not adopted.
"""
TRACE = """\
`trace` with its method "krylov", for the same transformer with 8 layers of width 512 (29M parameters) and a
basis of 104 rows. The host looks at every product, and a step is the programs below beside the product:
`sweep`, one pass over the rows, is run for a direction and for its product, `row` takes the direction in,
`direction` keeps what the product opens. `samples` are eight of what is outside of a basis of 100 vectors.
None gathers a vector, and none holds a second basis.

Before, a random vector was drawn whole on one device, and what programs returned was whole on every device
where nothing said how it lies: images of samples, and the stacks of XTrace and Hutch++, four vectors for each
probe. That shows on CPU devices, too, where a test now asks that all lie as the parameters do.
"""
MANY = """\
Those of [the page on GPUs](gpu.md), for the same transformer on sixteen chips: `solve` one product of a
linear system in any of its modes, `trace, signs` eight probes of Hutchinson's trace, `trace, sketch` the
sixteen products of XTrace with eight probes, `diagonal, signs` a batch of four of the diagonal, and `funm,
vectors` and `solve, sides` a step of sixteen vectors. Four products are made side by side.

That gathers the parameters once for four, 1.25 in the place of 2.00 gradients' gathers for a product. But
what one sequence keeps between layers lies in VMEM, and what four vectors keep does not: a product moves
0.3 GB of HBM then, alone 0.04 GB. On a v5e the one saves about as much time as the other costs, by the data
sheet.
"""
BARE = """\
The step of `basis="none"`, of two transformers written as above, at full depth: a loop is compiled once, so
that 124 layers take what two would. Each chip has one sequence; all of the model is in its step, the product
and the three terms of the recurrence.

* **1e11**: 124 layers of width 8192, 64 heads, sequences of 1024 tokens. Arguments and results of a step are
  the parameters and two vectors; the rest are temporaries, among them the weights of a layer, those of the
  vector, their gradients, and what is kept between layers.
* **1e9, 32k**: 75 layers of width 1024, 8 heads, sequences of 32,768 tokens, `spectra.attention` in blocks of
  1024, `spectra.VocabularyLoss` in chunks of 1024. Activations are kept between 5 groups of
  layers and between the 15 of one of them, and made anew for the others: all 75 would be 20 GB, of 16 GiB.

"Largest" is the largest array that any collective makes or takes; beside it the parameters of one layer and
of a table of words. Products inside the model are at JAX's own precision, as in the rows of "default" above,
which take the memory of those in float32; in float32 these two were not compiled, which takes five times as
long. Bytes of the long one count the blocks that the causal mask hides, half of them, which are left out when
it runs.
"""
FORMS = """\
The same transformer with 8 layers of width 512, JAX's default precision in the model: what is compared is
who says where weights are gathered (see `benchmarks/aot/model.py`), and `jvp` of the gradient with its
linearisation. "In a loop" is one of ten products, so that what the compiler takes out of the loop counts a
tenth; "linearised" saves what the products share before the loop.

What came: wherever the weights of a layer are gathered as a whole, three ways of saying so give the same
collectives; left alone, the partitioner moves several times as much, in more kinds. Linearisation saves a
fifth of the gathers, those of the primal pass, and reads more than ten times the bytes of HBM: what it saves
are activations that remat would have made anew from VMEM. So the step above is `jvp` of the gradient
(`linearize=False`) with `shard_map`.
"""


def topology(r: dict) -> str:
    """The chips, and the compiler where it is another one."""
    other = r.get("libtpu", LIBTPU)
    return r["topology"] if other == LIBTPU else f"{r['topology']}, by {other}"


def orthogonalisation(rows: list[dict]) -> list[str]:
    lines = [
        "| topology | parameters | basis | numbers a chip | compile s (CPU s) | memory | HBM bytes / floor "
        "| XLA's bytes / floor | collectives |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        start = f"| {topology(r)} | {r.get('parameters', 998_396_928):,} | {r['layout']} |"
        if "failed" in r:
            lines.append(f"{start} | | | | | {text.short(r['failed'])} |")
            continue
        floor = text.floor(r)
        lines.append(
            f"{start} {r['numbers_a_chip']:,} | {text.seconds(r)} | {text.memory(r, CHIPS)} "
            f"| {r['hbm'] / floor:.2f} | {r['bytes_accessed'] / floor:.2f} | {text.collectives(r)} |"
        )
    return lines


def programs(rows: list[dict]) -> list[str]:
    lines = [
        "| topology | program | form | compile s (CPU s) | memory | HBM bytes | collectives "
        "| matrix products |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: (r["topology"], r["form"])):
        program = REPEATED.get(r["program"], r["program"])
        start = f"| {topology(r)} | {program}, {r['precision']} | {r['form']} |"
        if "failed" in r:
            lines.append(f"{start} | | | {text.short(r['failed'])} | |")
            continue
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(r["precisions"].items()))
        share = 1 / REPEATS if r["program"] in REPEATED else 1
        lines.append(
            f"{start} {text.seconds(r)} | {text.memory(r, CHIPS)} | {share * r['hbm'] / 1e9:.2f} GB "
            f"| {text.collectives(r, share)} | {kinds} |"
        )
    return lines


def several(rows: list[dict]) -> list[str]:
    lines = [
        "| topology | program | compile s (CPU s) | memory | of it temporary | HBM bytes | collectives |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {topology(r)} | {r['program']} | {text.seconds(r)} | {text.memory(r, CHIPS)} "
            f"| {r['temporary'] / 2**20:.1f} MiB | {r['hbm'] / 1e9:.3f} GB | {text.collectives(r)} |"
        )
    return lines


def bare(rows: list[dict]) -> list[str]:
    lines = [
        "| model | topology | parameters | products | numbers a chip | compile s (CPU s) | memory "
        "| of it temporary | HBM bytes | collectives | largest; a layer, a table, MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        start = f"| {r['size']} | {topology(r)} | {r.get('parameters', 0):,} | {r['precision']} |"
        if "failed" in r:
            lines.append(f"{start} | | | | | {text.short(r['failed'])} | |")
            continue
        size = SIZES[r["size"]]
        largest = max(moved[2] for moved in r["collectives"].values())
        arrays = (largest, 48 * size.width**2, 4 * size.vocabulary * size.width)
        largest, *whole = (f"{count / 1e6:,.0f}" for count in arrays)
        lines.append(
            f"{start} {r['numbers_a_chip']:,} | {text.seconds(r)} | {text.memory(r, CHIPS)} "
            f"| {r['temporary'] / 2**30:.2f} GiB | {r['hbm'] / 1e9:,.0f} GB | {text.collectives(r)} "
            f"| {largest}; {', '.join(whole)} |"
        )
    return lines


def extrapolated(known: dict, chips: int = 256) -> list[str]:
    """A step on 16x16 from the one on 8x8, where the former was not compiled: vectors fall with the chips."""
    steps = [r for r in known.values() if r["program"] == "step" and r["size"] == "1e9" and "failed" not in r]
    if any(r["topology"] == "v5e:16x16" for r in steps):
        return []
    lines = []
    for r in (r for r in steps if r["topology"] == "v5e:8x8"):
        share = r["chips"] / chips
        memory = r["temporary"] + (r["memory"] - r["temporary"]) * share
        passes = text.floor(r)
        moved = r["hbm"] - (1 - share) * passes
        lines.append(
            f"| v5e:16x16, extrapolated from 8x8 | step | {r['form']} | | {memory / 2**30:.2f} of 16 GiB "
            f"| {moved / 1e9:.2f} GB | {text.collectives(r)} | |"
        )
    return lines


def checks(known: dict) -> list[str]:
    """What a step adds to its product, and how it compares with the gradient, where all were compiled."""
    lines = []
    for step in known.values():
        if step["program"] != "step" or "failed" in step:
            continue
        name = f"{step['topology']}, {step['size']}"
        product, gradient = (text.partner(known, step, program) for program in ("product", "gradient"))
        if product:
            floor = text.floor(step)
            recurrence = step["hbm_recurrence"]
            grown = (step["hbm"] - recurrence) / product["hbm"]
            rest = (step["hbm"] - product["hbm"]) / floor
            added = {k: v[0] - product["collectives"].get(k, [0])[0] for k, v in step["collectives"].items()}
            kinds = ", ".join(f"{count:.0f} {kind}" for kind, count in added.items() if count) or "none"
            lines.append(
                f"* {name}: the recurrence moves {recurrence / floor:.2f} times the floor of two "
                f"Gram-Schmidt passes, the product {grown:.2f} times what it moves alone; the step less the "
                f"product alone is {rest:.2f} times the floor. Collectives that the step adds: {kinds}."
            )
        if gradient:
            own, other = (r.get("libtpu", LIBTPU) for r in (step, gradient))
            by = "" if own == other else f" The step is by {own} here, the gradient by {other}."
            lines.append(f"* {name}: {text.gathers(step, gradient)}{by}")
    return lines
