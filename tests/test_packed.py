"""Vectors packed into few arrays: the same products, and programs that do not grow with the leaves."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.base import trees
from spectra.estimators.run import FEW
from spectra.krylov import linear_run
from spectra.krylov.packed import layout_of, pack, packed, unpack
from spectra.krylov.plan import choose_together


@dataclasses.dataclass(frozen=True)
class Diagonal(spectra.LinearOperator):
    """One entry a parameter, 0.5 to 2.5, in a pytree of any number of leaves."""

    like: dict

    def mv(self, v):
        return jax.tree.map(lambda d, x: (jnp.cos(d) + 1.5) * x, self.like, v)


def diagonal(leaves, each=7):
    rows = np.arange(leaves * each, dtype=np.float32).reshape(leaves, each)
    return Diagonal({f"leaf{i}": jnp.asarray(row) for i, row in enumerate(rows)})


def entries(op):
    return np.cos(np.asarray(trees.ravel(op.like), np.float64)) + 1.5


def test_products_are_those_of_the_operator_and_padding_stays_zero():
    op = diagonal(3, each=5000)  # of more than one block, the last lanes of which are padding
    layout = layout_of(op)
    run = packed(layout, op)
    vectors = jax.tree.map(lambda x: jnp.stack([x, x + 1]), op.like)
    stack = pack(layout, vectors)
    numbers = sum(leaf[0].size for leaf in stack)
    assert run.size == op.size < numbers
    products = run.mv_batch(stack)
    assert sum(int(np.count_nonzero(leaf)) for leaf in products) <= 2 * op.size
    for got, expected in zip(
        jax.tree.leaves(unpack(layout, products)), jax.tree.leaves(op.mv_batch(vectors)), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
    one = unpack(layout, run.mv([leaf[0] for leaf in stack]))
    np.testing.assert_array_equal(trees.ravel(one), trees.ravel(op.mv(op.like)))


@pytest.mark.parametrize(
    "like",
    [
        {"one": jnp.ones(3)},
        {"half": jax.ShapeDtypeStruct((3,), jnp.float32), "whole": jax.ShapeDtypeStruct((2,), jnp.float64)},
    ],
    ids=["one array", "two types"],
)
def test_what_is_left_as_it_is(like):
    with jax.enable_x64(True):
        assert layout_of(Diagonal(like)) is None


@pytest.mark.slow
def test_a_run_that_is_saved_holds_vectors_as_those_of_any_number_of_devices(tmp_path):
    op, b = diagonal(3), jax.tree.map(jnp.ones_like, diagonal(3).like)
    saved = tmp_path / "run"
    spectra.solve(op, b, tol=0.0, max_matvecs=3, method="cg", checkpoint=saved)
    kinds = json.dumps([json.loads(path.read_text()) for path in saved.rglob("*.json")])
    assert "[1, 7]" in kinds  # a leaf of one right-hand side
    assert "21" not in re.findall(r"\[1, 1, (\d+)\]", kinds)  # a panel


def test_inside_a_callers_jit_nothing_is_packed():
    seen = []
    jax.jit(lambda op: seen.append(layout_of(op)))(diagonal(2))
    assert seen == [None]


def operations(leaves):
    """StableHLO operations of the loop of block conjugate gradients."""
    op = diagonal(leaves)
    layout = layout_of(op)
    run, b = packed(layout, op), pack(layout, jax.tree.map(lambda x: x[None], op.like))
    problem, _ = linear_run.begin(run, b, None, "auto", 1e-5, 50, b, None)
    block = linear_run._begin_block(problem, 2)
    arguments = run, problem, block, 1, choose_together(run, 1), linear_run.Layout.of(run.like).anonymous()
    return len(re.findall(r"stablehlo\.", linear_run._block_chunk.lower(*arguments).as_text()))


@pytest.mark.slow
def test_a_leaf_costs_a_program_of_the_solver_its_own_product_alone():
    """A slice, a product and a piece of a concatenation; leaf by leaf it has 192 operations for each."""
    few, many = operations(4), operations(24)
    assert (many - few) / 20 < 12


@pytest.mark.slow
def test_results_are_in_the_form_of_the_parameters():
    op, key = diagonal(FEW + 1), jax.random.key(0)
    spectrum = entries(op)
    b = jax.tree.map(jnp.ones_like, op.like)
    found = spectra.solve(op, b, tol=1e-6, lower_bound=0.5)
    assert jax.tree.structure(found.x) == jax.tree.structure(op.like)
    np.testing.assert_allclose(trees.ravel(found.x), 1 / spectrum, atol=found.error_bound)
    exact = spectra.diagonal(op, key=key, num_matvecs=16, method="hutchinson")  # as signs have a diagonal
    np.testing.assert_allclose(trees.ravel(exact.value), spectrum, rtol=1e-5)
    sketched = spectra.diagonal(op, key=key, num_matvecs=16, method="xdiag")
    assert jax.tree.structure(sketched.value) == jax.tree.structure(op.like)
    # Student's t of 7 degrees of freedom is beyond 3 in 2 %: 7 of 63 entries are three times in 10⁴.
    assert np.mean(np.abs(trees.ravel(sketched.value) - spectrum) <= 3 * trees.ravel(sketched.stderr)) > 0.9
    for method in ("hutch++", "krylov", "xtrace", "xnystrace", "hutchinson"):
        trace = spectra.trace(op, key=key, num_matvecs=20, method=method)
        off = abs(trace.value - spectrum.sum())
        # Few degrees of freedom, and sums in float32.
        assert off <= 6 * trace.stderr + 1e-5 * spectrum.sum(), method
