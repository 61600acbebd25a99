"""Arguments that could have no effect with the others given are refused by name, whatever their value."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra

N, KEY = 40, jax.random.key(0)


@pytest.fixture(scope="module")
def op():
    return spectra.MatrixOperator(jnp.diag(jnp.linspace(1.0, 2.0, N)))


@pytest.fixture(scope="module")
def quadrature(op):
    return run(op)


def run(op):
    return spectra.slq(op, key=KEY, num_steps=5, num_probes=3)


OF_A_RUN = {
    "trace_of": lambda q, **more: spectra.trace_of(q, np.log, **more),
    "logdet": lambda q, **more: spectra.logdet(q, **more),
    "effective_dimension": lambda q, **more: spectra.effective_dimension(q, 0.1, **more),
    "count_above": lambda q, **more: spectra.count_above(q, 1.5, **more),
    "negative_share": lambda q, **more: spectra.negative_share(q, **more),
    "summary": lambda q, **more: spectra.summary({"all": q}, **more),
}
DEFAULTS = {"num_steps": 100, "num_probes": 8}
"""Given by name they are refused as well, where nothing runs."""


@pytest.mark.parametrize("name", OF_A_RUN)
@pytest.mark.parametrize("argument", DEFAULTS)
def test_a_finished_run_takes_no_arguments_of_another(name, argument, quadrature):
    with pytest.raises(spectra.SpectraError, match=f"{argument}={DEFAULTS[argument]} has no effect"):
        OF_A_RUN[name](quadrature, **{argument: DEFAULTS[argument]})


MEANINGLESS = {
    "plot_blocks": (lambda op: spectra.plot_blocks({"all": run(op)}, heat_map=True, own_x=True), "own_x="),
    "trace, exact": (lambda op: spectra.trace(op, key=None, method="exact", probes="normal"), "probes="),
    "eigsh, SM, v0": (lambda op: spectra.eigsh(op, 1, which="SM", key=KEY, v0=jnp.ones(N)), "v0 has"),
    "eigsh, metric": (
        lambda op: spectra.eigsh(op, 1, key=KEY, metric=jnp.ones(N), v0=jnp.ones(N)),
        "v0 and deflate",
    ),
    "solve, dense, x0": (lambda op: spectra.solve(op, jnp.ones(N), method="dense", x0=jnp.ones(N)), "x0="),
    "solve, dense, preconditioner": (
        lambda op: spectra.solve(op, jnp.ones(N), method="dense", preconditioner="nystrom"),
        "preconditioner=",
    ),
    "slq, none": (
        lambda op: spectra.slq(op, key=KEY, num_steps=3, num_probes=1, basis="none", basis_dtype="float32"),
        "basis_dtype=",
    ),
    "plan, none": (
        lambda op: spectra.plan(op, num_steps=3, num_probes=1, basis="none", basis_dtype="float32"),
        "basis_dtype=",
    ),
}


@pytest.mark.parametrize("name", MEANINGLESS)
def test_what_another_argument_leaves_no_meaning_is_refused_by_name(name, op):
    call, argument = MEANINGLESS[name]
    with pytest.raises(spectra.SpectraError, match=argument):
        call(op)


COUNTED = {
    "slq": ("num_probes", lambda op, n: spectra.slq(op, key=KEY, num_probes=n)),
    "kpm": ("num_moments", lambda op, n: spectra.kpm(op, key=KEY, num_moments=n)),
    "trace": ("num_matvecs", lambda op, n: spectra.trace(op, key=KEY, method="hutchinson", num_matvecs=n)),
    "diagonal": (
        "num_matvecs",
        lambda op, n: spectra.diagonal(op, key=KEY, method="hutchinson", num_matvecs=n),
    ),
    "count_above": ("num_probes", lambda op, n: spectra.count_above(op, 1.5, key=KEY, num_probes=n)),
}


@pytest.mark.parametrize("name", COUNTED)
@pytest.mark.parametrize("number", [2**31, 10**30])
def test_more_than_can_be_counted_is_refused_at_once(name, number, op):
    """A call of 10³⁰ probes ran without an end, or JAX could not convert the number."""
    argument, call = COUNTED[name]
    with pytest.raises(spectra.SpectraError, match=f"{argument}={number}: use at most 2,147,483,647"):
        call(op, number)


@pytest.mark.slow
def test_where_the_method_is_chosen_the_same_call_serves_all_sizes():
    """A loop over blocks passes the same arguments to small and to large ones."""
    small = spectra.MatrixOperator(jnp.diag(jnp.arange(1.0, 4.0)))
    assert spectra.condition_number(small, key=KEY, num_steps=9, num_probes=2).method == "dense"
    assert spectra.trace(small, key=KEY, probes="normal").method == "exact"


def loss_fn(params, batch):
    return jnp.mean((batch[0] @ params - batch[1]) ** 2)


def model_fn(params, inputs):
    return inputs @ params


def output_loss(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


ON_DATA = {
    "HessianOperator": (loss_fn,),
    "GradientCovarianceOperator": (loss_fn,),
    "dense_hessian": (loss_fn,),
    "critical_sharpness": (loss_fn,),
    "GGNOperator": (model_fn, output_loss),
    "FisherOperator": (model_fn, output_loss),
    "KFACOperator": (model_fn, output_loss),
    "EKFACOperator": (model_fn, output_loss),
}


@pytest.mark.parametrize("name", ON_DATA)
@pytest.mark.parametrize(("argument", "meant"), [("weigth_fn", "weight_fn"), ("microbach", "microbatch")])
def test_a_misspelt_option_of_an_operator_is_refused(name, argument, meant):
    """Taken for a field of a subclass, it had no effect: without its weights, the matrix is another one."""
    given = (*ON_DATA[name], jnp.ones(2), (jnp.ones((3, 2)), jnp.ones(3)))
    given = (*given, jnp.ones(2)) if name == "critical_sharpness" else given
    with pytest.raises(
        TypeError, match=rf"{name}\(\) got an unexpected keyword argument '{argument}'.*{meant}"
    ):
        getattr(spectra, name)(*given, **{argument: 2})


def test_a_misspelt_argument_of_a_function_is_refused_with_what_is_meant():
    op = spectra.MatrixOperator(jnp.eye(3))
    for function, name, meant in [
        (spectra.spectrum, "num_step", "num_steps"),
        (spectra.slq, "n_probes", "num_probes"),
        (spectra.plan, "num_probs", "num_probes"),
    ]:
        with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got an .*'{name}'.*mean '{meant}'"):
            function(op, **{name: 3})


@pytest.mark.parametrize("name", ["HessianOperator", "FisherOperator"])
def test_inputs_and_targets_as_two_arguments_are_refused_with_what_to_do(name):
    two = *ON_DATA[name], jnp.ones(2), jnp.ones((3, 2)), jnp.ones(3)
    words = r"takes .*loss_fn, params, data by position, and was given 1 more: a batch is one argument"
    with pytest.raises(TypeError, match=words):
        getattr(spectra, name)(*two)


def test_an_option_of_another_operator_is_refused():
    foreign: Any = {"centered": True}
    with pytest.raises(TypeError, match=r"'centered'\. It has .*loss_fn, params, data, wrt, .*check_data"):
        spectra.HessianOperator(loss_fn, jnp.ones(2), (jnp.ones((3, 2)), jnp.ones(3)), **foreign)
