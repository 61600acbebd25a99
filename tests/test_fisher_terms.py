"""What the terms of a Fisher matrix are, what each weighs, and which laws targets are drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import relative_error, slow_but
from networks import cross_entropy, softmax

import spectra
from spectra import FisherOperator, GGNOperator
from spectra.bridge import losses

BATCH, TOKENS, INPUTS, CLASSES = 6, 5, 4, 3
RNG = np.random.default_rng(0)
X = RNG.standard_normal((BATCH, TOKENS, INPUTS))
W = RNG.standard_normal((INPUTS, CLASSES))
LABELS = RNG.integers(0, CLASSES, (BATCH, TOKENS))
MASK = np.ones((BATCH, TOKENS), int)
MASK[[1, 3, 4], [2, 0, 4]] = 0
NUMBERS = RNG.standard_normal((BATCH, TOKENS, CLASSES))
HOT = np.eye(CLASSES)[LABELS]
EVERY = np.full((BATCH, TOKENS), 1 / LABELS.size)
CLASS_WEIGHTS = np.array([0.0, 1.0, 4.0])
KEY = jax.random.key(0)


def model(w, x):
    return x @ w


def model_of_pytorch(w, x):
    return jnp.swapaxes(x @ w, 1, 2)


def second_moment(weights, labels, w=W, x=X):
    """Σ_t w_t g_t g_tᵀ of the gradients of single tokens."""
    scores = softmax(x @ w) - np.eye(w.shape[1])[labels]
    gradients = np.einsum("bti,btc->btic", x, scores).reshape(weights.size, -1)
    return np.einsum("t,ti,tj->ij", weights.ravel(), gradients, gradients)


def gauss_newton(weights):
    p = softmax(X @ W)
    middle = np.einsum("btc,cd->btcd", p, np.eye(CLASSES)) - np.einsum("btc,btd->btcd", p, p)
    rows = np.einsum("bti,cd->btcid", X, np.eye(CLASSES)).reshape(BATCH, TOKENS, CLASSES, -1)
    return np.einsum("bt,btcm,btcd,btdn->mn", weights, rows, middle, rows)


def nll(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], -1)[..., 0]


def ignoring(logits, labels):
    kept = labels >= 0
    return jnp.sum(jnp.where(kept, nll(logits, labels), 0)) / jnp.sum(kept)


def summed_over_tokens(logits, labels):
    return jnp.mean(jnp.sum(nll(logits, labels), -1))


def class_weighted(logits, labels):
    each = jnp.asarray(CLASS_WEIGHTS, logits.dtype)[labels]
    return jnp.sum(each * nll(logits, labels)) / jnp.sum(each)


def class_weighted_of_pytorch(logits, labels):
    return losses.cross_entropy(logits, labels, weight=CLASS_WEIGHTS)


def of_booleans(logits, labels):
    return jnp.mean(nll(logits, labels.astype(int)))


def masked(logits, targets):
    mask = targets["attention_mask"]
    return jnp.sum(mask * nll(logits, targets["labels"])) / jnp.sum(mask)


LAST = np.where(np.arange(TOKENS) < TOKENS - 1, LABELS, -100)
COUNTED = CLASS_WEIGHTS[LABELS] / CLASS_WEIGHTS[LABELS].sum()
BESIDE = {"attention_mask": MASK, "labels": LABELS}
TERMS = {
    "the last label of every sequence is ignored": (model, ignoring, LAST, (LAST >= 0) / (LAST >= 0).sum()),
    "summed over tokens, a mean over sequences": (model, summed_over_tokens, LABELS, EVERY * TOKENS),
    "class weights, one of them zero": (model, class_weighted, LABELS, COUNTED),
    "the same in PyTorch's layout": (model_of_pytorch, class_weighted_of_pytorch, LABELS, COUNTED),
    "a mask of integers before the labels": (model, masked, BESIDE, MASK / MASK.sum()),
}


@pytest.mark.parametrize("name", slow_but(TERMS, "class weights, one of them zero"))
def test_empirical_fisher_weighs_each_term_as_the_loss_does(name, x64):
    model_fn, loss_fn, targets, weights = TERMS[name]
    data = jnp.asarray(X), jax.tree.map(jnp.asarray, targets)
    expected = second_moment(weights, LABELS)

    def make(data):
        return FisherOperator(model_fn, loss_fn, jnp.asarray(W), data, kind="empirical")

    assert relative_error(make(data).as_matrix(), expected) <= 1e-12
    v = jnp.cos(jnp.arange(W.size)).reshape(W.shape)
    traced = np.ravel(jax.jit(lambda data: make(data).mv(v))(data))  # the loss is looked at in the program
    np.testing.assert_allclose(traced, expected @ np.ravel(v), rtol=1e-10)
    factored = spectra.EKFACOperator(model_fn, loss_fn, jnp.asarray(W), data, kind="empirical")
    if model_fn is model:  # the layer alone is the model; terms of a sequence are separate
        np.testing.assert_allclose(float(factored.trace()), np.trace(expected), rtol=1e-10)


@pytest.mark.slow
def test_booleans_are_labels_of_two_classes(x64):
    w, labels = W[:, :2], LABELS > 0
    op = FisherOperator(
        model, of_booleans, jnp.asarray(w), (jnp.asarray(X), jnp.asarray(labels)), kind="empirical"
    )
    assert relative_error(op.as_matrix(), second_moment(EVERY, labels.astype(int), w)) <= 1e-12


@pytest.mark.parametrize("name", ["the last label of every sequence is ignored", *list(TERMS)[4:]])
def test_labels_that_do_not_count_are_not_drawn(name, x64):
    model_fn, loss_fn, targets, weights = TERMS[name]
    data = jnp.asarray(X), jax.tree.map(jnp.asarray, targets)
    exact = FisherOperator(model_fn, loss_fn, jnp.asarray(W), data)
    assert relative_error(exact.as_matrix(), gauss_newton(weights)) <= 1e-12
    op = FisherOperator(model_fn, loss_fn, jnp.asarray(W), data, kind="mc", key=KEY)
    drawn, own = (x if loss_fn is ignoring else x["labels"] for x in (op.data[1], targets))
    np.testing.assert_array_equal(np.asarray(drawn)[weights == 0], own[weights == 0])
    assert (np.asarray(drawn) != LABELS)[weights > 0].any()
    assert relative_error(op.as_matrix(), second_moment(weights, np.maximum(drawn, 0))) <= 1e-12


def cross_entropy_of_rows(logits, rows):
    return -jnp.mean(jnp.sum(rows * jax.nn.log_softmax(logits), -1))


def class_weighted_rows(logits, rows):
    return -jnp.mean(
        jnp.sum(jnp.asarray(CLASS_WEIGHTS, logits.dtype) * rows * jax.nn.log_softmax(logits), -1)
    )


def poisson(logits, counts):
    return jnp.mean(jnp.exp(logits) - counts * logits)


def of_probabilities(logits, targets):
    return jnp.mean((jax.nn.sigmoid(logits) - targets) ** 2)


def of_sums(outputs, targets):
    return jnp.mean(jnp.sum(outputs - targets, -1) ** 2)


def huber(outputs, targets):
    return losses.huber_loss(outputs, targets)


def focal(logits, targets):
    """Lin, Goyal, Girshick, He and Dollár, arXiv:1708.02002: no number beyond 0 and 1 has a curvature."""
    p = jax.nn.sigmoid(logits)
    missed = 1 - (p * targets + (1 - p) * (1 - targets))
    return jnp.mean(missed**1.5 * (jax.nn.softplus(logits) - targets * logits))


def positives_weighted(logits, targets):
    return losses.bce_with_logits(logits, targets, pos_weight=3.0)


NO_LAW = {
    "one-hot targets": (cross_entropy_of_rows, HOT),
    "counts": (poisson, np.abs(NUMBERS).round()),
    "a squared error of probabilities": (of_probabilities, NUMBERS),
    "a squared error of sums": (of_sums, NUMBERS),
    "a squared error with a linear tail": (huber, 3 * NUMBERS),
    "a binary loss that weighs ones": (positives_weighted, HOT),
    "a binary loss that weighs what is missed": (focal, HOT),
}


@pytest.mark.parametrize("name", NO_LAW)
def test_targets_are_not_drawn_from_a_law_that_the_loss_does_not_have(name):
    loss_fn, targets = NO_LAW[name]
    data = jnp.asarray(X), jnp.asarray(targets)
    with pytest.raises(spectra.StructureError, match="kind='mc' does not fit this loss: as a function of"):
        FisherOperator(model, loss_fn, jnp.asarray(W), data, kind="mc", key=KEY)


@pytest.mark.slow
def test_curvature_that_depends_on_targets_is_found_in_every_form_of_these():
    x, w = jnp.asarray(X), jnp.asarray(W)
    FisherOperator(model, cross_entropy_of_rows, w, (x, jnp.asarray(HOT)))  # its rows sum to one
    FisherOperator(model, losses.bce_with_logits, w, (x, jnp.asarray(HOT > 0)))
    for model_fn, loss_fn, targets in (
        (model, class_weighted_rows, HOT),
        (model_of_pytorch, class_weighted_of_pytorch, LABELS),
        (model, positives_weighted, HOT.astype(int)),
    ):
        with pytest.raises(spectra.StructureError, match="its curvature depends on the targets"):
            FisherOperator(model_fn, loss_fn, w, (x, jnp.asarray(targets)))


def mean_and_variance(outputs, targets):
    """Normal targets of unknown variance: a loss of outputs of another form than these."""
    mean, log_variance = outputs
    return jnp.mean(jnp.sum((targets - mean) ** 2 * jnp.exp(-log_variance) + log_variance, -1)) / 2


def two_outputs(w, x):
    return jnp.split(model(w, x)[..., :2], 2, -1)


def side_by_side(w, x):
    return model(w, x)[..., :2]


def of_both(outputs, targets):
    return mean_and_variance(jnp.split(outputs, 2, -1), targets)


def of_the_mean(outputs, targets):
    return jnp.mean((outputs[0] - targets) ** 2)


@pytest.mark.parametrize(("model_fn", "loss_fn"), [(two_outputs, mean_and_variance), (side_by_side, of_both)])
def test_the_curvature_of_a_variance_depends_on_targets_of_another_form(model_fn, loss_fn):
    x, targets = jnp.asarray(X), jnp.asarray(NUMBERS[..., :1])
    with pytest.raises(spectra.StructureError, match="its curvature depends on the targets"):
        FisherOperator(model_fn, loss_fn, jnp.asarray(W), (x, targets))
    exact = FisherOperator(two_outputs, of_the_mean, jnp.asarray(W), (x, targets))
    ggn = GGNOperator(two_outputs, of_the_mean, jnp.asarray(W), (x, targets))
    assert relative_error(exact.as_matrix(), ggn.as_matrix()) <= 1e-6


def weighted(outputs, targets):
    """A mean over examples with the weights beside the numbers."""
    numbers, weights = targets
    return jnp.sum(weights * jnp.sum((outputs - numbers) ** 2, (1, 2))) / jnp.sum(weights)


def total_weight(batch):
    return jnp.sum(batch[1][1])


def test_a_mask_of_which_both_halves_have_as_much_is_seen(x64):
    """The matrix of 4 of 6 examples was that of 6, half as large again."""
    mask = np.array([1.0, 0, 1, 1, 0, 1])
    args = model, weighted, jnp.asarray(W), (jnp.asarray(X), (jnp.asarray(NUMBERS), jnp.asarray(mask)))
    with pytest.raises(spectra.DataError, match="the mean over its terms"):
        FisherOperator(*args, kind="empirical")
    op = FisherOperator(*args, kind="empirical", weight_fn=total_weight)
    gradients = np.einsum("bti,btc->bic", X, 2 * (X @ W - NUMBERS)).reshape(BATCH, -1)
    expected = np.einsum("b,bi,bj->ij", mask / mask.sum(), gradients, gradients)
    assert relative_error(op.as_matrix(), expected) <= 1e-12


@pytest.mark.parametrize("weights", [np.linspace(0.3, 2.0, BATCH), np.arange(1.0, BATCH + 1) * 10])
def test_weights_of_examples_are_no_numbers_of_terms(weights, x64):
    """They counted twice; where they count once is named, and has the matrix of the definition."""
    batch = jnp.asarray(X), (jnp.asarray(NUMBERS), jnp.asarray(weights))
    with pytest.raises(spectra.DataError, match=r"would count twice.*GradientCovarianceOperator"):
        FisherOperator(model, weighted, jnp.asarray(W), batch, kind="empirical", weight_fn=total_weight)
    op = spectra.GradientCovarianceOperator(
        lambda w, b: weighted(model(w, b[0]), b[1]), jnp.asarray(W), batch, weight_fn=total_weight
    )
    gradients = np.einsum("bti,btc->bic", X, 2 * (X @ W - NUMBERS)).reshape(BATCH, -1)
    expected = np.einsum("b,bi,bj->ij", weights / weights.sum(), gradients, gradients)
    assert relative_error(op.as_matrix(), expected) <= 1e-12


def log_probabilities(w, x):
    return jax.nn.log_softmax(model(w, x))


def of_log_probabilities(outputs, labels):
    return -jnp.mean(jnp.take_along_axis(outputs, labels[..., None], -1))


def absolute(outputs, targets):
    return jnp.mean(jnp.abs(outputs - targets))


def sure(w, x):
    return 1e6 * model(w, x)


def test_a_gradient_without_curvature_is_no_fisher_matrix_of_zeros():
    x, w = jnp.asarray(X), jnp.asarray(W)
    for model_fn, loss_fn, targets in (
        (log_probabilities, of_log_probabilities, LABELS),
        (model, absolute, NUMBERS),
    ):
        with pytest.raises(spectra.StructureError, match=r"no curvature.* take log_softmax in loss_fn"):
            FisherOperator(model_fn, loss_fn, w, (x, jnp.asarray(targets)))
    FisherOperator(sure, cross_entropy, w, (x, jnp.asarray(LABELS)))  # whose curvature underflows


def of_one_logit(w, x):
    return jnp.broadcast_to(w.astype(jnp.bfloat16), (len(x), 2))


def binary(logits, targets):
    logits = logits.astype(jnp.float32)
    return jnp.mean(jax.nn.softplus(logits) - targets * logits)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_rare_targets_of_a_model_in_bfloat16_are_as_rare_as_they_should_be(kind):
    """Of 2·10⁵ with probability 0.002, five standard deviations are 5 %; of 2⁷ levels each is 0.8 %."""
    count = 200_000
    logits = jnp.log(jnp.array([0.998, 0.002])) if kind == "classes" else jnp.array([-6.2, -6.2])
    logits = np.asarray(logits.astype(jnp.bfloat16), float)
    targets = jnp.zeros(count, int) if kind == "classes" else jnp.zeros((count, 2))
    loss_fn = cross_entropy if kind == "classes" else binary
    args = of_one_logit, loss_fn, jnp.asarray(logits, jnp.float32), (jnp.zeros((count, 1)), targets)
    op = FisherOperator(*args, kind="mc", key=KEY)
    p = softmax(logits)[1] if kind == "classes" else 1 / (1 + np.exp(-logits[0]))
    seen, size = float(np.asarray(op.data[1]).sum()), targets.size
    assert abs(seen - p * size) <= 5 * np.sqrt(p * (1 - p) * size)


def words(w, x):
    return x, w


@pytest.mark.slow
def test_scores_need_outputs_of_every_example(x64):
    data = jnp.asarray(X[:4, :4]), jnp.asarray(LABELS[:4, :4])  # as many rows of W as examples
    loss_fn = spectra.VocabularyLoss(chunk=4)
    for examples in (4, 3):
        few = jax.tree.map(lambda x, n=examples: x[:n], data)
        with pytest.raises(spectra.StructureError, match="return logits"):
            FisherOperator(words, loss_fn, jnp.asarray(W), few, kind="empirical")
    exact = FisherOperator(words, loss_fn, jnp.asarray(W), data)
    ggn = GGNOperator(model, cross_entropy, jnp.asarray(W), data)
    assert relative_error(exact.as_matrix(), ggn.as_matrix()) <= 1e-12


@pytest.mark.slow
def test_a_first_batch_of_padding_says_nothing_of_the_loss(x64):
    empty = np.full_like(LAST[:2], -100)
    data = [(jnp.asarray(X[:2]), jnp.asarray(empty)), (jnp.asarray(X), jnp.asarray(LAST))]
    op = FisherOperator(
        model,
        ignoring,
        jnp.asarray(W),
        data,
        kind="empirical",
        weight_fn=lambda batch: (batch[1] >= 0).sum(),
    )
    assert relative_error(op.as_matrix(), second_moment((LAST >= 0) / (LAST >= 0).sum(), LABELS)) <= 1e-12


SURE = np.float32([[0, -3, -30], [-25, 0, -40], [-20, -45, 0], [-60, -1, 0], [0, -41, -42], [-43, 0, -44]])
"""Margins of logits in which 1 - p of the label has no digits in float32, and partly none in float64."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["empirical", "mc", "type2"])
def test_scores_of_predictions_that_are_sure_keep_their_digits(kind):
    """One entry of the parameters for each number of the outputs, so that the diagonal has them all."""
    labels = SURE.argmax(1)
    op = FisherOperator(
        model,
        cross_entropy,
        jnp.asarray(SURE),
        (jnp.eye(6), jnp.asarray(labels)),
        kind=kind,
        key=KEY if kind == "mc" else None,
    )
    p = np.exp(SURE - SURE.max(1, keepdims=True).astype(float))
    p /= p.sum(1, keepdims=True)
    others = np.array([[np.delete(row, c).sum() for c in range(3)] for row in p])
    drawn = np.eye(3)[np.asarray(op.data[1])]
    exact = (p * others if kind == "type2" else np.where(drawn, others, p) ** 2) / 6
    found = spectra.diagonal(op, key=None, method="exact")
    resolved = exact > 1e-36
    np.testing.assert_allclose(np.asarray(found.value)[resolved], exact[resolved], rtol=1e-5)
    lower, _, upper = map(np.asarray, found.interval())
    assert np.all((lower <= exact) & (exact <= upper))


def to_bfloat16(logits, labels):
    return cross_entropy(logits.astype(jnp.bfloat16), labels).astype(jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("loss_fn", [cross_entropy, to_bfloat16])
def test_a_softmax_of_predictions_that_are_sure_is_one(loss_fn):
    """Its curvature is small, and what it is compared with is rounded: that says nothing against it."""
    labels = SURE.argmax(1)
    margins = 12 * (np.eye(3)[labels] - 1) * (1 + np.arange(18).reshape(6, 3) / 40)
    w = jnp.asarray(margins, jnp.float32)
    op = FisherOperator(model, loss_fn, w, (jnp.eye(6), jnp.asarray(labels)), kind="mc", key=KEY)
    assert op.softmax
    assert np.all(np.isfinite(op.mv(w)))
