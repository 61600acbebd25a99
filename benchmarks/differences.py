"""Hessian products by central differences against exact ones: the error, by size of the step.

A decoder of two layers, width 64, trained for 100 steps of Adam on sequences of a Markov chain. Computed in
float32 and with the model in bfloat16; parameters are float32 in both. The truth is the exact product of the
same function in float64. A difference is [g(θ + h v) - g(θ - h v)] / 2h for a unit vector v, with h in units
of |θ|: the relative step |h v| / |θ|. Errors are relative, |product - truth| / |truth|; λ is the error of
vᵀHv, which a power iteration or a Rayleigh quotient reports, relative to |λ|. Directions: random, and the
leading eigenvector.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import spectra
from benchmarks.problems import Decoder
from benchmarks.settings import Goal, Report, Settings, table

STEPS = 10.0 ** np.arange(-7.0, 0.0)


def problem(dtype, settings: Settings):
    """(loss of a vector of parameters, the trained vector); the model computes in `dtype`."""
    module = Decoder(vocabulary=16, width=64, depth=2, heads=4)
    keys = jax.random.split(jax.random.key(0), 3)
    chain = jax.random.dirichlet(keys[0], jnp.full(16, 0.3), (16,))

    def walk(token, key):
        following = jax.random.categorical(key, jnp.log(chain[token]))
        return following, following

    first = jnp.arange(16) % 16
    tokens = jax.lax.scan(walk, first, jax.random.split(keys[1], 33))[1].T
    params = module.init(keys[2], tokens[:, :-1])["params"]
    flat, unravel = ravel_pytree(params)

    def loss(vector, working):
        params = jax.tree.map(lambda x: x.astype(working), unravel(vector.astype(vector.dtype)))
        logits = module.apply({"params": params}, tokens[:, :-1]).astype(jnp.promote_types(working, "f"))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    optimizer = optax.adam(3e-3)

    @jax.jit
    def train(vector):
        def step(carry, _):
            vector, state = carry
            update, state = optimizer.update(jax.grad(loss)(vector, jnp.float32), state)
            return (vector + update, state), None

        return jax.lax.scan(step, (vector, optimizer.init(vector)), length=settings.choose(100, 2))[0][0]

    return functools.partial(loss, working=dtype), np.asarray(train(flat), np.float64), unravel


def main(settings: Settings) -> Report:
    """Tables of errors by step, for both precisions and both directions."""
    exact_loss, vector, _ = problem(jnp.float32, settings)
    op = spectra.HessianOperator(lambda w, _: exact_loss(w), jnp.asarray(vector, jnp.float32), None)
    leading = np.asarray(spectra.eigsh(op, 1, key=jax.random.key(1)).vectors[0], np.float64)
    random = np.random.default_rng(0).standard_normal(len(vector))
    directions = {"random": random, "leading eigenvector": leading}
    lines, goals = [], []
    for dtype in (jnp.float32, jnp.bfloat16):
        loss, _, _ = problem(dtype, settings)
        for name, v in directions.items():
            v = v / np.linalg.norm(v)
            rows, ours, best = errors(loss, exact_loss, vector, v)
            title = f"{jnp.dtype(dtype).name}, {name} direction"
            lines += [f"## {title}", "", *table(["relative step", "error", "error of λ"], rows), ""]
            goals.append(Goal(f"{title}: exact product's error over the best difference's", ours / best, 1.0))
    return Report(lines, goals)


def errors(loss, exact_loss, vector: np.ndarray, v: np.ndarray):
    """Rows by step, with the exact product's last; its error, and that of the best difference."""
    with jax.enable_x64(True):
        truth = jax.jvp(jax.grad(functools.partial(exact_loss.func, working=jnp.float64)), (vector,), (v,))[1]
        truth = np.asarray(truth)
    theta, direction = jnp.asarray(vector, jnp.float32), jnp.asarray(v, jnp.float32)
    gradient = jax.jit(jax.grad(loss))
    found = {}
    for relative in STEPS:
        h = float(relative * np.linalg.norm(vector))
        ahead, behind = theta + h * direction, theta - h * direction
        found[f"{relative:.0e}"] = (gradient(ahead) - gradient(behind)) / (2 * h)
    found["exact product"] = jax.jit(lambda w, v: jax.jvp(jax.grad(loss), (w,), (v,))[1])(theta, direction)
    sizes = {
        name: (
            np.linalg.norm(product - truth) / np.linalg.norm(truth),
            abs(v @ (np.asarray(product, np.float64) - truth)) / abs(v @ truth),
        )
        for name, product in found.items()
    }
    rows = [[name, f"{error:.1e}", f"{value:.1e}"] for name, (error, value) in sizes.items()]
    best = min(error for name, (error, _) in sizes.items() if name != "exact product")
    return rows, sizes["exact product"][0], best


if __name__ == "__main__":
    print("\n".join(main(Settings(tiny=True)).lines))
