"""What the peers' own test suites ask of matrix functions, solves and Kronecker factors, asked here.

One row for each property: whose it is, what it says, and a function that returns what was found, what it
should be, and the tolerance. Truth is SciPy's in float64, or a closed form. All matrices are of one order.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from cases import relative_error, rotation
from networks import Network, cross_entropy, model_fn

import spectra

N, KAPPA, KEY = 24, 50.0, jax.random.key(0)
RNG = np.random.default_rng(7)
Q = rotation(N)
DEFINITE = (Q * np.geomspace(1.0, KAPPA, N)) @ Q.T
INDEFINITE = (Q * np.geomspace(1.0, KAPPA, N) * np.where(np.arange(N) % 3, 1, -1)) @ Q.T
SINGULAR = (Q * np.where(np.arange(N) < 4, 0.0, np.geomspace(1.0, KAPPA, N))) @ Q.T
MOVE = (lambda a: (a + a.T) / 2)(RNG.standard_normal((N, N)))
B, V = RNG.standard_normal((N, 3)), RNG.standard_normal(N)
LEFT, RIGHT = DEFINITE[:4, :4], DEFINITE[6:12, 6:12]  # principal blocks are definite as well
TOL = 1e-12
SOLVED = 10 * KAPPA * TOL
"""Of x: residuals of TOL |b|, amplified by κ, and as much again in what is compared with them, times five."""
COMPUTED = 100 * KAPPA * N * np.finfo(float).eps
"""Of functions that are exact after n steps: n products of rounding eps |A| each, with derivatives of f up to
100 κ |f| / |A| on the spectrum."""
solve = functools.partial(spectra.solve, tol=TOL)


def op(matrix):
    return spectra.MatrixOperator(matrix)


def of(matrix, f):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * f(values)) @ vectors.T


# matfree: decompositions, functions of matrices, and their derivatives.


def lanczos_compresses():
    found = spectra.lanczos(op(DEFINITE), V, 9)
    q = np.asarray(found.basis)
    return q @ DEFINITE @ q.T, np.asarray(found.matrix()), COMPUTED


def functions_are_the_dense_ones():
    names = {"exp": np.exp, "log": np.log, "inv_sqrt": lambda x: x**-0.5}
    scaled = DEFINITE / KAPPA
    found = [spectra.funm(op(scaled), name, V, tol=0).value for name in names]
    return np.stack(found), np.stack([of(scaled, f) @ V for f in names.values()]), COMPUTED


def quadratic_forms_have_frechet_derivatives():
    """d/dt vᵀ exp(A + t E) v = vᵀ L(A, E) v."""
    scaled = DEFINITE / KAPPA

    def form(t):
        return V @ spectra.funm(op(scaled + t * MOVE), "exp", V, num_steps=N).value

    frechet = scipy.linalg.expm_frechet(scaled, MOVE, compute_expm=False)
    return jax.grad(form)(0.0), V @ frechet @ V, COMPUTED


def a_determinant_has_the_inverse_as_derivative():
    def logdet(t):
        return spectra.logdet(op(DEFINITE + t * MOVE), key=KEY, num_steps=N, num_probes=N).value

    # Exact with n orthogonal probes only up to the spread of the estimate: compared with its own difference.
    h = 1e-4
    difference = (logdet(h) - logdet(-h)) / (2 * h)
    # h² times third derivatives of order one, and the rounding of the values over h.
    return jax.grad(logdet)(0.0), difference, 1e-6


def signs_see_a_diagonal_exactly():
    entries = np.arange(1.0, N + 1)
    found = spectra.trace(
        op(np.diag(entries)), method="hutchinson", probes="rademacher", num_matvecs=2, key=KEY
    )
    return found.value, entries.sum(), COMPUTED


def a_partial_cholesky_factor_preconditions():
    """Pivoted Cholesky of a low rank, as a metric for CG: the solution, in fewer products than without."""
    values = np.where(np.arange(N) < 6, 1e3, 1.0)
    matrix = (Q * values) @ Q.T
    rest, factor = matrix.copy(), []
    for _ in range(6):
        i = np.argmax(np.diag(rest))
        factor.append(rest[i] / np.sqrt(rest[i, i]))
        rest = rest - np.outer(factor[-1], factor[-1])
    low = np.stack(factor)
    inverse = np.linalg.inv(low.T @ low + np.eye(N))
    found = solve(op(matrix), V, method="cg", preconditioner=op((inverse + inverse.T) / 2))
    plain = solve(op(matrix), V, method="cg", preconditioner=op(np.diag(np.linspace(1, 2, N))))
    assert found.num_matvecs < plain.num_matvecs
    return found.x, np.linalg.solve(matrix, V), 10 * 1e3 * TOL  # as SOLVED, at κ = 1e3


# CoLA: structure.


def kronecker(x):
    return LEFT @ x @ RIGHT


def a_kronecker_product_is_solved_by_its_factors():
    x = V.reshape(4, 6)
    found = solve(spectra.FunctionOperator(kronecker, jnp.zeros((4, 6))), x).x
    return found, np.linalg.solve(LEFT, x) @ np.linalg.inv(RIGHT), KAPPA * SOLVED  # κ of a product of two


def roots_of_roots():
    root = spectra.funm(op(DEFINITE), "sqrt", V, tol=0, bounds=(0.9, None)).value
    return spectra.funm(op(DEFINITE), "sqrt", root, tol=0, bounds=(0.9, None)).value, DEFINITE @ V, COMPUTED


def inverse_roots_of_inverse_roots():
    root = spectra.funm(op(DEFINITE), "inv_sqrt", V, tol=0, bounds=(0.9, None)).value
    again = spectra.funm(op(DEFINITE), "inv_sqrt", root, tol=0, bounds=(0.9, None)).value
    return again, np.linalg.solve(DEFINITE, V), COMPUTED


def blocks_of_a_diagonal_are_solved_one_by_one():
    like = {"left": jnp.zeros(4), "right": jnp.zeros(6)}
    both = spectra.FunctionOperator(lambda v: {"left": LEFT @ v["left"], "right": RIGHT @ v["right"]}, like)
    found = solve(both, {"left": jnp.asarray(V[:4]), "right": jnp.asarray(V[4:10])}).x
    truth = np.append(np.linalg.solve(LEFT, V[:4]), np.linalg.solve(RIGHT, V[4:10]))
    return np.append(found["left"], found["right"]), truth, SOLVED


def exp_undoes_log():
    logarithm = of(DEFINITE, np.log)
    found = spectra.funm(op((logarithm + logarithm.T) / 2), "exp", V, tol=0).value
    return found, DEFINITE @ V, COMPUTED


def a_diagonal_and_a_low_rank_by_woodbury():
    entries, rows = np.linspace(1.0, 3.0, N), RNG.standard_normal((2, N))
    total = spectra.DiagonalOperator(jnp.asarray(entries)) + spectra.LowRankOperator(jnp.asarray(rows))
    d = 1 / entries
    small = np.linalg.inv(np.eye(2) + (rows * d) @ rows.T)
    return solve(total, V).x, d * V - d * (rows.T @ (small @ (rows @ (d * V)))), SOLVED


def a_multiple_has_the_inverse_of_the_number():
    return solve(-2.5 * op(DEFINITE), V).x, -np.linalg.solve(DEFINITE, V) / 2.5, SOLVED


# lineax: symmetric solves.


def every_method_solves(matrix, method):
    return solve(op(matrix), V, method=method).x, scipy.linalg.solve(matrix, V, assume_a="sym"), SOLVED


def a_singular_system_is_solved_in_the_range():
    return SINGULAR @ solve(op(SINGULAR), SINGULAR @ V, method="minres").x, SINGULAR @ V, SOLVED


def tangents_are_those_of_the_solution():
    """dx = A⁻¹ (db - dA x)."""

    def x(t):
        return solve(op(INDEFINITE + t * MOVE), V + t * B[:, 0], method="minres").x

    found = jax.jvp(x, (0.0,), (1.0,))[1]
    at = np.linalg.solve(INDEFINITE, V)
    return found, np.linalg.solve(INDEFINITE, B[:, 0] - MOVE @ at), KAPPA * SOLVED


def cotangents_are_those_of_the_inverse():
    """∂ wᵀA⁻¹b / ∂A = -A⁻¹w (A⁻¹b)ᵀ, and A⁻¹w for b."""
    w = B[:, 0]

    def form(matrix, b):
        return w @ solve(op(matrix), b, method="minres").x

    by_matrix, by_b = jax.grad(form, (0, 1))(jnp.asarray(INDEFINITE), jnp.asarray(V))
    left, right = np.linalg.solve(INDEFINITE, w), np.linalg.solve(INDEFINITE, V)
    return np.vstack([by_matrix, by_b]), np.vstack([-np.outer(left, right), left]), KAPPA * SOLVED


def batches_of_operators_are_solved_one_by_one():
    matrices = np.stack([DEFINITE, DEFINITE + np.eye(N), 2 * DEFINITE])
    found = jax.vmap(lambda matrix, b: solve(op(matrix), b, method="cg").x)(matrices, B.T)
    return found, np.linalg.solve(matrices, B.T[..., None])[..., 0], SOLVED


def an_inverse_as_preconditioner_takes_one_step():
    inverse = np.linalg.inv(DEFINITE)
    found = solve(op(DEFINITE), V, preconditioner=op((inverse + inverse.T) / 2))
    return np.append(found.x, found.num_matvecs), np.append(np.linalg.solve(DEFINITE, V), 2), SOLVED


def batches_are_solved_one_by_one():
    return (
        jax.vmap(lambda b: solve(op(DEFINITE), b, method="cg").x, 1, 1)(B),
        np.linalg.solve(DEFINITE, B),
        SOLVED,
    )


def a_start_at_the_solution_takes_no_step():
    x = np.linalg.solve(DEFINITE, V)
    found = spectra.solve(op(DEFINITE), V, x0=x, method="cg")
    return np.append(found.x, found.num_matvecs), np.append(x, 2), SOLVED  # the residual before and after


# curvlinops: Kronecker factors.


@functools.cache
def network():
    net = Network()
    return model_fn, cross_entropy, net.params(), (jnp.asarray(net.x), jnp.asarray(net.labels))


def damped_inverses_invert():
    own = spectra.EKFACOperator(*network())
    v = RNG.standard_normal(own.size)
    return own.inverse(0.1) @ (own.shift(0.1) @ v), v, COMPUTED


def eigenvalues_give_trace_determinant_and_norm():
    own = spectra.EKFACOperator(*network())
    dense, values = np.asarray(own.as_matrix()), np.asarray(own.eigenvalues())
    found = [own.trace(), own.logdet(0.1), np.linalg.norm(values)]
    sign, logdet = np.linalg.slogdet(dense + 0.1 * np.eye(own.size))
    return np.array(found), np.array([np.trace(dense), sign * logdet, np.linalg.norm(dense)]), COMPUTED


def the_correction_keeps_the_trace():
    return (
        spectra.EKFACOperator(*network()).trace(),
        np.trace(spectra.GGNOperator(*network()).as_matrix()),
        COMPUTED,
    )


def batches_of_any_size_are_one():
    *model, (x, labels) = network()
    batches = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    found = [cls(*model, batches).as_matrix() for cls in (spectra.KFACOperator, spectra.EKFACOperator)]
    whole = [cls(*network()).as_matrix() for cls in (spectra.KFACOperator, spectra.EKFACOperator)]
    return np.stack(found), np.stack(whole), COMPUTED


# xitorch: solves with shifts of their own, generalised pairs, second derivatives.


def each_column_has_its_shift():
    """A X - X E = B."""
    shifts = [-2.3, 0.5, 70.0]  # the first between eigenvalues
    found = [solve(op(DEFINITE), B[:, i], shift=-e, method="minres").x for i, e in enumerate(shifts)]
    x = np.stack(found, 1)
    return DEFINITE @ x - x * np.array(shifts), B, 10 * TOL


def each_column_has_its_shift_of_a_metric():
    """A X - M X E = B."""
    shifts, metric = [-2.3, 0.5, 70.0], np.diag(np.linspace(1.0, 3.0, N))
    systems = [op(DEFINITE) + (-e) * op(metric) for e in shifts]
    found = [solve(one, B[:, i], method="minres").x for i, one in enumerate(systems)]
    x = np.stack(found, 1)
    return DEFINITE @ x - metric @ x * np.array(shifts), B, 10 * TOL


def generalised_vectors_are_orthonormal_in_the_metric():
    pairs = spectra.eigsh(op(INDEFINITE), 3, which="LA", key=KEY, metric=op(DEFINITE), tol=1e-10)
    v = np.asarray(pairs.vectors)
    found = np.block([[v @ DEFINITE @ v.T, v @ INDEFINITE @ v.T]])
    truth = scipy.linalg.eigh(INDEFINITE, DEFINITE, eigvals_only=True)[-3:]
    # Residuals of 1e-10 |A|, twice κ in the metric.
    return found, np.block([[np.eye(3), np.diag(truth)]]), 2 * KAPPA**2 * 1e-10


def second_derivatives_of_a_solve():
    """d²/ds² bᵀ (A + s)⁻¹ b = 2 bᵀ (A + s)⁻³ b."""

    def form(s):
        return V @ solve(op(DEFINITE), V, shift=s, method="cg").x

    cubed = np.linalg.matrix_power(np.linalg.inv(DEFINITE), 3)
    return jax.grad(jax.grad(form))(0.0), 2 * V @ cubed @ V, KAPPA**2 * SOLVED


slow = pytest.mark.slow
PROPERTIES = [
    pytest.param("matfree", lanczos_compresses, marks=slow),
    pytest.param("matfree", functions_are_the_dense_ones, marks=slow),
    pytest.param("matfree", quadratic_forms_have_frechet_derivatives, marks=slow),
    pytest.param("matfree", a_determinant_has_the_inverse_as_derivative, marks=slow),
    pytest.param("matfree", signs_see_a_diagonal_exactly, marks=slow),
    pytest.param("matfree", a_partial_cholesky_factor_preconditions, marks=slow),
    pytest.param("CoLA", a_kronecker_product_is_solved_by_its_factors, marks=slow),
    pytest.param("CoLA", roots_of_roots, marks=slow),
    pytest.param("CoLA", a_multiple_has_the_inverse_of_the_number, marks=slow),
    pytest.param("CoLA", a_diagonal_and_a_low_rank_by_woodbury, marks=slow),
    pytest.param("CoLA", exp_undoes_log, marks=slow),
    ("CoLA", inverse_roots_of_inverse_roots),
    pytest.param("CoLA", blocks_of_a_diagonal_are_solved_one_by_one, marks=slow),
    *(
        pytest.param(
            "lineax", functools.partial(every_method_solves, sign * matrix, method), id=name, marks=marks
        )
        for name, sign, matrix, method, marks in (
            ("definite, auto", 1, DEFINITE, "auto", slow),
            ("definite, minres", 1, DEFINITE, "minres", slow),
            ("negative, auto", -1, DEFINITE, "auto", slow),
            ("indefinite, auto", 1, INDEFINITE, "auto", slow),
            ("indefinite, minres", 1, INDEFINITE, "minres", ()),
            ("indefinite, dense", 1, INDEFINITE, "dense", slow),
        )
    ),
    ("lineax", a_singular_system_is_solved_in_the_range),
    pytest.param("lineax", cotangents_are_those_of_the_inverse, marks=slow),
    pytest.param("lineax", batches_of_operators_are_solved_one_by_one, marks=slow),
    pytest.param("lineax", an_inverse_as_preconditioner_takes_one_step, marks=slow),
    pytest.param("lineax", tangents_are_those_of_the_solution, marks=slow),
    pytest.param("lineax", a_start_at_the_solution_takes_no_step, marks=slow),
    pytest.param("lineax", batches_are_solved_one_by_one, marks=slow),
    pytest.param("curvlinops", damped_inverses_invert, marks=slow),
    pytest.param("curvlinops", eigenvalues_give_trace_determinant_and_norm, marks=slow),
    pytest.param("curvlinops", batches_of_any_size_are_one, marks=slow),
    pytest.param("curvlinops", the_correction_keeps_the_trace, marks=slow),
    pytest.param("xitorch", each_column_has_its_shift, marks=slow),
    pytest.param("xitorch", each_column_has_its_shift_of_a_metric, marks=slow),
    ("xitorch", generalised_vectors_are_orthonormal_in_the_metric),
    pytest.param("xitorch", second_derivatives_of_a_solve, marks=slow),
]


@pytest.mark.slow
@pytest.mark.parametrize(("peer", "claim"), PROPERTIES, ids=lambda x: getattr(x, "__name__", None))
def test_a_property_of(peer, claim, x64):
    found, expected, tolerance = claim()
    assert relative_error(np.asarray(found), np.asarray(expected)) <= tolerance, peer
