"""Condition numbers: published matrices, closed forms, loops over backward passes, and honest bounds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import readme_code
import scipy.linalg
from cases import diagonal, planted, rotation

import spectra

KEY = jax.random.key(0)
EPS = np.finfo(float).eps


# W. Gautschi and others; spectral condition numbers of Hilbert matrices to the digits published.
HILBERT = {2: 19.281, 3: 524.06, 4: 1.5514e4, 5: 4.7661e5, 6: 1.4951e7, 7: 4.7537e8, 8: 1.5258e10}


@pytest.mark.parametrize("n", HILBERT)
def test_hilbert_matrices(n, x64):
    result = spectra.condition_number(spectra.MatrixOperator(scipy.linalg.hilbert(n)), key=KEY)
    # Rounding of an eigenvalue is n eps |H|: relative to the smallest, n eps κ. Five digits published.
    assert result.value == pytest.approx(HILBERT[n], rel=5e-5 + n * EPS * HILBERT[n])
    assert result.value == result.effective
    assert not result.is_lower_bound
    assert result.rank == n


@pytest.mark.parametrize("rho", [0.6, 0.8, 0.9, 1.0])
def test_strakos_matrices(rho, x64):
    n, low, high = 24, 0.1, 100.0
    i = np.arange(1, n + 1)
    eigenvalues = low + (i - 1) / (n - 1) * (high - low) * rho ** (n - i)
    result = spectra.condition_number(spectra.MatrixOperator(planted(eigenvalues)), key=KEY)
    assert result.value == pytest.approx(high / low, rel=10 * n * EPS * high / low)


def test_a_single_zero_is_counted_once():
    """17 (9 / 17 - 8 / 17) is above 1 by rounding, and no second eigenvalue is known from that."""
    op = diagonal(np.linspace(-1.0, 1.0, 17))
    result = spectra.condition_number(op, key=KEY, method="krylov", num_steps=17, num_probes=4)
    assert (result.nullity, result.rank, result.nullity_interval) == (1, 16, (1.0, 1.0, 1.0))


@pytest.mark.parametrize("cut", [None, 1e-3])
def test_what_the_noise_allows_is_no_more_than_the_truth(cut):
    """2^-23 is the noise of float32 beside one: of 8388608, "above 8.4e+06" was printed."""
    smallest = 2.0**-23 if cut is None else cut * (1 - 1e-6)
    op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, smallest], jnp.float32)))
    result = spectra.condition_number(op, key=KEY, rank_tol=cut)
    assert result.value == np.inf
    stated = float(re.search(r"above ([^)]*)\)", str(result))[1])
    assert 0.3 / smallest <= stated <= 1 / smallest


def data_matrix(size, seed):
    rotations = [rotation(size, seed + i) for i in (0, 1)]
    return rotations[0] @ np.diag(np.linspace(1.0, 10.0, size)) @ rotations[1]


def two_layer_loss(params, batch):
    x, y = batch
    return 0.5 * jnp.sum((y - params["W2"] @ params["W1"] @ x) ** 2)


def trained(width, size, seed):
    """Gradient descent on both layers, then least squares for the last one, twice to round less."""
    rng = np.random.default_rng(seed)
    batch = (jnp.asarray(data_matrix(size, seed)), jnp.asarray(rng.standard_normal((size, size))))
    params = {
        "W1": jnp.asarray(rng.standard_normal((width, size)) / 10),
        "W2": jnp.asarray(rng.standard_normal((size, width)) / 10),
    }
    start = two_layer_loss(params, batch)
    gradient = jax.jit(jax.grad(two_layer_loss))
    for _ in range(100):
        params = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient(params, batch))
    for _ in range(2):
        features = params["W1"] @ batch[0]
        params["W2"] += (batch[1] - params["W2"] @ features) @ jnp.linalg.pinv(features)
    return params, batch, float(two_layer_loss(params, batch) / start)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "size", "seed"), [(100, 5, 0), (100, 5, 1), (40, 4, 2)])
def test_two_layer_linear_network(width, size, seed, x64):
    params, batch, relative_loss = trained(width, size, seed)
    assert relative_loss < 1e-20
    features = np.asarray(params["W1"]) @ np.asarray(batch[0])
    gram = features @ features.T
    closed_form = np.kron(np.eye(size), gram)  # W2 is ravelled row by row
    column_by_column = np.arange(size * width).reshape(size, width).T.ravel()
    op = spectra.HessianOperator(two_layer_loss, params, batch).block("W2")
    assert op.size == size * width
    h = np.asarray(op.as_matrix())
    scale = np.linalg.norm(closed_form)
    assert np.linalg.norm(h - closed_form) <= 1e-9 * scale
    reordered = h[np.ix_(column_by_column, column_by_column)]
    assert np.linalg.norm(reordered - np.kron(gram, np.eye(size))) <= 1e-9 * scale
    nonzero = np.linalg.eigvalsh(gram)[-size:]
    dense = spectra.condition_number(op, key=KEY)
    krylov = spectra.condition_number(op, key=KEY, method="krylov")
    for result in (dense, krylov):
        assert result.value == np.inf
        assert result.effective == pytest.approx(nonzero[-1] / nonzero[0], rel=1e-9)
        assert not result.is_lower_bound
    assert dense.rank == size * size
    assert krylov.num_matvecs < op.size
    low, _, high = krylov.nullity_interval
    assert low <= dense.nullity <= high
    # The blocks of dense_hessian are in the same place.
    blocks = spectra.dense_hessian(two_layer_loss, params, batch, structure="blocks")
    np.testing.assert_allclose(blocks["W2"]["W2"].reshape(h.shape), h, rtol=0, atol=1e-12 * scale)


def test_each_layer_agrees_with_a_loop_over_backward_passes(x64):
    rng = np.random.default_rng(3)
    params = {
        f"Dense_{i}": {
            "kernel": jnp.asarray(rng.standard_normal((a, b))),
            "bias": jnp.asarray(rng.standard_normal(b)),
        }
        for i, (a, b) in enumerate([(3, 4), (4, 4), (4, 2)])
    }
    x = jnp.asarray(rng.standard_normal((30, 3)))

    def loss(params, x):
        for name in sorted(params):
            x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
        return jnp.mean(x**2)

    table = spectra.condition_number(spectra.HessianOperator(loss, params, x), key=KEY, per_layer=True)
    assert list(table) == ["Dense_0", "Dense_1", "Dense_2"]
    for name, result in table.layers.items():

        def gradient(layer, name=name):
            g = jax.grad(loss)(params | {name: layer}, x)[name]
            return jnp.concatenate([g["bias"].ravel(), g["kernel"].ravel()])

        n = gradient(params[name]).size
        backward = jax.jit(jax.grad(lambda layer, i: gradient(layer)[i]))
        passes = [backward(params[name], i) for i in range(n)]
        rows = [np.concatenate([p["bias"].ravel(), p["kernel"].ravel()]) for p in passes]
        eigenvalues = np.abs(np.linalg.eigvalsh(np.array(rows)))
        kappa = eigenvalues.max() / eigenvalues.min()
        assert result.size == n
        assert result.value == pytest.approx(kappa, rel=10 * n * EPS * kappa)
    assert "Dense_1" in repr(table)
    assert "<table>" in table._repr_html_()


def test_shift_and_rank_tolerance(x64):
    op = diagonal(np.array([-2.0, 0.0, 1e-5, 1.0, 4.0]))
    assert spectra.condition_number(op, key=KEY, shift=3.0).value == pytest.approx(7.0)
    loose = spectra.condition_number(op, key=KEY, rank_tol=1e-4)
    assert (loose.rank, loose.nullity, loose.effective) == (3, 2, pytest.approx(4.0))
    assert spectra.condition_number(op, key=KEY).effective == pytest.approx(4e5)


@pytest.mark.parametrize("kind", ["double", "cluster"])
def test_what_rounding_may_take_across_the_threshold_is_in_doubt(kind):
    """A double eigenvalue at the threshold is on both sides of it, to some roundings of |H|.

    Counted to the last one, the nullity was the true one in 18 % of 400 such matrices.
    """
    for seed in range(12):
        rng, values = np.random.default_rng(seed), np.geomspace(1e-1, 1.0, 60)
        away = rng.standard_normal() * np.ones(2) if kind == "double" else rng.standard_normal(8)
        values[: len(away)] = 1e-3 + 3e-8 * away
        matrix = (rotation(60, seed) * values) @ rotation(60, seed).T
        op = spectra.MatrixOperator(jnp.asarray((matrix + matrix.T) / 2))
        found = spectra.condition_number(op, key=KEY, rank_tol=1e-3)
        zero = values <= 1e-3
        assert found.nullity_interval.lower <= zero.sum() <= found.nullity_interval.upper <= len(away)
        assert found.smallest_interval.lower <= values[~zero].min() <= found.smallest_interval.upper
        low, _, high = found.effective_interval
        assert low <= 1 / values[~zero].min() <= high


def test_float32_says_that_it_is_a_lower_bound():
    hilbert = spectra.MatrixOperator(scipy.linalg.hilbert(8).astype(np.float32))
    result = spectra.condition_number(hilbert, key=KEY)
    assert result.is_lower_bound
    assert result.effective <= HILBERT[8]
    assert result.smallest_nonzero > result.noise_floor
    assert "at least" in repr(result)


def test_zero_matrix_and_identity(dtype):
    zero = spectra.condition_number(spectra.MatrixOperator(np.zeros((5, 5), dtype)), key=KEY)
    assert (zero.value, zero.rank, zero.largest) == (np.inf, 0, 0.0)
    one = spectra.condition_number(spectra.MatrixOperator(np.eye(5, dtype=dtype)), key=KEY)
    assert one.value == 1.0


LARGE = 2500
SPECTRA = {
    "definite": (np.linspace(1.0, 50.0, LARGE), 50.0, False),
    "negative definite": (-np.linspace(1.0, 50.0, LARGE), 50.0, False),
    "indefinite with a gap": (np.r_[np.linspace(-2, -1, 1200), np.linspace(0.5, 3, 1300)], 6.0, False),
    "dense around zero": (np.linspace(-1.0, 1.001, LARGE), 1.001 / 4e-4, True),
}


@pytest.mark.slow  # in test_bounds.py on smaller ones
@pytest.mark.parametrize("name", SPECTRA)
def test_large_operators_without_a_matrix(name, x64):
    entries, kappa, bound = SPECTRA[name]
    result = spectra.condition_number(diagonal(entries), key=KEY, method="krylov")
    assert result.method == "krylov"
    assert result.is_lower_bound is bound
    if bound:
        exact = np.abs(entries).max() / np.abs(entries).min()
        assert 1 < result.value <= exact * (1 + 1e-6)
        low, _, high = result.nullity_interval
        assert low == 0 < high
    else:
        # eigsh: |λ - θ| <= residual² / gap with residual 1e-4 |H|, relative to the smallest.
        assert result.value == pytest.approx(kappa, rel=1e-3)
        assert result.nullity == 0


def test_large_singular_operator(x64):
    entries = np.r_[np.zeros(500), np.repeat([1.0, 2.0, 8.0], [500, 500, 1000])]
    result = spectra.condition_number(diagonal(entries), key=KEY, method="krylov")
    assert result.value == np.inf
    assert result.effective == pytest.approx(8.0)
    low, estimate, high = result.nullity_interval
    assert low <= 500 <= high
    assert 0 < high - low < 400
    assert result.nullity == estimate


@pytest.mark.parametrize("method", ["dense", "krylov"])
def test_scaling_changes_nothing_but_the_scale(method, x64):
    a = planted(np.repeat([0.0, 1.0, 3.0, 7.0], 12))
    one, other = (
        spectra.condition_number(spectra.MatrixOperator(c * a), key=KEY, method=method) for c in (1.0, 1e-6)
    )
    assert (one.rank, one.value) == (other.rank, other.value)
    assert other.effective == pytest.approx(one.effective, rel=1e-10)
    assert other.smallest_nonzero == pytest.approx(1e-6 * one.smallest_nonzero, rel=1e-10)


def test_results_are_saved_and_loaded(tmp_path):
    result = spectra.condition_number(diagonal(np.arange(1.0, 6.0, dtype=np.float32)), key=KEY)
    assert spectra.load(spectra.save(result, tmp_path / "c")) == result


def test_bad_input_raises():
    op = diagonal(np.ones(4, np.float32))
    for arguments, words in [
        ({"method": "exact"}, "method="),
        ({"shift": np.nan}, "shift="),
        ({"rank_tol": 2.0}, "rank_tol="),
    ]:
        with pytest.raises(spectra.SpectraError, match=words):
            spectra.condition_number(op, key=KEY, **arguments)
    with pytest.raises(spectra.SpectraError, match="outside jit"):
        jax.jit(lambda v: spectra.condition_number(spectra.MatrixOperator(v), key=KEY).value)(jnp.eye(3))


@pytest.mark.slow  # every page is run with the docs
def test_the_page_on_condition_numbers_runs(pytestconfig, capsys):
    readme_code.main([str(pytestconfig.rootpath / "docs" / "condition-numbers.md")])
    assert "blocks of" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["dense", "krylov"])
def test_a_matrix_of_zeros_has_no_condition_number_over_its_range(method):
    op = spectra.FunctionOperator(lambda v: 0 * v, jnp.zeros(40))
    found = spectra.condition_number(op, method=method, key=jax.random.key(0))
    rows = dict(found.rows())
    assert rows["over the numerical range"] == rows["smallest |λ| above zero"] == "none"
    assert "-0" not in repr(found)
    assert found.cells()[4] == "none"
    report = spectra.spectrum(op, key=jax.random.key(0), num_steps=5, num_probes=2)
    assert dict(report.rows())["effective condition number"] == "none"
