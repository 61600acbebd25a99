"""The measurements on a card, each a function that returns figures; a group is one process."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import spectra
from benchmarks import attention, peers, problems
from benchmarks.aot import model
from benchmarks.card.measure import first, kernels, milliseconds, peak
from spectra.krylov import basis as _basis
from spectra.krylov.layout import Layout
from spectra.krylov.step import orthogonalize

STEPS = 100
TINY = bool(os.environ.get("SPECTRA_CARD_TINY"))
"""Sizes that only show that everything runs."""


def network(name: str):
    """Loss, parameters and batch of the networks that `benchmarks.gpu` compiles."""
    if name != "small":
        return problems.get(name, 8 if TINY else None)
    key = jax.random.key(0)
    size = model.Size(1, 16, 2, 32, 8) if TINY else model.SIZES["small"]
    keys = iter(jax.random.split(key, 32))
    draw = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape), static_argnums=1)
    params = jax.tree.map(
        lambda shape: draw(next(keys), shape), size.shapes, is_leaf=lambda x: type(x) is tuple
    )
    tokens = jax.random.randint(key, (1, size.length + 1), 0, size.vocabulary)
    return model.make_loss(size, "auto", None), params, tokens


def ceilings() -> Iterator[dict]:
    """What the card moves and multiplies at most, by XLA's own programs."""
    n, key = 2**20 if TINY else 2**29, jax.random.key(0)
    x = jax.random.normal(key, (n,))
    add = jax.jit(lambda x: x + 1)
    side = 256 if TINY else 8192
    a = jax.random.normal(key, (side, side))
    half = a.astype(jnp.bfloat16)
    product = jax.jit(jnp.matmul, static_argnames="precision")
    runs = {
        "copy": lambda: add(x),
        "float32": lambda: product(a, a, precision="highest"),
        "default": lambda: product(a, a),
        "bfloat16": lambda: product(half, half),
    }
    found = milliseconds(runs)
    rates = {
        f"{k} TFLOP/s": round(2 * side**3 / found[k] / 1e9, 1) for k in ("float32", "default", "bfloat16")
    }
    yield {"GB/s": round(8 * n / found["copy"] / 1e6, 1)} | rates


def orthogonalisation(n: int, rows: int = STEPS, *, segments: int | None = None) -> Iterator[dict]:
    """Both Gram-Schmidt passes over a full basis, and one; a matrix-vector product with as many rows."""
    layout = Layout.of(jax.ShapeDtypeStruct((n,), jnp.float32))
    count, held = _basis.segments(rows)
    if segments == 1:
        count, held = 1, count * held
    keys = jax.random.split(jax.random.key(0), count + 1)
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape) / np.sqrt(n), static_argnums=1)
    basis = [[draw(keys[i], (p.shape[0], held, *p.shape[1:])) for p in layout.panels] for i in range(count)]
    gemv = jax.jit(lambda a, x: jnp.matmul(a, x, precision="highest"))
    x = jax.random.normal(keys[-1], (n,))
    run = jax.jit(lambda basis, w, filled: orthogonalize(basis, w, filled, layout)[0])
    once = layout.pack(x)
    combined = jax.jit(
        lambda basis: [sum(jnp.sum(s[i], axis=1) for s in basis) for i in range(len(basis[0]))]
    )
    twice = [a + 1e-3 * b for a, b in zip(combined(basis), once, strict=True)]
    yield {"n": n, "rows": count * held, "segments": count, "GB of rows": 4 * count * held * n / 1e9}
    yield {
        "ms": milliseconds(
            {
                "no row": lambda: run(basis, once, 0),
                "one pass": lambda: run(basis, once, rows),
                "two passes": lambda: run(basis, twice, rows),
            }
        )
    }
    yield {"peak": peak()}
    basis.clear()
    matrix = draw(keys[0], (count * held, n))
    yield {"gemv": milliseconds({"gemv": lambda: gemv(matrix, x)})["gemv"]}


def steps(name: str, count: int = STEPS) -> Iterator[dict]:
    """A gradient, a Hessian product, and `count` Lanczos steps."""
    loss_fn, params, batch = network(name)
    op = spectra.HessianOperator(loss_fn, params, batch)
    v, prepared = problems.vector(params), op.prepare()
    gradient = jax.jit(jax.grad(loss_fn))
    plain = jax.jit(lambda p, v, b: jax.jvp(lambda p: jax.grad(loss_fn)(p, b), (p,), (v,))[1])
    multiply = jax.jit(lambda op, v: op.mv(v))
    yield {"n": op.size} | first(lambda: multiply(prepared, v), "first product")
    with jax.default_matmul_precision("highest"):
        ms = milliseconds(
            {
                "gradient": lambda: gradient(params, batch),
                "product": lambda: multiply(prepared, v),
                "jvp of grad": lambda: plain(params, v, batch),
            }
        )
    yield {"ms": ms, "peak of products": peak()}

    def lanczos():
        return spectra.lanczos(op, v, count).alpha

    yield first(lanczos, "first run")
    ms["step"] = milliseconds({"step": lanczos}, rounds=3)["step"] / count
    yield {"ms": ms, "peak": peak()}
    fast = spectra.HessianOperator(loss_fn, params, batch, matmul_precision="default").prepare()
    error = float(distance(multiply(fast, v), multiply(prepared, v)))
    ms |= milliseconds({"product, tf32": lambda: multiply(fast, v)})
    yield {"ms": ms, "error of tf32": error}
    yield {"plan": spectra.plan(op, num_steps=count, num_probes=1).total}


def traced(name: str, count: int = STEPS) -> Iterator[dict]:
    """What the card starts in `count` Lanczos steps."""
    loss_fn, params, batch = network(name)
    op, v = spectra.HessianOperator(loss_fn, params, batch), problems.vector(params)
    yield {"steps": count} | kernels(lambda: spectra.lanczos(op, v, count).alpha)


@jax.jit
def distance(a, b):
    """Of two pytrees, relative to the second."""
    norm = lambda t: jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(t)))  # noqa: E731
    return norm(jax.tree.map(jnp.subtract, a, b)) / norm(b)


def loops(name: str) -> Iterator[dict]:
    """Milliseconds a step alone, for processes with other flags of XLA."""
    loss_fn, params, batch = network(name)
    op, v = spectra.HessianOperator(loss_fn, params, batch), problems.vector(params)
    ms = milliseconds({"step": lambda: spectra.lanczos(op, v, STEPS).alpha}, rounds=3)["step"] / STEPS
    yield {"ms": ms, "flags": os.environ.get("XLA_FLAGS", "")}


def one_segment(name: str) -> Iterator[dict]:
    """The same with a basis that is one segment, of any size."""
    limit, _basis.SMALL = _basis.SMALL, 2**40
    jax.clear_caches()
    yield from loops(name)
    _basis.SMALL = limit
    jax.clear_caches()


def densities(name: str, count: int = 80) -> Iterator[dict]:
    """One probe of the density, tool by tool."""
    classes = (
        peers.Matfree,
        peers.MatfreeLinearised,
        peers.HessianEigenthings,
        peers.Curvlinops,
        peers.PyHessian,
    )
    tools, notes = peers.build((peers.Spectra, *classes), name, network(name))
    found: dict = {"steps": count, "notes": notes, "ms": {}, "ms of a product": {}}
    turns = {}
    for tool in tools:
        with failures(found, tool.label):
            tool.density(count, 1)
            turns[tool.label] = partial(synchronised, tool, tool.density, count, 1)
    found["ms"] = milliseconds(turns, rounds=3)
    yield found
    products = {tool.label: partial(synchronised, tool, tool.product, tool.vector) for tool in tools}
    found["ms of a product"] = milliseconds(products)
    found["largest"] = {label: float(np.max(np.asarray(turn()[0]))) for label, turn in turns.items()}
    yield found


def synchronised(tool, function, *args):
    """A call that is over when it returns, PyTorch's, too."""
    result = function(*args)
    if getattr(tool, "device", "cpu") == "cuda":
        tool.torch.cuda.synchronize()
    return result


@contextlib.contextmanager
def failures(found: dict, name: str):
    """Write down what fails, and go on."""
    try:
        yield
    except Exception as error:
        found.setdefault("failed", {})[name] = f"{type(error).__name__}: {str(error)[:300]}"


def estimates() -> Iterator[dict]:
    """Calls of users on the MLP: seconds of the first, milliseconds, products and the time of one."""
    loss_fn, params, batch = network("mlp")
    op, v = spectra.HessianOperator(loss_fn, params, batch), problems.vector(params)
    prepared, key = op.prepare(), jax.random.key(0)
    multiply = jax.jit(lambda op, v: op.mv(v))
    one = milliseconds({"product": lambda: multiply(prepared, v)})["product"]
    calls = {
        "slq, 80 steps, 4 probes": lambda: spectra.slq(op, key=key, num_steps=80, num_probes=4),
        "eigsh, 10 largest": lambda: spectra.eigsh(op, 10, which="LA", key=key, tol=1e-3),
        "trace": lambda: spectra.trace(op, key=key, num_matvecs=64),
        "diagonal": lambda: spectra.diagonal(op, key=key, num_matvecs=64),
        "kpm, 80 moments": lambda: spectra.kpm(op, key=key, num_moments=80, num_probes=4),
        "solve, shift 3": lambda: spectra.solve(op, v, shift=3.0),
    }
    found: dict = {"ms of a product": one}
    for name, call in calls.items():
        with failures(found, name):
            start = first(lambda call=call: jax.tree.leaves(call()))
            result = call()
            ms = milliseconds({name: lambda call=call: jax.tree.leaves(call())}, rounds=3)[name]
            found[name] = start | {"ms": ms, "products": getattr(result, "num_matvecs", None)}
        yield found


def truth() -> Iterator[dict]:
    """Statements in float32 beside float64 on the same card, and whether a second run has the same bits."""
    loss_fn, params, batch = network("mlp")
    op, key = spectra.HessianOperator(loss_fn, params, batch), jax.random.key(0)
    found = spectra.slq(op, key=key, num_steps=80, num_probes=2)
    again = spectra.slq(op, key=key, num_steps=80, num_probes=2)
    pairs = spectra.eigsh(op, 5, which="LA", key=key, tol=1e-4)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
        data = (jnp.asarray(batch[0], jnp.float64), batch[1])
        exact = spectra.eigsh(spectra.HessianOperator(loss_fn, wide, data), 5, which="LA", key=key, tol=1e-9)
    differences = np.abs(np.asarray(pairs.values, np.float64) - np.asarray(exact.values))
    yield {
        "same bits": bool(np.array_equal(np.asarray(found.nodes), np.asarray(again.nodes))),
        "values": np.asarray(exact.values).tolist(),
        "differences": differences.tolist(),
        "extremes": [np.asarray(x).tolist() for x in (found.range, exact.values[-1])],
        "stated": (np.asarray(pairs.residuals) + pairs.noise_floor).tolist(),
        "status": str(pairs.status),
    }


def attending(length: int) -> Iterator[dict]:
    """A Hessian product through causal attention of one sequence, ours and with the whole square."""
    args = attention.arrays(length)
    found: dict = {"length": length}
    for name, attend in reversed(attention.FORMS.items()):
        if name == "plain" and length > 8192:
            continue
        with failures(found, name):
            params, v, x = args
            run = partial(attention.products(attend)[1], params, v, x)
            with jax.default_matmul_precision("highest"):
                start = first(run)
                ms = milliseconds({name: run})[name]
            found[name] = start | {"ms": ms, "peak": peak()}
        yield found


def demo() -> Iterator[dict]:
    """The command that the README begins with, from its start to its last line."""
    code = "from spectra.cli.commands import main; main()"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", code, "demo", "-o", folder], capture_output=True, text=True, check=False
        )
        yield {
            "seconds": round(time.perf_counter() - start, 1),
            "rc": run.returncode,
            "said": run.stdout[-600:],
        }


def gpt2(sequence: int = 256, examples: int = 4, count: int = 20) -> Iterator[dict]:
    """GPT-2 small with random weights through the bridge: a product beside PyTorch's, and Lanczos steps."""
    import torch

    from benchmarks import real_models

    found: dict = {"sequence": sequence, "examples": examples}
    module, example, batch = real_models.gpt2(sequence, examples)
    with tempfile.TemporaryDirectory() as folder:
        spectra.bridge.export(module, example, folder)
        loaded = spectra.bridge.load(folder)
    loss = spectra.bridge.make_loss(loaded, "cross_entropy")
    params = jax.tree.map(jnp.asarray, loaded.params)
    op = spectra.HessianOperator(loss, params, jax.tree.map(jnp.asarray, batch))
    found["n"] = op.size
    if not TINY:
        with failures(found, "torch"):
            found["torch"] = double_backward(torch, module, batch)
        yield found
    found["plan"] = spectra.plan(op, num_steps=count, num_probes=1).total
    v, multiply = problems.vector(params), jax.jit(lambda op, v: op.mv(v))
    prepared = op.prepare()
    found |= first(lambda: multiply(prepared, v), "first product")
    found["ms"] = milliseconds({"product": lambda: multiply(prepared, v)}, rounds=3)
    yield found | {"peak": peak()}
    prepared = None
    if not TINY:

        def run():
            return spectra.lanczos(op, v, count).alpha

        found |= first(run, "first run")
        found["ms"]["step"] = milliseconds({"step": run}, rounds=1)["step"] / count
    yield found | {"peak": peak(), "steps": count}


def double_backward(torch, module, batch) -> dict:
    """Milliseconds of a product by PyTorch, true float32, the graph of the gradient kept."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = False
    module = module.to(device)
    tokens, labels = (torch.tensor(batch[name], device=device).long() for name in ("input_ids", "labels"))
    weights = list(module.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = torch.nn.functional.cross_entropy(module(tokens), labels)
        gradient = torch.autograd.grad(loss, weights, create_graph=True)
        v = [torch.randn_like(w) for w in weights]

        def product():
            torch.autograd.grad(gradient, weights, v, retain_graph=True)
            torch.cuda.synchronize()
            return jnp.zeros(())

        ms = milliseconds({"product": product}, rounds=3)["product"]
    largest = torch.cuda.max_memory_allocated()
    module.to("cpu")
    torch.cuda.empty_cache()
    return {"ms": ms, "peak": largest}


NETWORKS = ("mlp", "transformer", "small")
Cell = tuple[str, Callable[[], Iterator[dict]]]
GROUPS: dict[str, list[Cell]] = {
    "programs": [
        *((f"steps, {name}", partial(steps, name)) for name in NETWORKS),
        *(
            (f"orthogonalisation, {n}", partial(orthogonalisation, n))
            for n in ((85_002,) if TINY else (85_002, 5_000_000, 30_000_000))
        ),
        ("ceilings", ceilings),
        ("truth", truth),
        ("estimates", estimates),
        ("orthogonalisation, 85002, one segment", partial(orthogonalisation, 85_002, segments=1)),
        *((f"one segment, {name}", partial(one_segment, name)) for name in NETWORKS[:2]),
    ],
    "densities": [(f"density, {name}", partial(densities, name)) for name in NETWORKS[:2]],
    "kernels": [(f"kernels, {name}", partial(traced, name)) for name in NETWORKS],
    "attention": [(f"attention, {n}", partial(attending, n)) for n in ((256,) if TINY else (8192, 32768))],
    "no graphs": [(f"no graphs, {name}", partial(loops, name)) for name in NETWORKS[:2]],
    "gpt2": [("gpt2", partial(gpt2, 4, 1) if TINY else gpt2)],
    "demo": [("demo", demo)],
}
FLAGS = {"no graphs": "--xla_gpu_enable_command_buffer="}
"""Of XLA, for a group."""
