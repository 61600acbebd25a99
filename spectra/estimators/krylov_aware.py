"""The trace from a Krylov space that is known exactly, and samples of what is outside of it.

With an orthonormal basis Q of which all products are known (`spectra.krylov.explored`),

    tr H = Σ_i q_iᵀ H q_i + E vᵀ H v,    v uniform on the sphere |v|² = n - r in the complement of Q,

and the variance of a sample is 2 |P (H - c) P|_F², P = 1 - QQᵀ and c the mean of P H P on its range. A
Hutch++ sketch of r vectors costs 2 r products, XTrace tests what is outside of r vectors with 2 r as well;
here r products give r vectors, and vectors of a Krylov space, which hold what is large far better.

How many of the products go to the basis is decided as it grows. A direction with H q = α q + β q' + ... takes
(α - c)² + 2 β² off the square F of the norm, exactly; F itself is known from each random vector that is taken
in: (n - r) β² is an unbiased estimate of it. The error is √(2 F / s) with s samples: one direction more is
worth its product while what it takes off F is more than F / s. That is asked of the mean of the last `WINDOW`
directions; where the answer is no a random vector is taken in, so that copies of an eigenvalue, of which a
Krylov space holds one, are found, and F is known anew; a second no ends it. An F that by chance was so small
that nothing is left of it says nothing: it is taken anew as well. Where no direction waits, random
vectors are gone on with, and their gains count as those of the others.

All decisions rest on the basis. The samples are other random vectors, independent of them: given the basis
they are as those of Hutch++, the estimate has no bias, and the interval rests on Student's t with the
variance that the samples show, see `spectra.estimators.low_rank.hutchpp`.

References:
    Chen and Hallman, arXiv:2205.01736; Persson, Cortinovis and Kressner, arXiv:2109.10659 (the split).
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import programs, stacks
from spectra.base.errors import NonFiniteError, NotSymmetricError, SpectraError
from spectra.base.trees import PyTree
from spectra.estimators import blocks
from spectra.estimators.low_rank import complement_forms, project
from spectra.estimators.run import LOOSEST, Run, adaptive
from spectra.krylov import explored
from spectra.krylov.layout import Layout
from spectra.krylov.product_rounding import multiply
from spectra.krylov.rows import stack
from spectra.results import Estimate

WINDOW = 4
"""Directions whose mean gain is asked for."""
SAMPLES = 4
"""Samples that are left, at least, or a tenth of the budget."""
MARGIN = 1.2
"""Samples before the first look, in those that F wants: a second look takes half as many again."""
GROWTH = 1.5
"""Of the basis between two random vectors, without which F may be too small by chance to end."""
ROWS = 16
"""The basis is handed to the samples in multiples of this, filled up by zeros: compiled code is shared."""
CHUNK = 8
"""Samples in one compiled call; fewer are filled up by zeros, but for their products."""


@dataclasses.dataclass
class Split:
    """Whether the next product goes to the basis, and to a random direction; see above."""

    size: int
    budget: int
    tol: float | None = None
    spent: int = 0
    next_random: int = 0
    doubtful: bool = False
    done: bool = False
    square: float = math.inf  # F, as of the last random direction, less what was gained since
    centre: float = 0.0  # c
    total: float = 0.0  # Σ α
    gains: list[float] = dataclasses.field(
        default_factory=list[float]
    )  # since a random direction that was wanted

    @property
    def least(self) -> int:
        """Samples that the basis leaves, at least."""
        return max(SAMPLES, self.budget // 10)

    @property
    def wanted(self) -> float:
        """Samples that are left, or fewer where they reach the tolerance."""
        left = self.budget - self.spent
        if self.tol is None:
            return left
        value = self.total + (self.size - self.spent) * self.centre
        goal = self.tol * abs(value)
        return min(left, 2 * self.square / goal**2) if goal > 0 else left

    def random_next(self, waiting: np.ndarray) -> bool:
        """Whether the next direction is a random one."""
        return self.spent >= self.next_random or not waiting.any()

    def take(self, form: float, outside: float, *, random: bool) -> None:
        """The step that was made."""
        # Where nothing waits a random vector is one more direction of the window: else an operator with a
        # few distinct eigenvalues, each chain of which is short, would never fill it, and never be asked.
        forced = random and self.spent < self.next_random
        gain = (form - self.centre) ** 2 + 2 * outside**2
        self.spent += 1
        self.total += form
        if random:
            self.next_random = max(self.spent + 2 * WINDOW, int(GROWTH * self.spent))
            self.square, self.centre = (self.size - self.spent) * outside**2, form
            self.gains = [*self.gains, gain] if forced else []
            self.done = self.tol is not None and self.spent > WINDOW and self.wanted <= SAMPLES
        else:
            self.square = max(self.square - gain, 0.0)
            self.gains.append(gain)
        if self.budget - self.spent <= self.least:
            self.done = True
        elif len(self.gains) >= WINDOW:
            self._ask()

    def _ask(self) -> None:
        gain = float(np.mean(self.gains[-WINDOW:]))
        if self.square < WINDOW * gain:  # F was too small, or all but gone: a random vector tells which
            self.next_random = self.spent
            return
        worth = gain * self.wanted > self.square
        if worth:
            self.doubtful = False
        elif self.doubtful:
            self.done = True
        else:
            self.doubtful, self.next_random = True, self.spent


def krylov(run: Run, kind: str, num_matvecs: int, reason: str) -> Estimate:
    """The trace on a Krylov space, and samples of what is outside of it; see above."""
    if run.traced:
        raise SpectraError("method='krylov' decides by values, which do not exist inside jit or vmap.")
    if run.by is not None or kind != "normal":
        raise SpectraError(
            "method='krylov' gives a single number, from normal probes: with by= or probes='rademacher', use "
            "method='xtrace' or 'hutchinson'."
        )
    layout, precision = Layout.of(run.op.like), run.precision
    split, forms, squares, state = _explore(run, layout, num_matvecs)
    basis = stack(state.basis, layout, 0, -(-split.spent // ROWS) * ROWS)
    unit, rest, fixed = state.unit, run.op.size - split.spent, float(np.sum(forms))
    del state
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def step(count: int) -> tuple[float, float]:
        for start in range(num_samples(), count, CHUNK):  # `adaptive` counts all samples, not the new ones
            some = min(CHUNK, count - start)
            parts.append(_samples(run, basis, unit, split.spent + start, some, rest))
        values, stderr = result()
        return values[-1], stderr[-1]

    def num_samples() -> int:
        return sum(len(part[0]) for part in parts)

    def result() -> tuple[np.ndarray, np.ndarray]:
        samples, variances, sizes = map(np.concatenate, zip(*parts, strict=True))
        spread = 2 * np.mean(variances) / len(samples)
        rounding = precision * (np.sqrt(split.spent * np.sum(squares)) + rest * np.sqrt(np.mean(sizes)))
        value, stderr = fixed + np.mean(samples), np.hypot(np.sqrt(spread), rounding)
        return np.array([value]), np.array([stderr])

    least = max(SAMPLES, math.ceil(MARGIN * split.wanted))
    ended = adaptive(run, step, num_matvecs - split.spent, least=least, signed=True)
    text = f"a Krylov space of {split.spent} vectors is known, {num_samples()} samples are outside of it"
    return run.estimate(
        *result(),
        unit=unit,
        num_matvecs=split.spent + num_samples(),
        method="krylov",
        ended=ended,
        reason=f"{reason}; {text}" if reason else text,
        dof=float(num_samples()),
    )


def _explore(
    run: Run, layout: Layout, num_matvecs: int
) -> tuple[Split, list[float], list[float], explored.Explored]:
    """The basis: how the budget was split, α and |Hq|² of each direction, and the state."""
    split = Split(run.op.size, num_matvecs, run.tol and min(run.tol, LOOSEST))
    state = explored.empty(layout, -(-(num_matvecs - split.least) // ROWS) * ROWS)
    waiting, forms, squares = np.zeros(explored.WAITING), list[float](), list[float]()
    floor = run.op.size**0.5 * float(jnp.finfo(run.op.dtype).eps)
    while not split.done:
        random = split.random_next(waiting)
        # A new direction takes the place of the shortest one that waits, which is none at first.
        slot = int(np.argmin(waiting) if random else np.argmax(waiting))
        drawn = explored.draw(run.key, split.spent, run.op) if random else None
        state, found = explored.grow(run.op, layout, state, slot, drawn)
        if run.journal is not None:
            run.journal.count(1)
        found, asymmetry = jax.device_get((found, state.asymmetry))
        form, outside, square = (float(x) for x in (found.form, found.outside, found.square))
        if not np.isfinite([form, outside]).all():
            raise NonFiniteError(f"a product is NaN or infinite. {run.op.explain_non_finite()}")
        split.take(form, outside, random=random)
        forms.append(form)
        squares.append(square)
        scale = math.sqrt(max(squares))
        waiting = np.where(found.lengths > floor * scale, found.lengths, 0.0)
        _check_symmetric(run, float(asymmetry), scale)
    return split, forms, squares, state


def _check_symmetric(run: Run, asymmetry: float, scale: float) -> None:
    limit = math.sqrt(run.precision)
    if asymmetry > limit * scale:
        raise NotSymmetricError(
            f"the operator is not symmetric, or not linear: |uᵀHv - vᵀHu| reaches {asymmetry / scale:.1e} "
            f"|H|, and the precision of its products explains {limit:.1e}. {run.op.explain_asymmetry()}"
        )


def _samples(
    run: Run, basis: PyTree, unit: jax.Array, first: int, count: int, rest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """vᵀHv, what it shows of its own variance, and |(1 - QQᵀ)Hv|² / |v|², of `count` samples in the unit."""
    outside, lengths = project(basis, _probes(run, first))
    images = blocks.in_unit(_images(run, outside, count), unit)[0]
    dots, squares, residuals = (
        run.host(jnp.sum(x, axis=0))[:count] for x in complement_forms(basis, outside, images)
    )
    lengths = run.host(lengths)[:count]
    return rest * dots / lengths, rest * residuals / lengths, squares / lengths


def _probes(run: Run, first: int) -> PyTree:
    """`CHUNK` probes by the program that has drawn the random directions."""
    return stacks.stacked([explored.draw(run.key, first + i, run.op) for i in range(CHUNK)])


def _images(run: Run, vectors: PyTree, count: int) -> PyTree:
    """Products of the first `count` vectors, and zeros.

    Side by side only where it saves something: one by one, the program is that which the basis was made with,
    whatever their number.
    """
    if run.batch > 1 and (count == CHUNK or run.op.on_host):
        return stacks.padded(run.products(blocks.rows(vectors, 0, count)), CHUNK)
    images: list[PyTree] = []
    for vector in _split(vectors)[:count]:
        images.append(multiply(run.op, vector))
        if run.journal is not None:
            run.journal.count(1)
    return stacks.stacked(images + [_zeros(images[0])] * (CHUNK - count))


_split, _zeros = programs.jit(stacks.split), programs.jit(partial(jax.tree.map, jnp.zeros_like))
"""Programs of all leaves, where an operation outside of any is one for each shape."""
