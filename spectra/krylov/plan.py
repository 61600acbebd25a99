"""Memory and products of a run, known before anything is allocated."""

import jax

from spectra import _memory
from spectra._errors import MemoryLimitError, SpectraError
from spectra.krylov import basis as _basis
from spectra.krylov.lanczos import check_steps
from spectra.operators.base import LinearOperator, require_operator
from spectra.results import Plan, format_bytes

VECTORS = 6
"""Working vectors beside the basis: q_i, q_{i-1}, the product as a pytree and packed, w before and after
a Gram-Schmidt pass."""
_BATCH_NUMBERS = 2**22
"""On an accelerator probes run side by side until their vectors hold this many numbers: enough to fill it."""


def plan(op: LinearOperator, *, num_steps: int, num_probes: int) -> Plan:
    """State the bytes and products that `slq` would need, without running or allocating anything.

    The peak is linearization + probe_batch * (basis + 6 vectors + workspace), on top of parameters and
    data. The workspace of a product comes from compiling it for the device, which takes as long as the
    first product of a run.

    Args:
        op: the operator.
        num_steps: Lanczos steps a probe, m.
        num_probes: probes, k.

    Returns:
        `Plan` with sizes in bytes, `total`, `available` and `fits`.

    Raises:
        SpectraError: num_steps or num_probes out of range.

    Cost: one compilation; no product.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.eye(1000))
        >>> spectra.plan(op, num_steps=80, num_probes=8).num_matvecs
        640
    """
    batch = estimate(op, num_steps=num_steps, num_probes=num_probes).probe_batch
    workspace = 0 if op.on_host else _workspace(op)
    return estimate(op, num_steps=num_steps, num_probes=num_probes, probe_batch=batch, workspace=workspace)


def estimate(
    op: LinearOperator,
    *,
    num_steps: int,
    num_probes: int,
    probe_batch: int | None = None,
    workspace: int = 0,
) -> Plan:
    """`plan` without compiling: all but the workspace, which is taken as given."""
    require_operator(op)
    check_steps(num_steps, op.size)
    if num_probes < 1:
        raise SpectraError(f"num_probes={num_probes}: at least one probe is needed.")
    if probe_batch is not None and not 1 <= probe_batch <= num_probes:
        raise SpectraError(f"probe_batch={probe_batch} is not between 1 and num_probes={num_probes}.")
    layout = _basis.Layout.of(op.structure, packed=op.packable)
    vector = sum(p.size * p.dtype.itemsize for p in layout.panels)
    count, rows = _basis.segments(num_steps)
    basis = count * rows * vector
    linearization = op.prepared_bytes()
    available = _memory.available_bytes()
    one = basis + VECTORS * vector + workspace
    if probe_batch is None:
        probe_batch = choose_batch(op, one, linearization, available, num_probes)
    return Plan(
        size=op.size,
        num_steps=num_steps,
        num_probes=num_probes,
        probe_batch=probe_batch,
        vector=vector,
        basis=basis,
        vectors=VECTORS * vector,
        linearization=linearization,
        workspace=workspace,
        available=available,
        num_matvecs=num_steps * num_probes,
    )


def require_fit(plan: Plan) -> None:
    """Raise where a run cannot fit, naming the arguments that would make it fit."""
    if plan.fits:
        return
    assert plan.available is not None
    fixed = plan.linearization + plan.vectors + plan.workspace
    steps = max(0, (plan.available - fixed) * plan.num_steps // max(plan.basis, 1))
    advice = []
    if plan.probe_batch > 1:
        advice.append("probe_batch=1")
    if plan.linearization:
        advice.append("linearize=False in the operator")
    if steps >= 2:
        advice.append(f"num_steps={steps}")
    advice.append("float32 instead of float64 parameters")
    raise MemoryLimitError(
        f"the run needs {format_bytes(plan.total)} ({plan.probe_batch} x "
        f"{format_bytes(plan.basis)} of basis, {format_bytes(plan.linearization)} of saved "
        f"linearisation) and {format_bytes(plan.available)} are free. Try " + ", or ".join(advice) + "."
    )


def choose_batch(op, one: int, shared: int, available: int | None, num_probes: int) -> int:
    """Probes in flight. Streams share each pass over the data between as many probes as fit.

    On a CPU one probe at a time is fastest: the reorthogonalisation is bound by memory bandwidth and
    batched products gain nothing. An accelerator needs wide operations to be busy.
    """
    if op.on_host:
        wanted = num_probes
    elif jax.default_backend() == "cpu":
        wanted = 1
    else:
        wanted = max(1, _BATCH_NUMBERS // op.size)
    if available is not None:
        wanted = min(wanted, max(1, (available // 2 - shared) // max(one, 1)))
    return min(wanted, num_probes)


def _workspace(op: LinearOperator) -> int:
    """Temporaries of one compiled product, as the compiler states them."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), op.structure)
    prepared = jax.eval_shape(lambda op: op.prepare(), op) if op.prepared_bytes() else op
    compiled = jax.jit(lambda op, v: op.mv(v)).lower(prepared, shapes).compile()
    analysis = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else 0
