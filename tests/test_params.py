"""Any pytree of parameters: nested, Flax linen and nnx, half precision, scalar, empty leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import relative_error
from flax import linen, nnx

import spectra
from spectra.base import paths, trees

KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((9, 2)).astype(np.float32)


def two_layers(k1, b1, k2, b2, x, y):
    return jnp.mean(jnp.sum((jnp.tanh(x @ k1 + b1) @ k2 + b2 - y) ** 2, axis=1))


def reference(kernels, order):
    """Float64 Hessian of `two_layers` by central differences of NumPy losses, leaves in `order`.

    Independent of JAX: second differences with step 1e-4 have truncation near 1e-8 and cancellation
    eps / 1e-8 = 2e-8, both far below float32's own rounding.
    """
    x, y = X.astype(np.float64), Y.astype(np.float64)
    parts = {k: np.asarray(v, np.float64) for k, v in kernels.items()}
    shapes = [parts[name].shape for name in order]
    flat = np.concatenate([parts[name].ravel() for name in order])

    def loss(theta):
        pieces, start = {}, 0
        for name, shape in zip(order, shapes, strict=True):
            size = int(np.prod(shape))
            pieces[name] = theta[start : start + size].reshape(shape)
            start += size
        h = np.tanh(x @ pieces["k1"] + pieces["b1"]) @ pieces["k2"] + pieces["b2"]
        return np.mean(np.sum((h - y) ** 2, axis=1))

    n, e = len(flat), 1e-4 * np.eye(len(flat))
    hessian = np.zeros((n, n))
    for i in range(n):
        for j in range(i + 1):
            corners = [loss(flat + s * e[i] + t * e[j]) * s * t for s in (1, -1) for t in (1, -1)]
            hessian[i, j] = hessian[j, i] = sum(corners) / 4e-8
    return hessian


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        hidden = jnp.tanh(linen.Dense(3)(x))
        return linen.Dense(2)(hidden)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 3, rngs=rngs)
        self.second = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def mean_square(out, y):
    return jnp.mean(jnp.sum((out - y) ** 2, axis=1))


# 32 roundings of a float32 product, plus the reference's own error of 1e-7 |H|.
TOLERANCE = 32 * 1.2e-7


@pytest.mark.slow
def test_flax_linen_variables():
    model = Linen()
    variables = model.init(KEY, X)
    op = spectra.HessianOperator(lambda p, b: mean_square(model.apply(p, b[0]), b[1]), variables, (X, Y))
    first, second = variables["params"]["Dense_0"], variables["params"]["Dense_1"]
    exact = reference(
        {"k1": first["kernel"], "b1": first["bias"], "k2": second["kernel"], "b2": second["bias"]},
        ["b1", "k1", "b2", "k2"],
    )
    assert relative_error(op.as_matrix(), exact) <= TOLERANCE
    product = op @ jax.tree.map(jnp.ones_like, variables)
    assert jax.tree.structure(product) == jax.tree.structure(variables)


@pytest.mark.slow
def test_flax_nnx_state():
    graph, state = nnx.split(Nnx(nnx.Rngs(0)))
    op = spectra.HessianOperator(lambda s, b: mean_square(nnx.merge(graph, s)(b[0]), b[1]), state, (X, Y))
    pure = nnx.to_pure_dict(state)
    first, second = pure["first"], pure["second"]
    exact = reference(
        {"k1": first["kernel"], "b1": first["bias"], "k2": second["kernel"], "b2": second["bias"]},
        ["b1", "k1", "b2", "k2"],
    )
    assert relative_error(op.as_matrix(), exact) <= TOLERANCE
    q = spectra.slq(op, key=KEY, num_steps=8, num_probes=2)
    values = np.linalg.eigvalsh(exact)
    assert abs(q.range[1] - values[-1]) <= 1e-3 * values[-1]
    product = op @ jax.tree.map(jnp.ones_like, state)
    assert jax.tree.structure(product) == jax.tree.structure(state)


def parameters(dtype=jnp.float32):
    rng = np.random.default_rng(2)
    shapes = {"k1": (4, 3), "b1": (3,), "k2": (3, 2), "b2": (2,)}
    return {k: jnp.asarray(rng.standard_normal(s) / 2, dtype) for k, s in shapes.items()}


def nested_loss(p, batch):
    (k1, b1), (k2, b2) = (p["first"][0], p["first"][1]), p["second"]
    return two_layers(k1, b1, k2, b2, *batch)


def nested(p):
    return {"first": [p["k1"], p["b1"]], "second": (p["k2"], p["b2"])}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_half_precision_parameters_give_the_float32_hessian_at_their_values(dtype):
    half = nested(parameters(dtype))
    full = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    op = spectra.HessianOperator(nested_loss, half, (X, Y))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(op.structure))
    assert op.dtype == jnp.float32
    product = op @ jax.tree.map(jnp.ones_like, full)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(product))
    same = spectra.HessianOperator(nested_loss, full, (X, Y))
    np.testing.assert_array_equal(op.as_matrix(), same.as_matrix())
    exact = reference(
        {k: np.asarray(v, np.float64) for k, v in parameters(dtype).items()},
        ["k1", "b1", "k2", "b2"],
    )
    assert relative_error(op.as_matrix(), exact) <= TOLERANCE
    # Vectors in half precision are cast up, not the products down.
    rounded = op @ jax.tree.map(jnp.ones_like, half)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded))
    q = spectra.slq(op, key=KEY, num_steps=6, num_probes=2)
    assert np.isfinite(q.nodes).all()


@pytest.mark.slow
def test_one_leaf_in_half_precision_leaves_the_others_alone(x64):
    p = parameters(jnp.float64)
    p["k1"] = p["k1"].astype(jnp.bfloat16)
    op = spectra.HessianOperator(nested_loss, nested(p), (X, Y))
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(op.structure)]
    assert dtypes == [jnp.float32, jnp.float64, jnp.float64, jnp.float64]
    v = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), op.structure)
    assert [x.dtype for x in jax.tree.leaves(op @ v)] == dtypes
    assert np.isfinite(spectra.lanczos(op, v, 6).alpha).all()


@dataclasses.dataclass
class Layer:
    scale: jax.Array
    empty: jax.Array


jax.tree_util.register_dataclass(Layer, ["scale", "empty"], [])

# A quartic with H = diag(12 a_i c_i²), c the parameters: every leaf kind has a known product.
TREES = {
    "scalar leaf": {"a": jnp.array(2.0), "b": jnp.arange(1.0, 4.0)},
    "only a scalar": jnp.array(2.0),
    "list": [jnp.array(1.0), jnp.arange(1.0, 3.0)],
    "tuple of tuples": ((jnp.array([1.0]),), (jnp.ones((2, 2)), jnp.array(3.0))),
    "none inside": {"a": None, "b": jnp.arange(1.0, 4.0)},
    "empty leaf": {"a": jnp.zeros((0,)), "b": jnp.arange(1.0, 4.0), "c": jnp.zeros((3, 0))},
    "custom node": Layer(jnp.arange(1.0, 4.0), jnp.zeros((0, 2))),
    "numpy leaves": {"w": np.arange(1.0, 4.0, dtype=np.float32)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TREES)
def test_shapes_and_containers_of_leaves(name):
    params = TREES[name]

    def loss_fn(p, _):
        return sum(jnp.sum(x**4) for x in jax.tree.leaves(p))

    op = spectra.HessianOperator(loss_fn, params, None)
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])
    exact = np.diag(12 * flat**2)
    assert op.size == len(flat)
    assert relative_error(op.as_matrix(), exact) <= TOLERANCE
    ones = jax.tree.map(jnp.ones_like, params)
    product = op @ ones
    assert jax.tree.map(jnp.shape, product) == jax.tree.map(jnp.shape, params)
    steps = min(3, op.size)
    eager = spectra.lanczos(op, ones, steps)
    assert jax.tree.map(jnp.shape, eager.basis) == jax.tree.map(lambda x: (steps, *x.shape), params)
    traced = jax.jit(lambda op, v: spectra.lanczos(op, v, steps).alpha)(op, ones)
    scale = 64 * 1.2e-7 * np.abs(exact).max()
    np.testing.assert_allclose(traced, eager.alpha, rtol=0, atol=scale)
    q = spectra.slq(op, key=KEY, num_steps=steps, num_probes=2)
    assert q.range[1] <= exact.max() + scale


@dataclasses.dataclass
class Whole:
    """A model as Equinox has them: its function, its sizes and its flags are leaves beside its arrays."""

    weight: jax.Array
    activation: object
    scale: object
    heads: int
    name: str


jax.tree_util.register_dataclass(Whole, ["weight", "activation", "scale", "heads", "name"], [])


def whole_loss(model, x):
    hidden = model.activation(x @ model.weight * model.scale)
    return jnp.mean(hidden.reshape(len(x), model.heads, -1) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [jnp.array(0.7), 0.7], ids=["array", "number left out"])
def test_what_is_no_array_is_a_constant(scale, x64):
    """The Hessian of the same loss with those constants written in, by `jax.hessian`."""
    x = jnp.asarray(X, float)
    weight = jnp.asarray(np.random.default_rng(3).standard_normal((4, 2)))
    model = Whole(weight, jnp.tanh, scale, 2, "whole")
    op = spectra.HessianOperator(whole_loss, model, x, wrt="weight")

    def written_in(w):
        return whole_loss(dataclasses.replace(model, weight=w.reshape(4, 2)), x)

    exact = jax.jit(jax.hessian(written_in))(weight.ravel())
    assert relative_error(op.as_matrix(), exact) <= 64 * np.finfo(float).eps
    v = jax.tree.map(jnp.ones_like, op.like)
    assert v.activation is None
    assert jax.tree.structure(op @ v) == jax.tree.structure(v)
    assert list(op.blocks()) == ["weight"]


@pytest.mark.slow
def test_all_arrays_of_a_model_with_functions_vary_by_default(x64):
    model = Whole(jnp.ones((4, 2)), jnp.tanh, jnp.array(0.7), 2, "whole")
    op = spectra.HessianOperator(whole_loss, model, jnp.asarray(X, float))
    assert list(op.blocks()) == ["weight", "scale"]
    assert op.size == 9

    def of_arrays(flat):
        return whole_loss(dataclasses.replace(model, weight=flat[:8].reshape(4, 2), scale=flat[8]), X)

    exact = jax.jit(jax.hessian(of_arrays))(jnp.append(jnp.ones(8), 0.7))
    limit = 64 * np.finfo(float).eps * float(jnp.linalg.norm(exact))
    np.testing.assert_allclose(op @ jnp.ones(9), exact @ jnp.ones(9), atol=limit)


def test_a_python_number_that_may_be_meant_to_vary_is_refused():
    model = Whole(jnp.ones((4, 2)), jnp.tanh, 0.7, 2, "whole")
    for wrt in (None, "scale"):
        with pytest.raises(spectra.StructureError, match=r"'scale' is a float, not an array.*eqx\.partition"):
            spectra.HessianOperator(whole_loss, model, X, wrt=wrt)


def test_static_parts_tell_compiled_code_apart():
    assert len({paths.Static(1), paths.Static(1), paths.Static(1.0)}) == 2
    unhashable = paths.Static([1])
    assert len({unhashable, unhashable, paths.Static([1])}) == 2


@pytest.mark.slow
def test_many_leaves_are_one_operator():
    params = {f"{i:03}": jnp.full((2,), 1.0 + i) for i in range(60)}
    op = spectra.HessianOperator(lambda p, _: sum(jnp.sum(x**3) / 6 for x in p.values()), params, None)
    result = spectra.lanczos(op, jax.tree.map(jnp.ones_like, params), 5)
    assert float(result.orthogonality) <= 64 * 1.2e-7
    # alpha_0 is the mean of the diagonal, 1 .. 60.
    assert float(result.alpha[0]) == pytest.approx(30.5, rel=1e-5)


@pytest.mark.parametrize("x64", [False, True])
def test_vectors_of_numpy_parameters_have_the_dtype_that_jax_computes_in(x64):
    """Without x64 JAX takes float64 for float32; from 0.11 on it warns where a structure says otherwise."""
    params = {"single": np.ones(2, np.float32), "double": np.ones(3)}
    with jax.enable_x64(x64):
        got = jax.tree.map(lambda leaf: leaf.dtype, trees.vector_structure(params))
        assert got == jax.tree.map(lambda leaf: jnp.asarray(leaf).dtype, params)


def two_types_loss(params, batch):
    hidden = jnp.tanh(batch[0] @ params["a"].astype(batch[0].dtype))
    return jnp.mean((hidden @ params["b"] - batch[1]) ** 2)


def two_types_model(params, x):
    return jnp.tanh(x @ params["a"].astype(x.dtype)) @ params["b"]


def test_parameters_of_two_types_have_the_precision_of_the_coarser(x64):
    """Vectors hold what belongs to a float32 leaf in float32, whatever the others are."""
    rng = np.random.default_rng(0)
    batch = jnp.asarray(rng.standard_normal((30, 5))), jnp.asarray(rng.standard_normal(30))
    a, b = rng.standard_normal((5, 8)), rng.standard_normal(8)
    params = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b)}
    eps = float(jnp.finfo(jnp.float32).eps)
    op = spectra.HessianOperator(two_types_loss, params, batch)
    kernel = spectra.TangentKernelOperator(two_types_model, params, batch[0])
    for each in (op, kernel, op.block("a"), 2.0 * op):
        assert each.precision == eps
    assert op.block("b").precision == float(jnp.finfo(jnp.float64).eps)
    found = spectra.trace(op, key=jax.random.key(0), method="exact")  # was refused as not symmetric
    double = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    dense = spectra.HessianOperator(two_types_loss, double, batch).as_matrix()
    interval = found.interval()
    assert interval.lower <= np.trace(dense) <= interval.upper
