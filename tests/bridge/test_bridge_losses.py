"""Losses against torch.nn.functional, and loaders. Tolerance: a dozen float32 roundings, 1e-6."""

import itertools
import warnings
from functools import cache, partial

import bridge_reference as reference
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import spectra
from spectra import bridge
from spectra.bridge import BridgeError
from spectra.bridge import losses as _losses

rng = np.random.default_rng(0)
LOGITS = {n: rng.standard_normal(s).astype(np.float32) for n, s in
          {"flat": (7, 5), "image": (3, 5, 2, 4), "single": (5,)}.items()}  # fmt: skip
TARGETS = {"flat": np.array([0, 4, -100, 2, 1, 1, -100]), "single": np.array(3),
           "image": rng.integers(0, 5, (3, 2, 4))}  # fmt: skip
WEIGHT = np.array([0.5, 1.0, 2.0, 0.1, 3.0], np.float32)


def _same(ours, theirs):
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-6, atol=1e-6)


def _compiled(function, *arrays):
    """All of a dictionary's losses in one program; an error names the one that differs."""
    arrays = [jnp.asarray(x) for x in arrays]
    return jax.jit(function).lower(*arrays).compile(reference.FAST)(*arrays)


def _check(ours, theirs):
    assert set(ours) == set(theirs)
    wrong = {}
    for name, expected in theirs.items():
        try:
            _same(ours[name], expected)
        except AssertionError as error:
            wrong[name] = str(error)
    assert not wrong


REDUCTIONS = ("mean", "sum", "none")
VARIANTS = {
    f"{reduction} {smoothing} {'plain' if weight is None else 'weighted'}": (weight, smoothing, reduction)
    for weight, smoothing, reduction in itertools.product((None, WEIGHT), (0.0, 0.2), REDUCTIONS)
}


@pytest.mark.parametrize("shape", list(LOGITS))
def test_cross_entropy(shape):
    x, y = LOGITS[shape], TARGETS[shape]

    def losses(x, y, logs, module, array):
        results = {}
        for name, (weight, smoothing, reduction) in VARIANTS.items():
            weight = None if weight is None else array(weight)
            options = {"weight": weight, "reduction": reduction}
            results[name] = module.cross_entropy(x, y, label_smoothing=smoothing, **options)
            if smoothing == 0 and shape != "single":
                results[f"nll {name}"] = module.nll_loss(logs, y, **options)
        return results

    logs = x - np.log(np.exp(x).sum(min(1, x.ndim - 1), keepdims=True))
    ours = _compiled(partial(losses, module=_losses, array=jnp.asarray), x, y, logs)
    _check(ours, losses(torch.tensor(x), torch.tensor(y), torch.tensor(logs), F, torch.tensor))


@pytest.mark.parametrize("shape", list(LOGITS))
def test_cross_entropy_with_probabilities(shape):
    x = LOGITS[shape]
    axis = 0 if x.ndim == 1 else 1
    q = np.exp(x[::-1]) / np.exp(x[::-1]).sum(axis, keepdims=True)

    def losses(x, q, module, array):
        options = {"weight": array(WEIGHT), "label_smoothing": 0.1}
        return {r: module.cross_entropy(x, q, reduction=r, **options) for r in REDUCTIONS}

    ours = _compiled(partial(losses, module=_losses, array=jnp.asarray), x, q)
    _check(ours, losses(torch.tensor(x), torch.tensor(q), F, torch.tensor))


@pytest.mark.slow
def test_class_axis_and_ignore_index():
    x, y = LOGITS["image"], TARGETS["image"]
    last = jnp.moveaxis(jnp.asarray(x), 1, -1)
    ours = _losses.cross_entropy(last, jnp.asarray(y), class_axis=-1, ignore_index=2)
    _same(ours, F.cross_entropy(torch.tensor(x), torch.tensor(y), ignore_index=2))


@pytest.mark.slow
def test_targets_outside_of_the_classes_give_nan():
    for target in (7, 3, -1):
        for smoothing in (0.0, 0.1):
            value = _losses.cross_entropy(jnp.ones((1, 3)), jnp.array([target]), label_smoothing=smoothing)
            assert jnp.isnan(value)
    assert jnp.isnan(_losses.cross_entropy(jnp.ones((1, 3)), jnp.array([-100])))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_elementwise_losses(reduction):
    x, y = (rng.standard_normal((4, 3)).astype(np.float32) for _ in range(2))
    p = rng.random((4, 3)).astype(np.float32)
    tx, ty, tp = map(torch.tensor, (x, y, p))
    jx, jy, jp = map(jnp.asarray, (x, y, p))
    _same(_losses.mse_loss(jx, jy, reduction=reduction), F.mse_loss(tx, ty, reduction=reduction))
    options = {"weight": p[0] + 1, "pos_weight": p[1] + 2}
    theirs = F.binary_cross_entropy_with_logits(
        50 * tx, tp, reduction=reduction, **{k: torch.tensor(v) for k, v in options.items()}
    )
    _same(_losses.bce_with_logits(50 * jx, jp, reduction=reduction, **options) / 50, theirs / 50)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: _losses.mse_loss(jnp.ones(3), jnp.ones((3, 1))),
            r"mse_loss needs .*\(3,\); got float32\[3, 1\]",
        ),
        (lambda: _losses.bce_with_logits(jnp.ones(3), jnp.ones(2)), "bce_with_logits needs"),
        (lambda: _losses.nll_loss(jnp.ones((3, 2)), jnp.ones(3)), "class indices"),
        (
            lambda: _losses.cross_entropy(jnp.ones((3, 2)), jnp.ones(2, int)),
            r"class indices.*\(3,\); got int32\[2\]",
        ),
        (
            lambda: _losses.cross_entropy(jnp.ones((3, 2)), jnp.ones(3)),
            "class indices, which are integers, or",
        ),
        (
            lambda: _losses.cross_entropy(jnp.ones((3, 2)), jnp.ones((3, 2), int)),
            "one-hot rows are probabilities",
        ),
        (
            lambda: _losses.cross_entropy(jnp.ones((1, 2)), jnp.ones(1, int), weight=[1.0]),
            "weights",
        ),
        (lambda: _losses.mse_loss(jnp.ones(3), jnp.ones(3), reduction="max"), "reduction"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(BridgeError, match=message):
        call()


@cache
def _classifier():
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    return module, bridge.from_torch(module, torch.zeros(2, 4))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cross_entropy", {}),
        ("cross_entropy", {"weight": [1.0, 2.0, 3.0]}),
        ("mse_loss", {}),
        ("bce_with_logits", {}),
    ],
)
def test_weighted_batches_average_to_the_whole(name, options):
    """Σ weight·loss / Σ weight over unequal batches is PyTorch's loss of all examples at once."""
    module, model = _classifier()
    x = torch.randn(11, 4)
    y = torch.randint(0, 3, (11,)) if name == "cross_entropy" else torch.rand(11, 3)
    if name == "cross_entropy":
        y[:4] = -100
    dataset = torch.utils.data.TensorDataset(x, y)
    batches = torch.utils.data.DataLoader(dataset, batch_size=5)
    loss = bridge.make_loss(model, name, **options)
    assert len(batches) == 3
    for _ in range(2):
        parts = [(loss(model.params, b), loss.weight(b)) for b in batches]
    ours = sum(w * v for v, w in parts) / sum(w for _, w in parts)
    function = {"bce_with_logits": F.binary_cross_entropy_with_logits}.get(name) or getattr(F, name)
    tensors = {k: torch.tensor(v) for k, v in options.items()}
    _same(ours, function(module(x), y, **tensors).detach())


def test_smoothed_targets_without_weight_are_not_lost():
    """Their loss is no multiple of a weight of 0; without smoothing, or where they are ignored, it is 0."""
    _, model = _classifier()
    x = np.ones((2, 4), np.float32)
    for smoothing, ignored, expected in ((0.1, 9, np.nan), (0.0, 9, 0), (0.1, 2, 0)):
        loss = bridge.make_loss(
            model, "cross_entropy", weight=[1.0, 1.0, 0.0], label_smoothing=smoothing, ignore_index=ignored
        )
        np.testing.assert_array_equal(loss.weight((x, np.array([2, 2]))), expected)
        np.testing.assert_array_equal(loss.weight((x, np.array([2, 0]))), 1)


@pytest.mark.slow
def test_batches_as_mappings_and_outputs_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, features):
            return {"logits": self.head(features), "features": features}

    model = bridge.from_torch(Two(), {"features": torch.zeros(2, 4)})
    loader = [{"features": torch.randn(5, 4), "labels": torch.tensor([0, 1, 2, 0, 1])}]
    (batch,) = loader
    loss = bridge.make_loss(model, "cross_entropy")
    value = loss(model.params, batch)
    pair = ({"features": batch["features"]}, batch["labels"])
    assert value == loss(model.params, pair)
    assert jax.grad(loss)(model.params, batch)["head.weight"].shape == (3, 4)
    mse = bridge.make_loss(model, "mse_loss", output="features")
    assert mse(model.params, (pair[0], batch["features"])) == 0
    for wrong in (bridge.make_loss(model, "mse_loss", output="other"), mse):
        with pytest.raises(BridgeError):
            wrong(model.params, (pair[0], batch["features"][:, :1]))
    with pytest.raises(BridgeError, match="no 'labels'"):
        loss(model.params, {"features": batch["features"]})
    with pytest.raises(BridgeError, match="must be"):
        loss(model.params, (1, 2, 3))


def test_unknown_losses():
    _, model = _classifier()
    with pytest.raises(BridgeError, match="unknown loss"):
        bridge.make_loss(model, "hinge")
    with pytest.raises(BridgeError, match=r"a class: .*MSELoss\(\.\.\.\)"):
        bridge.make_loss(model, nn.MSELoss)
    for first in ("mse_loss", nn.Linear(4, 3)):
        with pytest.raises(BridgeError, match=r"model is a (str|Linear): pass what from_torch"):
            bridge.make_loss(first, model)  # type: ignore[arg-type]
    with pytest.raises(BridgeError, match="takes 1 of the 2 arrays in the batch: name a loss"):
        bridge.make_loss(model)(model.params, (jnp.ones((2, 4)), jnp.ones((2, 3))))
    with pytest.raises(BridgeError, match="scalar"):
        bridge.make_loss(model, "mse_loss", reduction="none")


@pytest.mark.parametrize("former", [{"size_average": False}, {"reduce": True}, {"reduction": "sum"}])
def test_options_of_a_partial_function_are_pytorchs(former):
    """All of them, also the former names of a reduction; a dozen float32 roundings."""
    module, model = _classifier()
    x, y = rng.standard_normal((6, 4), np.float32), rng.standard_normal((6, 3), np.float32)
    loss = partial(partial(F.smooth_l1_loss, beta=0.5), **former)
    ours = bridge.make_loss(model, loss)(model.params, (x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of former names
        _same(ours, loss(module(torch.tensor(x)), torch.tensor(y)).detach())


def test_an_option_that_is_not_known_is_refused_wherever_it_is_set():
    _, model = _classifier()
    assert bridge.make_loss(model, nn.MSELoss(reduction="sum")).options == {"reduction": "sum"}
    with pytest.raises(BridgeError, match=r"mse_loss has no options \['weight'\]"):
        bridge.make_loss(model, partial(F.mse_loss, weight=torch.ones(6, 3)))
    for former in ({"reduce": False}, {"reduction": "none"}):
        with pytest.raises(BridgeError, match="scalar"):
            bridge.make_loss(model, partial(F.mse_loss, **former))


@pytest.mark.slow
def test_several_outputs_need_a_choice():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x + 1

    model = bridge.from_torch(Pair(), torch.zeros(2, 3))
    x = jnp.ones((2, 3))
    with pytest.raises(BridgeError, match="output="):
        bridge.make_loss(model, "mse_loss")({}, (x, x))
    assert bridge.make_loss(model, "mse_loss", output=1)({}, (x, x)) == 1


def _hessian(module, loss) -> np.ndarray:
    """The dense Hessian by PyTorch's double backward, in the order of a flat dictionary's keys."""
    params = dict(sorted(module.named_parameters()))
    (flat,) = [torch.cat([p.detach().reshape(-1) for p in params.values()])]

    def of_flat(flat):
        parts = flat.split([p.numel() for p in params.values()])
        named = {k: x.reshape(p.shape) for (k, p), x in zip(params.items(), parts, strict=True)}
        return loss(lambda *x: torch.func.functional_call(module, named, x))

    return torch.autograd.functional.hessian(of_flat, flat).numpy()


def _columns(op) -> np.ndarray:
    """All columns in one program for each shape of batch."""
    _, unravel = jax.flatten_util.ravel_pytree(op.like)
    columns = op.mv_batch(jax.vmap(unravel)(jnp.eye(op.size)))
    return np.concatenate([np.reshape(c, (op.size, -1)) for c in jax.tree.leaves(columns)], 1).T


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "microbatch"),
    [
        ("cross_entropy", {"ignore_index": 1, "label_smoothing": 0.2, "weight": [0.3, 1.0, 2.0]}, 2),
        ("cross_entropy", {"ignore_index": 2, "weight": [0.3, 1.0, 2.0]}, None),
        ("mse_loss", {}, None),
        ("bce_with_logits", {"pos_weight": [1.0, 2.0, 0.5]}, None),
    ],
)
def test_a_torch_loader_gives_pytorchs_hessian(name, options, microbatch, x64):
    """A DataLoader of tensors with a smaller last batch, as it is, against the loss of all examples.

    The entries are sums of 11 products of order one: 1e-12 is 400 roundings of 2.2e-16 above that.
    """
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(11, 4, dtype=torch.float64)
    y = torch.randint(0, 3, (11,)) if name == "cross_entropy" else torch.rand(11, 3, dtype=torch.float64)
    model = bridge.from_torch(module, x)
    options = {k: torch.tensor(v).double() if isinstance(v, list) else v for k, v in options.items()}
    loss = bridge.make_loss(model, name, **options)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    op = spectra.HessianOperator(loss, model.params, loader, weight_fn=loss.weight, microbatch=microbatch)
    function = {"bce_with_logits": F.binary_cross_entropy_with_logits}.get(name) or getattr(F, name)
    expected = _hessian(module, lambda f: function(f(x), y, **options))
    np.testing.assert_allclose(_columns(op), expected, atol=1e-12)


@pytest.mark.slow
def test_halves_make_the_gauss_newton_matrix(x64):
    """For a linear model it is the Hessian; the entries are sums of 10 products, as above."""
    model = bridge.from_torch(nn.Linear(4, 3).double(), torch.zeros(2, 4, dtype=torch.float64))
    loss = bridge.make_loss(model, "cross_entropy", weight=[1.0, 2.0, 0.5], label_smoothing=0.1)
    batch = (torch.randn(10, 4, dtype=torch.float64), torch.randint(0, 3, (10,)))
    ggn = spectra.GGNOperator(loss.outputs, loss.of_outputs, model.params, batch)
    hessian = spectra.HessianOperator(loss, model.params, batch)
    np.testing.assert_allclose(ggn.as_matrix(), hessian.as_matrix(), atol=1e-12)


def test_options_are_checked():
    _, model = _classifier()
    with pytest.raises(BridgeError, match="no options"):
        bridge.make_loss(model, "mse_loss", ignore_index=3)
    with pytest.raises(BridgeError, match="label_smoothing"):
        _losses.cross_entropy(jnp.ones((1, 3)), jnp.array([0]), label_smoothing=1.5)
    with pytest.raises(BridgeError, match="probabilities"):
        _losses.cross_entropy(jnp.ones((2, 3)), jnp.ones(3))
    total = bridge.make_loss(model, "cross_entropy", reduction="sum")
    with pytest.raises(BridgeError, match="averaged"):
        total.weight((jnp.ones((2, 4)), jnp.array([0, 1])))


@pytest.mark.slow
def test_batches_of_a_tokeniser(x64):
    """Mappings that are no dicts, bfloat16 features, tensors that require gradients."""
    from collections import UserDict

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, features):
            return self.head(features.to(self.head.weight.dtype))

    x = torch.randn(5, 4).bfloat16()
    model = bridge.from_torch(Head(), {"features": x})
    loss = bridge.make_loss(model, "cross_entropy")
    batches = [UserDict(features=x, labels=torch.tensor([0, 1, 2, 0, 1]))]
    op = spectra.HessianOperator(loss, model.params, batches, weight_fn=loss.weight)
    plain = {"features": jnp.asarray(x.float().numpy(), jnp.bfloat16), "labels": jnp.array([0, 1, 2, 0, 1])}
    np.testing.assert_allclose(op.loss(), jax.jit(loss)(model.params, plain), rtol=1e-6)
    tracked = bridge.make_loss(*_classifier()[1:], "mse_loss")
    model = tracked.model
    data = (torch.randn(6, 4, requires_grad=True), torch.randn(6, 3))
    assert np.isfinite(spectra.HessianOperator(tracked, model.params, data).loss())


def _batch_norm_loss(train):
    """(loss, parameters, data, the module in float64) of a network whose batch norm sees all examples."""
    draw = np.random.default_rng(1)
    data = draw.standard_normal((8, 3)), draw.standard_normal((8, 2))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    model = spectra.from_torch(module, (torch.tensor(data[0][:4]),), train=train)
    return bridge.make_loss(model, "mse_loss"), model.params, data, module.train(train)


def _double_backward(module, data):
    """PyTorch's Hessian in the order of JAX's leaves: names sorted."""
    inputs, targets = map(torch.tensor, data)
    names = sorted(name for name, _ in module.named_parameters())
    sizes = [dict(module.named_parameters())[name].shape for name in names]
    start = torch.cat([dict(module.named_parameters())[name].detach().ravel() for name in names])

    def loss(flat):
        parts = flat.split([size.numel() for size in sizes])
        values = {name: part.reshape(size) for name, part, size in zip(names, parts, sizes, strict=True)}
        output = torch.func.functional_call(module, values, (inputs,))
        return F.mse_loss(output, targets)

    return torch.autograd.functional.hessian(loss, start).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False])
def test_statistics_of_a_batch_are_those_of_all_its_examples(train, x64):
    """In training mode a batch may not be cut, not into pieces, not into batches, not into examples."""
    loss, params, data, module = _batch_norm_loss(train)
    expected = _double_backward(module, data)
    # Some hundred operations in sequence, and second derivatives divide by the cube of a deviation of 0.5.
    tolerance = 1e-12 * np.abs(expected).max()
    whole = spectra.HessianOperator(loss, params, data)
    np.testing.assert_allclose(whole.as_matrix(), expected, rtol=0, atol=tolerance)
    halves = [tuple(part[rows] for part in data) for rows in (slice(4), slice(4, 8))]
    cut = {
        "microbatch": lambda: spectra.HessianOperator(loss, params, data, microbatch=4),
        "stream": lambda: spectra.HessianOperator(loss, params, halves),
        "examples": lambda: spectra.GradientCovarianceOperator(loss, params, data),
    }
    for name, build in cut.items():
        if train:
            with pytest.raises(spectra.DataError, match="not a mean over examples"):
                build()
        elif name == "microbatch":
            np.testing.assert_allclose(build().as_matrix(), expected, rtol=0, atol=tolerance)
