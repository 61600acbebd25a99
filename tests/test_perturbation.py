"""Predicted changes of the loss: exact on a quadratic, right to second order on a network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import Network, cross_entropy, model_fn

import spectra
from spectra.estimators import loss_errors

NET = Network()


def loss_fn(params, batch):
    return cross_entropy(model_fn(params, batch[0]), batch[1])


def network():
    batch = jnp.asarray(NET.x, jnp.float32), jnp.asarray(NET.labels)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), NET.params())
    return spectra.HessianOperator(loss_fn, params, batch)


def value(params):
    """The loss in NumPy float64."""
    logits = np.tanh(NET.x @ params["B"].T + params["c"]) @ params["A"].T
    logits = logits - logits.max(axis=1, keepdims=True)
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(NET.x)), NET.labels])


def test_changes_pairs_and_sets_are_those_of_the_matrix():
    rng, op = np.random.default_rng(0), network()
    deltas = {name: rng.standard_normal(op.size) for name in "uvw"}
    found = spectra.perturbation(op, {name: jnp.asarray(d, jnp.float32) for name, d in deltas.items()})
    h = np.asarray(op.as_matrix(), float)
    g = np.concatenate([np.ravel(x) for x in jax.tree.leaves(op.gradient())]).astype(float)

    def change(*names):
        d = sum(deltas[name] for name in names)
        return g @ d + d @ h @ d / 2

    tol = {"rtol": 1e-4, "atol": 1e-5}  # float32 products, sums of n = 18 numbers of size one
    np.testing.assert_allclose(found.changes, [change(name) for name in "uvw"], **tol)
    np.testing.assert_allclose(found.pairs[0, 2], change("u", "w"), **tol)
    np.testing.assert_allclose(np.diagonal(found.pairs), found.changes)
    np.testing.assert_allclose(found.change(), change("u", "v", "w"), **tol)
    np.testing.assert_allclose(found.change(["v", "u"]), change("u", "v"), **tol)
    assert found.num_matvecs == 3
    assert found.ranking == tuple(sorted("uvw", key=lambda name: -change(name)))
    np.testing.assert_allclose(found.lengths, [np.linalg.norm(d) for d in deltas.values()], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_rounded_layers_change_the_loss_as_predicted(stream):
    op = network()
    if stream:
        parts = [jax.tree.map(lambda x, a=a: x[a : a + 4], op.data) for a in (0, 4, 8)]
        op = spectra.HessianOperator(loss_fn, op.params, parts)
    deltas = spectra.rounding_deltas(op, 8, channel_axis=0, by="leaf")
    assert set(deltas) == {"A", "B"}  # the bias stays
    found = spectra.perturbation(op, deltas, measure=True)
    weights = {name: np.asarray(x, float) for name, x in op.params.items()}
    for i, name in enumerate(found.names):
        moved = weights | {name: weights[name] + np.asarray(deltas[name][name], float)}
        true = value(moved) - value(weights)
        # The third order of a change of 1/254 of a weight: below a hundredth of the second's bound.
        assert abs(found.changes[i] - true) <= 1e-5
        assert abs(found.measured[i] - true) <= 1e-6  # a difference of two float32 losses of size one
    changed = {name: weights[name] + np.asarray(deltas[name][name], float) for name in deltas}
    moved = weights | changed
    assert abs(found.change() - (value(moved) - value(weights))) <= 1e-5
    assert "measured" in repr(found)


@pytest.mark.slow
@pytest.mark.parametrize("slow_in_double", [False, True])
def test_measured_changes_of_a_good_fit_are_right_to_their_rounding(slow_in_double, monkeypatch):
    """Residuals of 1e-4 of outputs near one are rounded as the outputs are; the second parts overlap."""
    if slow_in_double:
        monkeypatch.setattr(loss_errors, "doubled", lambda op: None)
    rng = np.random.default_rng(0)
    x, near = rng.standard_normal((50, 6)).astype(np.float32), rng.standard_normal(6).astype(np.float32)
    y = (x.astype(float) @ near).astype(np.float32)
    w = (near + 1e-4 * rng.standard_normal(6)).astype(np.float32)
    op = spectra.HessianOperator(
        lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2),
        jnp.asarray(w),
        (jnp.asarray(x), jnp.asarray(y)),
    )

    def change(d):
        return np.mean((x.astype(float) @ (w + d) - y) ** 2) - np.mean((x.astype(float) @ w - y) ** 2)

    for _ in range(6):
        deltas = {str(s): (s * rng.standard_normal(6)).astype(np.float32) for s in (1e-1, 1e-3, 1e-5)}
        found = spectra.perturbation(op, {k: jnp.asarray(d) for k, d in deltas.items()}, measure=True)
        for d, one, rounding in zip(deltas.values(), found.measured, found.rounding, strict=True):
            assert abs(one - change(d.astype(float))) <= rounding
        together = sum(d.astype(float) for d in deltas.values())
        assert abs(found.measured_all - change(together)) <= found.rounding_all


@pytest.mark.slow
def test_rounding_is_that_of_the_definition():
    op = network()
    for axis in (0, 1, None):
        deltas = spectra.rounding_deltas(op, 4, channel_axis=axis, by="leaf")
        for name in "AB":
            w = np.asarray(op.params[name], float)
            other = None if axis is None else 1 - axis
            step = np.abs(w).max(axis=other, keepdims=True) / 7
            new = w + np.asarray(deltas[name][name], float)
            np.testing.assert_allclose(new / step, np.round(new / step), atol=1e-5)
            assert (np.abs(new - w) <= step / 2 + 1e-6).all()
            assert deltas[name]["c"] is None


@pytest.mark.slow
def test_pruning_takes_the_smallest_of_each_leaf():
    op = network()
    deltas = spectra.pruning_deltas(op, 1 / 3, by="leaf")
    for name, count in (("A", 3), ("B", 2)):
        w = np.asarray(op.params[name])
        gone = np.asarray(deltas[name][name]) != 0
        assert gone.sum() == count
        assert np.abs(w[gone]).max() <= np.abs(w[~gone]).min()
        np.testing.assert_array_equal(np.asarray(deltas[name][name])[gone], -w[gone])


@pytest.mark.slow
def test_layers_of_a_stack_are_rounded_one_by_one():
    def scanned(params, x):
        step = lambda h, w: (jnp.tanh(h @ w), None)  # noqa: E731
        return jnp.mean(jax.lax.scan(step, x, params["layers"])[0] ** 2)

    params = {"layers": jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 2)), jnp.float32)}
    op = spectra.HessianOperator(scanned, params, jnp.ones((4, 2)))
    deltas = spectra.rounding_deltas(op, 3)
    assert len(deltas) == 3
    for i, delta in enumerate(deltas.values()):
        w, d = (np.asarray(x["layers"], float) for x in (params, delta))
        assert (np.delete(d, i, axis=0) == 0).all()
        step = np.abs(w[i]).max(axis=0) / 3
        np.testing.assert_allclose((w + d)[i] / step, np.round((w + d)[i] / step), atol=1e-5)


def made(slopes, curvature):
    """A result with names that tell which is which."""
    names = tuple(f"layer.{i}.weight" for i in range(len(slopes)))
    return spectra.Perturbation(
        names, np.array(slopes, float), np.array(curvature, float), np.ones(len(slopes)), 1.0, len(slopes)
    )


def test_what_is_left_out_keeps_the_rest_below_what_is_allowed():
    rng = np.random.default_rng(1)
    root = rng.standard_normal((5, 5))
    found = made(rng.standard_normal(5) / 4, root @ root.T)
    for most in (0.0, 0.3, 1.0, 3.0, 1e3):
        out = found.to_leave_out(most)
        rest = [name for name in found.names if name not in out]
        assert (found.change(rest) if rest else 0.0) <= most
        if out:  # and the last was needed
            assert found.change([*rest, out[-1]]) > most
    # The pair costs what neither does alone, and more than the worst of all does.
    pair = made([0.1, 0.1, 0.3], [[0.0, 2.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert pair.to_leave_out(0.45) == ("layer.0.weight",)
    with pytest.raises(spectra.SpectraError, match="most=-1"):
        pair.to_leave_out(-1.0)


def test_the_recipe_names_modules_and_ranks_layers():
    yaml = pytest.importorskip("yaml")
    text = made([0.1, 0.3, 0.05], np.zeros((3, 3))).recipe(bits=4, most=0.2)
    read = yaml.safe_load(text)["quant_stage"]["quant_modifiers"]["QuantizationModifier"]
    assert read["ignore"] == ["layer.1"]
    weights = read["config_groups"]["group_0"]["weights"]
    assert weights == {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    assert text.index("layer.1.weight: +0.3") < text.index("layer.0.weight: +0.1") < text.index("layer.2")
    assert "together: +0.15 on a loss of 1" in text
    assert '"layer' not in made([0.1], [[0.0]]).recipe(bits=8)
    hostile = dataclasses.replace(made([0.1], [[0.0]]), names=("a\nquant_stage: other\u2028b: c",))
    assert yaml.safe_load(hostile.recipe(bits=8, most=0.0)).keys() == {"quant_stage"}


def test_what_is_no_perturbation_is_refused():
    op = network()
    with pytest.raises(spectra.StructureError, match=r"deltas\['x'\].*shape"):
        spectra.perturbation(op, {"x": {"A": jnp.ones(2), "B": None, "c": None}})
    with pytest.raises(spectra.StructureError, match=r"deltas\['x'\]"):
        spectra.perturbation(op, {"x": {"A": jnp.ones((3, 3))}})
    with pytest.raises(spectra.SpectraError, match="changes nothing"):
        spectra.perturbation(op, {"x": {"A": None, "B": None, "c": None}})
    with pytest.raises(spectra.NonFiniteError, match="NaN"):
        spectra.perturbation(op, {"x": jnp.full(op.size, jnp.nan)})
    with pytest.raises(spectra.SpectraError, match="at least one"):
        spectra.perturbation(op, {})
    with pytest.raises(spectra.StructureError, match=r"deltas\['x'\].*leaf 'A' has"):
        spectra.perturbation(op, {"x": {"A": "words", "B": None, "c": None}})
    with pytest.raises(spectra.SpectraError, match="the same as text"):
        spectra.perturbation(op, {1: jnp.ones(op.size), "1": jnp.ones(op.size)})  # pyright: ignore
    with pytest.raises(spectra.StructureError, match="has no loss"):
        spectra.perturbation(spectra.MatrixOperator(jnp.eye(2)), {"x": jnp.ones(2)})  # pyright: ignore
    with pytest.raises(spectra.SpectraError, match="bits=1"):
        spectra.rounding_deltas(op, 1)
    with pytest.raises(spectra.SpectraError, match="share=1"):
        spectra.pruning_deltas(op, 1.0)
    found = spectra.perturbation(op, {"x": jnp.ones(op.size)})
    with pytest.raises(spectra.SpectraError, match="unknown: 'y'"):
        found.change(["y"])


@pytest.mark.slow
def test_it_is_saved_and_loaded(tmp_path):
    op = network()
    found = spectra.perturbation(op, spectra.pruning_deltas(op), measure=True)
    again = spectra.load(spectra.save(found, tmp_path / "perturbation"))
    assert repr(again) == repr(found)
    np.testing.assert_array_equal(again.pairs, found.pairs)
