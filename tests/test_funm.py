"""Functions of an operator applied to vectors, against dense float64 eigendecompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from cases import SHARP, rotation, slow_but

import spectra
from spectra import Status
from spectra.krylov import function_bounds, function_run

M = 120
FUNCTIONS = {
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "inv_sqrt": lambda x: 1 / np.sqrt(x),
    "inv": lambda x: 1 / x,
    "sign": np.sign,
    "abs": np.abs,
}
SPECTRA = {
    "bulk": np.linspace(0.5, 3.0, M),
    "decaying": np.geomspace(1e-2, 1.0, M),
    "outliers": np.concatenate([np.linspace(0.1, 1.0, M - 3), [3.0, 8.0, 20.0]]),
    "both signs": np.concatenate([np.linspace(-2.0, -0.5, 40), np.linspace(0.3, 3.0, M - 40)]),
}
SIDES = {"both signs": [(-2.1, -0.4), (0.2, 3.1)]}


def planted(values, dtype):
    q = rotation(len(values))
    a = jnp.asarray((q * values) @ q.T, dtype)
    return spectra.MatrixOperator((a + a.T) / 2)


def dense(op, f, v):
    values, vectors = np.linalg.eigh(np.asarray(op.matrix, np.float64))
    return vectors @ (f(values) * (vectors.T @ np.asarray(v, np.float64)).T).T


def vector():
    return np.random.default_rng(0).standard_normal(M)


@pytest.mark.parametrize("scale", [2.0**-700, 2.0**1000])
def test_a_function_of_any_size_has_the_bound_of_its_unit(scale):
    """Squares of f are neither 0 nor infinite: the bound of 1e-200 exp was 1e-307, and 1e155 x warned."""
    with jax.enable_x64(True):
        op, v = planted(SPECTRA["bulk"], jnp.float64), jnp.asarray(vector())
        for steps in (10, 40):
            one = spectra.funm(op, np.exp, v, num_steps=steps)
            found = spectra.funm(op, lambda x: scale * np.exp(x), v, num_steps=steps)
            assert (found.status, found.error_bound) == (one.status, pytest.approx(scale * one.error_bound))
            error = np.asarray(found.value) / scale - dense(op, np.exp, v)
            assert np.linalg.norm(error) <= found.error_bound / scale


@SHARP
@pytest.mark.parametrize("spectrum", slow_but(SPECTRA, "decaying", "both signs"))
def test_the_bound_holds(spectrum, dtype):
    """At every length, with ends that are given and ends that are found; finite where given."""
    op, v = planted(SPECTRA[spectrum], dtype), jnp.asarray(vector(), dtype)
    least = float(np.linalg.eigvalsh(np.asarray(op.matrix, np.float64))[0])
    bounds = SIDES.get(spectrum, (0.99 * least, None))
    for name, f in FUNCTIONS.items():
        if spectrum == "both signs" and name in ("log", "sqrt", "inv_sqrt"):
            continue
        truth = dense(op, f, v)
        for steps in (16, 48):
            for given in (None, bounds):
                found = spectra.funm(
                    op, name, v, num_steps=48, tol=10.0**-steps if steps < 48 else 0, bounds=given
                )
                error = np.linalg.norm(np.asarray(found.value, np.float64) - truth)
                assert error <= found.error_bound, (name, steps, given)
                assert given is None or np.isfinite(found.error_bound), name


def test_the_bound_is_not_wide(x64):
    """The worst eigenvalue has all of q: the bound exceeds the truth by how q is spread, √n or so."""
    op, v = planted(SPECTRA["bulk"], jnp.float64), vector()
    for name in ("sqrt", "exp", "inv"):
        found = spectra.funm(op, name, v, num_steps=8, tol=0, bounds=(0.5, 3.0))
        error = np.linalg.norm(np.asarray(found.value) - dense(op, FUNCTIONS[name], v))
        assert found.error_bound <= 3 * np.sqrt(M) * error, name


@pytest.mark.slow
def test_the_square_root_squares_to_the_operator(x64):
    op, v = planted(SPECTRA["decaying"], jnp.float64), vector()
    options = {"bounds": (0.0099, None), "tol": 1e-10}
    half = spectra.funm(op, "sqrt", v, **options)
    whole = spectra.funm(op, "sqrt", half.value, **options)
    assert half.status is whole.status is Status.CONVERGED
    assert half.num_steps <= M
    error = np.linalg.norm(np.asarray(whole.value) - np.asarray(op.matrix) @ v)
    assert error <= whole.error_bound + half.error_bound  # |√H| <= 1


@pytest.mark.slow
def test_a_users_function_and_several_vectors():
    op = planted(SPECTRA["both signs"], jnp.float32)
    columns = np.random.default_rng(1).standard_normal((M, 2)).astype(np.float32)
    found = spectra.funm(op, lambda x: x / (1 + x**2), columns)
    assert found.value.shape == (M, 2)
    errors = np.linalg.norm(np.asarray(found.value) - dense(op, lambda x: x / (1 + x**2), columns), axis=0)
    assert (errors <= found.error_bound).all()
    assert found.status is Status.CONVERGED


def columns():
    """Random ones, one that depends on another, one that nearly does, and zero."""
    b = np.random.default_rng(2).standard_normal((M, 6))
    b[:, 2], b[:, 4] = 1e-6 * b[:, 0], 0
    b[:, 3] = b[:, 1] + 1e-7 * b[:, 3]
    return b


@SHARP
def test_several_vectors_share_one_krylov_space(dtype):
    """Each is as right as its bound says, and all together take n products at most: one by one more."""
    op, b = planted(SPECTRA["decaying"], dtype), np.asarray(jnp.asarray(columns(), dtype), np.float64)
    for name, steps in (("sqrt", 8), ("inv", 128), ("log", 12)):
        options = {"bounds": (0.0099, 1.01), "tol": 1e-6, "num_steps": min(steps, M)}
        found = spectra.funm(op, name, b, **options)
        errors = np.linalg.norm(np.asarray(found.value, np.float64) - dense(op, FUNCTIONS[name], b), axis=0)
        assert (errors <= found.error_bound).all(), name
        assert found.num_matvecs <= M
        assert found.error_bound[4] == 0
        assert steps > M or (found.status is Status.BUDGET_EXHAUSTED and found.num_steps == steps)
    alone = spectra.funm(op, "inv", b[:, 1], bounds=(0.0099, 1.01), tol=1e-6)
    assert (
        3 * alone.num_matvecs
        > M
        >= spectra.funm(op, "inv", b[:, [0, 1, 5]], bounds=(0.0099, 1.01)).num_matvecs
    )


@pytest.mark.slow
def test_more_vectors_than_a_block_has(monkeypatch):
    op, b = planted(SPECTRA["bulk"], jnp.float32), columns().astype(np.float32)
    monkeypatch.setattr(function_run, "WIDEST", 4)
    found = spectra.funm(op, "sqrt", b, bounds=(0.49, 3.01))
    errors = np.linalg.norm(np.asarray(found.value, np.float64) - dense(op, np.sqrt, b), axis=0)
    assert (errors <= found.error_bound).all()


@pytest.mark.slow
def test_a_block_inside_jit_and_its_derivative(x64):
    """√(t A) = √t √A, so that the derivative at one is half of the value."""
    op, b = planted(SPECTRA["bulk"], jnp.float64), jnp.asarray(columns()[:, :2])

    def form(t, steps):
        return jnp.sum(b * spectra.funm(t * op, "sqrt", b, num_steps=steps).value)

    truth = np.sum(np.asarray(b) * dense(op, np.sqrt, b))
    value, slope = jax.jit(jax.value_and_grad(form), static_argnums=1)(1.0, 16)
    # κ = 6: 16 steps of Lanczos, a rule of degree 31, are off by about ((√κ - 1) / (√κ + 1))^32 = 1e-12.
    np.testing.assert_allclose([value, slope], [truth, truth / 2], rtol=1e-10)
    inside = jax.jit(lambda b: spectra.funm(op, "sqrt", b, num_steps=60).value)(jnp.asarray(columns()))
    np.testing.assert_allclose(inside, dense(op, np.sqrt, columns()), rtol=0, atol=1e-10)


SMALL, WEIGHTS = 24, np.random.default_rng(4).standard_normal((24, 3))
LEVELS, AXES = np.linspace(0.5, 3.0, 24), rotation(24)


def dependent():
    """Three vectors each: what a Krylov space of their own leaves no trace of."""
    b = np.random.default_rng(3).standard_normal((SMALL, 3))
    zero, equal, close, axes = b.copy(), b.copy(), b.copy(), b.copy()
    zero[:, 1] = 0
    equal[:, 2] = equal[:, 0]
    close[:, 2] = 1e-6 * (close[:, 0] - close[:, 1])
    axes[:, :2] = AXES[:, [3, 7]]
    return {"zero": zero, "equal": equal, "dependent": close, "eigenvectors": axes, "none": 0 * b}


@jax.jit
@jax.value_and_grad
def of_root(arguments):
    matrix, b, power = arguments
    op = spectra.MatrixOperator((matrix + matrix.T) / 2)
    found = spectra.funm(op, lambda x: x**power, b, num_steps=SMALL)
    return jnp.sum(WEIGHTS * jnp.sin(found.value))


@pytest.mark.parametrize("name", dependent())
def test_derivatives_by_zero_and_dependent_vectors_and_eigenvectors(name, x64):
    """In the matrix, the vectors and the function, against central differences of dense NumPy."""
    rng, b = np.random.default_rng(5), dependent()[name]
    a, step = (AXES * LEVELS) @ AXES.T, rng.standard_normal((SMALL, SMALL))
    step, move = (step + step.T) / SMALL, rng.standard_normal(b.shape)

    def dense(t):
        values, vectors = np.linalg.eigh(a + t * step)
        root = (vectors * values ** (0.5 + t)) @ vectors.T
        return np.sum(WEIGHTS * np.sin(root @ (b + t * move)))

    value, (by_matrix, by_vectors, by_power) = of_root((jnp.asarray(a), jnp.asarray(b), jnp.asarray(0.5)))
    along = np.sum(by_matrix * step) + np.sum(by_vectors * move) + by_power
    h = 1e-5
    # h² of a third derivative, and rounding over h, of a form of size one.
    np.testing.assert_allclose(along, (dense(h) - dense(-h)) / (2 * h), rtol=0, atol=1e-7)
    np.testing.assert_allclose(value, dense(0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "order"), [((1, 2, 3, 5, 7, 9), 2), ((1, 1 + 1e-9, 3, 5, 7, 9), 1)], ids=["apart", "close"]
)
def test_derivatives_where_a_space_is_exhausted_and_eigenvalues_are_close(values, order, x64):
    """exp of [[A, S, 0], [0, A, S], [0, 0, A]] holds exp(A + s S) in its first row: value, slope, half of
    the second derivative. The vector spans three eigenvectors, those of values that are close among them."""
    rng, n = np.random.default_rng(6), len(values)
    q = rotation(n)
    a, move = (q * np.array(values)) @ q.T, rng.standard_normal((n, n))
    move, v, w = (move + move.T) / n, q[:, :3] @ [1.0, 2.0, 3.0], rng.standard_normal(n)

    def form(s):
        op = spectra.MatrixOperator(a + s * move)
        return w @ spectra.funm(op, "exp", v, num_steps=n).value

    row = scipy.linalg.expm(np.kron(np.eye(3), a) + np.kron(np.eye(3, k=1), move))[:n].reshape(n, 3, n)
    truth = order * (w @ row[:, order] @ v)
    derivative = jax.grad(form) if order == 1 else jax.grad(jax.grad(form))
    # Quotients of Ritz values, one apart, of products of numbers up to e^9.
    assert abs(float(jax.jit(derivative)(0.0)) - truth) <= 1e-13 * np.exp(max(values)) * n


@pytest.mark.slow
@pytest.mark.parametrize("inside", [lambda f: f, jax.jit], ids=["outside", "inside jit"])
def test_forward_mode_is_refused(inside):
    def total(t):
        return spectra.funm(spectra.MatrixOperator(t * jnp.eye(3)), jnp.exp, jnp.ones(3)).value.sum()

    for derivative in (jax.jacfwd(total), lambda t: jax.jvp(total, (t,), (1.0,))[1]):
        with pytest.raises(spectra.SpectraError, match="in reverse mode only"):
            inside(derivative)(1.0)


@pytest.mark.slow
def test_a_vector_of_zeros_by_itself(x64):
    """f may have a pole where no eigenvalue is: it counts for nothing."""
    op = planted(SPECTRA["bulk"], jnp.float64)
    assert not np.asarray(
        jax.jit(lambda v: spectra.funm(op, "inv", v, num_steps=4).value)(jnp.zeros(M))
    ).any()


@pytest.mark.slow
def test_a_tree_and_an_exhausted_space():
    """x -> 2 x on every leaf: one step is exact, and says so."""
    op = spectra.FunctionOperator(
        lambda v: jax.tree.map(lambda x: 4.0 * x, v), {"a": jnp.ones(3), "b": jnp.ones(())}
    )
    v = {"a": jnp.arange(3.0), "b": jnp.asarray(2.0)}
    found = spectra.funm(op, "sqrt", v)
    assert found.status is Status.INVARIANT
    np.testing.assert_allclose(found.value["a"], 2.0 * v["a"], rtol=1e-5)


@pytest.mark.slow
def test_what_is_not_defined_is_refused():
    op = planted(SPECTRA["both signs"], jnp.float32)
    with pytest.raises(spectra.SpectraError, match=r"sqrt is not finite at the Ritz value -1\.9"):
        spectra.funm(op, "sqrt", vector())
    with pytest.raises(spectra.SpectraError, match="outside of the bounds"):
        spectra.funm(op, "exp", vector(), bounds=(0.0, 1.0))
    with pytest.raises(spectra.SpectraError, match="f='cosh'"):
        spectra.funm(op, "cosh", vector())
    with pytest.raises(spectra.SpectraError, match="beyond float32"):
        spectra.funm(100.0 * op, "exp", vector())


@pytest.mark.slow
def test_a_pole_between_the_eigenvalues_is_no_bound():
    """1/x is not bounded on an interval across zero, whatever its samples are."""
    op = planted(SPECTRA["both signs"], jnp.float32)
    assert spectra.funm(op, "inv", vector(), num_steps=16).error_bound == np.inf
    assert spectra.funm(op, lambda x: 1 / (x + 0.1), vector(), num_steps=16).error_bound == np.inf


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sign", "inv", "step"])
def test_the_bound_holds_where_rounding_moves_eigenvalues_across_a_step_or_pole(name):
    """Rounding turns zeros into ±1e-9, and vectors of small eigenvalues into those of one 10⁴ as large."""
    rng, n = np.random.default_rng(0), 12
    f = {"sign": np.sign, "inv": lambda x: 1 / x, "step": lambda x: (x > 0.3) * 1.0}[name]
    small = np.linspace(0.1, 1, 11) if name == "step" else np.linspace(0.5, 1, 6)
    values = np.r_[1e4, small] if name == "step" else np.r_[np.zeros(6), small]
    for _ in range(4):
        q = np.linalg.qr(rng.standard_normal((n, n)))[0]
        half = np.tril((q * values) @ q.T)
        matrix = (half + np.tril(half, -1).T).astype(np.float32)
        v = rng.standard_normal(n).astype(np.float32)
        found = spectra.funm(spectra.MatrixOperator(jnp.asarray(matrix)), f, jnp.asarray(v))
        theta, u = np.linalg.eigh(matrix.astype(float))
        assert np.linalg.norm(found.value - (u * f(theta)) @ (u.T @ v)) <= found.error_bound
        assert name != "step" or found.error_bound < np.linalg.norm(v)


@pytest.mark.parametrize("name", ["bump", "step", "kink"])
def test_the_bound_holds_where_f_is_about_a_bulk_far_below_the_largest_eigenvalues(name, x64):
    """The bulk is 1e-8 of the spectrum: no sample was in it, and errors were up to 250 times the bound."""
    rng, n = np.random.default_rng(1), 60
    values = np.r_[np.full(3, 1e8), rng.uniform(0.5, 1.5, n - 3)]
    q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    half = np.tril((q * values) @ q.T)
    matrix = half + np.tril(half, -1).T
    theta, u = np.linalg.eigh(matrix)
    op, v = spectra.MatrixOperator(jnp.asarray(matrix)), rng.standard_normal(n)
    for center in np.linspace(0.6, 1.4, 4):
        f = {
            "bump": lambda x, c=center: np.exp(-(((x - c) / 0.1) ** 2)),
            "step": lambda x, c=center: (x > c) * 1.0,
            "kink": lambda x, c=center: np.abs(x - c) / (1 + np.abs(x - c)),
        }[name]
        for steps in (10, 14, 18):
            found = spectra.funm(op, f, jnp.asarray(v), num_steps=steps, tol=0, bounds=(-1e6, 1.01e8))
            error = np.linalg.norm(found.value - (u * f(theta)) @ (u.T @ v))
            assert error <= found.error_bound <= 2.1 * np.linalg.norm(v)


@pytest.mark.parametrize(
    ("g", "bounds"),
    [
        (lambda x: 1 / x, (np.inf, np.inf)),  # one sample is beside the pole by chance
        (lambda x: 1 / (1 + (1e3 * x) ** 2), (1.0, 1.5)),  # and half of what samples differ by
        (lambda x: np.where(x > 0, 1.0, 0.0), (1.0, 1.5)),
    ],
    ids=["pole", "peak", "step"],
)
def test_samples_find_the_largest_value_or_a_pole(g, bounds):
    x = np.array([-1.0, 1e-9, 1.0])
    low, high = bounds
    found = function_bounds._largest(lambda x: (x, g(x)), x, g(x))
    assert low <= found <= high


@pytest.mark.slow
def test_the_same_inside_jit():
    op, v = planted(SPECTRA["bulk"], jnp.float32), jnp.asarray(vector(), jnp.float32)
    inside = jax.jit(lambda v: spectra.funm(op, "sqrt", v, num_steps=16).value)(v)
    outside = spectra.funm(op, "sqrt", v, num_steps=16, tol=0).value
    np.testing.assert_allclose(inside, outside, rtol=0, atol=1e-5 * float(np.abs(outside).max()))


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [5, (1.0,), (), ("a", "b"), (0.0, np.nan), (2.0, 1.0), [(0, 1), (2,)]])
def test_bounds_that_are_no_intervals(bounds):
    with pytest.raises(spectra.SpectraError, match=r"bounds=.*: use \(a, b\) with a <= b"):
        spectra.funm(spectra.MatrixOperator(np.eye(3)), "exp", np.ones(3), bounds=bounds)
