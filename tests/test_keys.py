"""Random keys: what is none is refused by name; both forms of one give the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra.base.calls import require_key

OP = spectra.MatrixOperator(jnp.diag(jnp.arange(1.0, 9.0)))
CALLS = {
    "compare_operators": lambda key: spectra.compare_operators(OP, OP, key=key),
    "eigsh": lambda key: spectra.eigsh(OP, 1, key=key),
    "slq": lambda key: spectra.slq(OP, key=key),
    "spectrum": lambda key: spectra.spectrum(OP, key=key),
    "trace": lambda key: spectra.trace(OP, key=key),
    "count_above": lambda key: spectra.count_above(OP, 1.0, key=key),
    "logdet": lambda key: spectra.logdet(OP, key=key),
    "solve": lambda key: spectra.solve(OP, jnp.ones(8), key=key),
    "funm": lambda key: spectra.funm(OP, "exp", jnp.ones(8), key=key),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (0, "key=0 is not a random key: pass a JAX random key"),
        ("seed", "key='seed' is not a random key"),
        (np.zeros(3), r"float64 of shape \(3,\), and no random key"),
        (jax.random.split(jax.random.key(0), 2), r"array of keys of shape \(2,\)"),
    ],
    ids=["number", "text", "array", "several"],
)
def test_what_is_no_key_is_refused_by_name(name, key, message):
    with pytest.raises(spectra.SpectraError, match=message):
        CALLS[name](key)


@pytest.mark.parametrize("name", ["compare_operators", "eigsh", "slq", "spectrum"])
def test_a_missing_key_is_named(name):
    with pytest.raises(spectra.SpectraError, match=r"key=None: .* jax\.random\.key\(0\)"):
        CALLS[name](None)


@pytest.mark.slow
def test_both_forms_of_a_key_are_one():
    typed, raw = jax.random.key(5), jax.random.PRNGKey(5)
    for key in (raw, np.asarray(raw)):
        assert require_key(key) == typed
    assert jax.jit(lambda key: jax.random.normal(require_key(key)))(raw) == jax.random.normal(typed)


def test_the_numbers_of_a_key_are_those_of_the_implementation_that_is_set():
    with jax.default_prng_impl("rbg"):  # four numbers
        typed, raw = jax.random.key(5), jax.random.PRNGKey(5)
        assert require_key(raw) == require_key(typed) == typed
        with pytest.raises(spectra.SpectraError, match=r"uint32 of shape \(2,\), and no random key"):
            require_key(np.zeros(2, np.uint32))
    with pytest.raises(spectra.SpectraError, match=r"uint32 of shape \(4,\), and no random key"):
        require_key(raw)
    with pytest.raises(spectra.SpectraError, match="array of uint64"):
        require_key(np.zeros(2, np.uint64))
