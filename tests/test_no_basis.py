"""Lanczos without reorthogonalisation: copies merged, and all that is stated of a spectrum still true."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.base import draws, host
from spectra.density.extremes import extreme
from spectra.krylov import recurrence
from spectra.krylov.layout import Layout
from spectra.krylov.plan import require_fit
from spectra.operators.composed import DeflatedOperator
from spectra.quadrature import brackets, rules
from spectra.quadrature.rules import breakdown_noise

N, KEY = 200, jax.random.key(0)
BULK = np.linspace(0.0, 1.0, N - 6)
OUTLIERS = np.array([5.0, 8.0, 20.0, 40.0, 90.0, 100.0])
VALUES = np.sort(np.append(BULK, OUTLIERS))


def operator(values=VALUES, dtype=jnp.float32):
    """A rotation away from a diagonal: I - 2 u uᵀ on both sides."""
    u = np.random.default_rng(0).standard_normal(len(values))
    reflection = np.eye(len(values)) - 2 * np.outer(u, u) / (u @ u)
    return spectra.MatrixOperator(jnp.asarray(reflection @ np.diag(values) @ reflection, dtype))


@pytest.fixture(scope="module")
def bare():
    return spectra.slq(operator(), key=KEY, num_steps=100, num_probes=4, basis="none")


@pytest.fixture(scope="module")
def full():
    return spectra.slq(operator(), key=KEY, num_steps=100, num_probes=4)


def test_copies_of_an_eigenvalue_are_one_node(bare, full):
    """The first eigenvalues are found several times; each is left once, with its part of the probe."""
    copies = [theta for theta, _, _ in brackets.rules(bare)]
    for i, theta in enumerate(copies):
        assert np.sum(theta > 99) > 2, "there is something to merge"
        nodes, length = bare.nodes[i], bare.lengths[i]
        assert np.diff(nodes[:length]).min() > 0
        for value in OUTLIERS:
            near = np.abs(nodes[:length] - value) <= bare.noise_floor
            assert near.sum() == 1
            # Weights are sums of squares of T's eigenvectors: known to the noise over the gap, 1 / 100.
            one, other = (
                bare.weights[i, :length][near],
                full.weights[i][np.abs(full.nodes[i] - value).argmin()],
            )
            assert one == pytest.approx(other, abs=bare.noise_floor / 100)
        assert bare.weights[i].sum() == pytest.approx(1, abs=1e-12)


def test_every_node_has_an_eigenvalue_within_its_residual(bare):
    live = np.arange(bare.num_steps) < bare.lengths[:, None]
    away = np.abs(bare.nodes[live][:, None] - VALUES).min(axis=1)
    assert np.all(away <= bare.residuals[live] + bare.noise_floor)


NARROW = np.append(1 + 0.01 * np.sort(np.random.default_rng(5).standard_normal(N - 1)), 100.0)
"""A bulk as wide as 5e-4 |H|: rounding in float32 carries mass over its gaps."""


@pytest.mark.parametrize(
    ("dtype", "values"),
    [("float32", VALUES), pytest.param("float64", VALUES, marks=pytest.mark.slow), ("float32", NARROW)],
)
def test_the_bracket_holds_for_the_measures_of_the_probes(dtype, values):
    """One probe on the eigenvectors themselves, so that its measure is known in float64."""
    values = np.asarray(np.asarray(values, dtype), float)  # those of the rounded matrix
    with jax.enable_x64(dtype == "float64"):
        op = spectra.MatrixOperator(jnp.asarray(np.diag(values), dtype))
        q = spectra.slq(op, key=KEY, num_steps=150, num_probes=3, basis="none")
        starts = [draws.sphere_sample(jax.random.fold_in(KEY, i), op.structure) for i in range(3)]
        masses = np.asarray(np.stack(starts), np.float64) ** 2
    sums = np.cumsum(masses / masses.sum(axis=1, keepdims=True), axis=1)
    x = np.concatenate([values, (values[1:] + values[:-1]) / 2, q.nodes.ravel()])
    slack = 4 * np.finfo(dtype).eps  # of a mass: the vector is rounded, and so is its norm
    for i, measure in enumerate(np.pad(sums, ((0, 0), (1, 0)))):
        lower, _, upper = brackets.bracket(_probe(q, i), x, q.noise_floor)
        below = measure[np.searchsorted(values, x, side="left")]
        upto = measure[np.searchsorted(values, x, side="right")]
        assert np.all(lower <= upto + slack)
        assert np.all(below <= upper + slack)
        assert np.mean(upper - lower) < (0.05 if values[0] == 0 else 0.3)
    assert extreme(q, -1).lower <= values[-1] <= extreme(q, -1).upper
    assert extreme(q, 0).lower <= values[0] <= extreme(q, 0).upper


def _probe(q, i):
    """A quadrature of one probe alone."""
    names = ("nodes", "weights", "residuals", "lengths", "asymmetry", "coefficients")
    return dataclasses.replace(q, **{name: getattr(q, name)[i : i + 1] for name in names})


def test_rounding_of_a_step_does_not_add_up():
    """q_i is off orthogonality to q_{i-1} by what one product rounds, `breakdown_noise`, at any step.

    Measured 4 to 7 eps, and 52 to 62 where α is taken before β q_{i-1} is subtracted. Ritz values are then
    within √m floors of 4 eps.
    """
    op, eps = operator(np.append(np.linspace(1.0, 1.01, N - 1), 100.0)), np.finfo(np.float32).eps
    for i in range(3):
        run = spectra.lanczos(op, jax.random.normal(jax.random.key(i), (N,)), N, reorthogonalize="none")
        assert run.asymmetry <= breakdown_noise(N, eps)
        top = np.linalg.eigvalsh(np.asarray(run.matrix(), np.float64))[-1]
        assert abs(top - 100) <= 100 * 4 * eps * rules.spread(N)


def test_merging_keeps_neighbours_apart_and_first_moments():
    theta = np.array([0.0, 1.0, 1.0 + 1e-9, 1.0 + 3e-7, 2.0, 2.0 + 1e-6])
    weights = np.array([0.1, 0.2, 0.1, 0.3, 0.05, 0.25])
    residuals = np.array([1e-3, 0.2, 0.1, 1e-8, 0.4, 0.3])
    nodes, masses, left = rules.merge(theta, weights, residuals, 1e-7)
    assert len(nodes) == 5
    assert nodes @ masses == pytest.approx(theta @ weights, rel=1e-15)
    assert left[1] <= 1e-9  # of two copies one combination has no residual
    np.testing.assert_allclose(left[[0, 2, 3, 4]], residuals[[0, 3, 4, 5]])
    # A chain of near ones does not become one node.
    assert len(rules.merge(np.linspace(0, 1, 11), np.full(11, 1 / 11), np.ones(11), 0.25)[0]) == 4


@pytest.mark.slow
def test_inside_jit_the_rule_is_the_same(bare):
    run = jax.jit(lambda op, key: spectra.slq(op, key=key, num_steps=100, num_probes=4, basis="none"))
    inside = run(operator(), KEY)
    assert np.all(inside.lengths <= inside.num_steps - 10)  # merged
    x = np.linspace(-1, 101, 60)
    lower, _, upper = inside.cdf(x)
    truth = np.searchsorted(VALUES, x, side="right") / N
    assert np.all((lower <= truth) & (truth <= upper))


@pytest.mark.slow
def test_with_outliers_deflated_it_is_the_run_with_a_basis():
    """W1 to the truth at most 1.2 of that with a basis, mean over probes of both."""
    op = operator()
    pairs = spectra.eigsh(op, 6, which="LA", key=jax.random.key(1))
    found = {}
    for basis in ("inherit", "none"):
        q = spectra.slq(op, key=KEY, num_steps=60, num_probes=4, deflate=pairs, basis=basis)
        x = np.linspace(-0.1, 101, 20001)
        estimate = q.cdf(x).estimate
        found[basis] = np.trapezoid(np.abs(estimate - np.searchsorted(VALUES, x, side="right") / N), x)
        assert q.nodes.max() == pytest.approx(100, rel=1e-5)
    assert found["none"] <= 1.2 * found["inherit"]


@pytest.mark.parametrize("basis", ["inherit", "none"])
def test_a_deflated_run_does_not_find_the_zero_of_its_deflated_vectors(basis):
    """All eigenvalues are from 10 on, so that zero is far outside what is left to find."""
    op = operator(np.append(np.linspace(10.0, 11.0, 180), np.linspace(50.0, 100.0, 20)))
    pairs = spectra.eigsh(op, 20, which="LA", key=jax.random.key(1))
    q = spectra.slq(op, key=KEY, num_steps=60, num_probes=2, deflate=pairs, basis=basis)
    assert q.range[0] == pytest.approx(10, abs=1e-3)
    assert extreme(q, 0).lower <= 10 <= extreme(q, 0).upper


@pytest.mark.slow
def test_deflated_pairs_are_all_that_memory_grows_by():
    n, r = 1 << 18, 48
    op = spectra.FunctionOperator(
        lambda v: jnp.sin(jnp.arange(n)) * v, jax.ShapeDtypeStruct((n,), jnp.float32)
    )
    known, layout = jax.ShapeDtypeStruct((r, n), jnp.float32), Layout.of(op.like)
    state = jax.eval_shape(lambda: recurrence.init(layout, jnp.ones(n), 1000, keep_basis=False))
    deflated = DeflatedOperator(op, known)
    lowered = recurrence._run_chunk.lower(deflated, layout, state, 0, 16, known)
    program = lowered.compile().memory_analysis()
    assert program is not None
    assert program.temp_size_in_bytes + program.output_size_in_bytes <= 8 * 4 * n


def test_an_exhausted_space_is_told_by_its_copies():
    """Four eigenvalues: their rule is exact after four steps, whatever rounding goes on with."""
    op = operator(np.repeat([0.0, 1.0, 2.0, 10.0], [100, 60, 30, 10]))
    q = spectra.slq(op, key=KEY, num_steps=40, num_probes=3, basis="none")
    assert q.status is spectra.Status.INVARIANT
    assert set(q.lengths) == {4}
    assert int(spectra.lanczos(op, jnp.ones(N), 40, reorthogonalize="none").length) <= 4
    # n steps without a basis are not the whole space.
    forty = operator(np.linspace(1.0, 2.0, 40))
    q = spectra.slq(forty, key=KEY, num_steps=40, num_probes=2, basis="none")
    assert q.status is spectra.Status.COMPLETE
    assert np.all(q.residuals[:, 0] > 0)


def test_memory_is_eight_vectors_whatever_the_steps():
    """What the compiler says of the loop: temporaries, and the state beside parameters."""
    n = 1 << 20
    like = jax.ShapeDtypeStruct((n,), jnp.float32)
    op = spectra.FunctionOperator(lambda v: jnp.sin(jnp.arange(n)) * v, like)
    layout = Layout.of(op.like)
    state = jax.eval_shape(lambda: recurrence.init(layout, jnp.ones(n), 1000, keep_basis=False))
    program = recurrence._run_chunk.lower(op, layout, state, 0, 16).compile().memory_analysis()
    assert program is not None
    total = program.temp_size_in_bytes + program.output_size_in_bytes
    assert total <= 8 * 4 * n
    plan = spectra.plan(op, num_steps=1000, num_probes=1, basis="none")
    assert plan.basis == 0
    assert plan.total <= 8 * 4 * n


def test_a_basis_that_does_not_fit_is_answered_with_none(bare):
    plan = spectra.plan(operator(), num_steps=100, num_probes=4)
    compiler = 0 if plan.process is None else plan.compiling  # in the same memory on a CPU
    small = dataclasses.replace(plan, available=plan.without_basis + compiler + 1000)
    assert 'with basis="none"' in repr(small)
    assert repr(small).rstrip().endswith("fits")
    # Six vectors for each probe in progress: 4.7 KiB for the one of a CPU.
    needs = f"{plan.probe_batch * 6 * 4 * N / 1024:.1f} KiB"
    assert needs == "4.7 KiB" or jax.default_backend() != "cpu"
    with pytest.raises(spectra.MemoryLimitError, match=re.escape(f'basis="none", which needs {needs}')):
        require_fit(small)
    with pytest.raises(spectra.SpectraError, match="stores none"):
        spectra.slq(operator(), key=KEY, num_steps=9, basis="none", basis_dtype="bfloat16")


@pytest.mark.slow
def test_a_killed_run_goes_on_and_its_checkpoint_is_two_vectors(tmp_path, bare):
    folder = tmp_path / "run"
    op = operator()
    options: dict[str, Any] = {"key": KEY, "num_steps": 100, "num_probes": 4, "basis": "none"}
    saved = spectra.Checkpoint(folder, steps=1, minutes=0)
    with pytest.MonkeyPatch.context() as patch:
        # An accelerator runs all probes at once, in fewer and longer chunks.
        calls = iter([0] * (12 if jax.default_backend() == "cpu" else 3) + [15] * 1000)
        patch.setattr(host, "pending", lambda: next(calls))
        with pytest.raises(spectra.PreemptedError):
            spectra.slq(op, checkpoint=saved, **options)
    names = [path.name for path in folder.glob("probe-*")]
    assert names
    assert not any("rows" in name for name in names)
    again = spectra.slq(op, checkpoint=saved, **options)
    np.testing.assert_array_equal(again.coefficients, bare.coefficients)
    np.testing.assert_array_equal(again.nodes, bare.nodes)
    options["basis"] = "inherit"
    with pytest.raises(spectra.CheckpointError, match="basis_dtype"):
        spectra.slq(op, checkpoint=saved, **options)


def test_a_file_brings_back_the_brackets(tmp_path, bare):
    path = tmp_path / "bare.npz"
    spectra.save(bare, path)
    again = spectra.load(path)
    assert again.noise_floor == bare.noise_floor
    x = np.linspace(0, 2, 9)
    np.testing.assert_array_equal(again.cdf(x).upper, bare.cdf(x).upper)
