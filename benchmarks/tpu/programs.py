"""The programs that are compiled: the package's own, on shapes placed over a topology's devices."""

import dataclasses
import os
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import spectra
from benchmarks.tpu import model
from benchmarks.tpu.hlo import Program
from spectra.krylov import basis as _basis
from spectra.krylov import recurrence
from spectra.krylov.layout import Layout
from spectra.krylov.orthogonalize import orthogonalize
from spectra.operators import base, compiled

REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation; `size` names a transformer of `model.SIZES`, or numbers a chip for "spread"."""

    program: str  # orthogonalize, gradient, product, products, linearized, step
    topology: str
    size: str
    layout: str = "fsdp"  # or "spread": replicated parameters, basis packed and split over the chips
    form: str = "shard_map"
    steps: int = 100
    precision: str = "float32"

    @property
    def name(self) -> str:
        return "/".join(str(value) for value in dataclasses.astuple(self))


def pod(topology: str) -> Mesh:
    """A mesh of one axis over all chips of a topology that exists in the compiler only."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    return Mesh(np.array(devices), (model.AXIS,), axis_types=(AxisType.Auto,))


def vectors(case: Case, mesh: Mesh):
    """Shapes of one vector: of a transformer, or of replicated parameters of so many numbers a chip."""
    if case.layout == "fsdp":
        return model.shape_structs(model.SIZES[case.size], mesh)
    size = int(float(case.size)) * mesh.size
    return jax.ShapeDtypeStruct((size,), jnp.float32, sharding=NamedSharding(mesh, P()))


def placed(layout: Layout, basis_or_vector):
    """Shapes of panels, or of segments of them, where the layout has them."""
    pairs = zip(basis_or_vector, layout.panel_specs, strict=True)
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(layout.mesh, s)) for x, s in pairs]


def lower(case: Case, mesh: Mesh):
    """The lowered program of a case."""
    like = vectors(case, mesh)
    layout = Layout.of(like, spread=case.layout == "spread")

    def whole(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))

    counter = whole(jax.ShapeDtypeStruct((), jnp.int32))
    if case.program == "orthogonalize":
        basis = jax.eval_shape(partial(_basis.zeros, layout, case.steps))
        basis = tuple(placed(layout, segment) for segment in basis)
        return jax.jit(orthogonalize).lower(basis, placed(layout, layout.panels), counter)
    size = model.SIZES[case.size]
    op = spectra.HessianOperator(
        model.make_loss(size, case.form, mesh),
        like,
        model.batch_struct(size, mesh),
        mode="forward-over-reverse",
        linearize=case.program == "linearized",
        matmul_precision=case.precision,
    )
    if case.program == "gradient":
        return compiled.gradient.lower(op)
    if case.program == "product":
        return base.product.lower(op, like)
    if case.program in ("products", "linearized"):
        return repeated.lower(op, like)
    shapes = jax.eval_shape(partial(recurrence.init, layout, num_steps=case.steps), like)
    state = dataclasses.replace(
        jax.tree.map(whole, shapes),
        basis=tuple(placed(layout, segment) for segment in shapes.basis),
        current=placed(layout, shapes.current),
        previous=placed(layout, shapes.previous),
    )
    return recurrence._run_chunk.lower(op, layout, state, counter, counter)


@jax.jit
def repeated(op, v):
    """`REPEATS` products in a loop, after what they share where the operator linearises."""
    prepared = op.prepare()
    return lax.fori_loop(0, REPEATS, lambda _, v: prepared.mv(v), v)


def figures(case: Case, keep: str | None = None) -> dict:
    """Compile a case; its figures for one chip."""
    mesh = pod(case.topology)
    like = vectors(case, mesh)
    clock, cpu = time.perf_counter(), time.process_time()
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # `explicit_axes` looks for it
        lowered = lower(case, mesh)
    traced = time.perf_counter() - clock
    with tempfile.TemporaryDirectory() as folder:
        # As libtpu writes it: jaxlib cannot read all of its instructions back from the executable.
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        seconds, cpu = time.perf_counter() - clock, time.process_time() - cpu
        text = next(Path(folder).glob("*jit_*.after_optimizations.txt")).read_text()
    if keep:
        with open(keep, "w") as file:
            file.write(text)
    program = Program(text)
    traffic, memory, cost = program.traffic(), compiled.memory_analysis(), compiled.cost_analysis()
    layout = Layout.of(like, spread=case.layout == "spread")
    count, rows = _basis.segments(case.steps)
    return dataclasses.asdict(case) | {
        "chips": mesh.size,
        "parameters": sum(int(np.prod(x.shape)) for x in jax.tree.leaves(like)),
        "numbers_a_chip": layout.device_bytes() // 4,
        "rows": count * rows,
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
        "bytes_accessed": cost["bytes accessed"],
        "flops": cost["flops"],
        "collectives": {k: [traffic.count[k], traffic.bytes[k], traffic.largest[k]] for k in traffic.count},
        "precisions": dict(program.precisions()),
        "basis_products": basis_products(program, rows),
    }


def basis_products(program: Program, rows: int) -> dict[str, int]:
    """Matrix products in the Gram-Schmidt passes by precision; the vector unit needs none."""
    found: dict[str, int] = {}
    for instruction in program.instructions():
        source = instruction.op in ("dot", "convolution") and "shard_map/cond" in instruction.rest
        if source:
            key = "highest" if "operand_precision={highest,highest}" in instruction.rest else "lower"
            found[key] = found.get(key, 0) + 1
    return found
