"""Linear systems with the damped Gauss-Newton matrix of trained networks, with and without preconditioners.

Damping is 1e-3 λ₁, and the right-hand sides are gradients of examples held out, as for influence functions.
Products are counted, not seconds: those of the iteration, its residual checks included, and apart from them
those that built the preconditioner, which the right-hand sides share. Shares are of the products of textbook
CG, SciPy's in float32, on average over 8 right-hand sides one at a time. All others are calls of `solve` with
the first of them, with 8, or with 64, which share one Krylov space (block CG). KFAC has exact roots of the
loss and takes two products, for its scale and its damping. Eigenpairs are the 64 largest of an earlier
`eigsh`. The Gauss-Newton matrix is taken since these Hessians, of networks that are not at a minimum, have
eigenvalues below minus the damping, where CG does not apply.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

import spectra
from benchmarks.problems import CONVOLUTIONS, DECODER
from benchmarks.settings import Goal, Report, Settings, table
from spectra.demos import digits

DAMPING = 1e-3
TOL = 1e-3
"""Within float32 at κ = 1000, whose products leave residuals of 1e-4 |b|."""
SHARE = 0.2
FEW, MANY = 8, 64
"""Right-hand sides."""
PAIRS = 64


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


def output_loss(outputs, targets):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, targets).mean()


def digits_model(params, images):
    return digits.MODEL.apply({"params": params}, images)


def digits_mlp(settings: Settings):
    """The demo's network, 85,002 parameters, on 256 digits."""
    count = settings.choose(256, 8)
    x, y = (jnp.asarray(a) for a in digits.load_digits())
    params = digits.MODEL.init(jax.random.key(0), x[:1])["params"]
    return digits_model, params, (x[:count], y[:count]), (x[count:], y[count:])


def cnn_model(params, images):
    return CONVOLUTIONS.apply({"params": params}, images)


def digits_cnn(settings: Settings):
    """Two convolutions and a linear head, 21,386 parameters, on the same digits."""
    _, _, data, held_out = digits_mlp(settings)
    return cnn_model, CONVOLUTIONS.init(jax.random.key(0), data[0][:1])["params"], data, held_out


MODEL = DECODER.clone(width=32, depth=2)


def decoder_model(params, tokens):
    return MODEL.apply({"params": params}, tokens)


def decoder(settings: Settings):
    """A decoder of two layers and width 32 on sequences in which each token follows from the last."""
    rows, length = settings.choose((8, 16), (2, 4))
    start = jax.random.randint(jax.random.key(1), (rows + MANY, 1), 0, DECODER.vocabulary)
    jumps = jax.random.bernoulli(jax.random.key(2), 0.2, (rows + MANY, length))
    tokens = (start + 5 * jnp.arange(length + 1)).at[:, 1:].add(7 * jumps) % DECODER.vocabulary
    params = MODEL.init(jax.random.key(0), tokens[:1, :-1])["params"]
    data, held_out = tokens[:rows], tokens[rows:]
    return decoder_model, params, (data[:, :-1], data[:, 1:]), (held_out[:, :-1], held_out[:, 1:])


NETWORKS = {"MLP on digits": digits_mlp, "CNN on digits": digits_cnn, "decoder": decoder}


def main(settings: Settings) -> Report:
    rows, goals = [], []
    for name, make in NETWORKS.items():
        goals += network(name, *make(settings), settings, rows)
    head = ["network", "preconditioner", "right-hand sides", "products of each", "built with", "share"]
    return Report(table([*head, "with what built it", "worst \\|b - Ax\\| / \\|b\\|", "status"], rows), goals)


def network(name: str, model_fn, params, data, held_out, settings: Settings, rows: list) -> list[Goal]:
    """The rows of one network, and its goals."""

    def loss_fn(params, batch):
        return output_loss(model_fn(params, batch[0]), batch[1])

    params = trained(loss_fn, params, data, settings.choose(100, 5))
    op = spectra.GGNOperator(model_fn, output_loss, params, data)
    singles = [tuple(x[i : i + 1] for x in held_out) for i in range(MANY)]
    gradients = [jax.grad(loss_fn)(params, single) for single in singles]
    many = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
    first, few = (jax.tree.map(lambda x, count=count: x[:count], many) for count in (1, FEW))
    top = spectra.eigsh(op, 1, which="LA", key=jax.random.key(3), tol=1e-2, verify=False)
    options = {"shift": DAMPING * float(top.values[0]), "tol": TOL, "max_matvecs": 1000}
    kfac = spectra.KFACOperator(model_fn, output_loss, params, data)
    count = settings.choose(PAIRS, 2)
    pairs = spectra.eigsh(op, count, which="LA", key=jax.random.key(5), tol=1e-2, verify=False)
    found = [textbook(op, gradient, options["shift"]) for gradient in gradients[:FEW]]
    plain, worst = np.mean([one[0] for one in found]), max(one[1] for one in found)
    label, goals = f"{name}, n = {op.size:,}", []
    add(rows, [label, "none, SciPy's CG", "1", f"{plain:.1f}", "0", "1.00", "1.00", f"{worst:.1e}", "–"])
    for way, b, preconditioner in (
        ("none", first, None),
        ("Nyström", first, "nystrom"),
        ("KFAC", first, kfac),
        (f"{count} eigenpairs", first, pairs),
        ("none", few, None),
        ("Nyström", few, "nystrom"),
        ("KFAC", few, kfac),
        (f"{count} eigenpairs", few, pairs),
        ("none", many, None),
    ):
        found = spectra.solve(op, b, preconditioner=preconditioner, key=jax.random.key(4), **options)
        sides = len(found.converged)
        known = preconditioner is pairs
        built = pairs.num_matvecs if known else found.preconditioner_matvecs
        each = found.num_matvecs / sides
        shares = [each / plain, (each + built / sides) / plain]
        cells = [f"{sides}", f"{each:.1f}", f"{built}", *(f"{share:.2f}" for share in shares)]
        worst = f"{np.max(found.residual_norm / norms(b)):.1e}"
        add(rows, [label, way, *cells, worst, found.status.code])
        if way == "none" and sides > 1:
            goals.append(
                Goal(f"{name}: products of one of {sides} solutions / textbook CG", shares[1], SHARE)
            )
        if known and sides > 1:
            text = f"{name}: products of one of {sides} solutions with {way} known / textbook CG"
            goals.append(Goal(text, shares[0], SHARE))
    return goals


def textbook(op, b, shift: float) -> tuple[int, float]:
    """Products that SciPy's conjugate gradients take, and the residual that they leave, in units of |b|."""
    flat, calls = np.asarray(ravel_pytree(b)[0]), []

    def product(v):
        calls.append(None)
        return np.asarray(shifted @ jnp.asarray(v, flat.dtype))

    shifted = op.prepare().shift(shift)
    matrix = scipy.sparse.linalg.LinearOperator((op.size, op.size), product, dtype=flat.dtype)
    x, _ = scipy.sparse.linalg.cg(matrix, flat, rtol=TOL, maxiter=1000)
    count = len(calls)
    return count, float(np.linalg.norm(flat - product(x)) / np.linalg.norm(flat))


def add(rows, cells):
    """One more row, printed at once: a run that is ended leaves what it has measured."""
    rows.append(cells)
    print("| " + " | ".join(cells) + " |", flush=True)


def norms(b):
    """|b| of each right-hand side."""
    return np.sqrt(sum(np.sum(np.asarray(x) ** 2, axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(b)))
