"""What rounding does to values of a loss: measured, since a loss may subtract what is nearly equal.

The stated precision is that of the loss as a number. But log Σ exp z - z_y of a classifier that is sure of an
example is 1e-5 where z is 10, and a squared residual of a good fit is rounded as the outputs are. What such
a value is off by is no share of it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.
from spectra.base import programs
from spectra.base.stacks import stacked
from spectra.base.trees import PyTree
from spectra.estimators.landscape import losses_at, on_batch
from spectra.krylov.product_rounding import KEY, SAMPLES, limit
from spectra.operators.accumulate import weighted_sum
from spectra.operators.data import DataOperator
from spectra.operators.doubled import QUICK, doubled, in_wide, types
from spectra.operators.stochastic import rounded_at_random

ROUNDINGS = 4
"""Roundings by which two evaluations of one loss may differ, in units of its precision."""


def stated_rounding(op: DataOperator, loss: float) -> float:
    """By how much two evaluations of one loss may differ, if it is as precise as it states."""
    return ROUNDINGS * op.loss_precision * abs(loss)


def measured_change(op: DataOperator, vectors: list[PyTree], loss: float) -> tuple[float, float]:
    """L(θ + d) - L(θ) for the sum d of some vectors, with `loss` for L(θ), and what rounding moves it by."""
    plane, points = stacked(vectors), np.ones((1, len(vectors)))
    there = float(losses_at(op, plane, points)[0])
    return there - loss, measured_rounding(op, plane, points, [loss, there])


def measured_rounding(op: DataOperator, plane: PyTree, points: np.ndarray, losses: list[float]) -> float:
    """By how much rounding moves the change of the loss from θ to θ + Σ_j x_j v_j, for some points x (p, k).

    `losses` are those at θ and at the points. In float64, where that is possible, they tell what these are
    off by, to which what is stated is added. Elsewhere each is evaluated four times more in stochastic
    arithmetic; see `limit`. Losses that are not finite tell nothing.
    """
    where = jnp.asarray(np.concatenate([np.zeros_like(points[:1]), points]), op.dtype)
    exact = doubled(op) is not None
    if exact:
        program = partial(_in_double, own=types())
        with jax.enable_x64(True):
            rows = [_over_data(op, program, plane, where)]
    else:
        salts = [jnp.uint32(KEY + i) for i in range(SAMPLES)]
        rows = [_over_data(op, partial(_at_random, salt), plane, where) for salt in salts]
    errors = np.asarray(losses, float) - np.asarray(rows, float)
    first = np.roll(errors[:, :1], 1, axis=0)  # with another salt: equal numbers are moved alike by one
    changes = (errors[:, 1:] - first).ravel()
    changes = changes[np.isfinite(changes)]
    stated = stated_rounding(op, losses[0])
    return stated + float(np.abs(changes).max(initial=0.0)) if exact else max(stated, limit(changes))


def _over_data(op: DataOperator, program: Any, plane: PyTree, where: jax.Array) -> Any:
    if op.stream is None:
        return program(jax.tree.map(jnp.asarray, op), plane, where)
    return weighted_sum(lambda piece: program(jax.tree.map(jnp.asarray, piece), plane, where), op._pieces())


@partial(programs.jit, options=QUICK, static_argnames="own")
def _in_double(op: DataOperator, plane: PyTree, where: jax.Array, own: bool) -> jax.Array:
    return in_wide(on_batch, op, plane, where, own=own)[0]


@partial(programs.jit, options=QUICK)
def _at_random(salt: jax.Array, op: DataOperator, plane: PyTree, where: jax.Array) -> jax.Array:
    return rounded_at_random(on_batch, salt, op, plane, where)[0]
