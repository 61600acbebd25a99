"""Sharpness along the direction that training moves in, from evaluations of the loss alone."""

import math
from collections.abc import Callable
from typing import Any, Unpack

import jax
import numpy as np

from spectra.base import trees
from spectra.base.calls import automatic
from spectra.base.errors import NonFiniteError, SpectraError, Status
from spectra.base.trees import PyTree
from spectra.estimators.landscape import losses_at
from spectra.estimators.loss_errors import measured_rounding, stated_rounding
from spectra.operators.arguments import DataOptions
from spectra.operators.data import shows_options
from spectra.operators.hessian import HessianOperator
from spectra.results import Sharpness


@shows_options
@automatic
def critical_sharpness(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    data: Any,
    direction: PyTree,
    *,
    step: float = 1.0,
    tol: float = 0.05,
    max_evaluations: int = 40,
    **options: Unpack[DataOptions],
) -> Sharpness:
    """Find the critical sharpness 2 / s, with s the first step at which L(θ + s d) = L(θ) again.

    On a quadratic it is dᵀHd / |g · d|; along the gradient, gᵀHg / gᵀg. A learning rate above s, in units of
    the direction, makes the next step raise the loss. Starting from `step`, it is found by trying longer or
    shorter steps and then bisecting, without any gradient.

    Args:
        loss_fn: pure function (params, batch) -> scalar, the mean over the batch.
        params: pytree of parameters.
        data: one batch or a re-iterable of batches.
        direction: pytree like the parameters that vary: an optimizer's update, or a gradient. The loss may
            fall along it or against it; `descends` of the result says which. For the loss of one task along
            the update of another, a loss that rises from the first step on is a conflict between the tasks,
            not a sharpness.
        step: first step tried, in units of the direction; the last result's `step` saves evaluations.
        tol: relative width of the bracket.
        max_evaluations: maximum number of evaluations of the mean loss.
        **options: see `DataOperator`: wrt, microbatch, weight_fn, ...

    Returns:
        `Sharpness` with its bracket. Its status is `BUDGET_EXHAUSTED` if the evaluations ran out before
        the bracket was narrow, and `STAGNATED` if the loss is within its rounding (as measured, and at least
        4 `precision` |L|) over the rest of it: `lower` is 0 if the loss never rose, `upper` infinite if it
        never fell.

    Raises:
        SpectraError: step, tol or max_evaluations out of range, or a direction that is zero.
        NonFiniteError: the direction, or the loss at the parameters, is NaN or infinite.
        StructureError: `direction` is not like the parameters.

    Cost: evaluations of the loss over all data: 8 from a `step` that is right to a factor of two (4 with
    tol=0.5), and two more for each factor of four by which it is too long. Three more in float64, or twelve
    in stochastic arithmetic where that is slow, measure the rounding of the loss; `num_evaluations` leaves
    them out. Memory is that of an evaluation.

    References:
        Kalra, Gagnon-Audet, Gromov, Mediratta, Niu, Miller and Shvartsman, arXiv:2601.16979.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> def loss_fn(w, x):
        ...     return jnp.mean((x @ w) ** 2)
        >>> w, x = jnp.ones(2), jnp.diag(jnp.array([1.0, 3.0]))
        >>> g = jax.grad(loss_fn)(w, x)
        >>> found = spectra.critical_sharpness(loss_fn, w, x, g, step=0.1, tol=1e-3)
        >>> round(float(found), 1), round(float(g @ (jnp.array([1.0, 9.0]) * g) / (g @ g)), 1)
        (8.9, 8.9)
    """
    if not (0 < step < math.inf and 0 < tol < 1 and max_evaluations >= 4):
        raise SpectraError(
            f"step={step}, tol={tol}, max_evaluations={max_evaluations}: use a positive step, a tolerance in "
            "(0, 1) and at least 4 evaluations."
        )
    trees.require_values("critical_sharpness", (params, data, direction))
    op = HessianOperator(loss_fn, params, data, **options)
    along = op.as_vector(direction, "direction")
    if not trees.all_finite(along):
        raise NonFiniteError("direction holds NaN or infinity.")
    if not trees.length(along) > 0:
        raise SpectraError("direction is zero: there is nothing to step along.")
    line = _Line(op, along, max_evaluations)
    if not math.isfinite(line.origin):
        raise NonFiniteError(op.explain_non_finite())
    sign, low, high = _narrowed(line, step, tol)
    while not line.tells([sign * x for x in (low, high) if 0 < x < math.inf]):
        sign, low, high = _narrowed(line, step, tol) if line.left else (1.0, 0.0, math.inf)
    done = low > 0 and high <= (1 + tol) * low
    return Sharpness(
        value=2 / math.sqrt(low * high) if low > 0 and high < math.inf else (math.inf if low == 0 else 0.0),
        lower=2 / high,
        upper=2 / low if low else math.inf,
        descends=sign > 0,
        loss=line.origin,
        num_evaluations=line.count,
        status=Status.CONVERGED if done else Status.STAGNATED if line.left else Status.BUDGET_EXHAUSTED,
    )


class _Line:
    """The mean loss along a direction; counts its evaluations."""

    def __init__(self, op: HessianOperator, along: PyTree, budget: int):
        self.op, self.plane, self.budget = op, jax.tree.map(lambda x: x[None], along), budget
        self._losses: dict[float, float] = {}
        self.origin = self._loss(0.0)
        self.rounding = stated_rounding(op, self.origin)

    @property
    def count(self) -> int:
        """Evaluations so far."""
        return len(self._losses)

    @property
    def left(self) -> bool:
        """Whether another evaluation is allowed."""
        return self.count < self.budget

    def _loss(self, step: float) -> float:
        if step not in self._losses:
            self._losses[step] = float(losses_at(self.op, self.plane, np.array([[step]]))[0])
        return self._losses[step]

    def tells(self, steps: list[float]) -> bool:
        """Whether the loss has changed by more than rounding at these steps, which have been tried. It is
        measured; where it hides a change, it is taken to be as large from then on, and twice as before."""
        if not steps:
            return True
        losses = [self.origin, *(self._losses[step] for step in steps)]
        measured = measured_rounding(self.op, self.plane, np.array(steps)[:, None], losses)
        if not any(abs(loss - self.origin) <= measured for loss in losses[1:]):
            return True
        self.rounding = max(measured, 2 * self.rounding)
        return False

    def change(self, step: float) -> int:
        """1 if the loss is above its value at the parameters or not finite, -1 if it is below it, and 0 if
        it is within its rounding of it."""
        change = self._loss(step) - self.origin
        if not change <= self.rounding:
            return 1
        return -1 if change < -self.rounding else 0


def _narrowed(line: _Line, step: float, tol: float) -> tuple[float, float, float]:
    """The same as `_bracket`, as narrow as the tolerance, or as evaluations and rounding allow."""
    sign, low, high = _bracket(line, step)
    seen = line.left and low > 0 and high < math.inf
    while line.left and seen and (1 + tol) * low < high:
        low, high, seen = _halved(line, sign, low, high, tol)
    return sign, low, high


def _bracket(line: _Line, step: float) -> tuple[float, float, float]:
    """The sign of the direction along which the loss falls; a step at which it is below its value and a
    longer one at which it is above. 0 or infinity where there is none: the evaluations ended before it was
    found, or the loss is within its rounding there.
    """
    low, level, above = step, 0.0, math.inf  # at `level` and below it nothing is seen to change
    while True:
        along = line.change(low)
        against = line.change(-low) if along >= 0 else 0
        if along < 0 or against < 0:
            break
        rises = along + against
        above = low if rises == 2 else above
        if not line.left or (rises and low / 4 <= level) or (not rises and 4 * low >= above):
            return 1.0, 0.0, above
        if not rises:
            level = low
        low = low / 4 if rises else 4 * low
    sign, high = (1.0 if along < 0 else -1.0), 2 * low
    while line.left:
        found = line.change(sign * high)
        if found > 0:
            return sign, low, high
        low, high = high if found < 0 else low, 2 * high
    return sign, low, math.inf


def _halved(line: _Line, sign: float, low: float, high: float, tol: float) -> tuple[float, float, bool]:
    """A narrower bracket, and whether the loss was seen to change in its middle. If it was not, the ends
    are brought as near to it as a change is seen."""
    middle = math.sqrt(low * high)
    found = line.change(sign * middle)
    if found:
        return (low, middle, True) if found > 0 else (middle, high, True)
    near = (1 + tol) ** 0.45  # both ends that near are within the tolerance
    ends = [low, high]
    for side, wanted in enumerate((-1, 1)):
        gap = near
        while line.left and gap * gap < high / low:
            if line.change(sign * middle * gap**wanted) == wanted:
                ends[side] = middle * gap**wanted
                break
            gap *= gap
    return ends[0], ends[1], False
