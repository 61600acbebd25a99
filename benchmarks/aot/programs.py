"""The programs that are compiled: the package's own, on shapes placed over devices that need not exist."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import spectra
from benchmarks import problems
from benchmarks.aot import model
from benchmarks.aot.hlo import Program
from spectra.base import meshes
from spectra.base.programs import options
from spectra.estimators import blocks, entrywise, hutchinson, low_rank, sketches
from spectra.krylov import band, explored, linear_run, recurrence
from spectra.krylov import basis as _basis
from spectra.krylov.band_block import chain_block
from spectra.krylov.lanczos import Steps
from spectra.krylov.layout import Layout
from spectra.krylov.linear_block import begin_block
from spectra.krylov.linear_step import KEPT
from spectra.krylov.plan import SHARING
from spectra.krylov.step import orthogonalize
from spectra.operators import base, differentiate

REPEATS = 10
NETWORKS = {"mlp": problems.mlp, "transformer": problems.transformer}  # as they are, on one device
WIDTH, HEADS = 64, 4  # of attention alone
SIDES = 16  # right-hand sides, or vectors, of one block
PROBES = 8  # of a trace
GPU_BLOCKS = (1024, 1024)
"""What `spectra.attention` takes by itself on a card for so few heads; the compiler runs on a CPU."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation; `size` names a network, or a transformer of `model.SIZES`, or numbers a device for
    "spread", or the length of a sequence for attention."""

    program: str  # a name of PROGRAMS
    topology: str
    size: str
    layout: str = "fsdp"  # or "spread": replicated parameters, basis packed and split over the devices
    form: str = "shard_map"
    steps: int = 100
    precision: str = "float32"

    @property
    def name(self) -> str:
        return "/".join(str(value) for value in dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Setting:
    """A case on its mesh: shapes of one vector, and how they lie."""

    case: Case
    mesh: Mesh

    @property
    def like(self):
        """Shapes of a vector: of a network, or replicated parameters of so many numbers a device."""
        case = self.case
        if case.program == "attention":
            return self.whole([jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * 3)
        if case.size in NETWORKS:
            return self.whole(network(case.size)[1])
        if case.layout == "fsdp":
            return model.shape_structs(model.SIZES[case.size], self.mesh)
        return self.whole(jax.ShapeDtypeStruct((int(float(case.size)) * self.mesh.size,), jnp.float32))

    @property
    def layout(self) -> Layout:
        return Layout.of(self.like, spread=self.case.layout == "spread" and self.mesh.size > 1)

    def whole(self, tree):
        """Shapes on every device."""
        sharding = NamedSharding(self.mesh, P())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    def placed(self, panels):
        """Shapes of panels, or of segments of them, where the layout has them."""
        pairs = zip(panels, self.layout.panels, strict=True)
        return [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, p.spec))
            for x, p in pairs
        ]

    @property
    def basis(self):
        shapes = jax.eval_shape(partial(_basis.zeros, self.layout, self.case.steps))
        return tuple(map(self.placed, shapes))

    @property
    def counter(self):
        return self.whole(jax.ShapeDtypeStruct((), jnp.int32))

    def stack(self, count: int):
        """Shapes of several vectors."""

        def one(x):
            sharding = NamedSharding(self.mesh, P(None, *x.sharding.spec))
            return jax.ShapeDtypeStruct((count, *x.shape), x.dtype, sharding=sharding)

        return jax.tree.map(one, self.like)

    @property
    def key(self):
        return self.whole(jax.eval_shape(jax.random.key, 0))

    def numbers(self, count: int):
        """Of probes."""
        return self.whole(jax.ShapeDtypeStruct((count,), jnp.int32))

    @property
    def op(self) -> spectra.HessianOperator:
        case = self.case
        if case.program == "attention":
            loss, data = attention_loss, jax.ShapeDtypeStruct((1, int(case.size), WIDTH), jnp.float32)
            data = self.whole(data)
        elif case.size in NETWORKS:
            loss, _, data = network(case.size)
            data = self.whole(data)
        else:
            size = model.SIZES[case.size]
            loss = model.make_loss(size, case.form, self.mesh)
            data = model.batch_struct(size, self.mesh)
        return spectra.HessianOperator(
            loss,
            self.like,
            data,
            mode="forward-over-reverse",
            linearize=case.program == "linearized",
            matmul_precision=case.precision,
        )


def network(name: str):
    """Loss, shapes of the parameters and of the batch; nothing is trained or allocated."""
    found = {}

    def shapes():
        found["loss"], *arrays = NETWORKS[name]()
        return arrays

    params, batch = jax.eval_shape(shapes)
    return found["loss"], params, batch


def attention_loss(params, x):
    query, key, value = ((x @ w).reshape(1, -1, HEADS, WIDTH // HEADS) for w in params)
    return jnp.mean(spectra.attention(query, key, value, is_causal=True, block_sizes=GPU_BLOCKS) ** 2)


@jax.jit
def repeated(op, v):
    """`REPEATS` products in a loop, after what they share where the operator linearises."""
    prepared = op.prepare()
    return lax.fori_loop(0, REPEATS, lambda _, v: prepared.mv(v), v)


def _orthogonalize(s: Setting):
    layout = s.layout

    @jax.jit
    def placed(basis, vector, filled):  # as in a step: where the result lies is not the partitioner's choice
        vector, *rest = orthogonalize(basis, vector, filled, layout)
        return layout.place(vector), rest

    return placed.lower(s.basis, s.placed(layout.panels), s.counter)


def _state(s: Setting) -> recurrence.LanczosState:
    shapes = jax.eval_shape(partial(recurrence.init, s.layout, num_steps=s.case.steps), s.like)
    return dataclasses.replace(
        s.whole(shapes), basis=s.basis, current=s.placed(shapes.current), previous=s.placed(shapes.previous)
    )


def _step(s: Setting):
    return recurrence._run_chunk.lower(s.op, s.layout, _state(s), s.counter, s.counter)


def _bare(s: Setting):
    """A step with `basis="none"`."""
    start = partial(recurrence.init, s.layout, num_steps=s.case.steps, keep_basis=False)
    shapes = jax.eval_shape(start, s.like)
    state = dataclasses.replace(
        s.whole(shapes), current=s.placed(shapes.current), previous=s.placed(shapes.previous)
    )
    return recurrence._run_chunk.lower(s.op, s.layout, state, s.counter, s.counter)


def _band(s: Setting) -> band.BandState:
    shapes = jax.eval_shape(partial(band.empty, s.layout, s.case.steps))
    return dataclasses.replace(s.whole(shapes), basis=s.basis)


def _chain(s: Setting):
    size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(s.like))
    args = (s.layout, size, _band(s), s.counter, s.counter, s.counter)
    return band.chain.lower(s.op, *args)


def _restart(s: Setting):
    state = _band(s)
    return band.replace.lower(s.layout, state, state.coefficients, state.coefficients, s.counter)


def _sides(s: Setting, count: int):
    """Right-hand sides, and shapes of the problem and the state that belong to them."""
    b = s.stack(count)
    return b, *jax.eval_shape(lambda b: linear_run.prepared(s.op, b, None, "auto", 1e-5, 100, b), b)


def _beside(s: Setting, b, tree):
    """Shapes of stacks of vectors that lie as the right-hand sides do, and of numbers on every device."""
    structure = jax.tree.structure(b)

    def is_vector(x) -> bool:
        return jax.tree.structure(x) == structure

    def beside(x):
        return s.stack(len(jax.tree.leaves(x)[0])) if is_vector(x) else s.whole(x)

    return jax.tree.map(beside, tree, is_leaf=is_vector)


def _solve(s: Setting):
    b, *state = _sides(s, 1)
    return linear_run._chunk.lower(s.op, *_beside(s, b, state), s.counter)


def _block(s: Setting):
    """A step of `solve` with several right-hand sides in one Krylov space."""
    b, problem, _ = _sides(s, SIDES)
    state = problem, jax.eval_shape(partial(begin_block, kept=KEPT // SIDES), problem)
    return linear_run._block_chunk.lower(
        s.op, *_beside(s, b, state), s.counter, SHARING, s.layout.anonymous()
    )


def _forms(s: Setting):
    """Quadratic forms of Hutchinson's trace."""
    unit = jax.ShapeDtypeStruct((), jnp.float32)
    pairs = blocks.Pairs(s.like, s.like, unit, unit)
    sums = jax.ShapeDtypeStruct((len(jax.tree.leaves(s.like)),), jnp.float32)
    carried = hutchinson.Carried(unit, pairs, hutchinson.Spread(s.like, s.like, sums))
    return hutchinson._forms.lower(s.op, s.key, s.numbers(PROBES), carried, "rademacher", SHARING)


def _sketch(s: Setting):
    """Probes of XTrace, their images, an orthonormal basis of these and its images."""
    unit = jax.ShapeDtypeStruct((), jnp.float32)
    options = {"start": 0, "stop": PROBES, "kind": "normal", "project": True, "grouped": False}
    options |= {"where": meshes.places(s.like)}
    return sketches._grow_compiled.lower(s.op, s.key, None, unit, batch=SHARING, **options)


def _entries(s: Setting):
    """A batch of signs of Hutchinson's diagonal, behind others."""
    unit = jax.ShapeDtypeStruct((), jnp.float32)
    pairs = blocks.Pairs(s.like, s.like, unit, unit)
    state = (s.like,) * 3
    return entrywise._step.lower(s.op, s.key, s.numbers(SHARING), state, unit, pairs, "rademacher")


def _explored(s: Setting) -> explored.Explored:
    """The Krylov space of the default trace."""
    shapes = jax.eval_shape(partial(explored.empty, s.layout, s.case.steps))
    waiting = tuple(map(s.placed, shapes.waiting))
    return dataclasses.replace(s.whole(shapes), basis=s.basis, waiting=waiting)


def _sweep(s: Setting):
    """Its direction, or product, made orthogonal to the rows."""
    return explored._orthogonal.lower(s.layout, s.basis, s.placed(s.layout.panels), s.counter)


def _row(s: Setting):
    """Its direction as a row, and the product of it as a vector."""
    return explored._take_in.lower(s.layout, _explored(s), s.placed(s.layout.panels), s.like)


def _direction(s: Setting):
    """What its product opens, among the directions that wait."""
    vector, state = s.placed(s.layout.panels), _explored(s)
    rest = explored._Rest(vector, state.unit, s.whole(jax.ShapeDtypeStruct(state.dropped.shape, jnp.float32)))
    numbers = s.counter, vector, rest, state.unit, s.whole(jax.ShapeDtypeStruct((), bool))
    return explored._open.lower(s.layout, state, *numbers)


def _outside(s: Setting):
    """Samples of what is outside of it."""
    basis, samples = s.stack(s.case.steps), s.stack(PROBES)
    return low_rank.complement_forms.lower(basis, samples, samples)


def _iteration(s: Setting):
    """A loop of one's own around `LanczosIteration`."""
    iteration = spectra.LanczosIteration(s.op, s.case.steps)
    state = Steps(_state(s), s.counter)

    @partial(jax.jit, donate_argnames="state")
    def steps(op, state, count):
        return lax.fori_loop(0, count, lambda _, state: iteration.step(op, state), state)

    return steps.lower(s.op, state, s.counter)


def _chain_block(s: Setting):
    """A step of `funm` with several vectors that share a Krylov space."""
    size = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(s.like))
    return chain_block.lower(s.op, s.layout, size, _band(s), s.counter, s.counter, SIDES, SHARING)


PROGRAMS: dict[str, Callable[[Setting], jax.stages.Lowered]] = {
    "orthogonalize": _orthogonalize,
    "gradient": lambda s: differentiate.gradient.lower(s.op),
    "product": lambda s: base.product.lower(s.op, s.like),
    "attention": lambda s: base.product.lower(s.op, s.like),
    "products": lambda s: repeated.lower(s.op, s.like),
    "linearized": lambda s: repeated.lower(s.op, s.like),
    "step": _step,
    "bare step": _bare,
    "chain": _chain,
    "restart": _restart,
    "solve": _solve,
    "solve, sides": _block,
    "funm, vectors": _chain_block,
    "trace, signs": _forms,
    "trace, sketch": _sketch,
    "diagonal, signs": _entries,
    "trace, sweep": _sweep,
    "trace, row": _row,
    "trace, direction": _direction,
    "trace, samples": _outside,
    "iteration": _iteration,
}
STEPWISE = ("step", "bare step", "chain", "solve", "solve, sides", "funm, vectors", "iteration")
"""Those of which one trip of their loop counts."""
PRODUCTS = {
    "trace, signs": PROBES,
    "trace, sketch": 2 * PROBES,
    "diagonal, signs": SHARING,
    "funm, vectors": SIDES,
    "solve, sides": SIDES,
}
"""Products of what takes several."""


def figures(
    case: Case, mesh: Mesh, keep: str | None = None, more: Callable[[Path, Program], dict] | None = None
) -> dict:
    """Compile a case; its figures for one device, and what `more` reads from the folder of the compiler's."""
    if mesh.size > 1:  # where there are several devices, random vectors are drawn as they will be split
        jax.config.update("jax_num_cpu_devices", 2)
    setting = Setting(case, mesh)
    clock, cpu = time.perf_counter(), time.process_time()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # `explicit_axes` looks for it
        lowered = PROGRAMS[case.program](setting)
    traced = time.perf_counter() - clock
    with tempfile.TemporaryDirectory() as folder:
        # As the compiler writes it: jaxlib cannot read all instructions of a TPU back from the executable.
        written = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=written | options(platform(case)))
        seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
        text = next(Path(folder).glob("*jit_*after_optimizations.txt")).read_text()
        program = Program(text)
        found = more(Path(folder), program) if more else {}
    if keep:
        Path(keep).write_text(text)
    traffic = program.step() if case.program in STEPWISE else program.traffic()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}  # none of a GPU
    layout = setting.layout
    count, rows = _basis.segments(case.steps)
    return (
        dataclasses.asdict(case)
        | {
            "chips": mesh.size,
            "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(setting.like)),
            "numbers_a_chip": layout.device_bytes() // 4,
            "rows": 0 if case.program == "bare step" else count * rows,
            "trace_s": round(traced, 1),
            "compile_s": round(seconds, 1),
            "compile_cpu_s": round(cpu, 1),
            "memory": memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes,
            "temporary": memory.temp_size_in_bytes,
            "hbm": traffic.hbm,
            "hbm_recurrence": program.recurrence() if case.program == "step" else None,
            "bytes_accessed": cost.get("bytes accessed"),
            "flops": cost.get("flops"),
            "copies": program.copies(segment_shapes(setting)),
            "collectives": {
                k: [traffic.count[k], traffic.bytes[k], traffic.largest[k]] for k in traffic.count
            },
            "precisions": dict(program.precisions()),
        }
        | found
    )


def platform(case: Case) -> str:
    """As the package names it, "gpu" or "tpu"."""
    return "tpu" if case.topology.startswith("v") else "gpu"


def segment_shapes(setting: Setting) -> set[tuple[int, ...]]:
    """What one device holds of a segment of the basis."""
    return {x.sharding.shard_shape(x.shape) for segment in setting.basis for x in segment}
