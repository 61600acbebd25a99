"""Tridiagonal reduction from one start vector: as one call, and step by step for iterations of one's own."""

import dataclasses
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError, Status
from spectra.base.trees import PyTree
from spectra.krylov import basis as _basis
from spectra.krylov.layout import BasisPlace, Layout
from spectra.krylov.recurrence import (
    CHUNK,
    LanczosState,
    Setup,
    absorb,
    advance,
    check,
    check_start,
    check_steps,
    init,
    placed,
    run,
)
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.jaxprs import outside_loops
from spectra.quadrature.rules import invariant_length
from spectra.results import Tridiagonal

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


@automatic
def lanczos(op: LinearOperator, v0: PyTree, num_steps: int, *, reorthogonalize: str = "full") -> Tridiagonal:
    """Reduce a symmetric operator to tridiagonal form on the Krylov space of a start vector.

    Computes H Qᵀ = Qᵀ T + r e_mᵀ with orthonormal rows q_0 = v0/|v0|, ..., q_{m-1}. The run ends early, with
    the true `length`, if the space is invariant; the eigenvalues of T are then eigenvalues of H. A residual
    that rounding alone can explain, β_j <= (10 + √n / 2) eps |T|, counts as zero; outside `jit`, so does a
    larger one that stems from amplified rounding, after which the run would repeat itself. `lanczos` works
    inside `jit` and `vmap`; outside, products are checked for NaN and for symmetry during the run.

    Args:
        op: a symmetric `LinearOperator` of order n.
        v0: start vector, a pytree like the parameters or a flat array (n,); need not be normalised.
        num_steps: m, from 1 to n.
        reorthogonalize: "full" keeps the basis and makes every new vector orthogonal to it; "none" is
            the bare three-term recurrence, which needs no basis but returns copies ("ghosts") of
            converged eigenvalues: `slq(basis="none")` merges them.

    Returns:
        `Tridiagonal` with alpha (m,), beta (m-1,), length, basis and orthogonality.

    Raises:
        SpectraError: num_steps out of range, or v0 zero or not finite.
        StructureError: v0 does not match the operator.
        NonFiniteError: a product is NaN or infinite.
        NotSymmetricError: the operator is not symmetric.

    Cost: m products, m n numbers of memory for the basis, and one read and write sweep of it per step
    (m² n numbers in all; twice that in steps that need a second Gram-Schmidt pass).

    References:
        Parlett, The Symmetric Eigenvalue Problem, doi:10.1137/1.9781611971163, ch. 13.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])))
        >>> result = spectra.lanczos(op, jnp.ones(6), 5)
        >>> int(result.length)  # three distinct eigenvalues
        3
    """
    if reorthogonalize not in ("full", "none"):
        raise SpectraError(f"reorthogonalize={reorthogonalize!r}: use 'full' or 'none'.")
    require_operator(op)
    check_steps(num_steps, op.size)
    v0 = op.as_vector(v0, "v0")
    keep = reorthogonalize == "full"
    traced = trees.is_traced((op, v0))
    layout = Layout.leafwise(op.structure) if traced else Layout.of(op.like)
    if traced:
        op = op.prepare()
        state = run(op, layout, init(layout, v0, num_steps, keep_basis=keep), 0, num_steps)
        return finished(state, layout, Status.TRACED)
    check_start(v0)
    setup = Setup(outside_loops(op.prepare()), BasisPlace(layout))
    state = _init(layout, v0, num_steps, keep_basis=keep)
    for start in range(0, num_steps, CHUNK):
        stop = min(start + CHUNK, num_steps)
        state = advance(setup, state, start, stop, batched=False)
        alpha, beta, done = jax.device_get((state.alpha, state.beta, state.length))
        length = invariant_length(alpha, beta, int(done), op.size, op.precision, orthogonal=keep)
        if length is not None:
            return finished(_cut(state, length), layout, Status.INVARIANT)
    return finished(state, layout, Status.COMPLETE)


def _cut(state: LanczosState, length: int) -> LanczosState:
    """The first `length` steps, with no residual: what rounding carried on is left out."""
    steps = np.arange(len(state.alpha))
    return dataclasses.replace(
        state,
        alpha=jnp.where(steps < length, state.alpha, 0),
        beta=jnp.where(steps < length - 1, state.beta, 0),
        length=jnp.asarray(length, jnp.int32),
    )


_init = programs.jit(init, static_argnames=("layout", "num_steps", "keep_basis"))


def finished(state: LanczosState, layout: Layout, status: Status) -> Tridiagonal:
    """The reduction that a state holds."""
    beta, last, asymmetry = _numbers(state.beta, state.length, state.asymmetry, state.scale)
    return Tridiagonal(
        alpha=state.alpha,
        beta=beta,
        residual_norm=last,
        length=state.length,
        asymmetry=asymmetry,
        second_passes=state.second_passes,
        segments=state.basis,
        layout=layout,
        status=status,
    )


@programs.jit
def _numbers(
    beta: jax.Array, length: jax.Array, asymmetry: jax.Array, scale: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return beta[:-1], beta[length - 1], asymmetry / jnp.where(scale > 0, scale, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """A run of `LanczosIteration` so far; a pytree of arrays."""

    lanczos: LanczosState
    done: 'Int[jax.Array, ""]'  # steps

    @property
    def alpha(self) -> 'Float[jax.Array, " steps"]':
        """The diagonal of T; zeros behind the steps done."""
        return self.lanczos.alpha

    @property
    def beta(self) -> 'Float[jax.Array, " steps"]':
        """|r_i| behind step i: all but the last one done are off the diagonal of T."""
        return self.lanczos.beta

    @property
    def alive(self) -> 'Bool[jax.Array, ""]':
        """Whether there is a next vector: False where the space is invariant."""
        return self.lanczos.alive


class LanczosIteration:
    """Lanczos as pure functions `init`, `step` and `finish`, from which to build your own iteration.

    `lanczos`, `slq` and `funm` run the same step. Each state is a pytree: `step` works under `jit`, in
    `lax.while_loop` and `lax.scan`, under `vmap` over start vectors, and in a Python loop that inspects
    `alpha` and `beta` between products, computes products elsewhere (`vector` and `absorb`), or saves the
    state.

    Args:
        op: a symmetric operator that defines the structure of vectors; `step` may be called with another
            operator of the same structure.
        num_steps: maximum number of steps, from 1 to n.
        reorthogonalize: "full" keeps a basis of num_steps vectors; "none" is the bare recurrence.

    Raises:
        SpectraError: an argument is out of range.

    Cost: a product and two reads of the basis per step. Outside `jit` a step also copies the basis, which a
    compiled loop updates in place.

    References:
        Parlett, The Symmetric Eigenvalue Problem, doi:10.1137/1.9781611971163, ch. 13.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, 2.0, 4.0, 8.0])))
        >>> iteration = spectra.LanczosIteration(op, num_steps=3)
        >>> state = iteration.init(jnp.ones(4))
        >>> state = iteration.step(op, state)
        >>> float(state.alpha[0])  # the mean of the eigenvalues that a vector of ones sees
        3.75
        >>> state = jax.lax.fori_loop(1, 3, lambda _, state: iteration.step(op, state), state)
        >>> int(iteration.finish(op, state).length)
        3
    """

    def __init__(self, op: LinearOperator, num_steps: int, *, reorthogonalize: str = "full"):
        require_operator(op)
        check_steps(num_steps, op.size)
        if reorthogonalize not in ("full", "none"):
            raise SpectraError(f"reorthogonalize={reorthogonalize!r}: use 'full' or 'none'.")
        self.num_steps, self.keeps_basis = num_steps, reorthogonalize == "full"
        self._layout = Layout.leafwise(op.structure) if trees.is_traced(op) else Layout.of(op.like)

    def init(self, v0: PyTree) -> Steps:
        """The state before the first step.

        Args:
            v0: start vector, a pytree like the operator's vectors; need not be normalised.

        Raises:
            StructureError: v0 is not such a vector.
            SpectraError: v0 is zero or not finite.
        """
        structure = self._layout.structure
        trees.check_structure(v0, structure, "v0")
        v0 = trees.cast_like(v0, structure)
        if not trees.is_traced(v0):
            check_start(v0)
        state = _init(self._layout, v0, self.num_steps, keep_basis=self.keeps_basis)
        return Steps(state, jnp.zeros((), jnp.int32))

    def vector(self, state: Steps) -> PyTree:
        """q_i, of length one: the vector to multiply next. Zero after a breakdown."""
        return _vector(self._layout, state)

    def absorb(self, state: Steps, product: PyTree) -> Steps:
        """The state after the next step, given H q_i. Nothing changes beyond `num_steps`."""
        trees.check_structure(product, self._layout.structure, "the product")
        return _absorb(self._layout, state, product)

    def step(self, op: LinearOperator, state: Steps) -> Steps:
        """The state after the next step, which takes one product with the operator."""
        if op.on_host:
            return self.absorb(state, op.mv(self.vector(state)))
        return _step(self._layout, op, state)

    def finish(self, op: LinearOperator, state: Steps) -> Tridiagonal:
        """The reduction after the steps so far: a `Tridiagonal`, as from `lanczos`.

        Raises:
            NonFiniteError: a product was NaN or infinite; not inside `jit`.
            NotSymmetricError: the operator is not symmetric; not inside `jit`.
            SpectraError: there was no step; not inside `jit`.
        """
        found, traced = state.lanczos, trees.is_traced(state)
        if not traced:
            if not int(state.done):
                raise SpectraError("no step was taken: call step, or absorb, before finish.")
            check(Setup(op, BasisPlace(self._layout)), found, int(state.done))
        result = finished(found, self._layout, _status(state, traced))
        # Behind the last step there is a residual, and no row of T.
        within = jnp.arange(self.num_steps - 1) < result.length - 1
        return dataclasses.replace(result, beta=jnp.where(within, result.beta, 0))


def _status(state: Steps, traced: bool) -> Status:
    if traced:
        return Status.TRACED
    return Status.COMPLETE if state.alive else Status.INVARIANT


@partial(programs.jit, static_argnames="layout")
def _vector(layout: Layout, state: Steps) -> PyTree:
    return layout.unpack(state.lanczos.current)


@partial(programs.jit, static_argnames="layout")
def _absorb(layout: Layout, state: Steps, product: PyTree) -> Steps:
    """The state after the next step, or, where there is no room for one, the same.

    Then the step is made for a row behind the last one, which no basis has, and its numbers are left. A
    conditional around it would hold reductions between devices, on which between GPUs the host decides, and
    copy the basis under `vmap`.
    """
    before, steps = state.lanczos, state.alpha.shape[0]
    room = state.done < steps
    count, rows = _basis.segments(steps)
    after = absorb(layout, jnp.where(room, state.done, count * rows), layout.pack(product), before)
    kept = [dataclasses.replace(one, basis=()) for one in (after, before)]
    chosen = jax.tree.map(partial(jnp.where, room), *kept)
    return Steps(placed(layout, dataclasses.replace(chosen, basis=after.basis)), state.done + room)


@partial(programs.jit, static_argnames="layout")
def _step(layout: Layout, op: LinearOperator, state: Steps) -> Steps:
    return _absorb(layout, state, op.mv(layout.unpack(state.lanczos.current)))
