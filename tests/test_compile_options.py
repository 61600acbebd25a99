"""Programs that are compiled with options, as on a GPU: the same numbers, also inside other programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but

import spectra
from spectra.base import arrays, programs

KEY = jax.random.key(0)
MATRIX = jnp.diag(jnp.arange(1.0, 9.0)) + 0.1
OP = spectra.MatrixOperator(MATRIX)
CALLS = {
    "slq": lambda op: spectra.slq(op, key=KEY, num_steps=5, num_probes=2).nodes,
    "lanczos": lambda op: spectra.lanczos(op, jnp.ones(8), 4).alpha,
    "trace": lambda op: spectra.trace(op, key=KEY, method="hutchinson", num_matvecs=4).value,
    "solve": lambda op: spectra.solve(op, jnp.ones(8)).x,
    "product": lambda op: op @ jnp.ones(8),
}


@pytest.fixture
def options(monkeypatch):
    """A GPU's options on the platform that is here, which ignores them, and those of every call."""
    monkeypatch.setitem(programs.OPTIONS, jax.default_backend(), programs.OPTIONS["gpu"])
    seen, own = [], programs.options

    def noted(platform, those, arrays):
        found = own(platform, those, arrays)
        seen.extend([found] if those is programs.OPTIONS else [])  # products in float64 have their own
        return found

    monkeypatch.setattr(programs, "options", noted)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_calls_with_options(options, name):
    call = CALLS[name]
    found = call(OP)
    assert options
    assert all(chosen == programs.OPTIONS["gpu"] for chosen in options)
    programs.OPTIONS.pop(jax.default_backend())
    np.testing.assert_array_equal(found, call(OP))


def test_programs_of_a_cpu_compile_quickly_unless_the_user_says_otherwise(monkeypatch):
    """In a process without flags; JAX refuses an option that XLA does not know."""
    monkeypatch.delenv("XLA_FLAGS")
    expected = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}
    assert programs.options("cpu") == expected
    given, own = [], jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **arguments: given.append(arguments) or own(f, **arguments))
    total = programs.jit(lambda xs: sum(jnp.tanh(x) + x for x in xs))
    few, many = [jnp.zeros(3)], [jnp.zeros(3)] * programs.MANY
    assert total(few).sum() == 0
    assert given == ([{}, {"compiler_options": expected}] if expected else [{}])
    assert total(many).sum() == 0  # what is saved of a deep network has the emitters
    assert len(given) == (2 if expected else 1)
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=true")
    assert programs.options("cpu") == {}


def test_a_program_is_compiled_once_with_its_options(options, monkeypatch):
    given, own = [], jax.jit

    def counted(function, **arguments):
        given.append(arguments.get("compiler_options"))
        return own(function, **arguments)

    monkeypatch.setattr(jax, "jit", counted)

    @programs.jit
    def doubled(x):
        return 2 * x

    assert doubled(jnp.ones(3)).sum() == doubled(jnp.ones(3)).sum() == 6
    assert given == [None, programs.OPTIONS["gpu"]]  # the plain one is for programs of others
    assert doubled.compiled(jnp.ones(3))(jnp.ones(3)).sum() == 6


@pytest.mark.parametrize("name", slow_but(CALLS, "product"))
def test_inside_other_programs(options, name):
    """JAX takes options for whole programs: inside of one, also beside constants only, there are none."""
    call = CALLS[name]
    expected = call(OP)
    np.testing.assert_allclose(jax.jit(call)(OP), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda: call(OP))(), expected, rtol=1e-5, atol=1e-5)
    stacked = jax.vmap(lambda shift: call(spectra.MatrixOperator(MATRIX + shift * jnp.eye(8))))(jnp.zeros(2))
    np.testing.assert_allclose(stacked[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trace", "solve"])
def test_gradients(options, name):
    def total(scale):
        return jnp.sum(CALLS[name](spectra.MatrixOperator(scale * MATRIX)))

    power = 1 if name == "trace" else -1  # of the scale
    assert jax.grad(total)(2.0) == pytest.approx(power * float(total(2.0)) / 2, rel=1e-4)


def test_what_the_user_chose_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert programs.options("gpu") == {}
    monkeypatch.delenv("XLA_FLAGS")
    assert programs.options("gpu") == {"xla_gpu_enable_triton_gemm": False}


@pytest.mark.parametrize(("decompose", "chosen"), [(arrays.eigh, "algorithm = 1"), (arrays.svd, "gesvd_ffi")])
def test_small_decompositions_are_by_qr_on_a_gpu(decompose, chosen):
    """As LAPACK's are: Jacobi's rotations, JAX's choice there, are off by several times as much."""
    traced = jax.jit(decompose).trace(jnp.eye(4))
    there, here = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu"))
    assert chosen in next(line for line in there.split("\n") if "cusolver" in line)
    assert "cusolver" not in here
