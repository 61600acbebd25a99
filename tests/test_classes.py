"""The parts of a Gauss-Newton matrix by classes, against sums over examples in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import OUTPUTS, N, Network, cross_entropy, half_square, model_fn, softmax

import spectra

NET = Network()


def network(labels=NET.labels, data=None, **options):
    batch = jnp.asarray(NET.x, jnp.float32), jnp.asarray(labels)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), NET.params())
    return spectra.GGNOperator(model_fn, cross_entropy, params, batch if data is None else data, **options)


def parts():
    """The four sums, written out."""
    p, jacobians, labels = softmax(NET.outputs()), NET.jacobians(), NET.labels
    g = np.einsum("ian,ica->icn", jacobians, np.eye(OUTPUTS)[None] - p[:, None])
    w = p / N
    means = np.zeros((OUTPUTS, OUTPUTS, g.shape[-1]))
    weights = np.zeros((OUTPUTS, OUTPUTS))
    for c in range(OUTPUTS):
        for k in range(OUTPUTS):
            mine = labels == c
            weights[c, k] = w[mine, k].sum()
            means[c, k] = (w[mine, k, None] * g[mine, k]).sum(0) / weights[c, k]
    found = dict.fromkeys(("class_means", "cross", "within", "same"), 0.0)
    for c in range(OUTPUTS):
        others = [k for k in range(OUTPUTS) if k != c]
        total = weights[c, others].sum()
        center = weights[c, others] @ means[c, others] / total
        found["class_means"] += total * np.outer(center, center)
        for k in others:
            away = means[c, k] - center
            found["cross"] += weights[c, k] * np.outer(away, away)
    for i in range(N):
        for k in range(OUTPUTS):
            if k == labels[i]:
                found["same"] += w[i, k] * np.outer(g[i, k], g[i, k])
            else:
                away = g[i, k] - means[labels[i], k]
                found["within"] += w[i, k] * np.outer(away, away)
    return found


def _stream(size):
    batch = network().data
    return [jax.tree.map(lambda x, a=a: x[a : a + size], batch) for a in range(0, N, size)]


@pytest.mark.parametrize(
    "form", ["batch", *(pytest.param(x, marks=pytest.mark.slow) for x in ("one-hot", "microbatch", "stream"))]
)
def test_parts_are_those_of_the_definition_and_sum_to_the_whole(form):
    if form == "one-hot":

        def loss(logits, targets):
            return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), -1))

        op = network()
        hot = op.data[0], jnp.eye(OUTPUTS)[NET.labels]
        op = spectra.GGNOperator(model_fn, loss, op.params, hot)
    else:
        op = network(
            data=_stream(4) if form == "stream" else None, microbatch=4 if form == "microbatch" else None
        )
    found, wanted = spectra.class_operators(op), parts()
    whole = np.asarray(op.as_matrix(), float)
    size = np.abs(whole).max()
    # Sums of N C terms of float32 numbers of that size.
    tol = 4 * N * OUTPUTS * np.finfo(np.float32).eps * size
    for name, part in wanted.items():
        np.testing.assert_allclose(found[name].as_matrix(), part, atol=tol)
    np.testing.assert_allclose(sum(np.asarray(x.as_matrix(), float) for x in found.values()), whole, atol=tol)


@pytest.mark.slow
def test_the_split_has_the_eigenvalues_of_the_parts(tmp_path):
    op, wanted = network(), parts()
    split = spectra.class_split(op, key=jax.random.key(0), num_eigenvalues=4)
    for name, part in wanted.items():
        exact = np.linalg.eigvalsh(part)[::-1]
        values = getattr(split, name)
        np.testing.assert_allclose(values, exact[: len(values)], atol=1e-5 * exact[0])
        trace = getattr(split, f"{name.removesuffix('_means')}_trace")
        np.testing.assert_allclose(getattr(trace, "value", trace), np.trace(part), rtol=1e-4)  # n = 18: exact
    np.testing.assert_allclose(split.weights.sum(), 1, rtol=1e-6)
    again = spectra.load(spectra.save(split, tmp_path / "split"))
    assert repr(again) == repr(split)


@pytest.mark.slow
def test_a_trained_classifier_has_outliers_of_the_class_means():
    """Papyan's finding on digits: the class means have k - 1 eigenvalues apart from the rest."""
    from spectra.demos import digits

    task = digits.problem()

    def logits(params, x):
        return digits.MODEL.apply({"params": params}, x)

    op = spectra.GGNOperator(logits, cross_entropy, task.params, task.data)
    split = spectra.class_split(op, key=jax.random.key(0), num_matvecs=16)
    ratios = split.class_means[:-1] / split.class_means[1:]
    assert int(np.argmax(ratios)) == 8
    assert ratios[8] > 5
    # What lies within the classes is a bulk: below the outliers of the whole.
    assert split.within[0] < split.whole[8]
    traces = split.class_trace + split.cross_trace + split.within_trace.value + split.same_trace.value
    error = np.hypot(split.within_trace.stderr, split.same_trace.stderr)
    whole = spectra.trace(op, key=jax.random.key(9), num_matvecs=200)
    assert abs(traces - whole.value) <= 4 * np.hypot(error, whole.stderr)


@pytest.mark.slow
def test_what_has_no_classes_is_refused():
    with pytest.raises(spectra.StructureError, match="GGNOperator"):
        spectra.class_operators(spectra.MatrixOperator(jnp.eye(2)))  # pyright: ignore
    op = network()
    real = op.data[0], jnp.asarray(NET.real, jnp.float32)
    with pytest.raises(spectra.DataError, match="softmax cross-entropy"):
        spectra.class_operators(spectra.GGNOperator(model_fn, half_square, op.params, real))

    def summed(logits, labels):
        return N * cross_entropy(logits, labels)

    with pytest.raises(spectra.DataError, match="softmax cross-entropy"):
        spectra.class_operators(spectra.GGNOperator(model_fn, summed, op.params, op.data))


@pytest.mark.slow
@pytest.mark.parametrize(("label", "streamed"), [(-1, False), (OUTPUTS, True)])
def test_labels_of_no_class_are_refused(label, streamed):
    """JAX reads class -1 as the last one, and takes the one-hot row of either for zero."""
    wrong = NET.labels.copy()
    wrong[1] = label

    def loss_fn(outputs, labels):  # what such a loss makes of them is its own affair
        return cross_entropy(outputs, labels % OUTPUTS)

    batch = jnp.asarray(NET.x, jnp.float32), jnp.asarray(wrong)
    halves = [jax.tree.map(lambda x, part=part: x[part], batch) for part in (slice(3), slice(3, None))]
    op = spectra.GGNOperator(model_fn, loss_fn, network().params, halves if streamed else batch)
    with pytest.raises(spectra.DataError, match=f"{100 / N:.3g} % of the labels are not between 0 and"):
        spectra.class_operators(op)


def linear_model(w, x):
    return x @ w


def mean_likelihood(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1))


@pytest.mark.slow
def test_saturated_probabilities_are_those_of_a_softmax_too():
    """p - p² is then its own rounding, and proves nothing about the loss."""
    x = jax.random.normal(jax.random.key(0), (24, 4))
    w = jax.random.normal(jax.random.key(1), (4, OUTPUTS))
    for size in (30, 50, 70, 90, 120, 150, 200, 300, 1000):
        sure = spectra.GGNOperator(linear_model, mean_likelihood, size * w, (x, jnp.arange(24) % OUTPUTS))
        assert set(spectra.class_operators(sure)) == {"class_means", "cross", "within", "same"}


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True])
def test_one_example_of_each_class_has_no_variation_within_a_class(streamed):
    x, labels = jax.random.normal(jax.random.key(0), (OUTPUTS, 2)), jnp.arange(OUTPUTS)
    data = [(x[i : i + 1], labels[i : i + 1]) for i in range(OUTPUTS)] if streamed else (x, labels)
    op = spectra.GGNOperator(linear_model, mean_likelihood, jnp.ones((2, OUTPUTS)), data)
    assert not jnp.any(spectra.class_operators(op)["within"].as_matrix())
