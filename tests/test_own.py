"""Operators and iterations of one's own: a dataclass is an operator, and three functions make Lanczos."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import all_but

import spectra

N = 40
ENTRIES = jnp.linspace(0.5, 2.0, N, dtype=jnp.float32)
KEY = jax.random.key(0)
traces: list[str] = []


@dataclasses.dataclass(frozen=True)
class WithField(spectra.LinearOperator):
    like: Any
    scale: float = 1.0

    def mv(self, v):
        traces.append("mv")
        return self.scale * self.like * v


@dataclasses.dataclass(frozen=True)
class WithProperty(spectra.LinearOperator):
    parts: dict[str, Any]  # arrays beside a number and a string
    inner: spectra.LinearOperator
    function: Callable[[jax.Array], jax.Array]
    power: Any = dataclasses.field(default=1, metadata={"static": True})

    @property
    def like(self):
        return self.inner.like

    def mv(self, v):
        factor = self.parts["times"] * self.function(self.parts["entries"]) ** self.power
        return self.inner.mv(v) * (factor / factor)


@dataclasses.dataclass
class Thawed(spectra.LinearOperator):
    entries: jax.Array

    @property
    def like(self):
        return self.entries

    def mv(self, v):
        return self.entries * v


class Plain(spectra.LinearOperator):
    def __init__(self, entries):
        self.like = entries

    def mv(self, v):
        return self.like * v


class Slotted(spectra.LinearOperator):
    __slots__ = ("__factor", "entries")

    def __init__(self, entries):
        self.entries, self.__factor = entries, jnp.ones(())

    @property
    def like(self):
        return self.entries

    def mv(self, v):
        return self.__factor * self.entries * v


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Registered(spectra.LinearOperator):
    entries: jax.Array

    @property
    def like(self):
        return self.entries

    def mv(self, v):
        return self.entries * v


class Derived(spectra.MatrixOperator):
    """Of a class that is an operator already."""


KINDS = {
    "field": lambda d: WithField(d),
    "property": lambda d: WithProperty({"times": 2, "name": "x", "entries": d}, WithField(d), jnp.exp),
    "not frozen": lambda d: Thawed(d),
    "no dataclass": lambda d: Plain(d),
    "slots": lambda d: Slotted(d),
    "registered by its author": lambda d: Registered(d),
    "derived": lambda d: Derived(jnp.diag(d)),
}


@jax.jit
def multiply(op, v):
    return op.mv(v)


@pytest.mark.parametrize("kind", all_but(KINDS, "derived", "not frozen", "property"))
def test_an_operator_of_any_kind_works_under_jit_and_in_algorithms(kind):
    """Diagonal matrices: the products of ones are the entries, to a few roundings of factors."""
    op = KINDS[kind](ENTRIES)
    ones, margin = jnp.ones(N), 8 * np.finfo("f").eps * 2
    for found in (op @ ones, multiply(op, ones), multiply(copy.deepcopy(op), ones)):
        np.testing.assert_allclose(found, ENTRIES, atol=margin)
    leaves, treedef = jax.tree.flatten(op)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    for parts in (leaves, [object() for _ in leaves], [None] * len(leaves)):
        rebuilt = treedef.unflatten(parts)
        assert jax.tree.structure(rebuilt, is_leaf=lambda x: x is None) == treedef
    np.testing.assert_allclose(spectra.lanczos(op, ones, N).alpha[0], ENTRIES.mean(), atol=margin)
    slope = jax.grad(lambda d: multiply(KINDS[kind](d), ones).sum())(ENTRIES)
    np.testing.assert_allclose(slope, ones, atol=margin)


def test_arrays_are_traced_and_numbers_are_static():
    multiply(WithField(ENTRIES), ENTRIES)
    traces.clear()
    multiply(WithField(2 * ENTRIES), ENTRIES)
    assert not traces, "compiled anew for other arrays"
    tripled = multiply(WithField(ENTRIES, 3.0), ENTRIES)
    np.testing.assert_allclose(
        tripled, 3 * np.float64(ENTRIES) ** 2, rtol=2 * np.finfo("f").eps
    )  # two products
    assert traces, "another number was not seen"


def test_what_lacks_a_part_is_no_operator():
    @dataclasses.dataclass(frozen=True)
    class NoLike(spectra.LinearOperator):
        entries: jax.Array

        def mv(self, v):
            return v

    class NoProduct(spectra.LinearOperator):
        like = ENTRIES

    with pytest.raises(TypeError, match="NoLike defines no `like`"):
        NoLike(ENTRIES)
    with pytest.raises(TypeError, match=r"abstract method '?mv"):
        NoProduct()


OP = spectra.MatrixOperator(jnp.diag(ENTRIES))
START = jnp.ones(N)


@pytest.mark.slow
@pytest.mark.parametrize("reorthogonalize", ["full", "none"])
def test_steps_of_ones_own_are_those_of_lanczos(reorthogonalize):
    """From a loop in Python, a compiled one, and products taken elsewhere: T to the rounding of a product."""
    iteration = spectra.LanczosIteration(OP, 12, reorthogonalize=reorthogonalize)
    whole = spectra.lanczos(OP, START, 12, reorthogonalize=reorthogonalize)
    first = iteration.init(START)
    state = other = first
    for _ in range(12):
        state = iteration.step(OP, state)
        vector = np.asarray(iteration.vector(other))
        other = iteration.absorb(other, jnp.asarray(np.asarray(ENTRIES) * vector))
    loop = jax.jit(lambda op: jax.lax.fori_loop(0, 12, lambda _, s: iteration.step(op, s), first))(OP)
    # T of a start vector depends on rounding by eps |H| times what neighbouring Ritz vectors share: 12 steps.
    margin = 12 * 8 * np.finfo("f").eps * 2
    for found in (state, other, loop):
        result = iteration.finish(OP, found)
        np.testing.assert_allclose(result.alpha, whole.alpha, atol=margin)
        np.testing.assert_allclose(result.beta, whole.beta, atol=margin)
        assert int(result.length) == 12
        assert result.status == whole.status


@pytest.mark.slow
def test_an_iteration_that_stops_holds_what_it_has_done():
    iteration = spectra.LanczosIteration(OP, 12)
    state = iteration.init(START)
    with pytest.raises(spectra.SpectraError, match="no step was taken"):
        iteration.finish(OP, state)
    for _ in range(5):
        state = iteration.step(OP, state)
    result, whole = iteration.finish(OP, state), spectra.lanczos(OP, START, 5)
    margin = 5 * 8 * np.finfo("f").eps * 2
    np.testing.assert_allclose(result.alpha[:5], whole.alpha, atol=margin)
    np.testing.assert_allclose(result.beta[:4], whole.beta, atol=margin)
    assert not np.any(result.beta[4:])
    np.testing.assert_allclose(result.residual_norm, whole.residual_norm, atol=margin)
    assert int(result.length) == 5
    vectors = np.asarray(result.basis)[:5]
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(5), atol=margin)


@pytest.mark.slow
def test_steps_beyond_the_room_change_nothing_and_an_invariant_space_ends_a_run():
    iteration = spectra.LanczosIteration(OP, 3)
    state = iteration.init(jnp.zeros(N).at[:2].set(1))
    for _ in range(5):
        state = iteration.step(OP, state)
    result = iteration.finish(OP, state)
    assert int(result.length) == 2  # a vector in the plane of two eigenvectors
    assert result.status == spectra.Status.INVARIANT
    full = iteration.init(START)
    for _ in range(3):
        full = iteration.step(OP, full)
    long = full
    for _ in range(2):
        long = iteration.step(OP, long)
    assert int(iteration.finish(OP, long).length) == 3
    jax.tree.map(np.testing.assert_array_equal, long, full)  # rows behind the third one, too


@pytest.mark.parametrize("copied", [lambda op: op, copy.copy, copy.deepcopy])
def test_what_is_assigned_to_an_operator_that_jax_rebuilt_is_multiplied_with(copied):
    """JAX keeps the parts that it rebuilt an operator from; they end with the next assignment."""
    op = copied(jax.tree.map(lambda x: x, Thawed(ENTRIES)))
    op.entries = 2 * ENTRIES
    np.testing.assert_array_equal(jax.jit(lambda op, v: op.mv(v))(op, jnp.ones(N)), 2 * ENTRIES)


@pytest.mark.parametrize("v0", [np.zeros(N, np.float32), np.full(N, np.nan, np.float32), np.ones(N + 1)])
def test_a_start_vector_that_is_none_is_refused(v0):
    with pytest.raises(spectra.SpectraError, match="v0"):
        spectra.LanczosIteration(OP, 3).init(v0)


@dataclasses.dataclass(frozen=True)
class Through(spectra.LinearOperator):
    base: spectra.LinearOperator

    @property
    def like(self):
        return self.base.like

    @property
    def made_of(self):
        return (self.base,)

    def mv(self, v):
        return self.base.mv(v)


def squares(w, x):
    return jnp.mean((x @ w) ** 2)


@pytest.mark.slow
def test_what_is_known_of_an_operator_is_known_of_what_it_is_made_of():
    data = jnp.eye(3)
    coarse = spectra.HessianOperator(squares, jnp.ones(3), data, matmul_precision="bfloat16")
    streamed = spectra.HessianOperator(squares, jnp.ones(3), [data, data])
    assert Through(coarse).precision == 2.0**-8  # the unit roundoff of bfloat16
    assert Through(coarse).computes_in == "bfloat16"
    assert Through(coarse).known_linear
    assert [Through(op).on_host for op in (coarse, streamed)] == [False, True]
    product = Through(streamed) @ jnp.arange(3.0)
    np.testing.assert_allclose(product, 2 * np.arange(3) / 3, rtol=1e-6)  # eight roundings or fewer
    matrix = Through(spectra.MatrixOperator(data))
    assert matrix.precision == np.finfo(np.float32).eps
    with pytest.raises(spectra.NonFiniteError, match="parameter leaf"):
        Through(spectra.HessianOperator(squares, jnp.full(3, jnp.nan), data)) @ jnp.ones(3)


def by_numpy(v):
    """A product that `jax.vmap` refuses: NumPy's, without `vmap_method=`."""
    return jax.pure_callback(lambda x: np.asarray(x) * np.asarray(DIGITS), v, v)


DIGITS = jnp.array([1.0, 2.0, 4.0, 5.0])
TIMES = {
    "matrix": (lambda op: op.as_matrix(), np.diag([1, 2, 4, 5])),
    "columns": (lambda op: op @ jnp.eye(4), np.diag([1, 2, 4, 5])),
    "exact": (lambda op: spectra.trace(op, key=None, method="exact").value, 12),
    "samples": (lambda op: spectra.trace(op, key=KEY, method="hutchinson", probes="rademacher").value, 12),
    "traced": (
        lambda op: jax.jit(lambda b: spectra.solve(op, b, tol=1e-6).x)(jnp.ones(4)),
        1 / DIGITS,
    ),
    "quadratures": (
        lambda op: jax.jit(lambda k: spectra.slq(op, key=k, num_steps=4, num_probes=2).nodes)(KEY),
        [[1, 2, 4, 5]] * 2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMES)
def test_products_that_cannot_be_mapped_are_called_one_after_the_other(name):
    """A NotImplementedError of JAX came from most functions: "vmap is only supported for ..."."""
    call, expected = TIMES[name]
    found = call(spectra.FunctionOperator(by_numpy, jnp.ones(4)))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
