"""Ritz vectors of one long run that are taken out of an operator, and runs of probes outside of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import stacks
from spectra.base.host import Progress
from spectra.base.trees import PyTree
from spectra.density import deflation
from spectra.density.run import ProbeRun
from spectra.krylov.layout import BasisPlace
from spectra.krylov.recurrence import Setup
from spectra.krylov.rows import stack
from spectra.operators.base import LinearOperator
from spectra.operators.composed import DeflatedOperator
from spectra.operators.jaxprs import outside_loops
from spectra.quadrature import rules
from spectra.results import Quadrature

ROWS = 16
"""A space is handed to the samples in multiples of this, filled up by zeros: compiled code is shared."""


@dataclasses.dataclass(frozen=True)
class Space:
    """Ritz vectors that were taken out, with their values and residuals, and what they cost."""

    values: np.ndarray  # (r,)
    residuals: np.ndarray  # (r,)
    vectors: PyTree  # orthonormal, leaves (rows, *leaf.shape); rows of zeros behind the last
    size: int  # n
    num_matvecs: int

    @property
    def norm(self) -> float:
        """The largest |Ritz value|."""
        return float(np.abs(self.values).max())

    def joined(self, rest: Quadrature) -> Quadrature:
        """The quadrature of all, from that of the complement."""
        found = deflation.with_space(rest, self.values, self.residuals, self.size)
        return dataclasses.replace(found, num_matvecs=rest.num_matvecs + self.num_matvecs)


def taken_out(run: ProbeRun, found: Quadrature, taken: np.ndarray) -> Space:
    """Some Ritz vectors of the first m steps of the one probe of a run, whose basis it forgets.

    `taken` is (m,). The run may have gone on since: Ritz values and residuals are those of m steps, too, not
    of `found`, which says what has been spent.
    """
    m, (alpha, beta) = len(taken), run.coefficients(0)
    assert run.last is not None
    values, vectors = np.linalg.eigh(rules.dense(alpha[:m], beta[: m - 1], np))
    residuals = np.abs(beta[m - 1] * vectors[-1])
    at = vectors[:, taken] if not taken.all() else np.eye(m)  # all of them: the basis itself is as good
    at = np.pad(at, ((0, 0), (0, -at.shape[1] % ROWS)))
    stacked = stacks.combine(jnp.asarray(at.T), stack(run.last.basis, run.place.layout, 0, m))
    run.forget()
    return Space(values[taken], residuals[taken], stacked, found.size, found.num_matvecs)


def outside(op: LinearOperator, space: Space, place: BasisPlace, key: jax.Array, bar: Progress) -> ProbeRun:
    """A run of probes in the complement of a space."""
    inner = outside_loops(DeflatedOperator(op, space.vectors).prepare())
    setup = Setup(inner, place, deflated=space.vectors, norm=space.norm)
    return ProbeRun(setup, key, bar, size=op.size - len(space.values))
