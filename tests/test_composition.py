"""jit, vmap and eager agree; the next checkpoint of the same model traces and compiles nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import OPERATORS, Ridge, ridge_loss

import spectra

KEY = jax.random.key(0)
COMPILED = [
    "matrix",
    "one batch, not linearised",
    "reverse over reverse",
    "finite difference",
    "masked microbatches",
    "sum, multiple and shift",
]


def close(got, want, precision, size=1.0):
    """Six steps of a well-separated spectrum: 64 roundings of a product."""
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * precision * size)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_jit_vmap_and_eager_agree_for_every_operator(name, x64):
    op, dense = OPERATORS[name]()
    size, m = np.linalg.norm(dense, 2), 3
    vs = jax.random.normal(KEY, (2, op.size), op.dtype)

    def run(op, v):
        return spectra.lanczos(op, v, m).alpha

    eager = np.stack([run(op, v) for v in vs])
    close(jax.jit(jax.vmap(run, in_axes=(None, 0)))(op, vs), eager, op.precision, size)


@pytest.mark.slow
def test_slq_agrees_inside_jit_and_vmap(dtype):
    op = Ridge().operator()
    run = lambda op, key: spectra.slq(op, key=key, num_steps=6, num_probes=2)  # noqa: E731
    eager = run(op, KEY)
    jitted = jax.jit(run)(op, KEY)
    assert jitted.status is spectra.Status.TRACED
    size, precision = max(map(abs, eager.range)), op.precision
    close(jitted.nodes, eager.nodes, precision, size)
    close(jitted.weights, eager.weights, precision)
    keys = jax.random.split(KEY, 3)
    mapped = jax.vmap(lambda key: run(op, key).nodes)(keys)
    for nodes, key in zip(mapped, keys, strict=True):
        close(nodes, run(op, key).nodes, precision, size)


@pytest.mark.slow
def test_operators_map_over_checkpoints():
    ridge = Ridge()
    op = ridge.operator()
    stacked = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), op.params)

    def largest(params):
        at = spectra.HessianOperator(ridge_loss, params, ridge.batch())
        return spectra.lanczos(at, jnp.ones(6), 6).matrix()

    mapped = jax.vmap(largest)(stacked)
    for i in range(2):
        one = largest(jax.tree.map(lambda x, i=i: x[i], stacked))
        np.testing.assert_allclose(np.linalg.eigvalsh(mapped[i]), np.linalg.eigvalsh(one), atol=64 * 1.2e-7)


@pytest.mark.slow
@pytest.mark.parametrize("linearize", [True, False])
def test_what_a_jitted_function_closes_over_may_be_concrete(linearize):
    op, v = Ridge().operator(linearize=linearize), jnp.ones(6)
    eager = spectra.lanczos(op, v, 4).alpha
    # Start closed over, operator closed over, both closed over.
    close(jax.jit(lambda op: spectra.lanczos(op, v, 4).alpha)(op), eager, 1.2e-7)
    close(jax.jit(lambda v: spectra.lanczos(op, v, 4).alpha)(v), eager, 1.2e-7)
    close(jax.jit(lambda: spectra.lanczos(op, v, 4).alpha)(), eager, 1.2e-7)
    nodes = spectra.slq(op, key=KEY, num_steps=4, num_probes=1).nodes
    closed = jax.jit(lambda: spectra.slq(op, key=KEY, num_steps=4, num_probes=1).nodes)
    close(closed(), nodes, 1.2e-7)


def test_matrix_operators_can_be_built_inside_jit():
    a = np.diag(np.arange(1.0, 5.0))
    np.testing.assert_array_equal(
        jax.jit(lambda v: spectra.MatrixOperator(a) @ v)(jnp.ones(4)), np.arange(1.0, 5.0)
    )


@pytest.mark.slow
def test_streams_inside_jit_are_refused_with_advice():
    op = Ridge().operator(Ridge().parts(5))
    with pytest.raises(spectra.SpectraError, match=r"inside jit.*microbatch="):
        jax.jit(lambda op, v: op @ v)(op, jnp.ones(6))
    with pytest.raises(spectra.SpectraError, match="inside jit"):
        jax.jit(lambda op, v: spectra.lanczos(op, v, 3).alpha)(op, jnp.ones(6))


def test_adaptive_runs_inside_jit_are_refused():
    op = Ridge().operator()
    with pytest.raises(spectra.SpectraError, match="tol="):
        jax.jit(lambda key: spectra.slq(op, key=key, num_steps=4, tol=0.1).nodes)(KEY)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"linearize": False},
        {"microbatch": 4},
        {"mode": "reverse-over-reverse"},
        "stream",
    ],
    ids=str,
)
def test_the_next_checkpoint_traces_and_compiles_nothing(options, caplog):
    ridge, count = Ridge(), 0

    def loss_fn(params, batch):
        nonlocal count
        count += 1
        return ridge_loss(params, batch)

    def analyse(params, shift):
        inputs, mask = ridge.batch()
        data = (inputs + shift, mask)
        keywords = {} if options == "stream" else options
        if options == "stream":
            data = [jax.tree.map(lambda x: x[:6], data), jax.tree.map(lambda x: x[6:], data)]
        op = spectra.HessianOperator(loss_fn, params, data, **keywords)
        spectra.lanczos(op, jnp.ones(6), 4)
        op @ jnp.ones(6)
        op.loss()
        return spectra.slq(op, key=KEY, num_steps=4, num_probes=2)

    def compiled():
        found = [r.message for r in caplog.records if "Finished XLA compilation" in r.message]
        caplog.clear()
        return {message.split(" in ")[0] for message in found}

    with jax.log_compiles():
        first = analyse(ridge.params(), 0.0)
        traces, before = count, compiled()
        second = analyse(jax.tree.map(lambda x: 0.5 * x, ridge.params()), 0.1)
    assert count == traces > 0
    assert any("loss" in name for name in before)
    # What the test itself does to the parameters may compile; nothing of the first time does again.
    assert not before & compiled()
    assert not np.allclose(first.nodes, second.nodes)


@pytest.mark.slow
def test_results_that_vmap_has_stacked_are_not_read_as_one():
    """The steps of several quadratures were taken for those of one: `mean` gave another number."""
    matrices = jnp.stack([jnp.diag(jnp.arange(1.0, 6.0)), jnp.diag(jnp.arange(2.0, 7.0))])

    def one(matrix):
        return spectra.slq(spectra.MatrixOperator(matrix), key=jax.random.key(0), num_steps=5, num_probes=3)

    several = jax.vmap(one)(matrices)
    for call in (
        lambda q: q.cdf(0.0),
        lambda q: q.mean(np.exp),
        lambda q: q.band_width(),
        lambda q: spectra.spectral_density(q),
        lambda q: spectra.trace_of(q, np.exp),
    ):
        with pytest.raises(spectra.SpectraError, match="these are 2 quadratures, as vmap"):
            call(several)
    assert "several" in repr(several)
    second = jax.tree.map(lambda x: x[1], several)
    assert second.mean(lambda x: x) == pytest.approx(one(matrices[1]).mean(lambda x: x), rel=1e-5)


def _cubes(params, x):
    return jnp.mean((x @ params) ** 3)


@pytest.mark.slow
def test_matrices_of_an_ensemble():
    """Without JAX's warning of a buffer that could not be given away."""
    x = jnp.cos(jnp.arange(12.0)).reshape(4, 3)

    def matrix(params):
        return spectra.HessianOperator(_cubes, params, x).as_matrix()

    params = jnp.array([[1.0, 2.0, 3.0], [0.5, -1.0, 0.2]])
    found = jax.vmap(matrix)(params)
    np.testing.assert_allclose(found, jnp.stack([matrix(p) for p in params]), rtol=1e-5, atol=1e-6)
