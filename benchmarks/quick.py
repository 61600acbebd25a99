"""Ratios within one run against the stored ones: what got slower? `python -m benchmarks --quick [--store]`.

Only ratios between things measured in turn are compared, since absolute times belong to a machine. A ratio is
called worse when it exceeds the stored one by more than a fifth and by three times the spread of both.
A report, never a gate: the exit status is 0.
"""

import functools
import json
import statistics
from datetime import date

import jax
import jax.numpy as jnp
import numpy as np

import spectra
from benchmarks import problems, timing
from benchmarks.settings import RESULTS
from benchmarks.timing import Times, machine
from spectra.krylov.step import orthogonalize

STORED = RESULTS / "ratios.json"
WORSE = 1.2
alternate = functools.partial(timing.alternate, quiet=True, tries=1)  # a report has one minute


def main(*, store: bool = False) -> int:
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    known = stored.get("ratios", {})
    now, worse = {}, []
    print(f"Ratios within one run on {machine()}; stored: {stored.get('machine', 'none')}")
    for section in (products, orthogonalization, estimates):
        for name, (value, noise) in section().items():
            now[name] = {"ratio": round(value, 3), "spread": round(noise, 3)}
            line = f"  {name:<58} {value:6.2f} ± {noise:.2f}"
            if name in known:
                before = known[name]
                line += f"   stored {before['ratio']:.2f}"
                limit = max(WORSE * before["ratio"], before["ratio"] + 3 * (noise + before["spread"]))
                if value > limit:
                    worse.append(name)
                    line += "   worse"
            print(line, flush=True)
    print("Worse than stored: " + (", ".join(worse) if worse else "nothing"))
    if store:
        STORED.write_text(
            json.dumps({"machine": machine(), "date": str(date.today()), "ratios": now}, indent=1)
        )
        print(f"stored in {STORED.name}")
    return 0


def shares(times: Times, reference: str) -> dict[str, tuple[float, float]]:
    """Median over rounds of each ratio to the reference within a round, and half its middle range."""
    found = {}
    for name, own in times.items():
        if name == reference:
            continue
        ratios = sorted(a / b for a, b in zip(own, times[reference], strict=True))
        quarter = len(ratios) // 4
        noise = (ratios[-1 - quarter] - ratios[quarter]) / 2
        found[f"{name} / {reference}"] = (statistics.median(ratios), noise)
    return found


def products() -> dict[str, tuple[float, float]]:
    """Products and Lanczos steps in gradients, for the MLP and the transformer."""
    found = {}
    for name, steps in (("mlp", 16), ("transformer", 4)):
        loss_fn, params, batch = problems.get(name)
        op = spectra.HessianOperator(loss_fn, params, batch)
        gradient, prepared, v = jax.jit(jax.grad(loss_fn)), op.prepare(), problems.vector(params)
        multiply = jax.jit(lambda op, v: op.mv(v))
        reference = f"gradient, {name}"
        functions = {
            reference: functools.partial(gradient, params, batch),
            f"product, {name}": functools.partial(multiply, prepared, v),
            f"{steps} Lanczos steps, {name}": lambda op=op, v=v, steps=steps: (
                spectra.lanczos(op, v, steps).alpha
            ),
        }
        found |= shares(alternate(functions, rounds=5), reference)
    return found


def lanczos(op, v, steps):
    return spectra.lanczos(op, v, steps).alpha


def orthogonalization() -> dict[str, tuple[float, float]]:
    """48 passes over a growing basis of 2e5 numbers, in matrix-vector products with all of it."""
    n, m = 200_000, 48
    diagonal = jnp.linspace(0.0, 1.0, n) ** 3
    v0 = jax.random.normal(jax.random.key(0), (n,))
    op = spectra.FunctionOperator(lambda v: diagonal * v, v0)
    result = spectra.lanczos(op, v0, m)
    matrix = jax.random.normal(jax.random.key(1), (m, n))
    gemv = jax.jit(lambda a, x: jnp.matmul(a, x, precision="highest"))

    @jax.jit
    def passes(rows, w):
        return jax.lax.fori_loop(0, m, lambda i, w: orthogonalize(rows, w, i + 1, result.layout)[0], w)

    packed = result.layout.pack(v0)
    functions = {
        "matrix-vector product": lambda: gemv(matrix, v0),
        "48 orthogonalisations": lambda: passes(result.segments, packed),
    }
    return shares(alternate(functions, rounds=5), "matrix-vector product")


def estimates() -> dict[str, tuple[float, float]]:
    """Eigenpairs against ARPACK with the same product, a trace against its products alone."""
    from scipy.sparse.linalg import eigsh

    loss_fn, params, batch = problems.get("mlp", 512)
    op = spectra.HessianOperator(loss_fn, params, batch)
    flat, key = op.to_scipy(), jax.random.key(0)
    start = np.asarray(jax.random.normal(key, (op.size,)))
    functions = {
        "ARPACK": lambda: eigsh(flat, 5, which="LM", tol=1e-3, v0=start)[0],
        "eigsh": lambda: spectra.eigsh(op, 5, which="LM", key=key, tol=3e-4).values,
    }
    found = shares(alternate(functions, rounds=5), "ARPACK")
    op = spectra.HessianOperator(*problems.get("small"))
    vectors = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (op.size,)))(jnp.arange(32))
    multiply = jax.jit(lambda op, stack: jax.lax.map(lambda v: op @ v, stack, batch_size=8))
    prepared = op.prepare()
    functions = {
        "32 products": lambda: multiply(prepared, vectors),
        "XTrace of 32 products": lambda: spectra.trace(op, key=key, method="xtrace", num_matvecs=32).value,
    }
    return found | shares(alternate(functions, rounds=5), "32 products")


if __name__ == "__main__":
    main()
