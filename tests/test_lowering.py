"""What is compiled for a mesh: which collectives a Lanczos step has, and in what precision it multiplies.

The programs are lowered for 8 simulated devices and for CUDA; with libtpu they are compiled for a TPU
topology, with the packages of CUDA for GPUs. Nothing of them is run.
"""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from cases import slow_but
from children import answer, environment

from benchmarks.aot.programs import PRODUCTS
from spectra.krylov.linear_step import KEPT
from spectra.krylov.plan import SHARING

ROWS = 24  # of the basis for 20 steps, in segments of 8

PROGRAM = """
import dataclasses, json, re, sys
import jax, jax.numpy as jnp, spectra
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from spectra.krylov import linear_block, linear_run, recurrence
from spectra.krylov.layout import Layout
from spectra.operators import differentiate

mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
every = ("data", "model")

def loss_fn(p, batch):
    hidden = jnp.tanh(batch @ p["w"] + p["b"])
    return jnp.mean((hidden @ p["v"]) ** 2)

shapes = {"w": (64, 128), "b": (128,), "v": (128, 32)}
cases = {
    "replicated": ({k: P() for k in shapes}, every, False),
    "spread": ({k: P() for k in shapes}, every, True),
    "fsdp": ({"w": P(every, None), "b": P(every), "v": P(every, None)}, every, False),
    "tensor": ({"w": P(None, "model"), "b": P("model"), "v": P("model", None)}, "data", False),
    "mixed": ({"w": P("data", "model"), "b": P("model"), "v": P("model", "data")}, "data", False),
}

def struct(shape, spec):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

def collectives(text):
    pattern = r"= (\\([^=]*?\\)|\\S+) (all-[a-z-]+|reduce-scatter|collective-permute|ragged-[a-z-]+)\\("
    found = re.findall(pattern, text)
    arrays = [(kind, re.findall(r"\\w+\\[([\\d,]*)\\]", shape)) for shape, kind in found]
    return [(kind, [[int(d) for d in a.split(",") if d] for a in shapes]) for kind, shapes in arrays]

out = {}
for name in sys.argv[1:]:
    specs, batch, spread = cases[name]
    like = {k: struct(s, specs[k]) for k, s in shapes.items()}
    data = struct((64, 64), P(batch, None))
    op = spectra.HessianOperator(loss_fn, like, data, mode="forward-over-reverse", linearize=False)
    layout = Layout.of(op.like, spread=spread)
    init = lambda: recurrence.init(layout, jax.tree.map(lambda s: jnp.ones(s.shape), like), 20)
    places = jax.jit(init).lower().compile().output_shardings
    state = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), jax.eval_shape(init), places
    )
    args = (op, layout, state, 0, 1)
    out[name] = {
        "step": collectives(recurrence._run_chunk.lower(*args).compile().as_text()),
        "gradient": collectives(differentiate.gradient.lower(op).compile().as_text()),
        "split": [p.sharding.shard_shape(p.shape) for p in state.basis[0]],
        "whole": [p.shape for p in state.basis[0]],
    }
    on_gpus = (op, dataclasses.replace(layout, platform="gpu"), *args[2:])
    exported = jax.export.export(recurrence._run_chunk, platforms=["cuda"])(*on_gpus)
    module = exported.mlir_module()
    dots = [line for line in module.splitlines() if "stablehlo.dot_general" in line]
    out[name]["cuda"] = {
        "platforms": exported.platforms,
        "devices": exported.nr_devices,
        "dots": len(dots),
        "lower": [line for line in dots if "precision = [HIGHEST, HIGHEST]" not in line],
    }
b = {k: struct((1, *s), P(None, *cases["fsdp"][0][k])) for k, s in shapes.items()}
like = {k: struct(s, cases["fsdp"][0][k]) for k, s in shapes.items()}
op = spectra.HessianOperator(loss_fn, like, struct((64, 64), P(every, None)))
begun = linear_run.begin.lower(op, b, None, "auto", 1e-5, 100, b)
pairs = zip(*map(jax.tree.leaves, (begun.out_info, begun.compile().output_shardings)), strict=True)
out["solve"] = [(x.shape, place.shard_shape(x.shape)) for x, place in pairs]

b = {k: struct((3, *s), P(None, *cases["fsdp"][0][k])) for k, s in shapes.items()}
problem, _ = jax.eval_shape(lambda op, b: linear_run.prepared(op, b, None, "auto", 1e-5, 100, b), op, b)
block = jax.eval_shape(lambda p: linear_block.begin_block(p, 2), problem)
layout = dataclasses.replace(Layout.of(like).anonymous(), platform="gpu")
args = (op, problem, block, 1, 3, layout)
module = linear_run._block_chunk.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
out["block"] = re.findall(r"LayoutConstraint.*-> tensor<([x\\d]+)xf32>", module)
print(json.dumps(out))
"""
OFTEN, SELDOM = ("spread", "fsdp"), ("replicated", "tensor", "mixed")
CASES = slow_but(["replicated", "spread", "fsdp", "tensor", "mixed"], *OFTEN)


class Lowered(dict):
    """What the program says of the cases of every run, or of the others, when it is first asked."""

    def __missing__(self, name):
        # Collectives are there before XLA optimises for a processor.
        self.update(answer("-c", PROGRAM, *(SELDOM if name in SELDOM else OFTEN), devices=8))
        return self[name]


@pytest.fixture(scope="module")
def lowered():
    return Lowered()


def moved(collectives, *, reductions: bool):
    """Shapes of what is reduced, or of what is otherwise moved."""
    return [shape for kind, shapes in collectives for shape in shapes if (kind == "all-reduce") == reductions]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_gathers_nothing_that_the_gradient_does_not(lowered, case):
    step = moved(lowered[case]["step"], reductions=False)
    gradient = moved(lowered[case]["gradient"], reductions=False)
    if case == "spread":  # the current vector, once: in the place of the all-reduce's second half
        assert len(step) == 1
        assert 64 * 128 + 128 + 128 * 32 <= step[0][0] < 64 * 128 + 128 + 128 * 32 + 8
        return
    assert all(shape in gradient for shape in step)  # parameters, activations, and vectors like them
    assert len(step) <= 2 * len(gradient)  # the parameters, and the vector
    assert not any(ROWS in shape or 8 in shape[1:2] for shape in step)  # no row axis: never the basis


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_adds_two_reductions_and_two_for_a_second_pass(lowered, case):
    own = [s for s in moved(lowered[case]["step"], reductions=True) if s in ([], [ROWS + 1], [ROWS])]
    gradient = [s for s in moved(lowered[case]["gradient"], reductions=True) if len(s) == 0]
    # The largest entry, in the first step alone; alpha, and coefficients with the norm; in the second pass
    # coefficients, and the norm, of zeros where there is none. "mixed" has leaves over two sets of devices,
    # each with its own sums; what is replicated needs none.
    sets = {"replicated": 0, "mixed": 2}.get(case, 1)
    assert len(own) - len(gradient) <= 5 * sets
    assert [sum(s == [rows] for s in own) for rows in (ROWS + 1, ROWS)] == [sets, sets]


@pytest.mark.parametrize("case", CASES)
def test_the_basis_is_split_as_the_parameters_are(lowered, case):
    ratio = [w[0] // s[0] for w, s in zip(lowered[case]["whole"], lowered[case]["split"], strict=True)]
    assert sorted(ratio) == {"replicated": [1], "tensor": [2], "mixed": [2, 8]}.get(case, [8])


def test_vectors_of_a_linear_system_begin_split_as_the_parameters_are(lowered):
    """Eight vectors, zeros as well, and the right-hand side: no device holds one of them whole."""
    vectors = [(whole, own) for whole, own in lowered["solve"] if len(whole) > 1]
    assert len(vectors) == 9 * 3
    assert all(math.prod(whole) == 8 * math.prod(own) for whole, own in vectors)


def test_a_gpu_is_told_the_order_of_what_a_block_multiplies_and_of_its_products(lowered):
    """Of its own part of three vectors: else all that the block keeps is copied to the order of products."""
    parts = ["3x8x128", "3x16", "3x16x32"]
    assert sorted(lowered["block"]) == sorted(2 * parts)


@pytest.mark.parametrize("case", CASES)
def test_a_step_lowers_for_cuda_in_full_precision(lowered, case):
    cuda = lowered[case]["cuda"]
    assert cuda["platforms"] == ["cuda"]
    assert cuda["devices"] == 8
    assert cuda["dots"] > 3 * 3  # three segments, twice, and the model's own
    assert not cuda["lower"]


def compiled_for(hardware, **case):
    """The figures of a case of `benchmarks.tpu` or `benchmarks.gpu`, compiled in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{hardware}", "--one", json.dumps(case)],
        env=environment(optimised=True, cache=False) | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def has(package):
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent
        return False


needs_cuda = pytest.mark.skipif(
    not has("jax_plugins.xla_cuda13"), reason="needs the compiler of GPUs: pip install '.[gpu-aot]'"
)
needs_libtpu = pytest.mark.skipif(not has("libtpu"), reason="needs libtpu: pip install '.[tpu-aot]'")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp", "spread"])
@needs_libtpu
def test_the_tpu_compiler_keeps_to_the_floor_of_bytes(layout):
    size = "1e9" if layout == "fsdp" else "5e6"
    figures = compiled_for("tpu", program="orthogonalize", topology="v5e:8x8", layout=layout, size=size)
    assert figures["hbm"] <= 1.1 * floor(figures)
    assert figures["memory"] <= 16 * 2**30
    # Coefficients of two passes, the square of the first, and the last norm: 2 · 104 + 2 numbers.
    assert figures["collectives"] == {"all-reduce": [3, 4 * (2 * figures["rows"] + 2), 420]}
    assert set(figures["precisions"]) <= {"highest"}


@pytest.mark.slow
@needs_libtpu
def test_a_step_on_a_tpu_holds_the_basis_once():
    """Rows stay where they are: without being told their order, libtpu 0.0.42 holds the basis twice."""
    case = {"topology": "v5e:4x4", "size": "small", "precision": "default"}  # which compiles fastest
    figures = compiled_for("tpu", program="step", steps=20, **case)
    assert figures["temporary"] < figures["rows"] * figures["numbers_a_chip"]  # a quarter of the basis


@pytest.mark.slow
@needs_libtpu
def test_no_chip_gathers_the_basis():
    """64 chips: there libtpu 0.0.42 gathers what it is told the order of. Each is told of its own part."""
    case = {"topology": "v5p:4x4x4", "size": "3e5", "layout": "spread", "steps": 20}
    figures = compiled_for("tpu", program="orthogonalize", **case)
    assert figures["collectives"] == {"all-reduce": [3, 4 * (2 * figures["rows"] + 2), 100]}
    assert figures["temporary"] < figures["rows"] * figures["numbers_a_chip"]


@needs_cuda
def test_a_step_on_a_gpu_copies_no_basis_and_asks_no_host():
    """Three segments, whose conditionals all lie in a command buffer."""
    figures = compiled_for("gpu", program="step", topology="h100:1", size="mlp", steps=20)
    assert figures["copies"] == 0
    assert "kConditional" not in figures["on_host"]
    assert figures["on_host"]["kWhile"] == 1  # the loop over steps, of which the host knows no number
    # One sweep of `dots` and of `subtract`; each again in the second pass, within one of its own.
    # None is left for the norm and the unit.
    assert figures["conditionals"] == 6
    assert figures["precisions"].keys() == {"cuBLAS, highest"}  # XLA's own kernels are slow in float32
    assert figures["instructions"] == {}  # neither tensor cores, whose float32 is tf32, nor float64


@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize("topology", ["h100:8", "rtx4090:8"])
def test_orthogonalisation_on_gpus_keeps_to_the_floor_of_bytes(topology):
    figures = compiled_for("gpu", program="orthogonalize", topology=topology, layout="spread", size="5e6")
    assert figures["hbm"] <= 1.1 * floor(figures)
    assert figures["copies"] == 0
    assert "kConditional" not in figures["on_host"]
    assert figures["collectives"] == {"all-reduce": [3, 4 * (2 * figures["rows"] + 2), 420]}


@pytest.mark.slow
@needs_cuda
def test_a_step_on_eight_gpus_gathers_twice_what_the_gradient_does():
    case = {"topology": "h100:8", "size": "small"}
    step, gradient = (compiled_for("gpu", program=p, **case) for p in ("step", "gradient"))
    assert step["hbm_recurrence"] <= 1.1 * floor(step)
    assert step["copies"] == 0
    assert "kConditional" not in step["on_host"]  # none has a reduction between cards inside
    assert step["collectives"]["all-gather"][1] <= 2 * gradient["collectives"]["all-gather"][1]
    # One gather may be of a weight and of the vector's part.
    assert step["collectives"]["all-gather"][2] <= 2 * gradient["collectives"]["all-gather"][2]


@pytest.fixture(scope="module")
def gradient_on_eight():
    return compiled_for("gpu", program="gradient", topology="h100:8", size="small")["collectives"]


@pytest.mark.slow
@needs_cuda
@pytest.mark.parametrize("program", ["iteration", "diagonal, signs", "funm, vectors", "solve, sides"])
def test_programs_of_several_products_on_eight_gpus(program, gradient_on_eight):
    """A loop of one's own, a batch of probes, blocks of vectors: no copy, no gather of a whole vector."""
    figures = compiled_for("gpu", program=program, topology="h100:8", size="small", steps=20)
    assert figures["copies"] == 0
    assert "kConditional" not in figures["on_host"]
    _, moved, largest = figures["collectives"]["all-gather"]
    _, own, own_largest = gradient_on_eight["all-gather"]
    assert moved <= 2 * own * PRODUCTS.get(program, 1)
    # Four vectors at once gather their parts together, each no more than the gradient gathers of weights.
    assert largest <= (2 if program == "iteration" else SHARING) * own_largest
    if program == "solve, sides":  # less than the directions that are kept, of which there is no second copy
        assert figures["temporary"] < 2 * KEPT * 4 * figures["numbers_a_chip"]


@pytest.mark.slow
@needs_cuda
def test_a_linear_system_on_eight_gpus_asks_no_host():
    """Its modes, each with sums over the cards, are no conditionals there."""
    figures = compiled_for("gpu", program="solve", topology="rtx4090:8", size="small")
    assert figures["conditionals"] == 0
    assert "kConditional" not in figures["on_host"]
    # Eight sums of a step and its choices: with those of the model in one, few and small.
    number, size, _ = figures["collectives"]["all-reduce"]
    assert number <= 10
    assert size <= 1000


@needs_cuda
def test_what_is_asked_of_tensor_cores_is_seen():
    """The same reader finds the library's default, which is TF32, where JAX's own precision is asked for."""
    figures = compiled_for("gpu", program="product", topology="h100:1", size="mlp", precision="default")
    assert figures["precisions"].keys() == {"cuBLAS, default"}


def floor(figures):
    """Bytes of two passes: two reads each of all rows, 4 bytes a number."""
    return 2 * 2 * 4 * figures["rows"] * figures["numbers_a_chip"]
