"""Batches, microbatches and streams: one mean, however the data are cut; sources that change."""

import functools
import itertools
import tracemalloc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Ridge, relative_error, ridge_count, ridge_loss, slow_but
from scipy import stats

import spectra
from spectra import DataError
from spectra.estimators.law import Law
from spectra.operators.doubled import in_double
from spectra.report import variability

CUTS = {"equal": (4, 8), "unequal": (1, 9), "a batch each": tuple(range(1, 12))}


def hessian(ridge, data, **options):
    return np.asarray(ridge.operator(data, **options).as_matrix(), np.float64)


@pytest.mark.parametrize("microbatch", [None, 5, 100])
@pytest.mark.parametrize("cut", slow_but(CUTS, "unequal", "a batch each"))
@pytest.mark.parametrize("masked", [False, True], ids=["examples", "tokens"])
def test_any_cut_of_the_data_gives_the_same_hessian(masked, cut, microbatch, x64):
    ridge = Ridge(num_examples=12, width=3, masked=masked)
    weight_fn = ridge_count if masked else None
    got = hessian(ridge, ridge.parts(*CUTS[cut]), microbatch=microbatch, weight_fn=weight_fn)
    # A sum of 12 terms in another order: 12 roundings, and as many in each product.
    assert relative_error(got, ridge.hessian()) <= 32 * np.finfo(float).eps
    op = ridge.operator(microbatch=microbatch, weight_fn=weight_fn)
    assert relative_error(op.as_matrix(), ridge.hessian()) <= 32 * np.finfo(float).eps


def test_token_means_need_token_weights(x64):
    ridge = Ridge(num_examples=12, width=3, masked=True)
    with pytest.raises(DataError, match=r"not a mean over examples.*weight_fn"):
        ridge.operator(ridge.parts(1, 9))
    wrong = hessian(ridge, ridge.parts(1, 9), check_data=False)
    assert relative_error(wrong, ridge.hessian()) > 1e-3


def test_fractional_weights_keep_the_precision_of_the_data(x64):
    ridge = Ridge(num_examples=12, width=3)
    ridge.mask = np.linspace(0.1, 1.3, 12)  # not representable in float32
    for options in ({}, {"microbatch": 5}):
        got = hessian(ridge, None, weight_fn=ridge_count, **options)
        assert relative_error(got, ridge.hessian()) <= 32 * np.finfo(float).eps


@pytest.mark.slow
@pytest.mark.parametrize("cut", [{"microbatch": 3}, {"data": (3, 6)}], ids=["micro", "stream"])
def test_a_piece_of_padding_only_counts_nothing(cut, x64):
    ridge = Ridge(num_examples=9, width=3)
    ridge.mask[3:6] = 0  # its own mean is 0 / 0, its weight is zero
    data = ridge.parts(*cut["data"]) if "data" in cut else None
    got = hessian(ridge, data, weight_fn=ridge_count, microbatch=cut.get("microbatch"))
    assert relative_error(got, ridge.hessian()) <= 32 * np.finfo(float).eps


@pytest.mark.slow
def test_loss_and_gradient_are_means_over_the_stream(x64):
    ridge = Ridge()
    one, many = ridge.operator(), ridge.operator(ridge.parts(2, 3))
    t = np.tanh(ridge.inputs @ ridge.w + ridge.b)
    assert float(one.loss()) == pytest.approx(np.mean(t**2), rel=1e-14)
    assert float(many.loss()) == pytest.approx(np.mean(t**2), rel=1e-14)
    gradient = ridge.inputs.T @ (2 * t * (1 - t**2)) / len(t)
    np.testing.assert_allclose(many.gradient()["w"], gradient, rtol=0, atol=1e-14)


class Loader:
    """A re-iterable that is not a list, as data loaders are."""

    def __init__(self, passes):
        self.passes = passes
        self.count = 0

    def __iter__(self):
        self.count += 1
        return iter(self.passes(self.count))


@pytest.mark.slow
def test_kinds_of_sources_are_the_same_stream():
    ridge = Ridge()
    parts = ridge.parts(4, 5)

    def generate():
        yield from parts

    matrices = [hessian(ridge, source) for source in (parts, generate, Loader(lambda _: parts))]
    np.testing.assert_array_equal(matrices[0], matrices[1])
    np.testing.assert_array_equal(matrices[0], matrices[2])


@pytest.mark.slow
def test_numpy_batches_of_any_dtype_are_read():
    ridge = Ridge()
    inputs, mask = ridge.inputs.astype(np.float32), np.ones(13, np.int8)
    batches = [(inputs[:4], mask[:4]), (inputs[4:].astype(jnp.bfloat16), mask[4:])]
    op = ridge.operator(batches)
    assert np.isfinite(op.as_matrix()).all()


def refuse(source, match, **options):
    with pytest.raises(DataError, match=match):
        Ridge().operator(source, **options)


@pytest.mark.slow
def test_a_shuffling_source_is_refused():
    x, m = Ridge().batch()
    orders = [np.random.default_rng(i).permutation(13) for i in range(9)]

    def passes(i):
        return [(x[o], m[o]) for o in np.split(orders[i], [5])]

    refuse(Loader(passes), "not deterministic: batch 0 differs.*shuffle=False")


def test_shuffled_order_of_equal_batches_is_refused():
    parts = Ridge().parts(5, 10)
    refuse(Loader(lambda i: parts if i == 1 else parts[::-1]), "not deterministic")


def test_a_source_with_random_noise_is_refused():
    x, m = Ridge().batch()
    refuse(Loader(lambda i: [(x + i * 1e-6, m)]), "random augmentation")


def test_sources_that_can_be_read_once_are_refused():
    parts = Ridge().parts(5)
    refuse(iter(parts), "read only once")
    refuse((part for part in parts), "read only once")
    exhausted = iter(parts)
    refuse(lambda: exhausted, "no batches on the second pass")


def test_sources_that_end_early_or_grow_between_passes_are_refused():
    parts = Ridge().parts(5, 10)
    refuse(Loader(lambda i: parts[: 4 - i]), "not deterministic: batch 2")
    refuse(Loader(lambda i: parts[: i + 1]), "not deterministic: batch 2")


def test_sources_that_end_early_or_grow_later_are_noticed_in_a_product():
    ridge = Ridge()
    parts = ridge.parts(5, 10)
    with pytest.raises(DataError, match="ended after 2 of 3"):
        ridge.operator(Loader(lambda i: parts if i <= 3 else parts[:2])).as_matrix()
    with pytest.raises(DataError, match="more than its 3"):
        ridge.operator(Loader(lambda i: parts if i <= 3 else parts + parts)).as_matrix()


def test_empty_sources_and_batches_are_refused():
    x, m = Ridge().batch()
    refuse([], "gives no batches")
    refuse(lambda: itertools.chain(), "gives no batches")
    refuse((x[:0], m[:0]), "no examples")
    refuse([(x, m), (x[:0], m[:0])], "data batch 1: the batch has no examples")


def test_inconsistent_batches_are_refused_by_leaf():
    x, m = Ridge().batch()
    refuse((x, m[:3]), r"differ in their number of examples: \{'0': 13, '1': 3\}.*shared=", microbatch=2)
    refuse([(x, m), (x, m[:3])], "data batch 1: leaves differ.*weight_fn=")
    refuse("a.npz", "data is text, 'a.npz'")
    refuse(["a.npz", "b.npz"], "data batch 0 is text, 'a.npz'")
    refuse({"x": x, "m": object()}, "leaf 'm' is a object")
    refuse({"x": x, "m": np.array([None] * 13)}, "leaf 'm' holds Python objects")


@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf, 0.0])
def test_impossible_weights_are_refused(weight):
    refuse(Ridge().parts(5), "weight_fn gave weights", weight_fn=lambda batch: weight)


def a_weight_each(batch):
    return batch[1]


WRONG_WEIGHTS = {"one each": a_weight_each, "none": lambda batch: None, "text": lambda batch: "3"}


@pytest.mark.parametrize("name", WRONG_WEIGHTS)
@pytest.mark.parametrize("microbatch", [None, 2])
def test_weights_that_are_not_one_number_are_refused(name, microbatch):
    ridge = Ridge()
    data = ridge.batch() if microbatch else ridge.parts(5)
    options = {"weight_fn": WRONG_WEIGHTS[name], "microbatch": microbatch}
    with pytest.raises(spectra.StructureError, match=r"weight_fn returned .*one real number"):
        ridge.operator(data, **options)
    with pytest.raises(spectra.StructureError, match=r"weight_fn returned shape \(1,\) and dtype"):
        spectra.GradientCovarianceOperator(ridge_loss, ridge.params(), ridge.batch(), weight_fn=a_weight_each)
    with pytest.raises(spectra.StructureError, match="weight_fn is a int; pass a function"):
        ridge.operator(data, **options | {"weight_fn": 0})


def test_what_ends_while_it_is_first_looked_at_is_refused():
    ridge = Ridge()
    for passes in range(2, 6):
        refuse(Loader(lambda i, n=passes: ridge.parts(5) if i < n else []), "gives no|ended after 0")
    refuse(lambda: 1, "data is a function that returned int")
    refuse(lambda: {"x": np.ones(3)}, "data is a function that returned dict")
    refuse(lambda name: [name], "a function that needs arguments, .*lambda: batches")


@pytest.mark.slow
def test_the_probe_can_be_switched_off():
    ridge = Ridge()
    source = Loader(lambda _: ridge.parts(5))
    op = spectra.HessianOperator(ridge_loss, ridge.params(), source, check_data=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(op.as_matrix()).all()


def examples(count=60):
    return jnp.asarray(np.random.default_rng(0).standard_normal((count, 4)))


def linear_loss(w, x):
    return 0.5 * jnp.mean((x @ w) ** 2)  # H = XᵀX / N


SUBSETS = {
    "one batch": lambda x: (spectra.HessianOperator(linear_loss, jnp.ones(4), x), None),
    "a stream": lambda x: (
        spectra.HessianOperator(linear_loss, jnp.ones(4), [x[i : i + 5] for i in range(0, 60, 5)]),
        None,
    ),
    "a function": lambda x: (
        lambda batch: spectra.HessianOperator(linear_loss, jnp.ones(4), batch),
        [x[:15], x[15:30], x[30:45], x[45:]],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SUBSETS)
def test_spread_over_disjoint_subsets(kind, x64):
    x = examples()
    operator, batches = SUBSETS[kind](x)
    spread = spectra.data_variability(
        operator, batches, key=jax.random.key(0), num_steps=4, num_eigenvalues=2, num_probes=2
    )
    rows = np.asarray(x)
    parts = [rows[15 * i : 15 * i + 15] for i in range(4)]
    if kind == "a stream":
        parts = [np.concatenate([rows[5 * j : 5 * j + 5] for j in range(i, 12, 4)]) for i in range(4)]
    for i, part in enumerate(parts):
        exact = np.linalg.eigvalsh(part.T @ part / len(part))
        np.testing.assert_allclose(spread.largest[i], exact[:1:-1], rtol=1e-10)
        np.testing.assert_allclose(spread.smallest[i], exact[:2], rtol=1e-10)
    whole = np.linalg.eigvalsh(rows.T @ rows / 60)
    np.testing.assert_allclose(spread.whole_largest, whole[:1:-1], rtol=1e-10)
    assert spread.whole_largest[0] <= spread.largest[:, 0].mean()
    assert "4" in repr(spread)
    assert "from probes" in repr(spread)


@pytest.mark.slow
def test_variance_of_the_data_is_told_apart_from_that_of_the_probes():
    """Subsets that are copies differ in nothing; subsets of other scale by the data."""
    x = examples(15).astype(jnp.float32)
    make = lambda batch: spectra.HessianOperator(linear_loss, jnp.ones(4), batch)  # noqa: E731
    options = {"key": jax.random.key(0), "num_steps": 4}
    same = spectra.data_variability(make, [x] * 3, num_probes=1, **options)
    assert same.trace_data_std <= 1e-12 * abs(same.whole_trace)  # rounding of the mean
    assert same.trace_probe_std > 0
    # One probe's trace is off by at most sqrt(2 / (n + 2)) = 0.6 of itself, 64 probes by 0.07: four of these.
    scaled = spectra.data_variability(make, [x, 10 * x], num_probes=64, **options)
    exact = [float(jnp.sum(x**2)) / 15, 100 * float(jnp.sum(x**2)) / 15]
    assert scaled.trace_data_std == pytest.approx(np.std(exact, ddof=1), rel=0.3)


def test_the_spread_in_a_file_without_an_interval_is_that_of_the_sample():
    numbers = np.ones((3, 1)), np.ones((3, 1)), np.array([1.0, 2.0, 6.0]), np.ones(3), np.ones(1), np.ones(1)
    spread = spectra.DataVariability(*numbers, 3.0, 9)
    assert spread.trace_data_std == pytest.approx(7**0.5)  # (4 + 1 + 9) / (3 - 1)


def subsets_of_a_few_outliers():
    """Second moments of four samples of 100 examples, of which two directions count most."""
    rng = np.random.default_rng(0)
    parts = rng.standard_normal((4, 100, 24)) * np.r_[6, 4, np.ones(22)]
    return [part.T @ part / 100 for part in parts]


DIFFERENCES = {
    "outliers": subsets_of_a_few_outliers,
    "one entry": lambda: [np.diag(np.r_[c, np.ones(23)]) for c in (1.0, 2.0, 4.0, 3.0)],
    "two subsets": lambda: [np.diag(np.r_[c, 1.0, np.ones(22)]) for c in (5.0, 1.0)],
    "equal traces": lambda: [np.diag(np.roll(np.linspace(0, 1, 24), 6 * i)) for i in range(4)],
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_the_spread_of_traces_lies_in_its_interval(name, x64):
    matrices = DIFFERENCES[name]()
    exact = np.std([np.trace(a) for a in matrices], ddof=1)
    ops = [spectra.MatrixOperator(jnp.asarray(a)) for a in matrices]
    # 400 keys of 20 probes each: probes are independent, so one call draws them all.
    samples = variability._samples(ops, jax.random.key(0), 8000, 8000, exact=False)

    def found(count):
        parts = zip(*(np.split(x[: 400 * count], 400) for x in samples), strict=True)
        each = [variability.Samples(*part) for part in parts]
        return np.array([variability.summary(x, 24, 2.2e-16, exact=False, level=0.95) for x in each]).T

    low, _, high = found(variability.FEWEST)
    # 94 % of some rates by simulation, less two standard deviations of 400 keys.
    assert np.mean((low <= exact) & (exact <= high)) >= 0.916
    low, middle, high = found(20)
    # 93 % at least; two standard deviations of 400 keys are 2.2 % at 95 %.
    assert np.mean((low <= exact) & (exact <= high)) >= 0.93
    # The other side: twice 1.96 standard errors is the least there is, but for a truth at the end, zero.
    error = np.sqrt(np.mean((middle - exact) ** 2))
    assert np.mean(high - low) <= (1.5 if exact > 0 else 2.5) * 3.92 * error


@pytest.mark.slow
def test_the_spread_of_traces_is_exact_where_probes_span_the_space():
    matrices = subsets_of_a_few_outliers()
    exact = np.std([np.trace(a) for a in matrices], ddof=1)
    ops = [spectra.MatrixOperator(jnp.asarray(a, jnp.float32)) for a in matrices]
    low, middle, high = variability.spread_of_traces(ops, jax.random.key(0), 24, 5)
    # Each of 24 entries of a trace is rounded once, as are the images that are subtracted.
    rounding = float(jnp.finfo(jnp.float32).eps) * 24 * max(np.trace(a) for a in matrices)
    assert middle == pytest.approx(exact, abs=rounding)
    assert low <= exact <= high
    assert high - low <= rounding


def sure_loss(params, batch):
    x, labels = batch
    logits = jnp.tanh(x @ params["a"]) @ params["b"]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


@pytest.mark.parametrize("seed", slow_but(range(8), 3))
def test_the_exact_spread_of_traces_contains_the_rounding_of_sure_classifiers(seed):
    """Against traces in float64; the precision of products alone left out 4.5 times what it stated."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, 4))
    labels = np.argmax(x @ rng.standard_normal((4, 3)) + 0.01 * rng.standard_normal((64, 3)), 1)
    params = {"a": rng.standard_normal((4, 4)), "b": 15 * rng.standard_normal((4, 3))}
    params, x = jax.tree.map(np.float32, (params, x))
    op = spectra.HessianOperator(sure_loss, params, (jnp.asarray(x), jnp.asarray(labels)))
    found = spectra.data_variability(op, key=jax.random.key(0), num_steps=28, num_probes=2)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, (params, x))
        parts = [
            spectra.HessianOperator(sure_loss, wide[0], (wide[1][i : i + 16], labels[i : i + 16]))
            for i in range(0, 64, 16)
        ]
        traces = [float(jnp.trace(part.as_matrix())) for part in parts]
    exact = np.std(traces, ddof=1)
    low, _, high = found.trace_spread
    assert low <= exact <= high
    assert high - low <= 1e-4 * exact  # rounding, and no more of it than a loss of this kind has


def test_a_stream_of_thousands_of_batches_is_as_precise_as_one_batch():
    """Sums of N numbers in float32 lose some √N / 4 roundings, those of two-sums one."""
    rng = np.random.default_rng(1)
    x = np.float32(rng.standard_normal((3000, 5)) + 1)
    op = spectra.HessianOperator(linear_loss, jnp.ones(5), list(x[:, None]), check_data=False)
    v = np.float32(rng.standard_normal(5))
    wanted = np.float64(x).T @ (np.float64(x) @ v) / len(x)
    error = np.linalg.norm(np.asarray(op @ jnp.asarray(v), np.float64) - wanted)
    # Each of 3000 products has a few roundings of its own, whose mean is far below one.
    assert error <= np.finfo(np.float32).eps * np.linalg.norm(wanted)


def square(w, x):
    return 0.5 * jnp.mean(x[:, 0]) * jnp.sum(w**2)


def test_products_in_float64_hold_no_list_of_the_batches():
    """Two or three vectors of 8 n bytes at a time; of 100 batches a list would be 100."""
    n, scales = 20_000, np.arange(1.0, 101.0, dtype=np.float32)
    op = spectra.HessianOperator(square, jnp.ones(n), list(scales.reshape(-1, 1, 1)), check_data=False)
    wide = in_double(op)
    assert wide is not None
    v = jnp.ones(n)
    wide.unrounded(v)
    tracemalloc.start()
    try:
        found = wide.unrounded(v)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(found, scales.mean(), rtol=1e-12)
    assert peak < 20 * 8 * n


@pytest.mark.slow
def test_printed_means_of_unequal_subsets_are_those_that_bound_the_whole():
    """By Jensen's inequality, with weights; the plain mean of these is 2.1, below the whole's 3.9."""
    x = np.concatenate([np.tile([[2.0, 0.0]], (97, 1)), np.tile([[0.5, 0.1]], (3, 1))])
    batches = [jnp.asarray(x[:97]), jnp.asarray(x[97:])]
    op = spectra.HessianOperator(linear_loss, jnp.ones(2), batches)
    found = spectra.data_variability(op, key=jax.random.key(0), num_subsets=2, num_steps=2)
    np.testing.assert_allclose(found.weights, [0.97, 0.03])
    mean = float(found.weights @ found.largest[:, 0])
    assert found.largest.mean() < found.whole_largest[0] <= mean * (1 + 1e-6)
    assert f"largest eigenvalue   {mean:.5g} ±" in str(found)
    assert f"trace                {found.weights @ found.trace:.5g}; between" in str(found)


@pytest.mark.slow
def test_subsets_speak_about_the_distribution_that_they_are_drawn_from():
    """Student's limits of NumPy's traces and eigenvalues of ten subsets, four parameters: all exact."""
    rng = np.random.default_rng(3)
    scales = np.array([2.0, 1.0, 0.5, 0.2])
    x = np.float32(rng.standard_normal((300, 4)) * scales)
    op = spectra.HessianOperator(linear_loss, jnp.ones(4), x)
    found = spectra.data_variability(op, key=jax.random.key(0), num_steps=4, num_subsets=10, num_probes=2)
    parts = [part.T @ part / 30 for part in np.split(np.float64(x), 10)]
    for values, limit, sign in (
        (np.array([np.linalg.eigvalsh(a)[-1] for a in parts]), found.limits[1], 1),
        (np.array([np.linalg.eigvalsh(a)[0] for a in parts]), found.limits[0], -1),
    ):
        stderr = np.std(values, ddof=1) / 10**0.5
        shape = sign * np.mean((values - values.mean()) ** 3) / np.std(values) ** 3
        t = stats.t.ppf(0.976, 9)  # the rest of 2.5 % is that of the probes, which see everything here
        t += max(shape, 0) * (1 + 2 * t**2) / 6 / 10**0.5  # Johnson
        # Further out by what rounding may have moved an eigenvalue: at most 16 + 128 roundings of |H|, twice.
        rounding = 2 * 144 * float(jnp.finfo(jnp.float32).eps) * max(np.linalg.norm(a, 2) for a in parts)
        assert 0 <= sign * (limit - values.mean()) - t * stderr <= rounding
    low, middle, high = found.trace_population
    traces = np.array([np.trace(a) for a in parts])
    np.testing.assert_allclose(middle, traces.mean(), rtol=1e-5)
    assert low < np.sum(scales**2) < high
    assert high - low >= 2 * stats.t.ppf(0.975, 9) * np.std(traces, ddof=1) / 10**0.5 * (1 - 1e-4)
    assert found.limits[0] < scales.min() ** 2
    assert scales.max() ** 2 < found.limits[1]
    assert "population" in repr(found)


@pytest.mark.parametrize("sizes", [(9, 1), (6, 3, 2, 1), (40, 1, 1, 1)], ids=str)
def test_subsets_of_unequal_size_tell_of_the_distribution(sizes):
    """Means of other numbers of normal examples; two of them leave Student's interval of the pooled variance,
    |x₁ - x₂| sqrt(p₁ p₂) with one degree of freedom, in closed form."""
    share = np.array(sizes) / sum(sizes)
    law = Law(share, np.zeros(len(sizes), int), 0.975, sizes=np.array(sizes))
    draws = np.random.default_rng(0).standard_normal((600, len(sizes))) / np.sqrt(sizes)
    errors = [law.errors(x) for x in draws]
    reach = np.array([[e.reach(0.975, up) * e.stderr for up in (True, False)] for e in errors])
    means = draws @ share
    covered = (means - reach[:, 0] <= 0) & (means + reach[:, 1] >= 0)
    assert covered.mean() >= 0.93  # 95 %, less two standard deviations of 600 draws
    # The squared errors have the expectation 1 / N, and with one degree of freedom a spread of sqrt(2 / 600).
    assert np.mean([e.stderr**2 for e in errors]) == pytest.approx(1 / sum(sizes), rel=4 * (2 / 600) ** 0.5)
    if len(sizes) == 2:
        apart = np.abs(draws[:, 0] - draws[:, 1]) * np.sqrt(share[0] * share[1])
        np.testing.assert_allclose(reach, np.stack([stats.t.ppf(0.975, 1) * apart] * 2, 1), rtol=1e-9)


@pytest.mark.slow
def test_subsets_of_unequal_size_count_by_their_examples():
    """The same in closed form, of the two mean squares that are the traces of a single parameter."""
    x = np.float32([[1.0]] * 9 + [[3.0]])
    found = spectra.data_variability(
        lambda batch: spectra.HessianOperator(linear_loss, jnp.ones(1), batch),
        [x[:9], x[9:]],
        key=jax.random.key(0),
        num_steps=1,
        num_probes=2,
    )
    reach = stats.t.ppf(0.975, 1) * (9 - 1) * 0.3  # |x₁ - x₂| sqrt(0.9 * 0.1)
    np.testing.assert_allclose(found.trace_population, [1.8 - reach, 1.8, 1.8 + reach], rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_few_steps_leave_open_how_far_eigenvalues_go(steps):
    """Subsets that are one matrix: any limit that is exceeded is too low. An outlier at either end, in NumPy;
    a Ritz value and its residual do not reach it."""
    values = np.r_[-1.2, np.linspace(0, 1, 198), 1.2]
    matrix = jnp.asarray(np.diag(values), jnp.float32)
    for seed in range(5):
        found = spectra.data_variability(
            lambda batch: spectra.MatrixOperator(matrix),
            [np.ones((5, 1))] * 2,
            key=jax.random.key(seed),
            num_steps=steps,
            num_probes=1,
        )
        assert found.limits[0] <= -1.2
        assert found.limits[1] >= 1.2
        assert "population" in repr(found)
        assert found.num_matvecs == 3 * steps + 2 * 3  # one probe tells no spread of traces


def test_the_error_of_the_probes_has_degrees_of_freedom_of_its_own():
    """Subsets that are one matrix leave that error alone: the interval is that of a report, from one probe,
    and has Student's t of one probe and not of four subsets."""
    op = spectra.MatrixOperator(jnp.diag(jnp.asarray([30.0] + [1.0] * 59)))
    options = {"key": jax.random.key(2), "num_steps": 3, "num_probes": 1}
    found = spectra.data_variability(lambda batch: op, [np.ones((5, 1))] * 4, **options)
    report = spectra.spectrum(op, exact=False, **options)
    np.testing.assert_allclose(found.trace_population, report.trace.interval(), rtol=1e-5)
    reach = stats.t.ppf(0.975, report.trace.dof) / stats.t.ppf(0.975, 3)
    assert reach > 2
    assert report.trace.interval().upper - report.trace.value >= 0.99 * reach * 3.18 * report.trace.stderr


@pytest.mark.slow
def test_ritz_values_that_have_not_converged_are_called_bounds(x64):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((400, 60)))
    op = spectra.HessianOperator(linear_loss, jnp.ones(60), x)
    options = {"key": jax.random.key(0), "num_subsets": 2, "num_probes": 1}
    few = spectra.data_variability(op, num_steps=5, **options)
    exact = [np.linalg.eigvalsh(part.T @ part / 200)[[0, -1]] for part in np.split(np.asarray(x), 2)]
    assert (few.largest[:, 0] <= np.array(exact)[:, 1]).all()
    assert (few.smallest[:, 0] >= np.array(exact)[:, 0]).all()
    assert "at least" in repr(few)
    assert "not converged" in repr(few)
    assert few.num_matvecs == 3 * 5 + 2 * 5
    assert "not converged" not in repr(spectra.data_variability(op, num_steps=60, **options))


def test_subsets_that_cannot_be_made():
    op = spectra.HessianOperator(linear_loss, jnp.ones(4), examples(3).astype(jnp.float32))
    key = jax.random.key(0)
    with pytest.raises(DataError, match="3 examples cannot be split into 4"):
        spectra.data_variability(op, key=key, num_steps=4)
    with pytest.raises(spectra.SpectraError, match="at least two"):
        spectra.data_variability(op, key=key, num_subsets=1)
    with pytest.raises(spectra.SpectraError, match="function from a batch"):
        spectra.data_variability(jnp.ones(3), key=key)  # pyright: ignore
    with pytest.raises(DataError, match="one batch has all of the weight"):
        Law(np.array([1.0, 0.0]), np.zeros(2, int), 0.975).errors(np.ones(2))


@pytest.mark.slow
def test_a_subset_of_the_batches(x64):
    x = examples()
    batches = [x[i : i + 6] for i in range(0, 60, 6)]

    def hessian(rows):
        return np.asarray(rows).T @ np.asarray(rows) / len(rows)

    limit = 32 * np.finfo(float).eps
    make = functools.partial(spectra.HessianOperator, linear_loss, jnp.ones(4))
    assert relative_error(make(batches, num_batches=3).as_matrix(), hessian(x[:18])) <= limit

    def endless():
        while True:
            yield x[:6]

    assert relative_error(make(endless, num_batches=2).as_matrix(), hessian(x[:6])) <= limit
    drawn = make(batches, num_batches=4, subsample_key=jax.random.key(3))
    chosen = drawn.stream.indices
    assert len(set(chosen)) == 4
    assert chosen != (0, 1, 2, 3)
    rows = np.concatenate([batches[i] for i in chosen])
    assert relative_error(drawn.as_matrix(), hessian(rows)) <= limit
    with pytest.raises(DataError, match="only 10 batches"):
        make(batches, num_batches=11)
    with pytest.raises(DataError, match="pass num_batches"):
        make(batches, subsample_key=jax.random.key(0))
    with pytest.raises(spectra.SpectraError, match="data is one batch"):
        make(x, num_batches=2)
