"""Values and gradients where elements are equal, missing, zero or on a border, against `torch.ops.aten`."""

from collections.abc import Callable
from typing import Any

import bridge_reference as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import slow_but
from operator_check import to_jax

from spectra.bridge.operators.index import no_number
from spectra.bridge.operators.registry import OPERATORS

NAN = float("nan")
EQUAL = torch.tensor([[1.0, 2.0, 2.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 0.0, 1.0]])
MISSING = torch.tensor([[1.0, NAN, 2.0, 0.0], [2.0, 2.0, NAN, NAN], [0.0, 1.0, 0.0, 1.0]])
SOURCE = torch.tensor([[2.0, 2.0, 5.0, 0.0], [1.0, 1.0, 1.0, 2.0], [1.0, 3.0, 1.0, 0.0]])
WHERE = torch.tensor([1, 1, 0, 3])
INFINITE = torch.full((3, 4), -float("inf"))
LINE = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.7])
GRID = torch.cartesian_prod(LINE, LINE, LINE).reshape(1, 7, 7, 7, 3)
VOLUME = torch.arange(27.0).reshape(1, 1, 3, 3, 3).square()

# name: (operator, arrays to differentiate, further arguments after each array)
TIES: dict[str, tuple[str, tuple, tuple]] = {
    "angle": ("angle.default", (EQUAL - 1,), ((),)),
    **{f"{n}, {x}": (f"{n}.default", (values,), ((),))
       for n in ("median", "nanmedian")
       for x, values in (("equal", EQUAL), ("missing", MISSING), ("infinite", INFINITE))},
    **{f"{n}, {x}": (n, (values,), ((1,),))
       for n in ("median.dim", "nanmedian.dim", "mode.default", "cummax.default", "cummin.default")
       for x, values in (("equal", EQUAL), ("missing", MISSING))},
    **{f"scatter {r}, {s}": ("scatter_reduce.two", (EQUAL, SOURCE), ((1, WHERE.expand(3, 4)), (r, s)))
       for r in ("sum", "mean", "prod", "amax", "amin") for s in (True, False)},
    **{f"index {r}, {s}": ("index_reduce.default", (EQUAL, SOURCE), ((1, WHERE), (r, s)))
       for r in ("mean", "prod", "amax", "amin") for s in (True, False)},
    "index amax, none": ("index_reduce.default", (INFINITE, SOURCE), ((1, WHERE), ("amax", True))),
    "index amin, none": ("index_reduce.default", (-INFINITE, -INFINITE), ((1, WHERE), ("amin", True))),
    **{f"grid {m} {p} {a}": ("grid_sampler_3d.default", (VOLUME, GRID), ((), (m, p, a)))
       for m in (0, 1) for p in (0, 1, 2) for a in (True, False)},
}  # fmt: skip


def _family(name: str) -> str:
    first = name.split()[0]
    return first if first in ("scatter", "index", "grid") else "order"


def _call(function: Callable[..., Any], operator: str, arrays: Any, others: tuple) -> Any:
    operands: list[Any] = []
    for array, after in zip(arrays, others, strict=True):
        operands += [array, *after]
    keywords = {"include_self": operands.pop()} if "reduce" in operator else {}
    result = function(*operands, **keywords)
    return result if isinstance(result, (tuple, list)) else (result,)


def _pytorch(name: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    operator, arrays, others = TIES[name]
    packet, overload = operator.split(".")
    leaves = [a.clone().requires_grad_() for a in arrays]
    results = _call(getattr(getattr(torch.ops.aten, packet), overload), operator, leaves, others)
    weights = torch.cos(torch.arange(float(results[0].numel()))).reshape(results[0].shape)
    gradients = torch.autograd.grad((results[0] * weights).nan_to_num().sum(), leaves)
    return [r.detach().numpy() for r in results], [g.numpy() for g in gradients]


def _ours(arrays: dict[str, list[jax.Array]]) -> dict[str, tuple[Any, Any]]:
    found = {}
    for name in arrays:
        operator, _, others = TIES[name]
        function = OPERATORS[f"aten.{operator}"]

        def loss(leaves, function=function, operator=operator, others=others):
            converted = tuple(tuple(map(to_jax, after)) for after in others)
            results = _call(function, operator, leaves, converted)
            weights = jnp.cos(jnp.arange(results[0].size, dtype=jnp.float32)).reshape(results[0].shape)
            return jnp.nan_to_num(results[0] * weights).sum(), results

        gradients, results = jax.grad(loss, has_aux=True)(arrays[name])
        found[name] = results, gradients
    return found


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
@pytest.mark.parametrize("family", slow_but(["order", "scatter", "index", "grid"], "order", "scatter"))
def test_values_and_gradients_at_ties(family):
    """A sum of up to 343 terms, mostly exact, so a few roundings of float32 of its largest."""
    names = [name for name in TIES if _family(name) == family]
    arrays = {name: [to_jax(a) for a in TIES[name][1]] for name in names}
    ours = jax.jit(_ours).lower(arrays).compile(reference.FAST)(arrays)
    wrong = []
    for name in names:
        values, gradients = _pytorch(name)
        for kind, mine, theirs in zip(("value", "gradient"), ours[name], (values, gradients), strict=True):
            for a, b in zip(mine, theirs, strict=True):
                scale = max(1.0, float(np.nan_to_num(np.abs(b)).max(initial=0)))
                if not np.allclose(a, b, rtol=0, atol=1e-5 * scale, equal_nan=True):
                    wrong.append((name, kind, np.asarray(a), b))
    assert not wrong


@pytest.mark.slow
def test_scattered_product_of_zeros_has_every_derivative(x64):
    """x·y·z at a place that receives y and z: PyTorch refuses its second derivative at zeros."""
    product = OPERATORS["aten.scatter_reduce.two"]

    def scattered(v):
        return product(v[:1], 0, jnp.zeros(2, int), v[1:], "prod").sum()

    derivatives = jax.jit(lambda v: (jax.grad(scattered)(v), jax.hessian(scattered)(v)))
    for point in ([0.0, 0.0, 3.0], [0.0, 2.0, 3.0], [0.0, 0.0, 0.0]):
        x, y, z = point
        gradient, hessian = derivatives(jnp.asarray(point))
        np.testing.assert_array_equal(gradient, [y * z, x * z, x * y])
        np.testing.assert_array_equal(hessian, [[0, z, y], [z, 0, x], [y, x, 0]])


TWO = SOURCE[:2]
# Operands with two indices in them, and whether a negative one counts from the end.
INDEXED: list[tuple[str, Callable[[Any], tuple], bool]] = [
    ("index.Tensor", lambda i: (EQUAL, [i]), True),
    ("embedding.default", lambda i: (EQUAL, i), False),
    ("index_select.default", lambda i: (EQUAL, 0, i), False),
    ("gather.default", lambda i: (EQUAL, 0, i[:, None]), False),
    ("one_hot.default", lambda i: (i, 3), False),
    ("index_put.default", lambda i: (EQUAL, [i], TWO), True),
    ("index_put.default", lambda i: (EQUAL, [i], TWO, True), True),
    ("put.default", lambda i: (EQUAL[:, 0], i, TWO[0, :2]), True),
    ("index_add.default", lambda i: (EQUAL, 0, i, TWO), False),
    ("index_reduce.default", lambda i: (EQUAL, 0, i, TWO, "mean"), False),
    ("scatter.src", lambda i: (EQUAL, 0, i[:, None], TWO), False),
    ("scatter.value", lambda i: (EQUAL > 0, 0, i[:, None], False), False),
    ("scatter_add.default", lambda i: (EQUAL.int(), 0, i[:, None], TWO.int()), False),
    ("scatter_reduce.two", lambda i: (EQUAL, 0, i[:, None], TWO, "amax"), False),
]


@pytest.mark.filterwarnings("ignore:index_reduce:UserWarning")
def test_an_index_that_pytorch_refuses_gives_no_number():
    """NaN, the least integer or True: JAX would take it for another index, or write nothing there."""
    places = torch.tensor([[0, -9], [0, -1], [0, 1], [0, 3]])

    def results(index):
        return [OPERATORS[f"aten.{name}"](*map(to_jax, operands(index))) for name, operands, _ in INDEXED]

    ours = jax.jit(jax.vmap(results)).lower(to_jax(places)).compile(reference.FAST)(to_jax(places))
    for (name, operands, wraps), found in zip(INDEXED, ours, strict=True):
        packet, overload = name.split(".")
        function = getattr(getattr(torch.ops.aten, packet), overload)
        for index, values in zip(places, np.asarray(found), strict=True):
            if index[1] == 1 or (index[1] == -1 and wraps):
                np.testing.assert_array_equal(values, function(*operands(index)).numpy())
                continue
            with pytest.raises((IndexError, RuntimeError)):
                function(*operands(index))
            assert not np.isfinite(values[-1]).any() or (values[-1] == no_number(values.dtype)).all()


def test_counts_that_do_not_fit_are_no_numbers():
    """A length that the values contradict: PyTorch would give another shape."""
    count = jax.jit(lambda x, w: OPERATORS["aten.bincount.default"](x, w, 3))
    np.testing.assert_array_equal(count(jnp.array([0, 2, 2]), jnp.ones(3)), [1, 0, 2])
    few = OPERATORS["aten.masked_scatter.default"](jnp.zeros(3), jnp.ones(3, bool), jnp.ones(2))
    np.testing.assert_array_equal(few, [1, 1, NAN])
    assert np.isnan(count(jnp.array([0, 2, 3]), jnp.ones(3))).all()
    whole = jax.jit(lambda x: OPERATORS["aten.bincount.default"](x, None, 3))
    assert (np.asarray(whole(jnp.array([0, 2, 3]))) < 0).all()
    repeat = jax.jit(
        lambda r: jnp.take(jnp.ones(2), OPERATORS["aten.repeat_interleave.Tensor"](r, 4), mode="fill")
    )
    np.testing.assert_array_equal(repeat(jnp.array([1, 3])), np.ones(4))
    assert np.isnan(repeat(jnp.array([1, 2]))).all()
