"""Several right-hand sides of one system: one Krylov space for all, each judged by itself."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import N, rotation, slow_but

import spectra
from spectra import Status
from spectra.krylov import linear_block, linear_run, plan
from spectra.krylov.linear_state import Mode
from spectra.krylov.linear_step import absorb

SIDES = 5


def matrix(signs=1.0, kappa=1e3):
    q = rotation(N, 0)
    values = np.geomspace(1.0, 1 / kappa, N) * signs
    return (q * values) @ q.T


def columns(seed=0):
    """Random ones, one that depends on another, one that nearly does, and zero."""
    b = np.random.default_rng(seed).standard_normal((N, SIDES))
    b[:, 2], b[:, 4] = 1e-6 * b[:, 0], 0
    b[:, 3] = b[:, 1] + 1e-7 * b[:, 3]
    return b


def test_a_block_takes_fewer_products_than_its_right_hand_sides_one_by_one(x64):
    a, b = matrix(), np.random.default_rng(1).standard_normal((N, SIDES))
    op = spectra.MatrixOperator(jnp.asarray(a))
    options = {"tol": 1e-6, "max_matvecs": 3 * N, "method": "cg"}
    found = spectra.solve(op, b, **options)
    alone = [spectra.solve(op, column, **options).num_matvecs for column in b.T]
    assert max(alone) <= N + 1  # no more directions than that are conjugate; and a check
    # A block of s is at least as good as the removal of the s - 1 smallest eigenvalues (O'Leary, theorem 5).
    left = np.geomspace(1.0, 1e-3, N)[: N - SIDES + 1]
    assert found.num_matvecs <= sum(alone) * np.sqrt(left[0] / left[-1]) / np.sqrt(1e3) + 2 * SIDES
    residuals = np.linalg.norm(a @ np.asarray(found.x) - b, axis=0)
    assert (residuals <= 1e-6 * np.linalg.norm(b, axis=0)).all()
    # Rounding of a product, eps sqrt(n) |A| |x|, on both sides.
    np.testing.assert_allclose(found.residual_norm, residuals, rtol=0, atol=2 * found.rounding.max())


LARGE = 300
OUTLIERS = np.concatenate([np.geomspace(1.0, 1e-3, 40), np.geomspace(1e-3, 1e-6, LARGE - 40)]) + 1e-3
"""Those of a damped Gauss-Newton matrix, κ = 1e3."""


def products_without_rounding(b):
    """Of each column: steps to the residual that is least in the Krylov space, in float64, and its check."""
    a = rotation(LARGE) * OUTLIERS @ rotation(LARGE).T
    space = directions = np.linalg.qr(b)[0]
    for steps in range(1, LARGE):
        images = a @ space
        rest = b - images @ np.linalg.lstsq(images, b)[0]
        if (np.linalg.norm(rest, axis=0) <= 1e-3 * np.linalg.norm(b, axis=0)).all():
            return steps + 1
        fresh = a @ directions
        for _ in range(2):
            fresh = fresh - space @ (space.T @ fresh)
        directions = np.linalg.qr(fresh)[0]
        space = np.concatenate([space, directions], axis=1)
    raise AssertionError


@pytest.mark.parametrize("count", slow_but([1, 8], 1))
def test_rounding_does_not_bring_directions_back(count, monkeypatch):
    """Least residuals are at most those of conjugate gradients, and below them by a step or two here. Without
    the directions that are kept, float32 takes 69 products in the place of 35, and 18 in the place of 10."""
    a = rotation(LARGE) * OUTLIERS @ rotation(LARGE).T
    op = spectra.MatrixOperator(jnp.asarray(a, jnp.float32))
    b = np.random.default_rng(1).standard_normal((LARGE, count))
    found = spectra.solve(op, jnp.asarray(b, jnp.float32), tol=1e-3, method="cg")
    least = products_without_rounding(b)
    assert found.converged.all()
    assert least <= found.num_matvecs / count <= 1.1 * least + 2
    monkeypatch.setattr(linear_run, "steps_kept", lambda op, sides: 0)
    without = spectra.solve(op, jnp.asarray(b, jnp.float32), tol=1e-3, method="cg")
    assert without.num_matvecs >= 1.3 * found.num_matvecs


@pytest.mark.slow
def test_right_hand_sides_that_depend_on_each_other_are_no_breakdown(x64):
    a, b = matrix(), columns()
    op = spectra.MatrixOperator(jnp.asarray(a))
    found = spectra.solve(op, b, tol=1e-8, max_matvecs=3 * N, method="cg", lower_bound=0.999e-3)
    assert found.converged.all()
    error = np.linalg.norm(np.linalg.solve(a, b) - np.asarray(found.x), axis=0)
    assert (
        error <= found.error_bound + 1e3 * N * np.finfo(float).eps * np.linalg.norm(found.x, axis=0)
    ).all()
    assert (np.asarray(found.x)[:, 4] == 0).all()
    inside = jax.jit(lambda op, b: spectra.solve(op, b, tol=1e-8, max_matvecs=3 * N, method="cg"))(op, b)
    assert inside.converged.all()
    np.testing.assert_allclose(
        inside.x, found.x, rtol=0, atol=2 * 1e3 * 1e-8 * np.linalg.norm(b, axis=0).max()
    )


@pytest.fixture
def pairs(monkeypatch):
    """An accelerator that two vectors fill."""
    monkeypatch.setattr(plan, "_BATCH_NUMBERS", 2 * N)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def test_products_of_a_block_come_in_equal_parts_that_fill_a_device(pairs):
    op = spectra.MatrixOperator(jnp.eye(N))
    assert [plan.choose_together(op, count) for count in (1, 2, 3, SIDES, 64)] == [1, 2, 2, 2, 2]
    op = spectra.MatrixOperator(jnp.eye(N // 2))  # four of these
    assert [plan.choose_together(op, count) for count in (4, SIDES, 9)] == [4, 3, 3]


def test_products_of_a_block_are_all_at_once_on_a_cpu():
    assert plan.choose_together(spectra.MatrixOperator(jnp.eye(N)), SIDES) == SIDES


@pytest.mark.slow
@pytest.mark.usefixtures("pairs")
def test_blocks_whose_products_come_in_parts(x64):
    """Three parts, of two, two and one."""
    a, b = matrix(), columns()
    op = spectra.MatrixOperator(jnp.asarray(a))
    found = spectra.solve(op, b, tol=1e-8, max_matvecs=3 * N, method="cg")
    assert relative(a @ np.asarray(found.x) - b, b) <= 1e-8
    root = spectra.funm(op, "sqrt", b, bounds=(0.999e-3, 1.001), tol=1e-6)
    values = np.geomspace(1.0, 1e-3, N)
    truth = rotation(N, 0) * np.sqrt(values) @ rotation(N, 0).T @ b
    assert (np.linalg.norm(root.value - truth, axis=0) <= root.error_bound).all()


@pytest.mark.slow
def test_each_goes_on_by_itself_where_the_curvature_is_not_positive(x64):
    signs = np.where(np.arange(N) % 3, 1.0, -1.0)
    a, b = matrix(signs, 10.0), columns()
    op = spectra.MatrixOperator(jnp.asarray(a))
    found = spectra.solve(op, b, max_matvecs=3 * N, preconditioner=lambda v: v)
    assert (found.method, found.status) == ("minres", Status.CONVERGED)
    assert relative(a @ np.asarray(found.x) - b, b) <= 1e-5 * (1 + 1e-6)
    refused = spectra.solve(op, b, max_matvecs=3 * N, method="cg")
    assert refused.status is Status.INDEFINITE
    assert np.asarray(refused.converged).tolist() == [False, False, False, False, True]


def relative(rest, b):
    sizes = np.linalg.norm(b, axis=0)
    return np.max(np.linalg.norm(rest, axis=0) / np.where(sizes > 0, sizes, 1))


@pytest.mark.slow
def test_more_right_hand_sides_than_a_block_has(x64, monkeypatch):
    monkeypatch.setattr(linear_run, "WIDEST", 2)
    a, b = matrix(kappa=10.0), columns(1)
    found = spectra.solve(spectra.MatrixOperator(jnp.asarray(a)), b, max_matvecs=3 * N, method="cg")
    assert found.converged.all()
    assert relative(a @ np.asarray(found.x) - b, b) <= 1e-5


@pytest.mark.parametrize("limit", slow_but([2, 3, 7], 3))
def test_no_more_products_of_each_than_allowed(limit, x64, capsys):
    op = spectra.MatrixOperator(jnp.asarray(matrix()))
    options = {"max_matvecs": limit, "tol": 1e-8, "method": "cg"}
    plain = spectra.solve(op, columns(), **options)
    watched = spectra.solve(op, columns(), progress=True, **options)
    assert plain.num_matvecs <= limit * SIDES
    assert (plain.status, watched.status) == (Status.BUDGET_EXHAUSTED,) * 2
    np.testing.assert_array_equal(plain.x, watched.x)


@pytest.mark.parametrize("sides", slow_but([1, 3], 3))
def test_a_run_whose_products_ran_out_goes_on_to_the_same_bits(sides, x64, tmp_path, monkeypatch):
    op = spectra.MatrixOperator(jnp.asarray(matrix()))
    b = columns()[:, 0] if sides == 1 else columns()[:, [0, 1, 3]]
    options = {"tol": 1e-6, "method": "cg"}
    whole = spectra.solve(op, b, max_matvecs=3 * N, **options)
    short = spectra.solve(op, b, max_matvecs=9, checkpoint=tmp_path, **options)
    assert (short.status, short.num_matvecs) == (Status.BUDGET_EXHAUSTED, 9 * sides)
    taken: list[int] = []
    for name in ("_products", "_block_products"):
        original = getattr(linear_run, name)
        monkeypatch.setattr(
            linear_run, name, lambda *args, original=original: taken.append(args[-1]) or original(*args)
        )
    rest = spectra.solve(op, b, max_matvecs=3 * N, checkpoint=tmp_path, **options)
    assert taken[0] == 8  # the last two of the nine were taken for the residual that was returned
    assert (rest.status, rest.num_matvecs) == (whole.status, whole.num_matvecs)
    np.testing.assert_array_equal(rest.x, whole.x)


def test_a_dense_matrix_takes_n_products_and_no_start(x64):
    op = spectra.MatrixOperator(jnp.asarray(matrix(kappa=1e14)))
    b = jnp.ones(N)
    with pytest.raises(spectra.SpectraError, match=rf"method='dense' forms the matrix by {N} products"):
        spectra.solve(op, b, method="dense", max_matvecs=N - 1)
    with pytest.raises(spectra.SpectraError, match="x0= is for"):
        spectra.solve(op, b, method="dense", x0=b)
    b = op @ b  # of the range, since the smallest eigenvalue may be zero for all that rounding leaves of it
    assert spectra.solve(op, b, method="dense").error_bound == np.inf
    known = spectra.solve(op, b, method="dense", lower_bound=0.9e-14)
    assert (known.bound, np.isfinite(known.error_bound)) == ("the given lower bound", True)


def test_all_modes_at_once_give_what_the_wanted_one_gives_alone(x64):
    """A CPU takes a branch where there is one right-hand side; GPUs, TPUs and `vmap` compute all and choose.

    The matrix is indefinite and singular, and b has a part outside of its range: all modes are met.
    """
    n = 12
    values = jnp.linspace(-1.0, 2.0, n).at[3].set(0.0)
    op = spectra.DiagonalOperator(values)
    inverse = spectra.DiagonalOperator(1 / (0.5 + jnp.abs(values)))
    b = jnp.cos(jnp.arange(float(n)))[None]
    problem, state = linear_run.begin(op, b, inverse, "auto", 1e-10, 100, b)
    state = jax.tree.map(lambda x: x[0], state)
    own = jax.tree.map(lambda x: x[0], dataclasses.replace(problem, inverse=None))
    problem = dataclasses.replace(own, inverse=inverse)
    alone, together = (jax.jit(partial(absorb, alone=alone)) for alone in (True, False))
    met = set()
    while state.mode != Mode.DONE:
        met.add(Mode(int(state.mode)))
        w = op.mv(state.go)
        after, other = alone(problem, state, w), together(problem, state, w)
        for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(other), strict=True):
            # The same operations; sums of n products may run in another order.
            np.testing.assert_allclose(x, y, rtol=0, atol=10 * n * np.finfo(float).eps * np.max(np.abs(x)))
        state = after
    assert met == {Mode.CG, Mode.MINRES, Mode.CHECK, Mode.NULL}


@pytest.mark.slow
def test_step_and_check_of_a_block_at_once_give_what_the_wanted_one_gives_alone(x64):
    """As above: a CPU takes one of two branches, other devices choose between both results."""
    values = jnp.geomspace(1.0, 100.0, N)
    op, inverse = spectra.DiagonalOperator(values), spectra.DiagonalOperator(1 / (1 + values))
    b = jnp.asarray(np.random.default_rng(3).standard_normal((SIDES, N)))
    problem, _ = linear_run.begin(op, b, inverse, "auto", 1e-8, 100, b)
    block = linear_block.begin_block(problem, 2)
    absorb_block = jax.jit(linear_block.absorb_block)
    forms = [jax.jit(partial(fn, problem)) for fn in (linear_block.one_of, linear_block.all_at_once)]
    met = set()
    while not block.done:
        met.add(bool(block.checking))
        products = jax.vmap(op.mv)(block.go)
        alone, together = (fn(block, products, jnp.linalg.norm(block.go, axis=1)) for fn in forms)
        for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            # Sums of n products in another order, and systems of the directions' condition, at most 100 here.
            np.testing.assert_allclose(
                x, y, rtol=0, atol=100 * 10 * N * np.finfo(float).eps * np.max(np.abs(x))
            )
        block = absorb_block(problem, block, products)
    assert met == {False, True}


def test_a_preconditioner_that_turns_directions_round_is_refused():
    """A block of them finds x all the same, and one right-hand side is refused by the steps of its own."""
    op, sides = spectra.MatrixOperator(jnp.diag(jnp.linspace(1.0, 5.0, N))), jnp.asarray(columns()[:, :3])
    with pytest.raises(spectra.SpectraError, match="not positive definite"):
        spectra.solve(op, sides, preconditioner=jnp.negative, method="cg", max_matvecs=40)
