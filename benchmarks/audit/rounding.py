"""Whether "exact" holds its rounding, and an eigenvalue its noise: losses in float32 against float64."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import t as student

import spectra
from benchmarks.audit.cells import Cell, cell
from benchmarks.audit.matrices import rotation

LAYERS = (20, 10, 10)
"""Inputs and widths; depth repeats the last matrix, so that rounding is carried through the same one."""
LOSSES = {"tanh": (jnp.tanh, 1.0, 1), "steep tanh": (jnp.tanh, 3.0, 2), "steep sine": (jnp.sin, 3.0, 3)}
SEEDS = 40
SECTION = "rounding: float32 against float64"
STATEMENTS = "trace", "Frobenius norm", "diagonal", "largest eigenvalue"


def loss_of(activation, gain: float, depth: int):
    def loss(params, batch):
        x, y = batch
        h = activation(x @ params["a"] * gain)
        for _ in range(depth):
            h = activation(h @ params["b"] * gain)
        return jnp.mean((h @ params["c"] - y) ** 2)

    return loss


def problem(seed: int):
    """Parameters and data in float32: exact numbers for both precisions."""
    rng = np.random.default_rng(seed)
    shapes = {"a": LAYERS[:2], "b": LAYERS[1:], "c": LAYERS[2:]}
    params = {k: (rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32) for k, s in shapes.items()}
    inputs = (rng.standard_normal((64, LAYERS[0])) @ rotation(LAYERS[0], seed)).astype(np.float32)
    return params, (inputs, rng.standard_normal(64).astype(np.float32))


def operator(loss, params, data, dtype):
    params, data = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, data))
    return spectra.HessianOperator(loss, params, data)


def measure(loss, seeds: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{statement: (errors, half widths)} over seeds; of a diagonal a row for each."""
    found: dict[str, list[tuple]] = {statement: [] for statement in STATEMENTS}
    for seed in range(seeds):
        params, data = problem(seed)
        with jax.enable_x64(True):
            matrix = np.asarray(operator(loss, params, data, jnp.float64).as_matrix())
        truths = {
            "trace": np.trace(matrix),
            "Frobenius norm": np.linalg.norm(matrix),
            "diagonal": np.diag(matrix),
        }
        op = operator(loss, params, data, jnp.float32)
        estimates = {
            "trace": spectra.trace(op, key=None, method="exact"),
            "Frobenius norm": spectra.frobenius_norm(op, key=None, num_matvecs=op.size),
            "diagonal": spectra.diagonal(op, key=None, method="exact"),
        }
        for name, estimate in estimates.items():
            value, stderr = (
                np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
                for tree in (estimate.value, estimate.stderr)
            )
            quantile = 1.96 if estimate.dof is None else student.ppf(0.975, estimate.dof)
            found[name].append((value - truths[name], quantile * stderr))
        pairs = spectra.eigsh(op, 1, which="LA", key=jax.random.key(seed), tol=1e-7)
        error = float(pairs.values[-1]) - np.linalg.eigvalsh(matrix)[-1]
        found["largest eigenvalue"].append((error, float(pairs.residuals[-1]) + pairs.noise_floor))
    return {
        name: (np.array([error for error, _ in rows]), np.array([half for _, half in rows]))
        for name, rows in found.items()
    }


def audit(count: int) -> Iterator[Cell]:
    """The cells of the section."""
    for name, kind in LOSSES.items():
        for statement, (errors, halves) in measure(loss_of(*kind), min(count, SEEDS)).items():
            width = float(np.mean(halves) / (1.96 * np.sqrt(np.mean(errors**2))))
            yield cell((SECTION, name, statement), np.abs(errors) <= halves, width)


def layout() -> tuple[str, tuple[str, ...], tuple[str, ...], str]:
    """Name, rows and columns of the section, and what is said below it."""
    return SECTION, tuple(LOSSES), STATEMENTS, "Networks of 310 parameters each, in the place of keys."
