"""Linear systems with the damped Hessian of trained networks: products of plain CG and with preconditioners.

Damping is 1e-3 λ₁ and b the gradient of half of the examples, as for an influence function. Products are
counted, not seconds: those of the iteration, its residual checks included, and apart from them those that
built the preconditioner, which serves every further right-hand side.
"""

import jax
import jax.numpy as jnp
import optax

import spectra
from benchmarks.problems import DECODER
from benchmarks.settings import Goal, Report, Settings, table
from spectra.demos import digits

DAMPING = 1e-3
TOL = 1e-3
"""Within float32 at κ = 1000, whose products leave residuals of 1e-4 |b|."""
SHARE = 0.2


def trained(loss_fn, params, batch, steps: int):
    optimizer = optax.adam(3e-3)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    return run(params)


def digits_mlp(settings: Settings):
    """The demo's network, 85,002 parameters, on 128 digits."""
    count = settings.choose(128, 8)
    batch = tuple(jnp.asarray(x[:count]) for x in digits.load_digits())
    params = digits.MODEL.init(jax.random.key(0), batch[0][:1])["params"]
    half = tuple(x[: count // 2] for x in batch)
    return digits.loss_fn, params, batch, half


def decoder(settings: Settings):
    """A decoder of two layers and width 32 on sequences in which each token follows from the last."""
    rows, length = settings.choose((8, 16), (2, 4))
    start = jax.random.randint(jax.random.key(1), (rows, 1), 0, DECODER.vocabulary)
    jumps = jax.random.bernoulli(jax.random.key(2), 0.2, (rows, length))
    tokens = (start + 5 * jnp.arange(length + 1)).at[:, 1:].add(7 * jumps) % DECODER.vocabulary
    model = DECODER.clone(width=32, depth=2)
    params = model.init(jax.random.key(0), tokens[:, :-1])["params"]

    def loss_fn(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss_fn, params, tokens, tokens[: rows // 2]


def main(settings: Settings) -> Report:
    rows, goals = [], []
    for name, make in {"MLP on digits": digits_mlp, "decoder": decoder}.items():
        loss_fn, params, batch, half = make(settings)
        params = trained(loss_fn, params, batch, settings.choose(200, 5))
        op = spectra.HessianOperator(loss_fn, params, batch)
        b = jax.grad(loss_fn)(params, half)
        count = settings.choose(32, 4)
        pairs = spectra.eigsh(op, count, which="LM", key=jax.random.key(3), tol=1e-3)
        shift = DAMPING * float(jnp.max(jnp.abs(jnp.asarray(pairs.values))))
        ways = {"none": None, "Nyström": "nystrom", f"{count} eigenpairs": pairs}
        plain = None
        for way, preconditioner in ways.items():
            found = spectra.solve(
                op, b, shift=shift, tol=TOL, preconditioner=preconditioner, key=jax.random.key(4),
                max_matvecs=4000,
            )  # fmt: skip
            plain = plain or found.num_matvecs
            built = pairs.num_matvecs if preconditioner is pairs else found.preconditioner_matvecs
            share = found.num_matvecs / plain
            cells = [f"{found.num_matvecs}", f"{share:.2f}", f"{built}", f"{found.residual_norm:.1e}"]
            rows.append([f"{name}, n = {op.size:,}", way, found.method, *cells, found.status.code])
            if preconditioner is not None:
                goals.append(Goal(f"{name}: products with {way} / without", share, SHARE))
    head = [
        "network",
        "preconditioner",
        "method",
        "products",
        "share",
        "built with",
        "\\|b - Ax\\|",
        "status",
    ]
    return Report(table(head, rows), goals)
