"""The exact Hessian: against closed forms and jax.hessian, with its symmetry used and its limits stated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import SHARP, Ridge, relative_error, ridge_count, ridge_loss, slow_but
from programs import OPTIMISED

import spectra
from spectra.operators import dense, hessian

EPS = np.finfo(float).eps
WIDTHS = (4, 5, 3, 2)


def network(params, inputs):
    x = inputs
    for name in ("fc1", "fc2", "fc3"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return jnp.mean(x**2)


def problem(dtype=jnp.float64):
    rng = np.random.default_rng(0)
    params = {
        f"fc{i}": {"kernel": rng.standard_normal((a, b)), "bias": rng.standard_normal(b)}
        for i, (a, b) in enumerate(itertools.pairwise(WIDTHS), start=1)
    }
    inputs = jnp.asarray(rng.standard_normal((7, WIDTHS[0])), dtype)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params), inputs


jax_hessian = jax.jit(jax.hessian(network))


@pytest.fixture(autouse=True)
def _cut_as_large_matrices_are(monkeypatch):
    """A block column for each leaf, or for a few: symmetry saves too little of small matrices."""
    monkeypatch.setattr(hessian, "WORTH", 1)


@pytest.mark.parametrize("mode", ["forward-over-reverse", "reverse-over-reverse"])
def test_blocks_are_those_of_jax_hessian(mode, x64):
    params, inputs = problem()
    blocks = spectra.dense_hessian(network, params, inputs, structure="blocks", mode=mode)
    expected = jax_hessian(params, inputs)
    assert jax.tree.structure(blocks) == jax.tree.structure(expected)
    assert blocks["fc1"]["kernel"]["fc2"]["kernel"].shape == (4, 5, 5, 3)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for got, want in zip(jax.tree.leaves(blocks), jax.tree.leaves(expected), strict=True):
        # Entries are sums over at most 7 examples and 5 units a layer, three layers deep.
        np.testing.assert_allclose(got, want, rtol=0, atol=100 * EPS * size)


@pytest.mark.slow
def test_flat_parameters_give_flat_blocks(x64):
    params = {"fc1": jnp.ones((2, 3)), "fc2": jnp.ones(3)}
    loss = lambda p, x: jnp.sum((x @ p["fc1"]) ** 2 @ p["fc2"] ** 2)  # noqa: E731
    blocks = spectra.dense_hessian(loss, params, jnp.ones((4, 2)), structure="blocks")
    expected = jax.jit(jax.hessian(loss))(params, jnp.ones((4, 2)))
    np.testing.assert_allclose(blocks["fc1"]["fc2"], expected["fc1"]["fc2"], rtol=1e-14)
    np.testing.assert_allclose(blocks["fc2"]["fc1"], expected["fc2"]["fc1"], rtol=1e-14)


@SHARP
def test_symmetric_to_the_bit(dtype):
    params, inputs = problem(dtype)
    matrix = np.asarray(spectra.dense_hessian(network, params, inputs))
    assert matrix.dtype == dtype
    np.testing.assert_array_equal(matrix, matrix.T)


CASES = {
    "one batch": {},
    "microbatches with a rest": {"microbatch": 4},
    "masked microbatches": {"microbatch": 4, "weight_fn": ridge_count},
    "reverse over reverse": {"mode": "reverse-over-reverse"},
    "finite difference": {"mode": "finite-difference"},
}


QUICK = [
    ("one batch", False),
    ("microbatches with a rest", False),
    ("reverse over reverse", False),
    ("finite difference", False),
]


@pytest.mark.parametrize(
    ("name", "streamed"), slow_but([(name, part) for name in CASES for part in (False, True)], *QUICK)
)
def test_closed_form(name, streamed, x64):
    ridge = Ridge(masked="weight_fn" in CASES[name])
    data = ridge.parts(5) if streamed else ridge.batch()
    matrix = spectra.dense_hessian(ridge_loss, ridge.params(), data, **CASES[name])
    # Central differences: eps^(2/3) times the third derivatives; else one rounding for each example.
    bound = 10 * EPS ** (2 / 3) if name == "finite difference" else 13 * 10 * EPS
    assert relative_error(matrix, ridge.hessian()) <= bound


@pytest.mark.slow
def test_chunks_and_groups_change_nothing(monkeypatch, x64):
    params, inputs = problem()
    whole = spectra.dense_hessian(network, params, inputs)
    monkeypatch.setattr(hessian, "CHUNK", 4)  # does not divide the leaves of 20, 15 and 6
    monkeypatch.setattr(hessian, "MAX_GROUPS", 4)  # some leaves share a group
    jax.clear_caches()
    split = spectra.dense_hessian(network, params, inputs)
    np.testing.assert_allclose(split, whole, rtol=0, atol=100 * EPS * float(jnp.abs(whole).max()))


@pytest.mark.parametrize(
    "make",
    slow_but([spectra.HessianOperator, spectra.GradientCovarianceOperator], spectra.HessianOperator),
)
def test_no_more_columns_side_by_side_than_memory_holds_activations_of(make, monkeypatch, x64):
    """Half of what is free, the largest power of two, 32 at most on a CPU and one at least; the matrix is the
    same."""
    op = make(network, *problem())
    whole, held, found = op.as_matrix(), op.evaluated_bytes(), {}
    for name, free in {"none": 0, "three": 7 * held, "many": 10**4 * held}.items():
        monkeypatch.setattr(dense.host, "available_bytes", lambda device=None, free=free: free)
        found[name] = dense.in_flight(op)
        np.testing.assert_allclose(
            op.as_matrix(memory_limit=2**30), whole, rtol=0, atol=100 * EPS * float(jnp.abs(whole).max())
        )
    most = dense.CACHED if jax.default_backend() == "cpu" else dense.IN_FLIGHT
    assert found == {"none": 1, "three": 2, "many": most}
    monkeypatch.setattr(dense, "CACHE", 9 * held)  # beyond which memory is read again and again
    assert dense.in_flight(op) == (8 if most == dense.CACHED else most)


@pytest.mark.slow
def test_columns_share_each_pass_over_a_stream(x64):
    """The matrix of a stream took a pass for every column."""
    params, inputs = problem()
    passes = []

    def batches():
        passes.append(None)
        yield inputs[:4]
        yield inputs[4:]

    op = spectra.GradientCovarianceOperator(network, params, batches)
    passes.clear()
    matrix = op.as_matrix()
    assert len(passes) < 10 < op.size  # some look at the data; all columns are in flight at once
    whole = spectra.GradientCovarianceOperator(network, params, inputs).as_matrix()
    np.testing.assert_allclose(matrix, whole, rtol=0, atol=100 * EPS * float(jnp.abs(whole).max()))


@pytest.mark.parametrize(
    ("sizes", "edges"),
    [
        ((2352, 12, 144, 12, 120, 10), [0, 6]),  # 2352 · 298 entries are fewer than a million
        ((2000, 10, 2000), [0, 2, 3]),  # 2010 · 2000, as many as a cut after the first; no second one
        ((4000, 100, 4000, 100, 4000), [0, 2, 3, 5]),  # 8100 · 4100, then 4100 · 4000
        ((1000,) * 16, list(range(0, 17, 2))),  # no more than eight
        ((5000,), [0, 1]),
    ],
)
def test_columns_are_cut_where_symmetry_saves_most(sizes, edges, monkeypatch):
    monkeypatch.setattr(hessian, "WORTH", 2**20)
    assert hessian._edges([0, *itertools.accumulate(sizes)]) == edges


@pytest.mark.slow
def test_only_blocks_on_and_below_the_diagonal_are_differentiated(x64):
    rng = np.random.default_rng(1)
    params = {f"fc{i}": jnp.asarray(rng.standard_normal((8, 8))) for i in range(4)}
    inputs = jnp.asarray(rng.standard_normal((32, 8)))

    def deep(params, x):
        for name in sorted(params):
            x = jnp.tanh(x @ params[name])
        return jnp.mean(x**2)

    op = spectra.HessianOperator(deep, params, inputs)

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile(OPTIMISED).cost_analysis()["flops"]

    first, last = (
        flops(lambda op, i, a=a: hessian._column(op, a, a + 1, i), op, jnp.int32(0)) for a in (0, 3)
    )
    # Columns of the last layer enter and leave the network there: of its 4 layers they pass one.
    assert last < 0.6 * first


def test_memory_limit_says_what_is_needed_and_what_works_instead():
    big = jnp.zeros(200_000)
    with pytest.raises(spectra.MemoryLimitError, match=r"order 200,000 needs .* GiB.*eigsh, slq"):
        spectra.dense_hessian(lambda p, x: jnp.sum(p**2), big, None)
    with pytest.raises(spectra.MemoryLimitError, match=r"limit of 1\.0 KiB"):
        spectra.dense_hessian(network, *problem(jnp.float32), memory_limit=1024)


def test_bad_input_raises():
    params, inputs = problem(jnp.float32)
    with pytest.raises(spectra.SpectraError, match="structure='rows'"):
        spectra.dense_hessian(network, params, inputs, structure="rows")
    with pytest.raises(spectra.NonFiniteError):
        spectra.dense_hessian(lambda p, x: jnp.sum(jnp.sqrt(p - 1.0)), jnp.ones(3), None)


@pytest.mark.slow
def test_inside_jit(x64):
    params, inputs = problem()
    outside = spectra.dense_hessian(network, params, inputs)
    inside = jax.jit(lambda p, x: spectra.HessianOperator(network, p, x).as_matrix())(params, inputs)
    np.testing.assert_allclose(inside, outside, rtol=0, atol=100 * EPS * float(jnp.abs(outside).max()))


@pytest.mark.slow
def test_ten_thousand_parameters_fit():
    n = 10_000
    rng = np.random.default_rng(2)
    params = {"w": jnp.asarray(rng.standard_normal((99, 100)) / 10, jnp.float32), "v": jnp.ones(100) / 100}
    inputs = jnp.asarray(rng.standard_normal((64, 99)), jnp.float32)
    loss = lambda p, x: jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"] - 1.0) ** 2)  # noqa: E731
    op = spectra.HessianOperator(loss, params, inputs)
    matrix = op.as_matrix()
    assert matrix.shape == (n, n)
    assert bool((matrix == matrix.T).all())
    v = jnp.asarray(rng.standard_normal(n), jnp.float32)
    # Two float32 sums over n terms, in different orders.
    assert relative_error(matrix @ v, op @ v) <= 1e-7 * np.sqrt(n)


@jax.custom_jvp
def scaled(x, by):
    """tanh x, with a derivative that is not its own: what depends on `by` is missing from the value."""
    del by
    return jnp.tanh(x)


@scaled.defjvp
def _(values, tangents):
    x, by = values
    return scaled(x, by), tangents[0] * (1 + jnp.sum(by**2))


def one_sided(params, x):
    return jnp.mean((jnp.tanh(x @ scaled(params["a"], params["b"])) @ params["b"] - 1) ** 2)


DENSE = {
    "matrix": lambda op: op.as_matrix(),
    "condition number": lambda op: spectra.condition_number(op, key=jax.random.key(0)),
    "report": lambda op: spectra.spectrum(op, key=jax.random.key(0)),
    "smallest": lambda op: spectra.eigsh(op, 2, which="SM", key=jax.random.key(0)),
}


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("name", slow_but(DENSE, "matrix", "condition number"))
def test_derivatives_that_are_no_hessian_are_refused(name, groups, monkeypatch):
    """A derivative of one's own need not be that of any function; of two groups one is multiplied once."""
    monkeypatch.setattr(hessian, "MAX_GROUPS", groups)
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"a": jax.random.normal(keys[0], (5, 4)), "b": jax.random.normal(keys[1], (4,))}
    op = spectra.HessianOperator(one_sided, params, jax.random.normal(keys[2], (20, 5)))
    with pytest.raises(spectra.NotSymmetricError, match="not symmetric"):
        DENSE[name](op)
