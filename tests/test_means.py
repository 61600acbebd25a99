"""Losses that are no mean over examples: refused where the data are cut, accepted where they are not."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import relative_error, slow_but
from jax import lax

import spectra
from spectra import DataError, FisherOperator, GradientCovarianceOperator, HessianOperator

RNG = np.random.default_rng(0)
X, T = RNG.standard_normal((2, 12, 3))
W = RNG.standard_normal((3, 2))


def unit(z):
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def similarities(w, batch):
    return unit(batch["x"] @ w) @ unit(batch["t"] @ w).T / 0.3


def contrastive(w, batch):
    logits = similarities(w, batch)
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(len(logits))).mean()


def contrastive_of_four(w, batch):
    """The size of a batch is written into it: it takes no halves."""
    logits = jnp.reshape(similarities(w, batch), (4, 4))
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4)).mean()


def normalised(w, batch):
    h = batch["x"] @ w
    return jnp.mean(jnp.tanh((h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)) ** 2)


def differences(w, batch):
    """What neighbours in the batch differ by: another order is another loss."""
    h = jnp.tanh(batch["x"] @ w)
    return jnp.mean((h[1:] - h[:-1]) ** 2)


def sum_of_squares(w, batch):
    return jnp.sum((batch["x"] @ w) ** 2)


def mean_of_squares(w, batch):
    return jnp.mean((batch["x"] @ w) ** 2)


def in_bfloat16(w, batch):
    h = jnp.tanh(batch["x"].astype(jnp.bfloat16) @ w.astype(jnp.bfloat16))
    return jnp.mean(h.astype(jnp.bfloat16) ** 2).astype(w.dtype)


KEY = jax.random.key(3)


def dropped(w, batch):
    return batch["x"] @ w * jax.random.bernoulli(KEY, 0.8, (len(batch["x"]), 2))


def with_dropout(w, batch):
    return jnp.mean(dropped(w, batch) ** 2)


def sum_with_dropout(w, batch):
    return jnp.sum(dropped(w, batch) ** 2)


def sum_in_control_flow(w, batch):
    """Draws in a loop, below a condition, under recomputation, with an old key made from a number."""

    @jax.checkpoint
    def step(i, h):
        key = jax.random.fold_in(jax.random.PRNGKey(3), i)
        return lax.cond(i % 2, lambda x: x, lambda x: x * jax.random.bernoulli(key, 0.8, x.shape), h)

    return jnp.sum(lax.fori_loop(0, 3, step, batch["x"] @ w) ** 2)


def contrastive_with_dropout(w, batch):
    h = unit(dropped(w, batch) + 1e-3)
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(h @ h.T / 0.3)))


def with_one_mask(w, batch):
    return jnp.mean((batch["x"] @ w * jax.random.bernoulli(KEY, 0.8, (2,))) ** 2)


def with_keys(w, batch):
    """Each example brings the key of its mask."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (2,)))(batch["key"])
    return jnp.mean((batch["x"] @ w * kept) ** 2)


def noise(batch):
    return jax.random.normal(batch["key"], batch["x"].shape, batch["x"].dtype)


def with_noise(w, batch):
    return jnp.mean(((batch["x"] + 0.1 * noise(batch)) @ w) ** 2)


def sum_with_noise(w, batch):
    return jnp.sum(((batch["x"] + 0.1 * noise(batch)) @ w) ** 2)


def rows(start, stop):
    return {"x": jnp.asarray(X[start:stop]), "t": jnp.asarray(T[start:stop])}


def whole(loss_fn, **options):
    return HessianOperator(loss_fn, jnp.asarray(W), rows(0, 12), **options)


CUTS = {
    "microbatch": lambda f: whole(f, microbatch=4),
    "stream": lambda f: HessianOperator(f, jnp.asarray(W), [rows(0, 4), rows(4, 8), rows(8, 12)]),
    "ragged": lambda f: HessianOperator(f, jnp.asarray(W), [rows(0, 5), rows(5, 10), rows(10, 12)]),
    "single examples": lambda f: HessianOperator(f, jnp.asarray(W), [rows(i, i + 1) for i in range(12)]),
    "gradient covariance": lambda f: GradientCovarianceOperator(f, jnp.asarray(W), rows(0, 12)),
}
NOT_MEANS = [
    (sum_of_squares, "microbatch"),
    (sum_of_squares, "stream"),
    (sum_of_squares, "single examples"),
    (contrastive, "microbatch"),
    (contrastive, "stream"),
    (contrastive, "gradient covariance"),
    (contrastive_of_four, "stream"),
    (normalised, "microbatch"),
    (normalised, "ragged"),
    (normalised, "gradient covariance"),
    (differences, "microbatch"),
    (differences, "stream"),
    (differences, "gradient covariance"),
    (sum_with_dropout, "microbatch"),
    (sum_with_dropout, "stream"),
    (sum_in_control_flow, "microbatch"),
    (contrastive_with_dropout, "stream"),
]
QUICK = [
    (sum_of_squares, "single examples"),
    (contrastive_of_four, "stream"),
    (normalised, "ragged"),
    (differences, "stream"),
    (differences, "gradient covariance"),
    (sum_with_dropout, "stream"),
    (contrastive_with_dropout, "stream"),
]


@pytest.mark.parametrize(
    ("loss_fn", "cut"), slow_but(NOT_MEANS, *QUICK), ids=lambda x: getattr(x, "__name__", x)
)
def test_losses_that_are_no_mean_are_refused_where_they_are_cut(loss_fn, cut):
    with pytest.raises(DataError, match=r"not a mean over examples.*sum.*weight_fn.*contrastive.*check_data"):
        CUTS[cut](loss_fn)


@pytest.mark.slow
@pytest.mark.parametrize("loss_fn", [sum_of_squares, contrastive, normalised])
def test_nothing_is_refused_where_nothing_is_cut(loss_fn, x64):
    exact = jax.jit(jax.hessian(lambda w: loss_fn(w, rows(0, 12))))(jnp.asarray(W)).reshape(6, 6)
    one = HessianOperator(loss_fn, jnp.asarray(W), [rows(0, 12)])
    for op in (whole(loss_fn), whole(loss_fn, microbatch=12), one):
        assert relative_error(op.as_matrix(), exact) <= 1e-10


def cancelled(w, batch):
    """Terms of both signs, a mean near zero: rounding is large beside it, in any order."""
    h = batch["x"] @ w
    return jnp.mean(h - jnp.asarray(X @ W).mean())


@pytest.mark.parametrize("loss_fn", [mean_of_squares, in_bfloat16, with_one_mask, cancelled])
@pytest.mark.parametrize("cut", ["microbatch", "ragged", "gradient covariance"])
def test_means_are_not_refused(loss_fn, cut):
    CUTS[cut](loss_fn)


def test_the_check_can_be_switched_off():
    op = whole(sum_of_squares, microbatch=4, check_data=False)
    assert float(op.loss()) == pytest.approx(np.sum((X @ W) ** 2) / 3, rel=1e-5)


def test_values_that_coincide_do_not_hide_a_loss_that_is_no_mean():
    """At weights of zero a sum of squares is zero on every batch."""
    with pytest.raises(DataError, match="not a mean"):
        HessianOperator(sum_of_squares, jnp.zeros((3, 2)), rows(0, 12), microbatch=4)


@pytest.mark.slow
def test_one_random_key_for_a_batch():
    """Halves of a batch draw other noise: what other keys change is no sign of a sum, and hides none."""
    batch = rows(0, 12) | {"key": jax.random.key(0)}
    with pytest.warns(UserWarning, match=r"pieces of microbatch=4 all draw the same.*random\.split"):
        HessianOperator(with_noise, jnp.asarray(W), batch, microbatch=4)
    with pytest.raises(DataError, match="not a mean"):
        HessianOperator(sum_with_noise, jnp.asarray(W), batch, microbatch=4)


@pytest.mark.parametrize("cut", ["microbatch", "gradient covariance"])
def test_a_key_in_the_closure(cut):
    with pytest.warns(
        UserWarning, match="all draw the same: the matrix is that of this noise, repeated"
    ) as said:
        CUTS[cut](with_dropout)
    assert len(said) == 1
    assert said[0].filename == __file__


@pytest.mark.slow
def test_noise_that_is_nobody_elses_business(x64):
    """A stream is as its user cuts it; with a key for each example a cut matrix is the whole one."""
    parts = [rows(i, i + 4) for i in (0, 4, 8)]
    HessianOperator(with_dropout, jnp.asarray(W), parts)
    HessianOperator(with_dropout, jnp.asarray(W), rows(0, 12), microbatch=4, check_data=False)
    batch = rows(0, 12) | {"key": jax.random.split(KEY, 12)}
    whole, cut = (HessianOperator(with_keys, jnp.asarray(W), batch, microbatch=m) for m in (None, 4))
    assert relative_error(cut.as_matrix(), np.asarray(whole.as_matrix())) <= 1e-14


def test_subsets_of_a_sum_are_refused():
    with pytest.raises(DataError, match="not a mean"):
        spectra.data_variability(whole(sum_of_squares), key=jax.random.key(0), num_steps=2, num_subsets=3)


def model_fn(w, x):
    return x @ w


def mean_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def error_of_differences(outputs, targets):
    return jnp.mean(jnp.diff(outputs - targets, axis=0) ** 2)


def sum_error(outputs, targets):
    return jnp.sum((outputs - targets) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_fisher_matrices_of_sums(kind):
    key = jax.random.key(0) if kind == "mc" else None
    data = jnp.asarray(X), jnp.asarray(T[:, :2])
    FisherOperator(model_fn, mean_error, jnp.asarray(W), data, kind=kind, key=key)
    for loss_fn in (sum_error, error_of_differences):
        with pytest.raises(DataError, match=f"kind='{kind}' needs a loss that is the mean over its terms"):
            FisherOperator(model_fn, loss_fn, jnp.asarray(W), data, kind=kind, key=key)
    FisherOperator(model_fn, sum_error, jnp.asarray(W), data)  # the Gauss-Newton matrix of a sum


class Weighted:
    """A loss that brings its weight: a mean over the targets that are not -1."""

    def __call__(self, w, batch):
        kept = batch["y"] >= 0
        return jnp.sum(kept * (batch["x"] @ w[:, 0]) ** 4) / self.weight(batch)

    def weight(self, batch):
        return jnp.sum(batch["y"] >= 0)


@pytest.mark.slow
def test_a_loss_that_brings_its_weight(x64):
    loss_fn, y = Weighted(), np.array([-1, -1, -1, 0, 0, 1, -1, 2, 0, 0, 1, 2])
    batch = {"x": jnp.asarray(X), "y": jnp.asarray(y)}
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 4], batch) for i in (0, 4, 8)]
    exact = jax.jit(jax.hessian(lambda w: loss_fn(w, batch)))(jnp.asarray(W)).reshape(6, 6)
    for data, microbatch in ((parts, None), (batch, 4)):
        op = HessianOperator(loss_fn, jnp.asarray(W), data, microbatch=microbatch)
        assert relative_error(op.as_matrix(), exact) <= 1e-10
    with pytest.raises(DataError, match="not a mean"):
        HessianOperator(loss_fn, jnp.asarray(W), parts, weight_fn=lambda batch: len(batch["x"]))


def of_labels(w, batch):
    """The mean over the examples whose label is not -1; the loss of none is zero."""
    kept = batch[1] >= 0
    each = jnp.where(kept, (batch[0] @ w[:, 0] - batch[1]) ** 2, 0)
    return jnp.sum(each) / jnp.maximum(jnp.sum(kept), 1)


def of_mask(w, batch):
    mask = batch[1].astype(w.dtype)
    return jnp.sum(mask * (batch[0] @ w[:, 0]) ** 2) / jnp.maximum(jnp.sum(mask), 1)


PADDED = np.arange(40) % 4
PADDED[33:] = -1
SKIPPED = np.arange(40) % 4
SKIPPED[17] = -1
RARE = {
    "padding at the end": (of_labels, PADDED),
    "one label in the middle": (of_labels, SKIPPED),
    "a mask of booleans": (of_mask, PADDED >= 0),
    "a mask of floats": (of_mask, (PADDED >= 0) * 1.0),
}


@pytest.mark.parametrize("name", slow_but(RARE, "padding at the end"))
def test_terms_that_do_not_count_are_found_wherever_they_are(name):
    loss_fn, labels = RARE[name]
    x = np.random.default_rng(5).standard_normal((40, 3))
    data = jnp.asarray(x, jnp.float32), jnp.asarray(labels, jnp.float32 if labels.dtype == float else None)
    parts = [jax.tree.map(lambda a, i=i: a[i : i + 2], data) for i in range(0, 40, 2)]
    w = jnp.ones((3, 1))
    for make in (
        lambda **options: HessianOperator(loss_fn, w, parts, **options),
        lambda **options: HessianOperator(loss_fn, w, data, microbatch=2, **options),
        lambda **options: GradientCovarianceOperator(loss_fn, w, data, **options),
    ):
        with pytest.raises(DataError, match="not a mean over examples"):
            make()
        make(weight_fn=lambda batch: jnp.sum(batch[1] >= (0 if loss_fn is of_labels else 1)))


@pytest.mark.slow
def test_values_that_differ_in_late_digits_are_shown_to_differ(x64):
    """As those of an adaptive solver do, whose steps depend on the batch."""

    def loss_fn(w, batch):
        return mean_of_squares(w, batch) + 1e-9 * jnp.mean(batch["x"] @ w) ** 2

    with pytest.raises(DataError, match="not a mean over examples") as info:
        HessianOperator(loss_fn, jnp.asarray(W), {"x": jnp.asarray(X), "t": jnp.asarray(T)}, microbatch=6)
    here, there = re.findall(r"is (\d\.\d+)", str(info.value))[:2]
    assert here != there
    assert "adaptive solver" in str(info.value)
