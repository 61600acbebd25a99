"""Every bad input gives an error that names the argument or the leaf, and never a number."""

import itertools
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from cases import COARSE, SHARP, SPECTRA, Ridge, all_but, planted, ridge_loss, slow_but

import spectra
from spectra import DataError, NonFiniteError, NotSymmetricError, SpectraError, StructureError

KEY = jax.random.key(0)
COUNTER = itertools.count()
OP = spectra.MatrixOperator(planted(SPECTRA["indefinite"]))


def hessian(loss_fn, params=None, **options):
    params = jnp.ones(3) if params is None else params
    return spectra.HessianOperator(loss_fn, params, None, **options)


@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (lambda p, _: p**2, r"shape \(3,\) and dtype float32"),
        (lambda p, _: jnp.sum(p).astype(int), r"shape \(\) and dtype int32"),
        (lambda p, _: jnp.sum(p) * 1j, "dtype complex64"),
    ],
    ids=["vector", "integer", "complex"],
)
def test_losses_that_are_not_one_real_number(loss_fn, found):
    with pytest.raises(StructureError, match=rf"loss_fn returned .*{found}.*one real number"):
        hessian(loss_fn)


def test_losses_with_auxiliary_outputs():
    with pytest.raises(StructureError, match="auxiliary"):
        hessian(lambda p, _: (jnp.sum(p**2), {"accuracy": 1.0}))


@pytest.mark.parametrize(
    ("loss_fn", "found"),
    [
        (lambda p, _: float(jnp.sum(p)), "keep it an array"),
        (lambda p, _: np.sum(np.tanh(p)), "use jax.numpy"),
        (lambda p, _: jnp.sum(p) if p[0] > 0 else 0.0, "use jnp.where or jax.lax.cond"),
        (lambda p, _: jnp.sum(p[p > 0]), "use jnp.where or weights of 0 and 1"),
        (lambda p, _: jnp.sum(p) * [1, 2][p[0].astype(int)], "index a jax.numpy array"),
    ],
    ids=["float", "numpy", "branch", "mask", "index"],
)
def test_a_loss_that_reads_values_is_told_how_to_do_without(loss_fn, found):
    with pytest.raises(StructureError, match=rf"raised \w+ in .*test_bad_input.py, line \d+: .*{found}"):
        hessian(loss_fn)


def test_params_and_data_that_are_exchanged():
    params, x = jnp.ones(3), jnp.ones((4, 3))
    with pytest.raises(StructureError, match=r"params and data exchanged only.*\(loss_fn, params, data\)"):
        spectra.HessianOperator(lambda p, b: jnp.mean((b["x"] @ p) ** 2), {"x": x}, params)


@pytest.mark.parametrize(
    ("leaf", "found"),
    [(scipy.sparse.csr_matrix(np.eye(3)), r"a csr_matrix of SciPy: give leaf.toarray\(\)"),
     (Ridge, "a batch holds arrays, in .*register_dataclass")],
    ids=["sparse", "object"],
)  # fmt: skip
def test_leaves_of_a_batch_that_are_no_arrays_come_with_what_to_do(leaf, found):
    with pytest.raises(DataError, match=f"data: leaf 'x' is {found}" if leaf is not Ridge else found):
        spectra.HessianOperator(lambda p, b: jnp.sum(p), jnp.ones(3), {"x": leaf})


def mask():
    return np.random.rand(3) < 0.5  # noqa: NPY002


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p, _: jnp.sum((p * mask()) ** 2),
        lambda p, _: jnp.sum(p**2) * random.random(),
        lambda p, _: jax.lax.scan(lambda x, _: (x + jnp.sum(p**2) * random.random(), None), 0.0, length=2)[0],
        lambda p, _: jnp.sum(p ** (2 + next(COUNTER))),
    ],
    ids=["array", "number", "inside a loop", "another program"],
)
def test_losses_that_are_another_program_at_each_trace(loss_fn):
    # A gradient and a product would be those of two functions: here of two masks.
    np.random.seed(0)  # noqa: NPY002
    with pytest.raises(StructureError, match=r"another program .*\(test_bad_input.py:\d+\).*jax.random"):
        hessian(loss_fn)
    assert hessian(loss_fn, check_data=False).size == 3


def test_a_value_of_an_earlier_trace_is_none():
    """As of a generator of keys, which keeps its state: the first product raised UnexpectedTracerError."""
    kept = [jnp.ones(3)]

    def keeping(p, _=None):
        kept.append(kept[-1] * p)
        return kept[-1]

    message = "reads a value that it has kept from an earlier call"
    with pytest.raises(StructureError, match=message) as raised:
        hessian(lambda p, _: jnp.sum(keeping(p)))
    assert re.search(r"test_bad_input\.py(:|, line )\d+", str(raised.value))
    kept[:] = [jnp.ones(3)]
    jax.make_jaxpr(keeping)(jnp.ones(3))
    with pytest.raises(StructureError, match=message) as raised:
        spectra.FunctionOperator(keeping, jnp.ones(3))
    assert re.search(r"test_bad_input\.py(:|, line )\d+", str(raised.value))


class OneUse:
    """What Equinox does with the state of a layer, of which a new one is made."""

    used = False

    def update(self, p):
        if self.used:
            raise ValueError("Attempted to use old state. Probably you have done something like:\n...")
        self.used = True
        return p


def test_a_state_that_can_be_updated_once_is_explained():
    """It was said that the loss could not be differentiated, perhaps because of integers."""
    state = OneUse()
    with pytest.raises(StructureError, match=r"test_bad_input.py, line \d+.*a copy of the state each time"):
        hessian(lambda p, _: jnp.sum(state.update(p) ** 2))


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda p, _: jnp.sum(jnp.cos(jnp.ones(3)) ** 2),
        lambda p, _: jnp.sum(jax.lax.stop_gradient(p) ** 2),
        lambda p, _: jnp.mean((p > 0).astype(float)),
    ],
    ids=["closed over", "stopped", "of whole numbers"],
)
def test_a_loss_that_its_parameters_do_not_reach_is_warned_of(loss_fn):
    with pytest.warns(UserWarning, match="the loss does not depend on the parameters that vary"):
        op = hessian(loss_fn)
    assert not op.as_matrix().any()


def test_a_rule_that_gives_a_loss_its_gradient_is_no_reason_to_warn():
    @jax.custom_jvp
    def sign(x):
        return jnp.where(x > 0, 1, -1).astype(x.dtype)

    sign.defjvp(lambda x, t: (sign(*x), jnp.cos(x[0]) * t[0]))
    matrix = hessian(lambda p, _: jnp.sum(sign(p))).as_matrix()
    np.testing.assert_allclose(matrix, -jnp.sin(1.0) * jnp.eye(3), rtol=1e-6)


@pytest.mark.parametrize(
    ("leaf", "found"),
    [
        (np.arange(3), "has dtype int"),
        (np.ones(3, bool), "has dtype bool"),
        (np.ones(3) * 1j, "has dtype complex"),
        (np.ones(3, ">f4"), "has dtype >f4, which JAX has not"),
        (1.5, "is a float, not an array"),
    ],
    ids=str,
)
def test_parameter_leaves_that_are_not_real_arrays(leaf, found):
    with pytest.raises(StructureError, match=f"'layer/kernel' {found}"):
        hessian(lambda p, _: 0.0, {"layer": {"kernel": leaf}, "bias": np.ones(2)})


def test_parameters_that_can_be_read_only_once():
    with pytest.raises(StructureError, match="a generator can be read only once: pass a list"):
        hessian(lambda p, _: 0.0, (x for x in [jnp.ones(2)]))


def half_of_squares(p, _):
    return jnp.sum(p**2) / 2


def test_parameters_in_eight_bits_are_cast_up_as_those_in_sixteen_are():
    op = hessian(half_of_squares, jnp.ones(3, jnp.float8_e4m3fn))
    assert op.dtype == jnp.float32
    np.testing.assert_array_equal(op.as_matrix(), np.eye(3))


@pytest.mark.parametrize("params", [{}, [], np.ones(0), {"a": np.ones((0, 3))}], ids=str)
def test_parameters_without_numbers(params):
    with pytest.raises(StructureError, match="the parameters hold no numbers"):
        hessian(lambda p, _: 0.0, params)


def run_all(op):
    """Every public function that multiplies with an operator."""
    v0 = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), op.structure)
    yield "lanczos", lambda: spectra.lanczos(op, v0, 2)
    yield "slq", lambda: spectra.slq(op, key=KEY, num_steps=2, num_probes=1)
    yield "spectrum", lambda: spectra.spectrum(op, key=KEY, num_steps=2, num_probes=1)
    yield "as_matrix", op.as_matrix
    yield "product", lambda: op @ v0


@pytest.mark.parametrize("linearize", [True, False])
@pytest.mark.parametrize(
    ("loss_fn", "params", "found"),
    [
        (lambda p, _: jnp.sum(jnp.log(p["w"])), -1.0, "The loss is nan"),
        (lambda p, _: jnp.sum(1 / p["w"]), 0.0, "The loss is inf"),
        pytest.param(
            lambda p, _: jnp.sum(jnp.sqrt(p["w"])),
            0.0,
            "gradient is not, in leaf 'w'",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda p, _: jnp.sum(p["w"] ** 1.5), 0.0, "second derivatives are not", marks=pytest.mark.slow
        ),
        (lambda p, _: jnp.sum(p["w"] ** 2), np.nan, "leaf 'w' holds NaN or infinite"),
    ],
    ids=["loss nan", "loss inf", "gradient", "hessian", "parameter"],
)
def test_losses_that_are_not_finite(loss_fn, params, found, linearize):
    op = hessian(loss_fn, {"w": jnp.full(3, params)}, linearize=linearize)
    for _, call in run_all(op):
        with pytest.raises(NonFiniteError, match=found):
            call()


@pytest.mark.parametrize("made", slow_but(["products of gradients", "the loss"], "the loss"))
def test_overflow_is_told_from_a_loss_that_has_no_value(made):
    """All is finite in float64; the advice for NaN would be to look for square roots."""
    if made == "the loss":
        op = hessian(lambda p, _: jnp.sum((1e15 * p["w"]) ** 4), {"w": jnp.ones(3)})
    else:
        op = spectra.FisherOperator(
            lambda p, x: x @ p,
            lambda f, y: 1e25 * jnp.mean((f - y) ** 2),
            jnp.ones(3),
            (jnp.eye(3), jnp.zeros(3)),
            kind="empirical",
        )
    with pytest.raises(NonFiniteError, match=rf"(?is){made}.*In float64 all is finite.*overflow.*power of"):
        op.as_matrix()


@pytest.mark.slow
@pytest.mark.parametrize("split", [False, True], ids=["batch", "stream"])
def test_labels_outside_of_the_classes_are_named(split):
    """The NaN does not reach the derivatives: products alone are finite, in float64 as in float32."""

    def loss(p, batch):
        log_probs = jax.nn.log_softmax(batch["x"] @ p)
        return -jnp.mean(jnp.take_along_axis(log_probs, batch["label"][:, None], 1))

    batch = {"x": jnp.ones((6, 2)), "label": jnp.arange(6) % 3 + 1}  # the classes are 0, 1 and 2
    data = [{name: leaf[i : i + 3] for name, leaf in batch.items()} for i in (0, 3)]
    op = spectra.HessianOperator(loss, jnp.ones((2, 3)), data if split else batch)
    with pytest.raises(
        NonFiniteError, match=r"(?s)loss is nan.*label beyond.*from 1 to 3 in leaf 'label'"
    ) as e:
        op.as_matrix()
    assert "overflow" not in str(e.value)


@pytest.mark.slow
def test_products_that_are_zero_are_no_unit_of_what_columns_are():
    op = spectra.FunctionOperator(lambda v: jnp.where(jnp.count_nonzero(v) == 1, v, 0), jnp.zeros(4))
    with pytest.raises(spectra.NotSymmetricError, match="more than zero, though products are zero"):
        spectra.trace(op, key=None, method="exact")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_batch_of_a_stream():
    x, m = Ridge().batch()
    op = Ridge().operator([(x, m), (x.at[0, 0].set(jnp.nan), m)])
    for _, call in run_all(op):
        with pytest.raises(NonFiniteError, match=r"The loss is nan .*, and leaf '0' of batch 1 holds NaN"):
            call()


@pytest.mark.slow
def test_a_product_that_turns_nan_half_way():
    # Eigenvalue NaN in a direction that the start reaches only by and by: tridiagonal coupling.
    def mv(v):
        out = jnp.roll(v, 1) + jnp.roll(v, -1)
        return jnp.where(jnp.abs(v[20]) > 0, jnp.nan, 1.0) * out

    op = spectra.FunctionOperator(mv, jnp.zeros(64))
    with pytest.raises(NonFiniteError, match=r"Lanczos step (21|22) is NaN.*function for NaN"):
        spectra.lanczos(op, jnp.zeros(64).at[0].set(1.0), 40)


@pytest.mark.slow
def test_overflow_in_a_product():
    op = spectra.MatrixOperator(np.full((2, 2), 3e38, np.float32))
    for name, call in run_all(op):
        if name in ("lanczos", "product"):  # a random probe may have entries of two signs
            with pytest.raises(NonFiniteError, match="NaN or infinite"):
                call()


@pytest.mark.parametrize(
    ("v", "found"),
    [
        ({"w": np.ones(5)}, "another structure"),
        ({"w": np.ones(4), "b": np.ones(())}, r"leaf 'w' has shape \(4,\), expected \(5,\)"),
        ({"w": np.ones(5, int), "b": np.ones(())}, "leaf 'w' has dtype int64, expected float32"),
        (np.ones(7), r"another structure.*an array of shape \(7,\).*a flat array of shape \(6,\)"),
        (np.ones(6) * 1j, "dtype complex.*, and the operator is real"),
        ([np.ones(5), np.ones(())], "another structure"),
    ],
    ids=["missing leaf", "shape", "integer", "flat of wrong length", "complex", "list"],
)
def test_vectors_that_do_not_match_the_parameters(v, found):
    op = Ridge().operator()
    with pytest.raises(StructureError, match=f"(?s)the vector.*{found}"):
        op @ v
    with pytest.raises(StructureError, match=f"(?s)v0.*{found}"):
        spectra.lanczos(op, v, 2)


def test_complex_columns_are_refused_and_those_of_scipy_multiplied():
    """A cast would drop their imaginary parts."""
    op = spectra.MatrixOperator(np.diag([1.0, 2.0, 3.0]))
    columns = np.ones((3, 2)) * 1j
    for call in (
        lambda: op @ columns,
        lambda: spectra.solve(op, columns),
        lambda: spectra.solve(op, columns.T),
    ):
        with pytest.raises(StructureError, match="complex"):
            call()
    np.testing.assert_allclose(op.to_scipy() @ (columns[:, 0] + 1), [1 + 1j, 2 + 2j, 3 + 3j])


def test_inside_jit_scipy_has_no_numbers():
    """Neither of an operator on traced numbers, nor of one that stands outside."""
    op = spectra.DiagonalOperator(jnp.ones(3))
    for make in (spectra.DiagonalOperator, lambda _: op):
        with pytest.raises(spectra.SpectraError, match="to_scipy reads numbers on the host: call it outside"):
            jax.jit(lambda d, make=make: make(d).to_scipy() @ np.ones(3, np.float32))(jnp.ones(3))


def test_sums_of_operators_on_other_vectors():
    with pytest.raises(StructureError, match="second operator of a sum"):
        OP + spectra.MatrixOperator(np.eye(3))


@pytest.mark.parametrize("array", [np.ones(3), jnp.ones(3), np.ones((3, 3))], ids=["numpy", "jax", "matrix"])
def test_arrays_are_no_factors_of_operators_and_no_terms(array):
    op = spectra.MatrixOperator(jnp.eye(3))
    for product in (lambda: op * array, lambda: array * op, lambda: op / array):
        with pytest.raises(StructureError, match=r"times an array of shape \(3.*: .* write op @ v"):
            product()
    for total in (lambda: op + array, lambda: array + op):
        with pytest.raises(StructureError, match=r"plus an array of shape \(3.*: wrap a matrix"):
            total()
    for factor in (np.float32(2), np.array(2.0), jnp.array(2.0)):
        np.testing.assert_array_equal((factor * op).as_matrix(), 2 * np.eye(3))


@pytest.mark.parametrize("x", ["a", None, 1j, np.ones(2) * 1j, [1, [2]]], ids=repr)
def test_points_of_a_distribution_that_are_no_real_numbers(x):
    op = spectra.MatrixOperator(jnp.diag(jnp.array([1.0, 2.0, 3.0])))
    quadrature = spectra.slq(op, key=jax.random.key(0), num_steps=3, num_probes=1)
    with pytest.raises(spectra.SpectraError, match=r"^x is .*: pass a real number, or an array of such"):
        quadrature.cdf(x)


@pytest.mark.parametrize("call", [spectra.spectrum, spectra.condition_number, spectra.trace])
def test_the_blocks_of_an_operator_in_place_of_one(call):
    blocks = hessian(lambda p, _: jnp.sum(p["a"] * p["b"]), {"a": jnp.ones(2), "b": jnp.ones(2)}).blocks()
    with pytest.raises(StructureError, match=r"a dict of 2 operators.* op\['a'\]"):
        call(blocks, key=KEY)


def test_functions_that_return_another_structure():
    with pytest.raises(StructureError, match=r"result of mv.*shape \(2,\), expected \(3,\)"):
        spectra.FunctionOperator(lambda v: v[:2], jnp.zeros(3))
    with pytest.raises(StructureError, match="mv is a Array"):
        spectra.FunctionOperator(jnp.ones(3), jnp.zeros(3))


@pytest.mark.parametrize(
    "matrix", [np.ones((2, 3)), np.ones(3), np.ones((0, 0)), np.ones((2, 2)) * 1j], ids=np.shape
)
def test_matrices_that_are_not_square_or_not_real(matrix):
    with pytest.raises(StructureError, match="MatrixOperator needs a"):
        spectra.MatrixOperator(matrix)


def test_matrices_that_are_not_symmetric():
    with pytest.raises(NotSymmetricError, match=r"reaches 1\.00e\+00"):
        spectra.MatrixOperator(np.array([[1.0, 1.0], [0.0, 1.0]]))


def skewed(v):
    a = planted(SPECTRA["indefinite"])
    return jnp.asarray(a + 0.1 * np.triu(np.ones(a.shape), 1), v.dtype) @ v


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
@COARSE
def test_functions_that_are_not_symmetric(size, dtype):
    a = planted(SPECTRA["indefinite"])
    op = size * spectra.FunctionOperator(skewed, jnp.zeros(len(a), dtype))
    with pytest.raises(NotSymmetricError, match=r"not symmetric.*dropout"):
        spectra.lanczos(op, jnp.ones(len(a)), 16)
    with pytest.raises(NotSymmetricError, match="not symmetric"):
        spectra.slq(op, key=KEY, num_steps=16, num_probes=2)


@pytest.mark.parametrize("steps", [0, -1, 49])
def test_numbers_of_steps_outside_one_to_n(steps):
    for call in (
        lambda: spectra.lanczos(OP, jnp.ones(48), steps),
        lambda: spectra.slq(OP, key=KEY, num_steps=steps),
        lambda: spectra.spectrum(OP, key=KEY, num_steps=steps),
        lambda: spectra.plan(OP, num_steps=steps, num_probes=1),
    ):
        with pytest.raises(SpectraError, match=f"num_steps={steps} is not between 1 and .* 48"):
            call()


def test_numbers_of_probes_below_one():
    with pytest.raises(SpectraError, match="num_probes=0"):
        spectra.slq(OP, key=KEY, num_steps=3, num_probes=0)
    with pytest.raises(SpectraError, match="num_probes=-1"):
        spectra.plan(OP, num_steps=3, num_probes=-1)
    with pytest.raises(SpectraError, match="probe_batch=9"):
        spectra.slq(OP, key=KEY, num_steps=3, num_probes=2, probe_batch=9)
    with pytest.raises(SpectraError, match="probe_batch=-1"):
        spectra.spectrum(OP, key=KEY, exact=True, probe_batch=-1)


@pytest.mark.parametrize("tol", [0.0, 1.0, -0.1, float("nan")])
def test_tolerances_outside_zero_to_one(tol):
    with pytest.raises(SpectraError, match="tol="):
        spectra.slq(OP, key=KEY, num_steps=3, tol=tol)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_start_vectors_that_have_no_direction(value):
    """Also where a dense matrix is made, which needs none."""
    small = spectra.MatrixOperator(jnp.eye(4))
    for call in (
        lambda v0: spectra.lanczos(small, v0, 3),
        lambda v0: spectra.eigsh(small, 1, key=KEY, v0=v0),
    ):
        with pytest.raises(SpectraError, match="v0 has norm"):
            call(jnp.full(4, value))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"mode": "forward"}, "mode='forward'"),
        ({"linearize": "maybe"}, "linearize='maybe'"),
        ({"microbatch": 0}, "microbatch=0"),
        ({"microbatch": 2.5}, r"microbatch=2\.5"),
        ({"matmul_precision": "precise"}, "matmul_precision='precise'"),
    ],
    ids=str,
)
def test_unknown_options(options, found):
    with pytest.raises(SpectraError, match=found):
        spectra.HessianOperator(ridge_loss, Ridge().params(), Ridge().batch(), **options)


@pytest.mark.slow
def test_unknown_options_of_functions():
    with pytest.raises(SpectraError, match="reorthogonalize='twice'"):
        spectra.lanczos(OP, jnp.ones(48), 3, reorthogonalize="twice")
    q = spectra.slq(OP, key=KEY, num_steps=3, num_probes=1)
    with pytest.raises(SpectraError, match="level=2"):
        q.cdf(0.0, level=2)
    with pytest.raises(SpectraError, match="shift needs a real scalar"):
        OP.shift(jnp.ones(3))


@pytest.mark.parametrize("factor", ["a", None, "1.0"], ids=repr)
def test_multiples_that_are_not_numbers(factor):
    with pytest.raises(TypeError):
        OP * factor


@pytest.mark.parametrize("call", ["slq", "lanczos", "spectrum", "plan"])
def test_what_is_not_an_operator(call):
    calls = {
        "slq": lambda: spectra.slq(np.eye(3), key=KEY),
        "lanczos": lambda: spectra.lanczos(np.eye(3), np.ones(3), 2),
        "spectrum": lambda: spectra.spectrum(np.eye(3), key=KEY),
        "plan": lambda: spectra.plan(np.eye(3), num_steps=2, num_probes=1),
    }
    with pytest.raises(SpectraError, match=r"ndarray.*MatrixOperator"):
        calls[call]()


def test_too_little_memory(monkeypatch):
    monkeypatch.setattr("spectra.base.host.available_bytes", lambda device=None: 10_000)
    with pytest.raises(spectra.MemoryLimitError, match=r"num_steps=\d+") as info:
        spectra.slq(OP, key=KEY, num_steps=48, num_probes=4)
    assert "KiB" in str(info.value)
    assert isinstance(info.value, MemoryError)
    assert not spectra.plan(OP, num_steps=48, num_probes=4).fits
    with pytest.raises(spectra.MemoryLimitError, match=r"order 48 needs.*memory_limit"):
        OP.as_matrix()


def test_errors_are_also_the_built_in_that_fits():
    for error, base in [
        (StructureError, TypeError),
        (NonFiniteError, FloatingPointError),
        (spectra.MemoryLimitError, MemoryError),
        (spectra.DataError, ValueError),
    ]:
        assert issubclass(error, (SpectraError, base))
        assert issubclass(error, SpectraError)
        assert issubclass(error, base)


TRIANGULAR = np.triu(np.random.default_rng(0).standard_normal((40, 40)))


def triangular(v):
    return jnp.asarray(TRIANGULAR[: len(v), : len(v)], v.dtype) @ v


def plus_one(v):
    return v + 1


DENSE = {
    "as_matrix": lambda op: op.as_matrix(),
    "condition_number": lambda op: spectra.condition_number(op, key=KEY),
    "eigsh": lambda op: spectra.eigsh(op, 1, which="SM", key=KEY),
    "eigsh of a small one": lambda op: spectra.eigsh(op, 1, which="LA", key=KEY),
}


@SHARP
@pytest.mark.parametrize("call", DENSE.values(), ids=DENSE)
@pytest.mark.parametrize("n", slow_but([12, 40], 12))
def test_dense_matrices_of_maps_without_a_symmetric_one(n, call, dtype):
    """Eigenvalues of (A + Aᵀ) / 2 are not those of A, and an affine map has no eigenvalues."""
    for function, message in ((triangular, "not symmetric"), (plus_one, "not linear|not symmetric")):
        with pytest.raises(spectra.NotSymmetricError, match=message):
            call(spectra.FunctionOperator(function, jnp.zeros(n)))


def square(w, x):
    return jnp.mean((x @ w) ** 2)


def logits_of(w, x):
    return jnp.stack([x @ w, -x @ w], axis=1)


def likelihood(logits, labels):
    return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(labels)), labels])


X = jnp.eye(4, 2)
ON_THE_HOST = {
    "class_split": lambda op: spectra.class_split(
        spectra.GGNOperator(logits_of, likelihood, op.params, (X, jnp.arange(4) % 2)), key=KEY
    ),
    "compare_operators": lambda op: spectra.compare_operators(op, op, key=KEY),
    "critical_sharpness": lambda op: spectra.critical_sharpness(square, op.params, X, op.params),
    "data_variability": lambda op: spectra.data_variability(op, key=KEY),
    "gradient_noise_scale": lambda op: spectra.gradient_noise_scale(
        spectra.GradientCovarianceOperator(square, op.params, X)
    ),
    "perturbation": lambda op: spectra.perturbation(op, {"all": op.params}),
    "population": lambda op: spectra.population(op, key=KEY),
    "save": lambda op: spectra.save(spectra.slq(op, key=KEY, num_steps=2), "never"),
    "spectral_density": lambda op: spectra.spectral_density(spectra.slq(op, key=KEY, num_steps=2)),
    "spectrum": lambda op: spectra.spectrum(op, key=KEY),
    "step_quality": lambda op: spectra.step_quality(op, op.params),
}


@pytest.mark.parametrize("call", ON_THE_HOST.values(), ids=ON_THE_HOST)
def test_what_reads_numbers_on_the_host_says_so_inside_jit(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpectraError, match="jit"):
        jax.jit(lambda w: call(spectra.HessianOperator(square, w, X)))(jnp.ones(2))
    assert not list(tmp_path.iterdir())


SMALL = spectra.MatrixOperator(np.diag(np.arange(1.0, 31.0, dtype=np.float32)))
KEYED = {"key": jax.random.key(0)}


def density(**options):
    return spectra.spectral_density(spectra.slq(SMALL, num_steps=5, num_probes=1, **KEYED), **options)


WRONG_TYPES = {
    "a tolerance that is text": (lambda: spectra.eigsh(SMALL, 2, tol="a", **KEYED), "tol='a'"),
    "no tolerance": (lambda: spectra.eigsh(SMALL, 2, tol=None, **KEYED), "tol=None"),
    "half a start vector": (lambda: spectra.eigsh(SMALL, 2, block_size=1.5, **KEYED), "block_size=1.5"),
    "half a product": (lambda: spectra.eigsh(SMALL, 2, max_matvecs=3.5, **KEYED), "max_matvecs=3.5"),
    "a flag for a number": (lambda: spectra.eigsh(SMALL, True, **KEYED), "k=True"),
    "a number for pairs": (lambda: spectra.eigsh(SMALL, 2, deflate=3, **KEYED), "deflate is of type int"),
    "a number for a folder": (lambda: spectra.eigsh(SMALL, 2, checkpoint=3, **KEYED), "checkpoint=3"),
    "steps in text": (lambda: spectra.slq(SMALL, num_steps="5", num_probes=1, **KEYED), "num_steps='5'"),
    "half a probe": (lambda: spectra.slq(SMALL, num_steps=5, num_probes=1.5, **KEYED), "num_probes=1.5"),
    "products in text": (lambda: spectra.trace(SMALL, num_matvecs="8", **KEYED), "num_matvecs='8'"),
    "half a moment": (lambda: spectra.kpm(SMALL, num_moments=2.5, **KEYED), "num_moments=2.5"),
    "one bound": (lambda: spectra.kpm(SMALL, bounds="x", **KEYED), "bounds='x'"),
    "no shift": (lambda: spectra.condition_number(SMALL, shift="x", **KEYED), "shift='x'"),
    "no steps": (lambda: spectra.condition_number(SMALL, num_steps=0, **KEYED), "num_steps=0"),
    "no probes": (lambda: spectra.spectrum(SMALL, num_probes=0, **KEYED), "num_probes=0"),
    "a negative width": (lambda: spectra.spectrum(SMALL, tol=-1, **KEYED), "tol=-1"),
    "a name for a function": (lambda: spectra.trace_of(SMALL, "log", **KEYED), "f='log'"),
    "text for a width": (lambda: density(bandwidth="x"), "bandwidth='x'"),
    "no level": (lambda: density(level=None), "level=None"),
    "text for a grid": (lambda: density(grid="x"), "grid must be a 1-D"),
    "no operator to split": (lambda: spectra.class_split(None, **KEYED), "op is a NoneType"),
    "no operators": (lambda: spectra.data_variability(lambda x: x, [X, X], **KEYED), "MatrixOperator"),
    "nothing of a function": (lambda: spectra.trace_of(SMALL, lambda x: None, **KEYED), "f makes None of"),
    "no number for a shift": (
        lambda: spectra.effective_dimension(SMALL, np.nan, **KEYED),
        "shift=nan: use a finite number",
    ),
    "an infinite shift": (lambda: spectra.logdet(SMALL, np.inf, **KEYED), "shift=inf: use a finite number"),
    "a metric that is not positive": (
        lambda: spectra.eigsh(SMALL, 1, metric=jnp.zeros(30), **KEYED),
        "the diagonal of '<root>' is not positive",
    ),
    "words of a function": (lambda: spectra.funm(SMALL, lambda x: "a", jnp.ones(30)), "f makes an array"),
    "a few values of a function": (lambda: spectra.trace_of(SMALL, lambda x: x[:2], **KEYED), "f makes an"),
    "text for a flag": (
        lambda: spectra.slq(SMALL, progress="no", **KEYED),
        "progress='no': use True or False",
    ),
    "a number for a flag": (lambda: spectra.kpm(SMALL, progress=1, **KEYED), "progress=1: use True or False"),
    "an array for a name": (
        lambda: spectra.eigsh(SMALL, 2, which=np.ones(3), **KEYED),
        "which is an array of shape (3,): use a string",
    ),
    "an array for a flag or a name": (
        lambda: spectra.eigsh(SMALL, 2, verify=jnp.ones(2), **KEYED),
        "verify is an array of shape (2,): use True or False, or a string",
    ),
    "text for a flag of an operator": (
        lambda: spectra.GradientCovarianceOperator(square, jnp.ones(2), X, centered="no"),
        "centered='no': use True or False",
    ),
    "an array for a mode": (
        lambda: spectra.HessianOperator(square, jnp.ones(2), X, mode=np.ones(2)),
        "mode is an array of shape (2,): use a string",
    ),
    "an array for one of two names": (
        lambda: spectra.FisherOperator(square, square, jnp.ones(2), X, kind=np.ones(2)),
        "kind is an array of shape (2,): use a string",
    ),
    "text for a flag of a picture": (lambda: density().plot(band="no"), "band='no': use True or False"),
    "no path": (lambda: density().save(None), "path=None: use a path"),
    "an empty path": (lambda: density().save(""), "path='': use a path"),
    "a number for a path": (lambda: spectra.load(3), "path=3: use a path"),
    "no path of a page": (lambda: spectra.write_report(density(), None), "path=None: use a path"),
    "no folder": (lambda: spectra.Checkpoint(None), "directory=None: use a path"),
    "an empty folder": (lambda: spectra.slq(SMALL, checkpoint="", **KEYED), "checkpoint=''"),
    "no time between checkpoints": (lambda: spectra.Checkpoint("a", minutes="x"), "minutes='x'"),
    "no steps between checkpoints": (lambda: spectra.Checkpoint("a", steps=0), "steps=0"),
    "no threshold": (lambda: spectra.count_above(SMALL, None, **KEYED), "threshold=None: use a real number"),
    "a threshold that is none": (lambda: spectra.count_above(SMALL, np.nan, **KEYED), "threshold=nan"),
    "text for a width of counts": (lambda: spectra.negative_share(SMALL, tol="x", **KEYED), "tol='x'"),
    "text for a damping": (lambda: spectra.logdet(SMALL, "x", **KEYED), "shift='x': use a real number"),
    "one number for bounds": (
        lambda: spectra.trace_of(SMALL, np.log, bounds=3, **KEYED),
        "bounds=3: use a pair",
    ),
    "a flag for a number of any type": (lambda: density(bandwidth=np.bool_(True)), "use a real number"),
    "an array for a summary": (lambda: spectra.summary(np.eye(3), **KEYED), "op is a ndarray"),
    "numbers for blocks": (lambda: spectra.slq({"a": 1}, **KEYED), "op is a int"),
    "no steps to compare with": (
        lambda: spectra.compare_operators(SMALL, SMALL, num_steps=-1, **KEYED),
        "num_steps=-1",
    ),
    "no model": (lambda: spectra.model_trace(None, square, jnp.ones(2), X, X), "model_fn is a NoneType"),
    "no eigenvalues to track": (
        lambda: spectra.SpectrumTracker(square, num_eigenvalues=0),
        "num_eigenvalues=0",
    ),
    "no callbacks": (lambda: spectra.SpectrumTracker(square, callbacks=3), "callbacks=(3,)"),
    "text for measures": (lambda: spectra.SpectrumTracker(square, measures="x"), "measures='x'"),
    "keys among the parameters": (
        lambda: spectra.HessianOperator(square, {"a": jax.random.key(0)}, X),
        "'a' has dtype key<fry>; a Hessian needs real floating-point parameters. Make it a constant with "
        "wrt=, or pass floating-point arrays only",
    ),
    "a model on other inputs": (
        lambda: spectra.JacobianOperator(lambda w, x: w @ x, jnp.ones(2), jnp.ones(3)),
        "model_fn(params, inputs) raised TypeError",
    ),
}


@pytest.mark.parametrize("name", all_but(WRONG_TYPES, "words of a function", "text for a width"))
def test_arguments_of_another_type_are_named(name):
    call, text = WRONG_TYPES[name]
    with pytest.raises(spectra.SpectraError, match=re.escape(text)):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda tree: spectra.HessianOperator(square, tree, X),
        lambda tree: spectra.HessianOperator(square, jnp.ones(2), tree),
        lambda tree: spectra.DiagonalOperator(tree),
        lambda tree: SMALL @ tree,
    ],
    ids=["parameters", "data", "entries", "vector"],
)
def test_dicts_with_keys_of_several_types(call):
    with pytest.raises(StructureError, match="keys of one type"):
        call({"a": jnp.ones(2), 0: jnp.ones(2)})


@pytest.mark.slow
def test_whole_numbers_of_any_type_are_whole_numbers():
    first, *others = (
        spectra.trace(SMALL, method="hutchinson", num_matvecs=count, **KEYED).value
        for count in (8, 8.0, np.int64(8), np.float32(8), jnp.int32(8))
    )
    assert others == [first] * 4


def test_complex_parameters_are_given_as_two_leaves():
    """A cast would drop the imaginary part."""
    with pytest.raises(spectra.StructureError, match=r"leaf 'w' has dtype complex64.*two leaves"):
        spectra.HessianOperator(
            lambda p, x: jnp.mean(jnp.abs(x @ p["w"]) ** 2),
            {"w": jnp.ones(3, jnp.complex64)},
            jnp.ones((4, 3)),
        )
