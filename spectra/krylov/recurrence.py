"""The Lanczos recurrence: one pure step, driven under `lax` control flow or in chunks from the host.

Step i, with q_i in row i of the basis:

    H q_i = β_{i-1} q_{i-1} + α_i q_i + β_i q_{i+1}

What a step computes is in `spectra.krylov.step`; here are the books of T, and the two drivers.
"""

import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays, programs, stacks, trees
from spectra.base.errors import NonFiniteError, NotSymmetricError, SpectraError
from spectra.base.trees import PyTree
from spectra.krylov import basis as _basis
from spectra.krylov import step
from spectra.krylov.basis import Basis
from spectra.krylov.cancelled import asymmetry_limit
from spectra.krylov.layout import BasisPlace, Layout, Panels
from spectra.operators.accumulate import Passes
from spectra.operators.base import LinearOperator
from spectra.operators.composed import along

CHUNK = 16
"""Steps in one compiled call: how often a run can report, stop, or notice a NaN."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all steps of a run have in common, and all of its probes."""

    op: LinearOperator
    place: BasisPlace
    deflated: PyTree = None  # orthonormal vectors that every q_i is kept orthogonal to
    norm: float = 0.0  # of the operator with their part, whose rounding is in what is left
    shared: bool = False  # whether the recurrence is a program of its own, for all operators of this size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LanczosState:
    """All that a run carries from step to step; a pytree of arrays."""

    basis: Basis  # segments; () without reorthogonalisation
    current: Panels  # q_i
    previous: Panels  # q_{i-1}
    alpha: jax.Array  # (m,)
    beta: jax.Array  # (m,), beta[i] = |r_i|
    scale: jax.Array  # (), largest row sum of |T| so far, an estimate of |H|
    asymmetry: jax.Array  # (), largest coefficient that symmetry makes zero, same unit as alpha
    length: jax.Array  # (), steps done before breakdown
    alive: jax.Array  # (), no breakdown yet
    second_passes: jax.Array  # ()


def init(layout: Layout, v0: PyTree, num_steps: int, *, keep_basis: bool = True) -> LanczosState:
    """The state before the first step, from any non-zero start vector."""
    start = layout.pack(v0)
    dtype = jnp.result_type(*start)
    size = step.norm(start)
    state = LanczosState(
        basis=_basis.zeros(layout, num_steps) if keep_basis else (),
        current=trees.scale(1 / size, start),
        previous=[jnp.zeros_like(x) for x in start],
        alpha=jnp.zeros(num_steps, dtype),
        beta=jnp.zeros(num_steps, dtype),
        scale=jnp.zeros((), dtype),
        asymmetry=jnp.zeros((), dtype),
        length=jnp.zeros((), jnp.int32),
        alive=jnp.ones((), bool),
        second_passes=jnp.zeros((), jnp.int32),
    )
    return placed(layout, state)


def placed(layout: Layout, state: LanczosState) -> LanczosState:
    """Vectors and rows where the layout has them, and numbers on every device."""
    if layout.mesh is None:
        return state
    numbers = {name: layout.replicate(x) for name, x in vars(state).items() if isinstance(x, jax.Array)}
    return dataclasses.replace(
        state,
        basis=tuple(map(layout.place, state.basis)),
        current=layout.place(state.current),
        previous=layout.place(state.previous),
        **numbers,
    )


def absorb(layout: Layout, i: int | jax.Array, w: Panels, state: LanczosState) -> LanczosState:
    """Step i of the recurrence, given the product w = H q_i.

    After a breakdown the current vector is zero, and so is all that follows from it: the remaining
    steps of a compiled loop leave T as it is.
    """
    q = state.current
    unit = step.unit_of_step(i == 0, w, state.scale)
    beta_previous = jnp.where(i > 0, state.beta[i - 1], 0) / unit
    rows = _basis.put(state.basis, i, q, layout) if state.basis else ()
    w, alpha = step.three_terms(w, q, state.previous, beta_previous, unit)
    asymmetry, second = state.asymmetry, state.second_passes
    if rows:
        w, beta, first, total, repeated = step.orthogonalize(rows, w, i + 1, layout)
        # Without the correction of the passes T would not be the projection Q H Qᵀ to rounding.
        alpha = alpha + total[i]
        # H q_i is orthogonal to all rows but i - 1, i, i + 1 if H is symmetric, and has the coefficient
        # β_{i-1} on row i - 1: what the first pass finds on rows before i is asymmetry or rounding.
        others = jnp.where(jnp.arange(len(first)) == i, 0, first)
        asymmetry = jnp.maximum(asymmetry, unit * jnp.max(jnp.abs(others)))
        second = second + repeated
    else:
        beta = arrays.root(step.vdot(w, w))
    scale = jnp.maximum(state.scale / unit, jnp.abs(alpha) + beta + beta_previous)
    if not rows:
        # The same of the one row at hand. q_i is orthogonal to it to |H| eps / β_{i-1}: as much is rounding.
        before = jnp.abs(step.vdot(state.previous, w)) * beta_previous
        asymmetry = jnp.maximum(asymmetry, unit * before / jnp.where(scale > 0, scale, 1))
    size = sum(x.size for x in w)
    current, alive = step.following(w, beta, scale, size, state.alive)
    after = LanczosState(
        basis=rows,
        current=current,
        previous=q,
        alpha=state.alpha.at[i].set(unit * alpha),
        beta=state.beta.at[i].set(jnp.where(alive | jnp.isnan(beta), unit * beta, 0)),
        scale=unit * scale,
        asymmetry=asymmetry,
        length=state.length + state.alive,
        alive=alive,
        second_passes=second,
    )
    return placed(layout, after)


def run(
    op: LinearOperator,
    layout: Layout,
    state: LanczosState,
    start: int | jax.Array,
    stop: int | jax.Array,
    deflated: PyTree = None,
    *,
    batched: bool = False,
) -> LanczosState:
    """Steps start..stop-1 under `lax` control flow; `batched` states carry a leading probe axis.

    q_i is kept orthogonal to the `deflated` vectors.
    """

    def one(i: jax.Array, state: LanczosState) -> LanczosState:
        if deflated is not None:
            state = _cleared(i, state, *_clear(layout, deflated, state.current))
        return absorb(layout, i, layout.pack(op.mv(layout.unpack(state.current))), state)

    # The counter is not batched, so `lax.cond` on it stays a branch under vmap.
    body = jax.vmap(one, in_axes=(None, 0)) if batched else one
    return lax.fori_loop(start, stop, body, state)


_run_chunk = programs.jit(run, static_argnames=("layout", "batched"), donate_argnames=("state",))


def _clear(layout: Layout, deflated: PyTree, current: Panels) -> tuple[Panels, jax.Array]:
    """q_i without what rounding has left along deflated vectors, and whether the run has ended before it.

    Their eigenvalue is zero where they are deflated. The product does not see that part, but the three terms
    carry it on, and outside the rest of the spectrum it grows until zero is a Ritz value.

    Near the end of an invariant space that part is not small: q_i is a remainder of rounding size, at unit
    length. A share s of it makes q_i shorter by s²/2, which would look like an asymmetry of H: what is left
    gets unit length again. Where that is less than half, there was rounding alone.
    """
    vector = layout.unpack(current)
    found = along(deflated, vector)
    square = 1 - jnp.vdot(found, found, precision=lax.Precision.HIGHEST)
    ended = square < 0.25
    unit = jnp.where(ended, 0, lax.rsqrt(jnp.where(ended, 1, square)))
    # Scaled before the difference, which takes no vector more: the length is known beforehand.
    left = stacks.subtract(trees.scale(unit, vector), stacks.combine(unit * found, deflated))
    return layout.pack(left), ended


def _cleared(i: int | jax.Array, state: LanczosState, current: Panels, ended: jax.Array) -> LanczosState:
    """The state with what `_clear` found."""
    beta = jnp.where(ended, state.beta.at[jnp.maximum(i - 1, 0)].set(0), state.beta)
    return dataclasses.replace(state, current=current, beta=beta, alive=state.alive & ~ended)


@partial(programs.jit, static_argnames=("layout", "batched"))
def _clear_one(layout: Layout, deflated: PyTree, current: Panels, batched: bool) -> tuple[Panels, jax.Array]:
    one = partial(_clear, layout, deflated)
    return (jax.vmap(one) if batched else one)(current)


@partial(programs.jit, static_argnames="batched")
def _cleared_one(
    i: int | jax.Array, state: LanczosState, current: Panels, ended: jax.Array, batched: bool
) -> LanczosState:
    return (jax.vmap(_cleared, in_axes=(None, 0, 0, 0)) if batched else _cleared)(i, state, current, ended)


@partial(programs.jit, static_argnames=("layout", "batched"), donate_argnames=("state",))
def _absorb_one(
    layout: Layout, i: int | jax.Array, w: Panels, state: LanczosState, batched: bool = False
) -> LanczosState:
    one = partial(absorb, layout)
    return (jax.vmap(one, in_axes=(None, 0, 0)) if batched else one)(i, w, state)


@partial(programs.jit, static_argnames=("layout", "batched"))
def _unpack(layout: Layout, panels: Panels, batched: bool = False) -> PyTree:
    return (jax.vmap(layout.unpack) if batched else layout.unpack)(panels)


@partial(programs.jit, static_argnames=("layout", "batched"))
def _pack(layout: Layout, vectors: PyTree, batched: bool = False) -> Panels:
    return (jax.vmap(layout.pack) if batched else layout.pack)(vectors)


@partial(programs.jit, static_argnames=("layout", "batched"))
def _multiply(op: LinearOperator, layout: Layout, panels: Panels, batched: bool = False) -> Panels:
    def one(panels: Panels) -> Panels:
        return layout.pack(op.mv(layout.unpack(panels)))

    return (jax.vmap(one) if batched else one)(panels)


def _product(setup: Setup, panels: Panels, batched: bool) -> Panels:
    op, layout = setup.op, setup.place.layout
    panels = setup.place.to_operator(op, panels)
    if op.on_host:
        vectors = _unpack(layout, panels, batched=batched)
        panels = _pack(layout, op.mv_batch(vectors) if batched else op.mv(vectors), batched=batched)
    else:
        panels = _multiply(op, layout, panels, batched=batched)
    return setup.place.to_basis(panels)


def advance(
    setup: Setup, state: LanczosState, start: int, stop: int, *, batched: bool, passes: Passes | None = None
) -> LanczosState:
    """Steps start..stop-1 from the host, checked for NaN and for symmetry. Consumes `state`.

    Product and recurrence are one compiled loop where they can be, and programs of their own otherwise. A
    product that streams its data is seen by `passes` between batches.
    """
    op, place, deflated = setup.op, setup.place, setup.deflated
    layout = place.layout
    if op.on_host or setup.shared or place.device is not None:
        for i in range(start, stop):
            if deflated is not None:
                found = _clear_one(layout, deflated, place.to_operator(op, state.current), batched=batched)
                state = _cleared_one(i, state, *place.to_basis(found), batched=batched)
            with passes.observed() if passes else contextlib.nullcontext():
                w = _product(setup, state.current, batched)
            state = _absorb_one(layout.anonymous(), i, w, state, batched=batched)
    else:
        state = _run_chunk(op, layout, state, start, stop, deflated, batched=batched)
    check(setup, state, stop)
    return state


def check(setup: Setup, state: LanczosState, stop: int) -> None:
    """Raise if a product was not finite or the operator is not symmetric."""
    op, row_precision = setup.op, setup.place.layout.row_precision
    alpha, beta, scale, asymmetry = jax.device_get((state.alpha, state.beta, state.scale, state.asymmetry))
    bad = ~(np.isfinite(alpha[..., :stop]) & np.isfinite(beta[..., :stop]))
    if bad.any():
        step = int(np.argwhere(bad)[:, -1].min())
        raise NonFiniteError(
            f"the product of Lanczos step {step + 1} is NaN or infinite. {op.explain_non_finite()}"
        )
    scale = np.maximum(scale, setup.norm)
    worst = float(np.max(asymmetry / np.where(scale > 0, scale, 1)))
    if not worst > max(float(np.sqrt(op.precision)), row_precision):  # rounded rows look like asymmetry
        return
    limit = asymmetry_limit(op, worst, row_precision)
    if worst > limit:
        raise NotSymmetricError(
            f"the operator is not symmetric: |uᵀHv - vᵀHu| reaches {worst:.1e} |H| within {stop} steps, "
            f"above {limit:.1e}, the square root of the precision of its products. Lanczos needs a "
            f"symmetric real operator. {op.explain_asymmetry()}"
        )


def check_start(v0: PyTree) -> None:
    """Raise unless a start vector is finite and not zero."""
    size = trees.length(v0)
    if not np.isfinite(size) or size == 0:
        raise SpectraError(f"v0 has norm {size}; pass a finite vector that is not zero.")


def check_steps(num_steps: int, size: int) -> None:
    """Raise unless 1 <= num_steps <= n."""
    if not 1 <= num_steps <= size:
        raise SpectraError(
            f"num_steps={num_steps} is not between 1 and the order of the operator, {size}: a Krylov "
            f"space has at most {size} dimensions. Use num_steps={size}, after which it is whole, or fewer."
        )
