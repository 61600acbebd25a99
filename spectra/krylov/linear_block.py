"""Block conjugate gradients: several right-hand sides of A x = b in one Krylov space (O'Leary,
doi:10.1016/0024-3795(80)90247-5).

Each step multiplies one direction for each right-hand side, as conjugate gradients side by side do, but every
solution uses all directions. Residuals are kept as R = Q C with orthonormal columns Q (Dubrulle, Electronic
Transactions on Numerical Analysis 12, 2001), so that right-hand sides that depend on each other, or come to,
are no breakdown. Where the curvature is not positive, or rounding ends the progress, each right-hand side
goes on by itself from what it has: see `linear_step`.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from spectra.base import arrays, stacks, trees
from spectra.base.trees import PyTree
from spectra.krylov.linear_short import PATIENCE, PROGRESS, begin_cg, begin_minres
from spectra.krylov.linear_state import (
    Mode,
    Problem,
    State,
    Verdict,
    choose,
    merge,
    norm_of,
    refuse_inverse,
    sides_of,
    to_check,
    zeros_beside,
)
from spectra.krylov.linear_step import HALF, Kept, conjugate, nothing_kept, start, stored

WIDEST = 64
"""Right-hand sides in one block: products of matrices of its width squared cost less than products with A."""
LOST = 10.0
"""A column is lost where less than this many roundings of it are left by the others."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """What a block carries from product to product. Rows of stacks are right-hand sides, or directions."""

    done: jax.Array
    checking: jax.Array  # the product under way is that of x
    checked: jax.Array  # the residuals are those of x, not of the recurrence
    spent: jax.Array  # the check under way is the last product
    indefinite: jax.Array  # a direction of negative curvature was met
    x: PyTree
    q: PyTree  # Q of the residuals R = Q C
    go: PyTree  # what is multiplied next: the directions S, or x
    c: jax.Array  # C
    unit_a: jax.Array
    norm_a: jax.Array  # largest |A v| / |v| so far
    norm_r: jax.Array  # of the true residuals, at the last check
    best: jax.Array  # smallest residual that counted as progress, in units of b
    idle: jax.Array  # steps since
    steps: jax.Array  # of this cycle
    products: jax.Array  # of each right-hand side
    inverse: jax.Array  # (SᵀAS)⁻¹ of the last step
    kept: Kept


def begin_block(problem: Problem, kept: int = 0) -> Block:
    """The block before the first product, from x = 0, with room for the directions of so many steps."""
    norms = jax.vmap(trees.norm)(problem.b)
    zero, no = jnp.zeros((), norms.dtype), jnp.zeros((), bool)
    count = jnp.zeros((), jnp.int32)
    zeros = zeros_beside(problem.b)
    square = jnp.zeros((len(norms), len(norms)), norms.dtype)
    flags: dict[str, jax.Array] = dict.fromkeys(("checking", "checked", "spent", "indefinite"), no)
    flags["done"] = jnp.all(norms <= problem.target)
    vectors = {"x": zeros, "q": zeros, "go": zeros, "c": square}
    numbers = {"unit_a": zero + 1, "norm_a": zero, "norm_r": norms, "best": zero, "inverse": square}
    counts = dict.fromkeys(("idle", "steps", "products"), count)
    block = Block(**flags, **vectors, **numbers, **counts, kept=nothing_kept(problem, kept))
    return _cycle(problem, block, *_directions(problem, problem.b))


def _directions(problem: Problem, stack: PyTree) -> tuple[PyTree, jax.Array, PyTree]:
    """Q and Z of `orthonormal`, and what the preconditioner makes of Q."""
    q, z = orthonormal(stack)
    return q, z, _preconditioned(problem, q)


def _cycle(problem: Problem, block: Block, q: PyTree, c: jax.Array, s: PyTree) -> Block:
    """Directions from the residuals."""
    zero = jnp.zeros_like(block.idle)
    best = jnp.max(_relative(problem, block.norm_r))
    return dataclasses.replace(block, q=q, c=c, go=s, best=best, idle=zero, steps=zero)


def _preconditioned(problem: Problem, q: PyTree) -> PyTree:
    inverse, unit = problem.inverse, problem.unit_p
    if inverse is None:
        return q
    return stacks.mapped(lambda row: trees.scale(1 / unit[0], inverse.mv(row)), q)


def _relative(problem: Problem, norms: jax.Array) -> jax.Array:
    """Residuals in units of b."""
    sizes = jax.vmap(trees.norm)(problem.b)
    return norms / jnp.where(sizes > 0, sizes, 1)


def absorb_block(problem: Problem, block: Block, products: PyTree) -> Block:
    """The block after the products of A with `block.go`."""
    kept, directions, steps = block.kept, block.go, block.steps
    stepping, block = ~block.done & ~block.checking, dataclasses.replace(block, kept=())
    first = block.products == 0
    unit = jnp.where(first, trees.power_of_two(trees.largest(products)), block.unit_a)
    w = trees.scale(1 / unit, products)
    sizes, images = (jax.vmap(trees.norm)(stack) for stack in (block.go, w))
    ratio = jnp.max(jnp.where(sizes > 0, images / jnp.where(sizes > 0, sizes, 1), 0))
    finite = jnp.isfinite(ratio)
    block = dataclasses.replace(
        block,
        unit_a=unit,
        norm_a=jnp.where(finite, jnp.maximum(block.norm_a, ratio), block.norm_a),
        products=block.products + ~block.done,
    )
    alone, at_once = (partial(fn, problem) for fn in (one_of, all_at_once))
    after = lax.platform_dependent(block, w, sizes, cpu=alone, default=at_once)
    # What is not finite is met again, and named, by the right-hand side that it belongs to.
    after = choose(finite, after, dataclasses.replace(block, done=jnp.ones((), bool)))
    spent = ~after.done & ~after.checking & (after.products >= jnp.min(problem.limit) - 1)
    after = _to_check(after, spent)
    after = choose(block.done, block, dataclasses.replace(after, spent=after.spent | spent))
    # Outside of the branches, which would copy what is kept.
    kept = stored(kept, directions, stacks.combine(after.inverse, w), steps, stepping & finite)
    before = jnp.where(after.done | after.checking, 0, after.steps)
    return dataclasses.replace(after, go=conjugate(kept, after.go, before), kept=kept)


def _to_check(block: Block, when: jax.Array) -> Block:
    return dataclasses.replace(block, checking=block.checking | when, go=choose(when, block.x, block.go))


_Step = tuple[PyTree, Callable[[PyTree, jax.Array, PyTree], Block]]
"""The vectors of which directions are made, and the block after them."""


def one_of(problem: Problem, block: Block, w: PyTree, sizes: jax.Array) -> Block:
    """The check or the step, whichever is wanted; see `linear_step`."""

    def alone(step: Callable[..., _Step]) -> Block:
        wanted, after = step(problem, block, w, sizes)
        return after(*_directions(problem, wanted))

    return lax.cond(block.checking, lambda: alone(_check), lambda: alone(_step))


def all_at_once(problem: Problem, block: Block, w: PyTree, sizes: jax.Array) -> Block:
    """Both, of which one is chosen: no conditional, and one set of directions."""
    checked, after_check = _check(problem, block, w, sizes)
    stepped, after_step = _step(problem, block, w, sizes)
    found = _directions(problem, choose(block.checking, checked, stepped))
    return choose(block.checking, after_check(*found), after_step(*found))


def _step(problem: Problem, block: Block, w: PyTree, sizes: jax.Array) -> _Step:
    """The step that A S = w allows; none where the curvature is not positive."""
    s = block.go
    inverse, definite = _inverse(stacks.inner(s, w), problem.noise[0] * block.norm_a * sizes**2, sizes > 0)
    length = _times(inverse, stacks.inner(s, block.q))
    x = jax.tree.map(jnp.add, block.x, stacks.combine(_times(length, block.c).T, s))

    def after(q: PyTree, z: jax.Array, fresh: PyTree) -> Block:
        c = _times(z, block.c)
        beta = _times(inverse, stacks.inner(w, fresh))
        go = stacks.subtract(fresh, stacks.combine(beta.T, s))
        norms = jnp.sqrt(jnp.sum(c**2, axis=0))
        now = jnp.max(_relative(problem, norms))
        better = now < PROGRESS * block.best
        after = dataclasses.replace(
            block,
            x=x,
            q=q,
            c=c,
            go=go,
            best=jnp.where(better, now, block.best),
            idle=jnp.where(better, 0, block.idle + 1),
            steps=block.steps + 1,
            inverse=inverse,
        )
        idle = after.idle > jnp.maximum(PATIENCE, after.steps // 4)
        after = _to_check(after, jnp.all(norms <= problem.target) | idle)
        ended = jnp.ones((), bool)
        return choose(definite, after, dataclasses.replace(block, done=ended, indefinite=ended))

    return stacks.subtract(block.q, stacks.combine(length.T, w)), after


def _inverse(curvature: jax.Array, noise: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(SᵀAS)⁻¹ without directions that depend on others, and whether SᵀAS is definite to rounding."""
    along = arrays.diagonal(curvature)
    definite = jnp.all((along > noise) | ~there)
    scale = jnp.where(there & (along > 0), lax.rsqrt(jnp.where(along > 0, along, 1)), 0)
    scaled = (curvature + curvature.T) / 2 * scale * scale[:, None]
    values, vectors = arrays.eigh(scaled)
    width, eps = len(scale), jnp.finfo(values.dtype).eps
    rounding = width * jnp.maximum(LOST * eps, jnp.max(noise * scale**2))
    definite &= values[0] >= -rounding
    kept = values > width * LOST * eps
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    return scale[:, None] * _times(vectors * inverse, vectors.T) * scale, definite


def _check(problem: Problem, block: Block, w: PyTree, sizes: jax.Array) -> _Step:
    """The true residuals of x, and a new cycle from them where that is worth it."""
    del sizes
    r = stacks.subtract(problem.b, w)
    norms, whole = jax.vmap(trees.norm)(r), jax.vmap(trees.norm)(problem.b)
    worse = norms > whole
    x = _where(worse, jax.tree.map(jnp.zeros_like, block.x), block.x)
    r, norms = _where(worse, problem.b, r), jnp.minimum(norms, whole)
    missed = norms > problem.target
    idle = jnp.any(missed & (norms > HALF * block.norm_r))
    no, eye = jnp.zeros((), bool), jnp.eye(len(norms), dtype=block.c.dtype)
    after = dataclasses.replace(block, x=x, q=r, c=eye, norm_r=norms, checking=no)
    end = ~jnp.any(missed) | block.spent | idle
    ended = dataclasses.replace(after, done=~no, checked=~no)
    return r, lambda q, c, s: choose(end, ended, _cycle(problem, after, q, c, s))


def _where(rows: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """The rows of `a` where said, else of `b`."""

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jax.tree.map(one, a, b)


def hand_over(problem: Problem, block: Block) -> State:
    """Each right-hand side by itself: at its end where the block has found that, else to go on from x."""
    dtype = trees.scalar_dtype(problem.b)
    claimed = stacks.combine(block.c.T, block.q)

    def one(problem: Problem, x: PyTree, r: PyTree) -> State:
        norm, norm_x = norm_of(r), norm_of(x)
        # The same as where one right-hand side meets such a direction, see `cg`.
        keep = ((norm <= problem.target * 1e3) | (norm <= 0.1 * norm_of(problem.b))) | block.checked
        keep &= (problem.noise * block.norm_a * norm_x <= problem.target) | block.checked
        x = choose(keep, x, jax.tree.map(jnp.zeros_like, x))
        r = choose(keep, r, problem.b)
        state = start(problem, dtype, Mode.CG)
        state = dataclasses.replace(
            state,
            norm_r=jnp.where(block.checked, norm, state.norm_r),
            unit_a=block.unit_a,
            norm_a=block.norm_a,
            products=block.products,
        )
        known = merge(state, jnp.ones((), bool), mode=jnp.int32(Mode.DONE))
        known = dataclasses.replace(known, x=x, r=r)
        z = problem.precondition(r)
        alone = begin_cg(state, x, r, z)
        if not problem.only_cg:
            alone = choose(block.indefinite, begin_minres(state, x, r, z), alone)
        alone = to_check(alone, block.products >= problem.limit - 1, verdict=Verdict.BUDGET)
        reached = (block.checked & (norm <= problem.target)) | (norm_of(problem.b) <= problem.target)
        said = jnp.where(reached, jnp.int32(Verdict.CONVERGED), jnp.int32(Verdict.BUDGET))
        found = choose(reached | block.spent, dataclasses.replace(known, verdict=said), alone)
        return refuse_inverse(found, trees.vdot(r, z), r)  # which a block does not ask

    return jax.vmap(one, in_axes=(sides_of(problem), 0, 0))(problem, block.x, claimed)


def orthonormal(stack: PyTree) -> tuple[PyTree, jax.Array]:
    """Q and Z with stack = Zᵀ Q row by row: orthonormal rows of Q, zero where a row depends on those before.

    Gram-Schmidt with each row projected twice; Z is upper triangular.
    """
    count = stacks.length(stack)
    dtype = trees.scalar_dtype(stack)
    eps = jnp.finfo(dtype).eps

    def body(i: jax.Array, carry: tuple[PyTree, jax.Array]) -> tuple[PyTree, jax.Array]:
        q, z = carry
        row: PyTree = jax.tree.map(partial(_taken, i=i), stack)
        size = trees.norm(row)
        before = jnp.zeros(count, dtype)
        for _ in range(2):
            part = stacks.inner(q, row)[:, 0]
            row = stacks.subtract(row, stacks.combine(part[None], q))
            before = before + part
        left = trees.norm(row)
        kept = left > LOST * eps * size
        row = trees.scale(jnp.where(kept, 1 / jnp.where(kept, left, 1), 0), row)
        q = jax.tree.map(partial(_put, i=i), q, row)
        return q, z.at[:, i].set(before.at[i].set(jnp.where(kept, left, 0)))

    start: Any = (jax.tree.map(jnp.zeros_like, stack), jnp.zeros((count, count), dtype))
    return lax.fori_loop(0, count, body, start)


def _taken(x: jax.Array, i: jax.Array) -> jax.Array:
    return cast("Any", lax.dynamic_index_in_dim)(x, i, 0)


def _put(x: jax.Array, y: jax.Array, i: jax.Array) -> jax.Array:
    return cast("Any", lax.dynamic_update_index_in_dim)(x, y.astype(x.dtype), i, 0)


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
