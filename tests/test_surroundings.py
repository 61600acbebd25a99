"""What a program does around a call: JAX's own checks, threads, donated arrays, batches that change."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spectra
from spectra import DataError, StructureError

KEY = jax.random.key(0)
X, Y = jnp.cos(jnp.arange(24.0)).reshape(8, 3), jnp.sin(jnp.arange(8.0))
PARAMS = {"hidden": jnp.eye(3, 2), "out": jnp.ones(2)}


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2)


def hessian(data=(X, Y), params=PARAMS):
    return spectra.HessianOperator(loss_fn, params, data)


def halves(*sizes):
    stops = np.cumsum([0, *sizes])
    return [(X[a:b], Y[a:b]) for a, b in itertools.pairwise(stops)]


V = jnp.ones(8)
CALLS = {
    "slq": lambda op: spectra.slq(op, key=KEY, num_steps=3, num_probes=2).nodes,
    "eigsh": lambda op: spectra.eigsh(op, 1, key=KEY).values,
    "trace": lambda op: spectra.trace(op, key=KEY, num_matvecs=4, method="hutchinson").value,
    "solve": lambda op: spectra.solve(op.shift(9.0), V).x,
    "kpm": lambda op: spectra.kpm(op, key=KEY, num_moments=6, num_probes=1).moments,
    "scipy": lambda op: op.to_scipy() @ np.ones(8),
}
STRICT = {
    "dtypes": partial(jax.numpy_dtype_promotion, "strict"),
    "shapes": partial(jax.numpy_rank_promotion, "raise"),
    "transfers": partial(jax.transfer_guard, "disallow_explicit"),
    "keys": partial(jax.debug_key_reuse, True),
}
"""Refusals of JAX that the package's own code does not keep to. The loss above keeps to all of them."""


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(jax.device_get(tree))])


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_jax_checks_the_code_of_its_user_and_not_that_of_the_package(name):
    op = hessian()
    plain = flat(CALLS[name](op))
    for strict in STRICT.values():
        with strict():
            found = CALLS[name](op)
        np.testing.assert_array_equal(flat(found), plain)


def test_jax_checks_no_code_that_reads_results():
    """A report could not be printed where `jax.transfer_guard("disallow")` was set: JAX's error."""
    row = np.array([[1.0, 2.0, 4.0]])
    size = {"lengths": np.array([3]), "asymmetry": np.zeros(1), "size": 9, "num_matvecs": 3}
    result = spectra.Quadrature(row, row / 7, row / 9, **size, precision=1e-7, status=spectra.Status.COMPLETE)
    plain = result.cdf(1.5)
    for strict in STRICT.values():
        with strict():
            assert result.cdf(1.5) == plain


@pytest.mark.slow
def test_a_search_for_nans_is_one_in_the_code_of_the_user():
    """A square root was tried at -1e-8, below a zero eigenvalue: FloatingPointError."""
    one, v = spectra.MatrixOperator(jnp.diag(jnp.array([2.0, 0.0, 0.0]))), jnp.array([1.0, 1.0, 0.0])
    plain = spectra.funm(one, jnp.sqrt, v, key=KEY)
    with jax.debug_nans(True), jax.debug_infs(True):
        found = spectra.funm(one, jnp.sqrt, v, key=KEY)
        assert spectra.solve(one, v).status.code == "singular"
        with pytest.raises(spectra.NonFiniteError, match="'hidden'"):
            _ = hessian(params=PARAMS | {"hidden": np.full((3, 2), np.nan, np.float32)}) @ V
    np.testing.assert_array_equal(found.value, plain.value)


def test_keys_of_a_batch_are_those_of_every_product():
    """KeyReuseError: the first product had consumed them."""
    keys = jax.random.split(KEY, 3)

    def noisy(p, keys):
        return jnp.mean(jax.vmap(jax.random.normal)(keys) * p["w"] ** 3)

    op = spectra.HessianOperator(noisy, {"w": jnp.ones(())}, keys)
    plain = op @ jnp.ones(1)
    with jax.debug_key_reuse(True):
        op = spectra.HessianOperator(noisy, {"w": jnp.ones(())}, keys)
        for _ in range(2):
            np.testing.assert_array_equal(op @ jnp.ones(1), plain)


@pytest.mark.slow
def test_operators_are_made_under_checks_too():
    batches = halves(4, 4)
    for strict in STRICT.values():
        with strict():
            blocks = hessian(batches).blocks()
        assert {name: block.size for name, block in blocks.items()} == {"hidden": 6, "out": 2}


def test_calls_from_threads_are_those_of_one_after_the_other():
    op, other = hessian(), hessian(params=jax.tree.map(lambda x: 2 * x, PARAMS))
    jobs = [(name, which) for name in ("slq", "eigsh", "trace") for which in (op, op, other)]
    expected = [flat(CALLS[name](which)) for name, which in jobs]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda job: flat(CALLS[job[0]](job[1])), jobs))
    for one, another in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, another)


@pytest.mark.slow
def test_runs_in_threads_save_their_checkpoints(tmp_path, recwarn):
    """Orbax numbers the saves of a process: two at once waited for each other, and neither was written."""
    op = hessian()

    def run(folder):
        saved = spectra.Checkpoint(tmp_path / folder, steps=1)
        return flat(spectra.slq(op, key=KEY, num_steps=3, num_probes=2, checkpoint=saved).nodes)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, ("a", "b")))
    np.testing.assert_array_equal(found[0], found[1])
    assert not [x for x in recwarn if "no checkpoint" in str(x.message)]


@pytest.mark.slow
def test_a_tracker_shared_by_threads_records_each_step_once(tmp_path):
    path = tmp_path / "history.jsonl"
    tracker = spectra.SpectrumTracker(lambda params: hessian(params=params), every=1, num_steps=2, path=path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda step: tracker(step, PARAMS), [0, 1, 2, 3] * 2))
    assert sorted(spectra.load(path).steps) == sorted(tracker.history.steps) == [0, 1, 2, 3]


@partial(jax.jit, donate_argnums=0)
def donating(tree):
    return jax.tree.map(lambda x: 0.5 * x, tree)


@pytest.mark.slow
def test_an_argument_that_was_donated_is_named():
    op, gone = hessian(), jax.tree.map(jnp.copy, PARAMS)
    tracker = spectra.SpectrumTracker(lambda params: hessian(params=params), every=1)
    pairs = spectra.eigsh(op, 1, key=KEY)
    donating(gone), donating(pairs.vectors)
    for call, name in (
        (lambda: spectra.lanczos(op, gone, 2), "v0: leaf 'hidden'"),
        (lambda: spectra.solve(op, gone), "b: leaf 'hidden'"),
        (lambda: op @ gone, "v: leaf 'hidden'"),
        (lambda: spectra.step_quality(op, gone), "update: leaf 'hidden'"),
        (lambda: tracker(0, gone), "state: leaf '0/hidden'"),
        (lambda: spectra.gradient_overlap(op, pairs), "pairs: leaf 'vectors/hidden'"),
        (lambda: pairs.save("nowhere"), "result: leaf 'vectors/hidden'"),
    ):
        with pytest.raises(StructureError, match=f"{name} was deleted: it was donated"):
            call()
    assert tracker(0, PARAMS).step == 0


def test_shapes_without_numbers_are_enough_to_plan_with_and_named_elsewhere():
    """A TypeError of `jax.jit`, that ShapeDtypeStruct is not a valid JAX type, came from all of these."""
    op = hessian(params=jax.eval_shape(lambda: PARAMS))
    assert spectra.plan(op, num_steps=2, num_probes=1).num_matvecs == 2
    for call in (
        lambda: op @ PARAMS,
        lambda: op.mv(PARAMS),
        op.as_matrix,
        lambda: spectra.slq(op, key=KEY, num_steps=2, num_probes=1),
        lambda: spectra.spectrum(op, key=KEY),
        lambda: spectra.solve(op, PARAMS),
    ):
        with pytest.raises(StructureError, match=r"'params/hidden' is a jax\.ShapeDtypeStruct, a shape"):
            call()
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'key'"):
        spectra.slq(op)


@pytest.mark.slow
def test_results_of_eval_shape_can_be_printed():
    """A notebook shows what a cell returns: it was a TypeError, of `float` on a shape."""
    op = hessian()
    estimate = jax.eval_shape(lambda op: spectra.trace(op, key=KEY, num_matvecs=2), op)
    quadrature = jax.eval_shape(lambda op: spectra.slq(op, key=KEY, num_steps=2, num_probes=1), op)
    assert "2 products, traced" in repr(estimate)
    assert "num_probes=1, num_steps=2" in repr(quadrature)
    assert quadrature._repr_html_() is None
    stacked = jax.eval_shape(
        jax.vmap(lambda key: spectra.slq(op, key=key, num_steps=2, num_probes=1)), jax.random.split(KEY)
    )
    assert "several" in repr(stacked)
    assert stacked._repr_html_() is None


@pytest.mark.parametrize(
    "second",
    [{"x": X, "y": Y}, (X, Y, Y), (X[:, :2], Y), None],
    ids=["a dict", "three arrays", "fewer columns", "nothing"],
)
def test_a_later_batch_that_the_loss_cannot_take_is_named(second):
    with pytest.raises(StructureError, match=r"raised \w+ in .*Batch 1 of the stream was "):
        hessian(lambda: iter([(X, Y), second]))


def of_eight(params, batch):
    """`loss_fn`, written for batches of eight examples."""
    return loss_fn(params, (batch[0], batch[1].reshape(8)))


@pytest.mark.parametrize(
    ("compute", "where"),
    [
        (
            lambda: spectra.HessianOperator(of_eight, PARAMS, [(X, Y), (X[:5], Y[:5])]),
            "Batch 1 of the stream",
        ),
        (lambda: spectra.population(eight(), key=KEY), "A part of [1-7] examples"),
        (lambda: spectra.data_variability(eight(), key=KEY, num_subsets=2), "A part of 4 examples"),
    ],
    ids=["last batch", "population", "data_variability"],
)
def test_a_loss_written_for_one_number_of_examples_is_named_with_the_other(compute, where):
    """What JAX said of shapes came from within the first product."""
    with pytest.raises(StructureError, match=rf"raised TypeError in .*{where} was "):
        compute()


def eight():
    return spectra.HessianOperator(of_eight, PARAMS, (X, Y))


@pytest.mark.slow
def test_batches_whose_structure_the_loss_takes_may_differ():
    def masked(params, batch):
        x, y, mask = batch
        return loss_fn(params, (x, y if mask is None else y * mask))

    op = spectra.HessianOperator(masked, PARAMS, lambda: iter([(X, Y, jnp.ones(8)), (X, Y, None)]))
    np.testing.assert_allclose(op.as_matrix(), hessian().as_matrix(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_source_that_begins_to_shuffle_batches_of_several_sizes_is_noticed():
    """Weights go by place: those of a shuffled pass would be wrong, and the result with them."""
    batches = halves(6, 2)
    op = hessian(lambda: iter(batches))
    batches.reverse()
    with pytest.raises(DataError, match=r"batch 0 .* float32\[2\].*not deterministic"):
        spectra.slq(op, key=KEY, num_steps=3, num_probes=2)
