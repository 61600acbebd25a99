"""Memory, products and time of a run, known before anything is allocated."""

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from spectra.base import PLACES, host, programs
from spectra.base.calls import automatic
from spectra.base.errors import MemoryLimitError, SpectraError
from spectra.base.trees import PyTree
from spectra.krylov import basis as _basis
from spectra.krylov.layout import BasisPlace, Layout, Panels
from spectra.krylov.recurrence import check_steps
from spectra.operators.base import LinearOperator, product, require_operator
from spectra.operators.data import DataOperator
from spectra.operators.jaxprs import slow_in_loops
from spectra.results import Plan, format_bytes

VECTORS = 6
"""Working vectors beside the basis: q_i, q_{i-1}, the product as a pytree and packed, w before and after
a Gram-Schmidt pass."""
STREAMED = 5
"""Vectors of a product over a stream: q_i as a pytree, the sum over its batches and what rounding has taken
from it, and the parts of two batches."""
SHARING = 4
"""Probes that share an evaluation: twice as many save another 5 % and hold twice the memory."""
COMPILING = 6 * 2**20
"""Bytes that compiling a run takes for each array of the parameters, without the product of `plan`."""
_BATCH_NUMBERS, _CPU_BATCH_NUMBERS = 2**22, 2**14
"""Vectors side by side hold up to this many numbers: enough to fill an accelerator, or the cores of a CPU."""


@automatic
def plan(
    op: LinearOperator,
    *,
    num_steps: int,
    num_probes: int,
    basis: str = "inherit",
    basis_dtype: Any = None,
    measure: bool = False,
) -> Plan:
    """State the bytes and products that `slq` would need, without running or allocating anything.

    The peak is linearization + probe_batch * (basis + 6 vectors + workspace), on top of parameters and
    data, with 7 vectors for streamed data; on a mesh, all figures are per device. The workspace of a
    product, of a stream with its first batch, is found by compiling it for the device, which takes as long as
    the first product of a run.

    On a CPU the process also holds Python, JAX, parameters, data and compiled programs; `process` is what it
    holds now. Compiling the rest of the run, mostly the drawing of a probe, takes about 6 MiB per array of
    the parameters; `compiling` is an allowance for that. `process_peak` is the sum of the run, `process` and
    `compiling`, and `fits` includes the allowance. A checkpoint needs additional memory for Orbax and what it
    writes, which is not counted. `available` respects the limits of a container and of a job of Slurm
    (control groups of Linux), where memory that caches files counts as free.

    Args:
        op: the operator.
        num_steps: Lanczos steps per probe, m.
        num_probes: number of probes, k.
        basis: see `slq`.
        basis_dtype: see `slq`.
        measure: time a product and a pass over a vector, and state the `seconds` of the run. For a basis on
            the host, this is a lower bound: it assumes the device's speed and no transfers.

    Returns:
        `Plan` with sizes in bytes, `total`, `available`, `fits`, and `seconds`.

    Raises:
        SpectraError: num_steps or num_probes out of range, or an unknown place for the basis.

    Cost: one compilation; no product unless `measure`.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.eye(1000))
        >>> spectra.plan(op, num_steps=80, num_probes=8).num_matvecs
        640
    """
    place = place_basis(op, basis, basis_dtype)
    keep = basis != "none"
    on_cpu = op.device.platform == "cpu"  # there vectors and the compiler share the process
    result = dataclasses.replace(
        estimate(op, place, num_steps=num_steps, num_probes=num_probes, keep_basis=keep),
        workspace=_workspace(op),
        compiling=COMPILING * len(jax.tree.leaves(op.like)),
        process=host.resident_bytes() if on_cpu else None,
    )
    if not measure:
        return result
    return dataclasses.replace(result, seconds=_seconds(op, Layout.of(op.like), result))


def estimate(
    op: LinearOperator,
    place: BasisPlace,
    *,
    num_steps: int,
    num_probes: int,
    probe_batch: int | None = None,
    keep_basis: bool = True,
) -> Plan:
    """`plan` without compiling: all but the workspace of a product."""
    check_steps(num_steps, op.size)
    if num_probes < 1:
        raise SpectraError(f"num_probes={num_probes}: at least one probe is needed.")
    check_probe_batch(probe_batch, num_probes)
    layout = place.layout
    vector = layout.device_bytes()
    count, rows = _basis.segments(num_steps)
    stored = count * rows * layout.device_bytes(layout.row_dtype) if keep_basis else 0
    num_devices = 1 if layout.mesh is None else layout.mesh.size
    linearization = op.prepared_bytes() // _num_pieces(op)
    available = host.available_bytes(op.device)
    kept, vectors, packed = (stored, VECTORS, 2) if place.device is None else (0, 3, 0)
    if op.on_host:
        vectors = max(vectors, packed + STREAMED)
    if probe_batch is None:
        one = kept + vectors * vector
        probe_batch = choose_batch(op, one, linearization, available, num_probes)
    return Plan(
        size=op.size,
        num_steps=num_steps,
        num_probes=num_probes,
        probe_batch=probe_batch,
        vector=vector,
        basis=kept,
        vectors=vectors * vector,
        linearization=linearization,
        workspace=0,
        available=available,
        num_matvecs=num_steps * num_probes,
        num_devices=num_devices,
        host=stored - kept,
    )


def place_basis(op: LinearOperator, basis: str = "inherit", dtype: Any = None) -> BasisPlace:
    """Where basis vectors lie, by the arguments of a user."""
    require_operator(op)
    if basis not in PLACES:
        raise SpectraError(f"basis={basis!r}: use one of {PLACES}.")
    if dtype is not None:
        try:
            dtype = jnp.dtype(dtype)
        except (TypeError, ValueError) as error:
            raise SpectraError(
                f'basis_dtype={dtype!r} is not a dtype: use one such as "bfloat16" or "float32".'
            ) from error
        if not jnp.issubdtype(dtype, jnp.floating):
            raise SpectraError(f"basis_dtype={dtype}: basis vectors need a floating dtype.")
        if basis == "none":
            raise SpectraError(
                f'basis_dtype={dtype} is that of stored vectors, and basis="none" stores none.'
            )
    layout = Layout.of(op.like, spread=basis == "sharded", row_dtype=dtype)
    if basis != "host":
        return BasisPlace(layout)
    if layout.mesh is not None:
        raise SpectraError(
            'basis="host" is for one device. On a mesh basis="sharded" divides the basis of replicated '
            'parameters by the number of devices, and basis_dtype="bfloat16" halves it.'
        )
    cpu = jax.local_devices(backend="cpu")[0]
    return BasisPlace(dataclasses.replace(layout, platform=cpu.platform), cpu)


def require_fit(plan: Plan) -> None:
    """Raise where a run cannot fit, naming the arguments that would make it fit."""
    if plan.fits:
        return
    assert plan.available is not None
    fixed = plan.linearization + plan.vectors + plan.workspace
    steps = max(0, (plan.available - fixed) * plan.num_steps // max(plan.basis, 1))
    advice: list[str] = []
    if plan.basis:
        small = format_bytes(plan.without_basis)
        advice.append(f'basis="none", which needs {small} (with deflate= for outliers)')
    if plan.probe_batch > 1:
        advice.append("probe_batch=1")
    if plan.linearization:
        advice.append("linearize=False in the operator")
    if plan.num_devices > 1:
        advice.append('basis="sharded" if parameters are replicated')
    if plan.basis:
        advice.append('basis_dtype="bfloat16"')
    if plan.basis and plan.num_devices == 1 and jax.default_backend() != "cpu":
        advice.append('basis="host"')
    if plan.basis and steps >= 2:
        advice.append(f"num_steps={steps}")
    advice.append("kpm, which keeps no basis")
    advice.append("float32 instead of float64 parameters")
    raise MemoryLimitError(
        f"the run needs {format_bytes(plan.total)} ({plan.probe_batch} x "
        f"{format_bytes(plan.basis)} of basis, {format_bytes(plan.linearization)} of saved "
        f"linearisation) and {format_bytes(plan.available)} are free. Try " + ", or ".join(advice) + "."
    )


def choose_batch(
    op: LinearOperator, one: int, shared: int, available: int | None, num_probes: int, *, bare: bool = False
) -> int:
    """Probes in flight. Streams share each pass over the data between as many probes as fit.

    Where products evaluate the loss again, under `jax.checkpoint`, in microbatches or because nothing is
    saved, four share one evaluation: 2.1 gradients per product in place of 2.6, as XLA counts.

    An accelerator needs wide operations to be busy. On a CPU one probe at a time is fastest: the
    reorthogonalisation is bound by memory bandwidth and batched products gain nothing, but for `bare`
    products of some thousand parameters, too small to fill the cores.
    """
    if op.on_host:
        wanted = num_probes
    elif jax.default_backend() == "cpu":
        fits = _CPU_BATCH_NUMBERS // op.size if bare else 1
        wanted = 2 ** max(0, fits.bit_length() - 1)  # divides the usual numbers: no second, smaller program
    else:
        wanted = max(1, _BATCH_NUMBERS // op.size)
    recomputed = None if op.on_host or slow_in_loops(op) else op.recomputed_bytes()
    if recomputed is not None:
        wanted, one = max(wanted, SHARING), one + recomputed
    if available is not None:
        wanted = min(wanted, max(1, (available // 2 - shared) // max(one, 1)))
    return min(wanted, num_probes)


def check_probe_batch(probe_batch: int | None, num_probes: int) -> None:
    """Raise unless so many of the probes can run side by side."""
    if probe_batch is not None and not 1 <= probe_batch <= num_probes:
        raise SpectraError(f"probe_batch={probe_batch} is not between 1 and num_probes={num_probes}.")


def choose_together(op: LinearOperator, count: int) -> int:
    """Products of a block of vectors that are taken side by side: in equal parts; on a CPU all.

    What a product gathers of a split vector, and holds of activations, it has for each of these. Free memory
    has no say, so that a run which is resumed has the same program.
    """
    if op.on_host or jax.default_backend() == "cpu":
        return count
    parts = -(-count // choose_batch(op, 0, 0, None, count))
    return -(-count // parts)


def _num_pieces(op: LinearOperator) -> int:
    """Into how many pieces the operator's most divided array is split: so are the values it saves."""
    leaves = (x for x in jax.tree.leaves(op) if isinstance(x, jax.Array) and not isinstance(x, Tracer))
    return max((x.size // math.prod(x.sharding.shard_shape(x.shape)) for x in leaves if x.size), default=1)


def _workspace(op: LinearOperator) -> int:
    """Temporaries of one compiled product, on one device, as the compiler states them; of a stream those of
    the product with its first batch."""
    if op.on_host:
        if not isinstance(op, DataOperator):
            return 0  # arithmetic: each part has programs of its own
        prepared = op.first_piece()  # nothing is saved between products
    else:
        prepared = jax.eval_shape(type(op).prepare, op) if op.prepared_bytes() else op
    analysis = programs.jit(_mv).compiled(prepared, _shapes(op)).memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else 0


def _mv(op: LinearOperator, v: PyTree) -> PyTree:
    return op.mv(v)


def _doubled(panels: Panels) -> Panels:
    return [2 * x for x in panels]


def _shapes(op: LinearOperator) -> Any:
    """Shapes of a vector, placed as the operator's own arrays are."""
    return jax.tree.map(
        lambda x, like: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(like, "sharding", None)),
        op.structure,
        op.like,
    )


def _seconds(op: LinearOperator, layout: Layout, plan: Plan) -> float:
    """Products at the speed of the second one; the basis at the speed of doubling a vector, two passes.

    Step i reads i + 1 rows twice, m² rows in all.
    """
    op, v = op.prepare(), jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), op.structure)
    one = _mv if op.on_host else product
    panels = programs.jit(layout.pack)(v)
    double = programs.jit(_doubled)
    times: list[float] = []
    for run in (lambda: one(op, v), lambda: double(panels)):
        jax.block_until_ready(run())
        started = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - started)
    per_row = times[1] / 2 * (plan.basis + plan.host) / max(1, plan.num_steps * plan.vector)
    return plan.num_probes * (plan.num_steps * times[0] + plan.num_steps**2 * per_row)
