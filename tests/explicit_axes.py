"""Program of `test_explicit_axes.py`, for eight devices: results on meshes with explicit axes, as JSON.

Its argument says which: "often" for what every run of the tests looks at, "rarely" for the rest.
"""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jax.sharding import auto_axes, explicit_axes, get_abstract_mesh, reshard

import spectra
from spectra.base.meshes import on_automatic_axes

ROWS = P("d", None)
LAYOUTS = {"often": ["fsdp"], "rarely": ["replicated", "written"]}
OFTEN = ["largest", "quadrature"]
OFTEN_ARRAYS = [
    "product",
    "gradient",
    "loss",
    "diagonal",
    "eigenvector",
    "basis",
    "matrix",
    "Gauss-Newton",
    "function",
]
rng = np.random.default_rng(0)
weights = jnp.asarray(rng.standard_normal((16, 4)) / 4, "float32")
inputs = jnp.asarray(rng.standard_normal((32, 16)), "float32")
symmetric = jnp.asarray(np.diag(np.arange(1.0, 17.0)), "float32")


def naive(w, x):
    """A network as one writes it for automatic axes."""
    return jnp.tanh(x @ w)


def written(w, x):
    """The same with explicit axes named."""
    return jnp.tanh(jnp.einsum("bi,io->bo", x, reshard(w, P()), out_sharding=ROWS))


def output_loss(outputs, targets):
    """The negative log-likelihood of a Gaussian."""
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1))


def class_loss(outputs, labels):
    """The cross-entropy of classes."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(outputs, labels))


def arrays(part, loss, model, w, x, m):
    """Results that live where the parameters do."""
    op, key = spectra.HessianOperator(loss, w, x), jax.random.key(0)
    adam, on_model = optax.scale_by_adam(), (model, output_loss, w, (x, x[:, :4]))
    single = naive, *on_model[1:]  # evaluated on single examples
    factors = functools.cache(lambda: spectra.KFACOperator(*single, kind="mc", key=key))
    labels = jnp.argmax(x[:, :4], axis=-1)
    classifier = spectra.GGNOperator(naive, class_loss, w, (x, labels))
    pairs, krylov = spectra.eigsh(op, 2, which="LA", key=key), spectra.lanczos(op, w, 8)
    results = {
        "product": lambda: op @ w,
        "scaled": lambda: (2 * op + op.shift(1.0)) @ w,
        "gradient": op.gradient,
        "loss": op.loss,
        "diagonal": lambda: spectra.diagonal(op, key=key, num_matvecs=32).value,
        "eigenvector": lambda: jnp.abs(pairs.vectors[0]),
        "basis": lambda: krylov.basis[1],
        "orthogonality": lambda: 1 + krylov.orthogonality,
        "matrix": op.as_matrix,
        "dense": lambda: spectra.dense_hessian(loss, w, x),
        "Gauss-Newton": lambda: spectra.GGNOperator(*on_model) @ w,
        "Fisher": lambda: spectra.FisherOperator(*on_model) @ w,
        "sampled Fisher": lambda: spectra.FisherOperator(*on_model, kind="mc", key=key) @ w,
        # Of single examples.
        "covariance": lambda: spectra.GradientCovarianceOperator(naive_loss, w, x) @ w,
        "centred": lambda: spectra.GradientCovarianceOperator(naive_loss, w, x, centered=True) @ w,
        "preconditioned": lambda: (
            spectra.PreconditionedOperator(op, adam.update(w, adam.init(w))[1], update_fn=adam.update) @ w
        ),
        "Kronecker factors": lambda: factors() @ w,
        "inverse": lambda: factors().inverse(1.0) @ w,
        "corrected": lambda: spectra.EKFACOperator(*single, kind="empirical").inverse(1.0) @ w,
        "eigenvalues": lambda: factors().eigenvalues(),
        "Kronecker product": lambda: spectra.KroneckerOperator(m, m).inverse(1.0) @ (m + 1),
        "determinant": lambda: spectra.KroneckerOperator(m, m).logdet(),
        "block": lambda: (spectra.HessianOperator(in_layers, [w], x).blocks()["0"] @ [w])[0],
        "class": lambda: next(iter(spectra.class_operators(classifier).values())) @ w,
        "submatrix": lambda: spectra.MatrixOperator(m).submatrix(jnp.arange(8)) @ np.arange(8.0),
        "Jacobian": lambda: spectra.JacobianOperator(naive, w, x).as_matrix(),
        "function": lambda: spectra.FunctionOperator(lambda v: 3 * v, w) @ w,
        "of a matrix": lambda: spectra.MatrixOperator(m) @ jnp.sum(m, axis=0),
    }
    return {name: result() for name, result in results.items() if part == "rarely" or name in OFTEN_ARRAYS}


def numbers(part, loss, model, w, x):
    """Results on the host."""
    op, key = spectra.HessianOperator(loss, w, x), jax.random.key(0)
    pairs = spectra.eigsh(op, 2, which="LA", key=key)
    few = {"key": key, "num_probes": 2, "num_steps": 8}
    tracker = spectra.SpectrumTracker(lambda w: spectra.HessianOperator(loss, w, x), every=1, tol=1e-4)
    results = {
        "largest": lambda: pairs.values,
        "smallest": lambda: spectra.eigsh(op, 1, which="SA", key=key).values,
        "nearest to zero": lambda: 1 + spectra.eigsh(op.shift(1.0), 1, which="SM", key=key).values,
        "Lanczos": lambda: spectra.lanczos(op, w, 2).alpha,
        "quadrature": lambda: spectra.slq(op, **few).nodes[:, 0],
        "atoms": lambda: spectra.slq(op, **few, deflate=pairs).atoms,
        "moments": lambda: spectra.kpm(op, key=key, num_probes=1, num_moments=8, bounds=(-1, 1)).moments,
        "trace": lambda: spectra.trace(op, key=key, num_matvecs=32).value,
        "trace of a function": lambda: spectra.trace_of(op, np.square, key=key, tol=0.5).value,
        "norm": lambda: spectra.frobenius_norm(op, key=key, num_matvecs=32).value,
        "logdet": lambda: spectra.logdet(op, 1.0, key=key).value,
        "effective dimension": lambda: spectra.effective_dimension(op, 1.0, key=key).value,
        "count": lambda: spectra.count_above(op, 0.1, key=key).value,
        "negative": lambda: spectra.negative_share(op, key=key).value,
        "condition": lambda: spectra.condition_number(op.shift(1.0), key=key).value,
        # Sorted, since the signs of eigenvectors are arbitrary.
        "plane": lambda: np.sort(spectra.loss_slice(op, pairs, num_points=3).loss.ravel()),
        "report": lambda: spectra.spectrum(op, **few).largest.estimate,
        "variability": lambda: spectra.data_variability(op, num_subsets=2, **few).whole_largest,
        "sharpness": lambda: tracker(0, w).sharpness,
        "scipy": lambda: op.to_scipy() @ np.ones(64, np.float32),
        "model": lambda: (
            spectra.model_trace(model, output_loss, w, x, x[:, :4], key=key, num_matvecs=32).value
        ),
        "planned": lambda: spectra.plan(op, num_steps=8, num_probes=1, measure=True).seconds is not None,
    }
    return {name: result() for name, result in results.items() if (name in OFTEN) == (part == "often")}


def flat(found):
    """Lists by name, which JSON can hold."""
    return {name: np.ravel(value).tolist() for name, value in found.items()}


def message(call):
    """What an error says."""
    try:
        call()
    except Exception as error:
        return " ".join([type(error).__name__, str(error), *getattr(error, "__notes__", ())])


def naive_loss(w, x):
    """Mean of squared outputs."""
    return jnp.mean(naive(w, x) ** 2)


def in_layers(layers, x):
    """Of parameters in a list."""
    return naive_loss(layers[0], x)


def written_loss(w, x):
    """The same with explicit axes named."""
    return jnp.mean(written(w, x) ** 2)


def pointers(array):
    """Where each device holds its part."""
    return [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]


def main(part):
    """Print the results of one part."""
    one = arrays(part, naive_loss, naive, weights, inputs, symmetric)
    found = {
        "eigenvalues": np.linalg.eigvalsh(np.asarray(one["matrix"], np.float64)).tolist(),
        "arrays": {"one": flat(one)},
        "numbers": {"one": flat(numbers(part, naive_loss, naive, weights, inputs))},
        "elsewhere": {},
    }
    mesh = jax.make_mesh((8,), ("d",))
    with jax.set_mesh(mesh):
        x, m, split = (jax.device_put(value, ROWS) for value in (inputs, symmetric, weights))
        whole = jax.device_put(weights, P(None, None))
        both = {"in_sharding": (ROWS, ROWS)}
        explicit = explicit_axes(written_loss, **both), explicit_axes(written, **both)
        fsdp = (naive_loss, naive, split, x, m)
        layouts = {
            "replicated": (naive_loss, naive, whole, x, m),
            "fsdp": fsdp,
            "written": (*explicit, *fsdp[2:]),
        }
        for layout in LAYOUTS[part]:
            results = arrays(part, *layouts[layout])
            on_mesh = {
                name for name, v in results.items() if jax.typeof(v).sharding.mesh == mesh.abstract_mesh
            }
            found["elsewhere"][layout] = sorted(results.keys() - on_mesh)
            found["arrays"][layout] = flat(results)
        found["numbers"]["fsdp"] = flat(numbers(part, *fsdp[:-1]))
        found["own"] = float(jax.jit(written_loss)(split, x))
        found["moved"] = pointers(on_automatic_axes(x)) != pointers(x)

        def inside(w):
            op = spectra.HessianOperator(naive_loss, w, x)
            return spectra.trace(op, key=jax.random.key(0), method="hutchinson", num_matvecs=4).value

        found["outside"] = inside(split)
        found["inside"] = float(jax.jit(auto_axes(inside, out_sharding=P()))(split))
        found["unwrapped"] = message(lambda: spectra.HessianOperator(written_loss, split, x))
        found["in jit"] = message(lambda: jax.jit(inside)(split))
        found["kept"] = str(get_abstract_mesh().axis_types)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
