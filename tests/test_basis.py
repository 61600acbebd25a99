"""Parts of the recurrence: vectors drawn as documented, sweeps over the rows of a basis."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHARP

import spectra
from spectra.base import draws
from spectra.krylov import basis, recurrence
from spectra.krylov.layout import Layout
from spectra.krylov.rows import _combine
from spectra.krylov.step import REPEAT, orthogonalize
from spectra.operators.jaxprs import _equations

SHAPES = {"scalar": (), "row": (5,), "matrix": (4, 6), "kernel": (3, 3, 2, 4), "same size": (6, 4)}


@SHARP
@pytest.mark.parametrize("distribution", [jax.random.normal, jax.random.rademacher])
def test_every_leaf_is_drawn_with_a_key_of_its_own(distribution, dtype):
    structure = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in SHAPES.items()}
    key = jax.random.key(3)
    drawn = draws.sample(key, structure, distribution)
    for i, name in enumerate(sorted(SHAPES)):
        expected = distribution(jax.random.fold_in(key, i), SHAPES[name], dtype)
        assert drawn[name].dtype == dtype
        # The same bits through the inverse of erf, some ten operations, as parts of other programs.
        np.testing.assert_allclose(drawn[name], expected, rtol=10 * float(np.finfo(dtype).eps))


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["threefry2x32", "counted otherwise", "rbg"])
def test_leaves_that_are_drawn_together_are_those_drawn_alone(generator):
    """Of any size, by any generator; what a row has beyond its leaf enters no norm."""
    sizes = [1, draws.LEAST, draws.LEAST + 1, 0, 3, draws.MOST, draws.MOST + 1, 3]
    structure = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in sizes]
    key = jax.random.key(5, impl="rbg" if generator == "rbg" else "threefry2x32")
    with jax.threefry_partitionable(generator != "counted otherwise"):
        drawn = draws.sample(key, structure, jax.random.normal)
        on_sphere = draws.sphere_sample(key, structure)
        expected = [jax.random.normal(jax.random.fold_in(key, i), (n,)) for i, n in enumerate(sizes)]
    length = np.linalg.norm(np.concatenate(expected, dtype=np.float64))
    for leaf, unit, row in zip(drawn, on_sphere, expected, strict=True):
        np.testing.assert_allclose(leaf, row, rtol=10 * float(np.finfo(np.float32).eps))
        # The square is summed one number after another, at worst.
        np.testing.assert_allclose(unit, row / length, rtol=sum(sizes) * float(np.finfo(np.float32).eps))


@functools.cache
def program(at_once):
    """Traced anew for each number of segments at once, which the module says while it is traced."""
    return jax.jit(lambda *arguments: orthogonalize(*arguments), static_argnums=3)


put = jax.jit(basis.put, donate_argnums=0, static_argnums=3)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("filled", [0, 9, 33, 52])
@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_sweeps_over_several_segments(at_once, filled, packed, x64, monkeypatch):
    """As many segments at once as on a TPU, here; the sums are those of NumPy."""
    monkeypatch.setattr(basis, "AT_ONCE", {"cpu": (at_once, at_once)})
    monkeypatch.setattr(basis, "SMALL", 0)
    rng = np.random.default_rng(filled)
    like = {"a": jnp.zeros((7, 5)), "b": jnp.zeros(40)}
    layout = Layout.of(like) if packed else Layout.leafwise(like)
    q = np.linalg.qr(rng.normal(size=(75, 52)))[0].T
    rows = basis.zeros(layout, 52)

    def vector(x):
        return layout.pack({"a": jnp.asarray(x[:35]).reshape(7, 5), "b": jnp.asarray(x[35:])})

    for i, row in enumerate(q[:filled]):
        rows = put(rows, i, vector(row), layout)
    v = rng.normal(size=75)
    arguments = rows, vector(v), filled, layout
    equations = _equations(jax.make_jaxpr(program(at_once), static_argnums=3)(*arguments).jaxpr)
    branches = [len(e.params["branches"]) for e in equations if e.primitive.name == "cond"]
    assert max(branches) == at_once + 1
    new, norm, first, total, repeated = program(at_once)(*arguments)
    leaves = layout.unpack(new)
    got = np.concatenate([np.ravel(leaves["a"]), np.ravel(leaves["b"])])
    expected = v - q[:filled].T @ (q[:filled] @ v)
    # Two passes of at most 52 terms of size |v|, each with a rounding, in sums of 75 products.
    tol = 2 * (52 + 75) * np.finfo(float).eps * np.linalg.norm(v)
    np.testing.assert_allclose(got, expected, rtol=0, atol=tol)
    assert abs(norm - np.linalg.norm(expected)) <= tol
    np.testing.assert_allclose(first[:filled], q[:filled] @ v, rtol=0, atol=tol)
    np.testing.assert_allclose(total[:filled], q[:filled] @ v, rtol=0, atol=tol)
    assert not np.any(first[filled:])
    assert bool(repeated) == (np.linalg.norm(q[:filled] @ v) > REPEAT * np.linalg.norm(expected))


@pytest.mark.parametrize("form", [basis.put_by_branch, basis.put_by_scatter])
@pytest.mark.parametrize("packed", [True, False])
def test_a_row_is_written_and_read_and_no_other(form, packed):
    """Either form of `put` leaves what NumPy's assignment does, also for a row that there is not."""
    like = {"a": jnp.zeros((70, 150)), "b": jnp.zeros(40)}  # two blocks where packed
    layout = Layout.of(like) if packed else Layout.leafwise(like)
    form = functools.partial(form, layout=layout) if form is basis.put_by_branch else form
    write, read = jax.jit(form), jax.jit(basis.take)
    rows = basis.zeros(layout, 20)
    expected = [np.zeros((24, *p.shape), np.float32) for p in layout.panels]
    rng = np.random.default_rng(0)
    for row in (0, 7, 8, 23, 24, 7, 16):  # the first and last of a segment, one of no segment, one again
        vector = [rng.normal(size=p.shape).astype(np.float32) for p in layout.panels]
        rows = write(rows, row, vector)
        if row < 24:
            for whole, x in zip(expected, vector, strict=True):
                whole[row] = x
        for row in (-1, *range(0, 25, 4), 7, 23):
            there = 0 <= row < 24
            for got, whole in zip(read(rows, row), expected, strict=True):
                np.testing.assert_array_equal(got, whole[row] if there else 0 * whole[0])
    for i, whole in enumerate(expected):
        got = np.concatenate([np.moveaxis(np.asarray(segment[i]), 1, 0) for segment in rows])
        np.testing.assert_array_equal(got, whole)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_rows_are_written_and_read_as_is_fast_elsewhere(platform, x64, monkeypatch):
    """A run with the forms of another platform, on this one: T is the projection of H on orthonormal rows."""
    monkeypatch.setattr(basis, "SMALL", 0)
    n, steps = 75, 20
    values = np.random.default_rng(0).normal(size=n)
    op, start = spectra.DiagonalOperator(jnp.asarray(values)), jnp.ones(n)
    own = Layout.of(start)
    layout = dataclasses.replace(own, platform=platform)
    run = jax.jit(lambda v: recurrence.run(op, layout, recurrence.init(layout, v, steps), 0, steps))
    state = run(start)
    write = jax.make_jaxpr(lambda rows, vector: basis.put(rows, 3, vector, layout))
    assert ("scatter" in str(write(state.basis, state.current))) == (platform == "gpu")
    assert own.platform == jax.default_backend()
    q = np.concatenate([np.asarray(segment[0])[0] for segment in state.basis])[:steps]
    projected = np.diag(state.alpha) + np.diag(state.beta[:-1], 1) + np.diag(state.beta[:-1], -1)
    # Sums of n products, of numbers up to |H|, and `steps` subtractions of them.
    tol = (n + steps) * np.finfo(float).eps * np.abs(values).max()
    np.testing.assert_allclose(q @ q.T, np.eye(steps), rtol=0, atol=tol)
    np.testing.assert_allclose(q @ (values[:, None] * q.T), projected, rtol=0, atol=tol)


@pytest.mark.parametrize("portion", [1, 2, 5])
def test_rows_are_combined_in_portions_of_any_size(portion):
    """Five blocks in portions that divide their number or do not."""
    rng = np.random.default_rng(1)
    q, weights = rng.normal(size=(5, 16, 2, 128)), rng.normal(size=(16, 16))
    parts = [jnp.asarray(q[:, i : i + 8], jnp.float32) for i in (0, 8)]
    new = jax.jit(functools.partial(_combine, portion))(parts, jnp.asarray(weights, jnp.float32))
    got, expected = np.concatenate(new, axis=1), np.einsum("rs,brxy->bsxy", weights, q)
    # Sums of 16 products, each factor and each term rounded.
    bound = (16 + 2) * np.finfo(np.float32).eps * np.einsum("rs,brxy->bsxy", np.abs(weights), np.abs(q))
    assert np.all(np.abs(got - expected) <= bound)
