"""Losses that are no mean over examples: refused where the data are cut, accepted where they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import relative_error

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


def sum_of_squares(w, batch):
    return jnp.sum((batch["x"] @ w) ** 2)


def mean_of_squares(w, batch):
    return jnp.mean((batch["x"] @ w) ** 2)


def in_bfloat16(w, batch):
    h = jnp.tanh(batch["x"].astype(jnp.bfloat16) @ w.astype(jnp.bfloat16))
    return jnp.mean(h.astype(jnp.bfloat16) ** 2).astype(w.dtype)


def with_dropout(w, batch):
    kept = jax.random.bernoulli(jax.random.key(3), 0.5, (len(batch["x"]), 2))
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
]


@pytest.mark.parametrize(("loss_fn", "cut"), NOT_MEANS, ids=lambda x: getattr(x, "__name__", x))
def test_losses_that_are_no_mean_are_refused_where_they_are_cut(loss_fn, cut):
    with pytest.raises(DataError, match=r"not a mean over examples.*sum.*weight_fn.*contrastive.*check_data"):
        CUTS[cut](loss_fn)


@pytest.mark.parametrize("loss_fn", [sum_of_squares, contrastive, normalised])
def test_nothing_is_refused_where_nothing_is_cut(loss_fn, x64):
    exact = jax.hessian(lambda w: loss_fn(w, rows(0, 12)))(jnp.asarray(W)).reshape(6, 6)
    one = HessianOperator(loss_fn, jnp.asarray(W), [rows(0, 12)])
    for op in (whole(loss_fn), whole(loss_fn, microbatch=12), one):
        assert relative_error(op.as_matrix(), exact) <= 1e-10


@pytest.mark.parametrize("loss_fn", [mean_of_squares, in_bfloat16, with_dropout])
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


def test_one_random_key_for_a_batch():
    """Halves of a batch draw other noise: what other keys change is no sign of a sum, and hides none."""
    batch = rows(0, 12) | {"key": jax.random.key(0)}
    HessianOperator(with_noise, jnp.asarray(W), batch, microbatch=4)
    with pytest.raises(DataError, match="not a mean"):
        HessianOperator(sum_with_noise, jnp.asarray(W), batch, microbatch=4)


def test_subsets_of_a_sum_are_refused():
    with pytest.raises(DataError, match="not a mean"):
        spectra.data_variability(whole(sum_of_squares), key=jax.random.key(0), num_steps=2, num_subsets=3)


def model_fn(w, x):
    return x @ w


def mean_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def sum_error(outputs, targets):
    return jnp.sum((outputs - targets) ** 2)


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_fisher_matrices_of_sums(kind):
    key = jax.random.key(0) if kind == "mc" else None
    data = jnp.asarray(X), jnp.asarray(T[:, :2])
    FisherOperator(model_fn, mean_error, jnp.asarray(W), data, kind=kind, key=key)
    with pytest.raises(DataError, match=f"kind='{kind}' needs a loss that is the mean over its terms"):
        FisherOperator(model_fn, sum_error, jnp.asarray(W), data, kind=kind, key=key)
    FisherOperator(model_fn, sum_error, jnp.asarray(W), data)  # the Gauss-Newton matrix of a sum


class Weighted:
    """A loss that brings its weight: a mean over the targets that are not -1."""

    def __call__(self, w, batch):
        kept = batch["y"] >= 0
        return jnp.sum(kept * (batch["x"] @ w[:, 0]) ** 4) / self.weight(batch)

    def weight(self, batch):
        return jnp.sum(batch["y"] >= 0)


def test_a_loss_that_brings_its_weight(x64):
    loss_fn, y = Weighted(), np.array([-1, -1, -1, 0, 0, 1, -1, 2, 0, 0, 1, 2])
    batch = {"x": jnp.asarray(X), "y": jnp.asarray(y)}
    parts = [jax.tree.map(lambda x, i=i: x[i : i + 4], batch) for i in (0, 4, 8)]
    exact = jax.hessian(lambda w: loss_fn(w, batch))(jnp.asarray(W)).reshape(6, 6)
    for data, microbatch in ((parts, None), (batch, 4)):
        op = HessianOperator(loss_fn, jnp.asarray(W), data, microbatch=microbatch)
        assert relative_error(op.as_matrix(), exact) <= 1e-10
    with pytest.raises(DataError, match="not a mean"):
        HessianOperator(loss_fn, jnp.asarray(W), parts, weight_fn=lambda batch: len(batch["x"]))
