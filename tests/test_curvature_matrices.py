"""Gauss-Newton, Fisher and gradient covariance against dense float64 matrices written in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import relative_error, slow_but
from networks import LOSSES, OUTPUTS, TARGETS, N, Network, curvature, model_fn, sandwich, softmax

import spectra
from spectra import FisherOperator, GGNOperator, GradientCovarianceOperator, HessianOperator

NAMES = list(LOSSES)
CUTS = {
    "one batch": lambda x, y: ((x, y), {}),
    "not linearised": lambda x, y: ((x, y), {"linearize": False}),
    "microbatches": lambda x, y: ((x, y), {"microbatch": 4}),
    "reverse": lambda x, y: ((x, y), {"mode": "reverse-over-reverse"}),
    "stream": lambda x, y: ([(x[:3], y[:3]), (x[3:], y[3:])], {}),
    "stream of microbatches": lambda x, y: ([(x[:3], y[:3]), (x[3:], y[3:])], {"microbatch": 2}),
}


def tolerance(dtype):
    """64 roundings: an entry is a sum over 11 examples of chains of about five operations."""
    return 64 * float(jnp.finfo(dtype).eps)


@functools.cache  # one function, one program
def loss_of(name):
    def loss_fn(params, batch):
        return LOSSES[name](model_fn(params, batch[0]), batch[1])

    return loss_fn


def setup(name, cut="one batch"):
    net = Network()
    data, options = CUTS[cut](jnp.asarray(net.x), jnp.asarray(getattr(net, TARGETS[name])))
    return net, data, options


CASES = [(name, "one batch", dtype) for name in NAMES for dtype in ("float32", "float64")]
CASES += [("cross_entropy", cut, "float64") for cut in list(CUTS)[1:]]


# How data are cut is for tests of the operators.
SELDOM = ("microbatches", "stream", "stream of microbatches", "not linearised")
ALWAYS = [case for case in CASES if case[2] == "float64" and case[1] not in SELDOM]


@pytest.mark.parametrize(("name", "cut", "dtype"), slow_but(CASES, *ALWAYS), indirect=["dtype"])
def test_gauss_newton_matrix(name, cut, dtype):
    net, data, options = setup(name, cut)
    op = GGNOperator(model_fn, LOSSES[name], net.params(), data, **options)
    expected = sandwich(net.jacobians(), curvature(name, net)[0])
    assert relative_error(op.as_matrix(), expected) <= tolerance(dtype)


def linear(w, x):
    return x @ w


def log_probabilities(w, x):
    return jax.nn.log_softmax(x @ w)


def of_log_probabilities(outputs, labels):
    return -jnp.mean(jnp.take_along_axis(outputs, labels[:, None], 1))


def absolute(outputs, labels):
    return jnp.mean(jnp.abs(outputs - labels[:, None]))


def hinge(outputs, labels):
    return jnp.mean(jax.nn.relu(1 - outputs * (2 * labels[:, None] - 1)))


def largest_output(outputs, _):
    return jax.lax.scan(lambda total, row: (total + jnp.max(row), None), 0.0, outputs)[0] / len(outputs)


def huber(outputs, labels):
    error = jnp.abs(outputs[:, 0] - labels)
    return jnp.mean(jnp.where(error < 1, error**2 / 2, error - 0.5))


def far(w, x):
    return 1e6 * (1 + x**2) @ w


X6, LABELS6 = np.random.default_rng(0).standard_normal((6, 3)).astype("float32"), np.arange(6) % 2


@pytest.mark.parametrize("options", [{}, {"mode": "reverse-over-reverse"}, {"microbatch": 2}], ids=str)
@pytest.mark.parametrize("loss_fn", [of_log_probabilities, absolute, hinge, largest_output])
def test_a_loss_linear_in_the_outputs_has_no_gauss_newton_matrix(loss_fn, options):
    """It is zero whatever the numbers, which says nothing about the network."""
    model = log_probabilities if loss_fn is of_log_probabilities else linear
    with pytest.raises(spectra.StructureError, match=r"linear in the.*take log_softmax in loss_fn"):
        GGNOperator(model, loss_fn, jnp.eye(3, 2), (X6, LABELS6), **options)


@pytest.mark.slow
def test_a_loss_that_is_linear_at_these_outputs_has_one():
    """Zero is true of these parameters alone: residuals are large, or a probability rounds to one."""
    for loss_fn in (huber, lambda f, y: of_log_probabilities(jax.nn.log_softmax(f), y)):
        assert not jnp.any(GGNOperator(far, loss_fn, jnp.eye(3, 2), (X6, LABELS6)).as_matrix())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float64", "float32"], indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_hessian_is_gauss_newton_plus_the_residual_term(name, dtype):
    net, data, _ = setup(name)
    hessian = HessianOperator(loss_of(name), net.params(), data)
    ggn = GGNOperator(model_fn, LOSSES[name], net.params(), data)
    middle, gradients = curvature(name, net)
    residual = net.residual_term(gradients)
    expected = sandwich(net.jacobians(), middle) + residual
    assert relative_error(hessian.as_matrix(), expected) <= tolerance(dtype)
    size = np.linalg.norm(expected) / np.linalg.norm(residual)  # the difference inherits H's errors
    assert relative_error((hessian - ggn).as_matrix(), residual) <= 2 * size * tolerance(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_exact_fisher_is_the_gauss_newton_matrix_of_these_losses(name, x64):
    net, data, _ = setup(name)
    op = FisherOperator(model_fn, LOSSES[name], net.params(), data, kind="type2", linearize=False)
    expected = sandwich(net.jacobians(), curvature(name, net)[0])
    assert relative_error(op.as_matrix(), expected) <= tolerance("float64")


ONE = ("cross_entropy", "one batch", "float64")
MOMENTS = [case for case in CASES if case[0] in ("cross_entropy", "half_square")]


# Losses and modes of differentiation are those of the Gauss-Newton matrix above.
@pytest.mark.parametrize(
    ("name", "cut", "dtype"),
    slow_but(MOMENTS, ONE),
    indirect=["dtype"],
)
def test_empirical_fisher_is_the_second_moment_of_gradients(name, cut, dtype):
    net, data, options = setup(name, cut)
    gradients = N * curvature(name, net)[1]  # of single examples
    moments = np.einsum("ia,ib->iab", gradients, gradients) / N
    expected = sandwich(net.jacobians(), moments)
    fisher = FisherOperator(model_fn, LOSSES[name], net.params(), data, kind="empirical", **options)
    assert relative_error(fisher.as_matrix(), expected) <= tolerance(dtype)
    covariance = GradientCovarianceOperator(loss_of(name), net.params(), data, **options)
    assert relative_error(covariance.as_matrix(), expected) <= tolerance(dtype)
    centered = GradientCovarianceOperator(loss_of(name), net.params(), data, centered=True, **options)
    mean = np.einsum("iam,ia->m", net.jacobians(), gradients) / N
    assert relative_error(centered.as_matrix(), expected - np.outer(mean, mean)) <= 2 * tolerance(dtype)
    vectors = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), net.params())
    one = centered @ net.params()
    for got, want in zip(jax.tree.leaves(centered.mv_batch(vectors)), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(got[1], 2 * want, rtol=0, atol=8 * tolerance(dtype) * np.abs(want).max())


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["one batch", "microbatches"])
@pytest.mark.parametrize("name", NAMES)
def test_sampled_fisher_of_given_samples(name, cut, x64):
    """The operator holds its samples; the second moment of their gradients is the matrix."""
    net, data, options = setup(name, cut)
    op = FisherOperator(
        model_fn, LOSSES[name], net.params(), data, kind="mc", key=jax.random.key(5), **options
    )
    drawn = np.asarray(op.data[1])
    assert drawn.shape == np.shape(data[1])
    assert drawn.dtype == data[1].dtype
    setattr(net, TARGETS[name], drawn)
    gradients = curvature(name, net)[1]
    weight = net.outputs().size if name == "binary" else N
    expected = sandwich(net.jacobians(), weight * np.einsum("ia,ib->iab", gradients, gradients))
    assert relative_error(op.as_matrix(), expected) <= tolerance("float64")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_sampled_fisher_is_unbiased(name):
    """The mean over 400 keys lies within five standard errors of the exact matrix, entry by entry.

    With 18² entries the largest of as many normal deviations exceeds five with probability 2e-4, and
    the keys are fixed.
    """
    net, data, _ = setup(name)

    @jax.jit
    def dense(key):
        op = FisherOperator(model_fn, LOSSES[name], net.params(), data, kind="mc", key=key)
        return jax.vmap(op.mv)(
            jax.vmap(lambda row: spectra.base.trees.unravel(row, op.structure))(jnp.eye(op.size))
        )

    samples = [dense(key) for key in jax.random.split(jax.random.key(0), 400)]
    flat = np.stack(
        [np.concatenate([x.reshape(x.shape[0], -1) for x in jax.tree.leaves(s)], 1) for s in samples]
    )
    expected = sandwich(net.jacobians(), curvature(name, net)[0])
    stderr = flat.std(0, ddof=1) / np.sqrt(len(flat))
    assert np.all(np.abs(flat.mean(0) - expected) <= 5 * stderr + 1e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_samples_do_not_depend_on_microbatches_and_follow_the_stream(x64):
    net, data, _ = setup("cross_entropy")
    make = lambda data, **o: FisherOperator(  # noqa: E731
        model_fn, LOSSES["cross_entropy"], net.params(), data, kind="mc", key=jax.random.key(1), **o
    )
    np.testing.assert_array_equal(make(data).data[1], make(data, microbatch=4).data[1])
    stream = make([data])
    key = jax.random.fold_in(jax.random.key(1), 0)
    same = FisherOperator(model_fn, LOSSES["cross_entropy"], net.params(), data, kind="mc", key=key)
    assert relative_error(stream.as_matrix(), same.as_matrix()) <= tolerance("float64")


@pytest.mark.slow
def test_custom_samples(x64):
    net, data, _ = setup("cross_entropy")
    op = FisherOperator(
        model_fn,
        LOSSES["cross_entropy"],
        net.params(),
        data,
        kind="mc",
        key=jax.random.key(0),
        sample_fn=lambda key, outputs, targets: jnp.argmax(outputs).astype(targets.dtype),
    )
    np.testing.assert_array_equal(op.data[1], net.outputs().argmax(1))


def smoothed(logits, labels):
    hot = 0.9 * jax.nn.one_hot(labels, OUTPUTS) + 0.1 / OUTPUTS
    return -jnp.mean(jnp.sum(hot * jax.nn.log_softmax(logits), -1))


def class_weighted(logits, labels):
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
    return jnp.mean(jnp.array([1.0, 2.0, 5.0])[labels] * nll)


@pytest.mark.slow
def test_a_likelihood_that_is_not_there_is_refused():
    net, data, _ = setup("cross_entropy")
    for kind, loss in (("mc", smoothed), ("mc", class_weighted), ("type2", class_weighted)):
        key = jax.random.key(0) if kind == "mc" else None
        with pytest.raises(spectra.StructureError, match=f"kind='{kind}' does not fit"):
            FisherOperator(model_fn, loss, net.params(), data, kind=kind, key=key)
    FisherOperator(model_fn, smoothed, net.params(), data, kind="type2")  # curvature without the targets
    unknown = (data[0], jnp.zeros((N, 7), int))
    norm = lambda outputs, targets: jnp.mean(outputs**2)  # noqa: E731
    with pytest.raises(spectra.StructureError, match="sample_fn"):
        FisherOperator(model_fn, norm, net.params(), unknown, kind="mc", key=jax.random.key(0))
    with pytest.raises(spectra.SpectraError, match="needs key="):
        FisherOperator(model_fn, LOSSES["cross_entropy"], net.params(), data, kind="mc")
    with pytest.raises(spectra.SpectraError, match="kind="):
        FisherOperator(model_fn, LOSSES["cross_entropy"], net.params(), data, kind="exact")  # pyright: ignore
    with pytest.raises(spectra.DataError, match=r"a batch is float\d\d\[.*\], not a pair"):
        GGNOperator(model_fn, LOSSES["cross_entropy"], net.params(), data[0])


# Tokens: outputs (batch, time, classes), masks beside the labels, a mean over the tokens that count.


def masked_cross_entropy(logits, targets):
    labels, mask = targets
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    return jnp.sum(mask * nll) / jnp.sum(mask)


def num_tokens(batch):
    return batch[1][1].sum()


def token_setup():
    net = Network()
    rng = np.random.default_rng(3)
    time = 4
    x = rng.standard_normal((5, time, 2))
    labels = rng.integers(0, OUTPUTS, (5, time))
    mask = (np.arange(time) < np.array([4, 1, 2, 3, 1])[:, None]) * 1.0
    flat = Network()
    flat.x = x.reshape(-1, 2)[mask.ravel() > 0]
    flat.labels = labels.ravel()[mask.ravel() > 0]
    as_jax = jax.tree.map(jnp.asarray, (x, (labels, mask)))
    return net, flat, as_jax


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["one batch", "microbatches", "stream"])
def test_tokens_are_the_terms_of_a_masked_language_model_loss(cut, x64):
    net, flat, data = token_setup()
    options = {"weight_fn": num_tokens}
    if cut == "microbatches":
        options["microbatch"] = 2
    if cut == "stream":
        data = [jax.tree.map(lambda a: a[:2], data), jax.tree.map(lambda a: a[2:], data)]
    count = len(flat.labels)
    p = softmax(flat.outputs())
    middle = np.einsum("ia,ab->iab", p, np.eye(OUTPUTS)) - np.einsum("ia,ib->iab", p, p)
    exact = sandwich(flat.jacobians(), middle) / count
    scores = p - np.eye(OUTPUTS)[flat.labels]
    empirical = sandwich(flat.jacobians(), np.einsum("ia,ib->iab", scores, scores)) / count
    residual = flat.residual_term(scores) / count
    args = (model_fn, masked_cross_entropy, net.params(), data)

    def loss_fn(params, batch):
        return masked_cross_entropy(model_fn(params, batch[0]), batch[1])

    limit = tolerance("float64")
    assert relative_error(GGNOperator(*args, **options).as_matrix(), exact) <= limit
    assert relative_error(FisherOperator(*args, **options).as_matrix(), exact) <= limit
    fisher = FisherOperator(*args, kind="empirical", **options)
    assert relative_error(fisher.as_matrix(), empirical) <= limit
    hessian = HessianOperator(loss_fn, net.params(), data, **options)
    assert relative_error(hessian.as_matrix(), exact + residual) <= limit
    FisherOperator(*args, kind="mc", key=jax.random.key(0), **options)
    if cut == "one batch":  # where nothing is cut, the loss says what each token weighs
        assert relative_error(FisherOperator(*args, kind="empirical").as_matrix(), empirical) <= limit


@pytest.mark.slow
def test_weights_of_single_examples(x64):
    net, data, _ = setup("half_square")
    weights = np.linspace(0, 2, N)
    batch = (*data, jnp.asarray(weights))

    def loss_fn(params, batch):
        x, y, w = batch
        return 0.5 * jnp.sum(w * jnp.sum((model_fn(params, x) - y) ** 2, -1)) / jnp.sum(w)  # 0 / 0 for w = 0

    gradients = N * curvature("half_square", net)[1]
    moments = np.einsum("i,ia,ib->iab", weights / weights.sum(), gradients, gradients)
    op = GradientCovarianceOperator(loss_fn, net.params(), batch, weight_fn=lambda b: b[2].sum())
    assert relative_error(op.as_matrix(), sandwich(net.jacobians(), moments)) <= tolerance("float64")


def token_loss(outputs, targets):
    """Mean cross-entropy over tokens, classes along the last axis."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None], -1))


def token_loss_of_pytorch(outputs, targets):
    return token_loss(jnp.swapaxes(outputs, 1, 2), targets)


def token_model(params, inputs):
    return inputs @ params


def token_model_of_pytorch(params, inputs):
    return jnp.swapaxes(inputs @ params, 1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [3, 5])
def test_empirical_fisher_of_tokens_does_not_depend_on_the_layout(classes, x64):
    """(batch, classes, tokens), where each token is a term: Σ s sᵀ of softmax scores, in NumPy."""
    rng = np.random.default_rng(0)
    inputs, params = rng.standard_normal((6, 5, 4)), rng.standard_normal((4, classes))
    targets = rng.integers(0, classes, (6, 5))
    logits = inputs @ params
    p = np.exp(logits - logits.max(-1, keepdims=True))
    scores = p / p.sum(-1, keepdims=True) - np.eye(classes)[targets]
    gradients = np.einsum("bti,btc->btic", inputs, scores).reshape(30, -1)
    data = jnp.asarray(inputs), jnp.asarray(targets)
    plain = FisherOperator(token_model, token_loss, jnp.asarray(params), data, kind="empirical")
    assert relative_error(plain.as_matrix(), gradients.T @ gradients / 30) <= 1e-12
    other = token_model_of_pytorch, token_loss_of_pytorch, jnp.asarray(params), data
    if classes == 5:  # as many as tokens: shapes do not tell
        with pytest.raises(spectra.StructureError, match="move the classes to the last axis"):
            FisherOperator(*other, kind="empirical")
        return
    assert relative_error(FisherOperator(*other, kind="empirical").as_matrix(), plain.as_matrix()) <= 1e-12


def mean_of_projections(w, x):
    """Its gradient for an example is the example."""
    return jnp.mean(x @ w)


@pytest.mark.parametrize("cut", slow_but(["one batch", "microbatches", "stream"], "one batch"))
def test_the_noise_of_gradients_survives_a_mean_that_is_far_longer(cut):
    """In float32 C - ḡ ḡᵀ would be off by eps |ḡ|²; the sum of (g - ḡ)(g - ḡ)ᵀ is by eps |ḡ| |g - ḡ|."""
    rng = np.random.default_rng(0)
    x = np.float32(rng.standard_normal((96, 12)) + 300 * rng.standard_normal(12))
    expected = np.cov(np.float64(x), rowvar=False, bias=True)
    mean, noise = np.linalg.norm(x.mean(0)), np.sqrt(np.trace(expected))
    options = {"microbatch": 40} if cut == "microbatches" else {}
    data = [x[:40], x[40:80], x[80:]] if cut == "stream" else jnp.asarray(x)
    op = GradientCovarianceOperator(mean_of_projections, jnp.ones(12), data, centered=True, **options)
    eps = float(np.finfo(np.float32).eps)
    error = np.linalg.norm(np.asarray(op.as_matrix(), np.float64) - expected)
    assert error <= 4 * eps * mean * noise
    pairs = spectra.eigsh(op, 2, which="LA", key=jax.random.key(0))
    largest = np.linalg.eigvalsh(expected)[-2:]
    assert np.all(
        np.abs(np.asarray(pairs.values, np.float64) - largest) <= pairs.residuals + pairs.noise_floor
    )
    # Rounding is measured with the mean taken out: the floor of a stream was that of C, 10⁵ times the noise.
    assert pairs.noise_floor <= 16 * eps * mean * noise
