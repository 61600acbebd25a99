"""Eigenvalues that every probe resolves: atoms of weight 1/n, which have no sampling error.

A Ritz pair (θ, y) of residual r is one eigenpair where r is small beside the gap to the neighbouring Ritz
values. Its weight in the rule of a probe v is |vᵀu|² then, a random number, while its share of all
eigenvalues is 1/n for certain. Conditional on these weights the rest of v, once normalised, is uniform on
the sphere of the complement, so that with r resolved eigenvalues

    tr f(H) = Σ_i f(λ_i) + (n - r) ν(f),    ν = (μ - Σ_i w_i δ(λ_i)) / (1 - Σ_i w_i),

and for ν all holds that holds for an operator of order n - r. What is known of the measure μ of a probe is
known of ν: its rule is that of μ without the resolved nodes, and brackets are those of μ less their weights.

Two things could go wrong. An eigenvalue may be repeated: then a probe sees one node for all its copies, with
a weight that is their sum. The Ritz vectors of different probes are random directions of the eigenspace
then, and parallel for a simple eigenvalue alone; a few numbers of each, its products with fixed random
vectors, tell that. And a weight may be off, since the pair has converged to within r only: the mass that a
measure with the coefficients of the run can have in the middle of the gaps beside a node (see `brackets`)
bounds that error.

References:
    Bhattacharjee, Jayaram, Musco, Musco and Ray, arXiv:2410.21690 (quadrature with deflated atoms).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from spectra.quadrature import Measures
from spectra.quadrature.brackets import Origin, dropped, largest_mass, rules
from spectra.quadrature.links import Links

ISOLATED = 1e-2
"""Residual and noise of a resolved pair, in gaps to its neighbours."""
LEAK = 1e-2
"""What a weight may be off by, in units of 1/n."""
MOVED = 1e-3
"""How far a residual may move an eigenvalue, r² / gap, in spacings of the rest; or the noise floor."""
MISTAKEN = 1e-4
"""Chance that the Ritz vectors of a double eigenvalue are taken for parallel."""
ANGLE = 0.05
"""Vectors further apart than this are not parallel, however many probes agree."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """A quadrature as atoms, which are known, and the rest, which is sampled."""

    atoms: np.ndarray  # (r,) eigenvalues, increasing
    rest: Any  # Quadrature of order n - r; None where no eigenvalue is left
    coupling: float  # how far the residuals of atoms can move an eigenvalue
    leaks: np.ndarray  # (r,) how much of the rest's measure may belong to an atom, or the reverse
    origin: Origin | None = None  # what the rest was made from by taking resolved nodes out
    links: Links | None = None  # of atoms that are the Ritz values of a Krylov space

    @property
    def eigenvalues(self) -> np.ndarray:
        """The atoms, without Ritz values that have not converged and what they are coupled to."""
        if self.links is None or self.links.beta == 0 or self.rest is None:
            return self.atoms
        return self.links.eigenvalues(self.sampled, np.ravel(self.rest.nodes), self.rest.noise_floor)

    @property
    def sampled(self) -> np.ndarray:
        """The atoms that all probes have resolved, or that were deflated as eigenpairs."""
        return self.atoms if self.links is None else np.setdiff1d(self.atoms, self.links.theta)

    @property
    def leak(self) -> float:
        """What a share of the rest may be off by."""
        return float(np.sum(self.leaks))

    def measure(self) -> tuple[np.ndarray, np.ndarray]:
        """Places and masses of the distribution: 1/n for an eigenvalue that is known, the rest as sampled."""
        count = len(self.atoms)
        n = count + (self.rest.size if self.rest is not None else 0)
        places, masses = self.atoms, np.full(count, 1 / n)
        if self.rest is None:
            return places, masses
        weights = np.asarray(self.rest.weights, np.float64)
        sampled = weights.ravel() * (self.rest.size / n / weights.sum())
        return np.append(places, np.asarray(self.rest.nodes).ravel()), np.append(masses, sampled)

    def total(self, f: Callable[[np.ndarray], np.ndarray]) -> float:
        """Σ f(λ) over the atoms."""
        return float(np.sum(f(self.atoms))) if len(self.atoms) else 0.0

    def spill(self, f: Callable[[np.ndarray], np.ndarray], mean: float) -> float:
        """How far leaks can move the trace of f, whose mean over the rest is given."""
        if self.rest is None or not len(self.atoms):
            return 0.0
        return self.rest.size * float(np.sum(self.leaks * np.abs(f(self.atoms) - mean)))


def parts(quadrature: Measures) -> Parts:
    """Deflated and resolved eigenvalues, and the rest of the quadrature."""
    rest = quadrature.bulk or quadrature
    known = np.zeros(0) if quadrature.atoms is None else np.asarray(quadrature.atoms, np.float64)
    if quadrature.atoms is not None and quadrature.bulk is None:
        return Parts(np.sort(known), None, quadrature.coupling, np.zeros(len(known)))
    found = _resolved(rest, quadrature.noise_floor)
    leaks = np.zeros(len(known))
    links = None if quadrature.links is None else Links(known, np.asarray(quadrature.links, np.float64))
    # Where all of the complement is known, what couples it to the space is not: it stays what is sampled.
    if found is None or (found.rest is None and links is not None and links.beta > 0):
        return Parts(np.sort(known), rest, quadrature.coupling, leaks, links=links)
    atoms = np.concatenate([known, found.atoms])
    order = np.argsort(atoms)
    leaks = np.concatenate([leaks, found.leaks])
    coupling = quadrature.coupling + found.coupling
    return Parts(atoms[order], found.rest, coupling, leaks[order], found.origin, links)


def _resolved(q, floor: float) -> Parts | None:
    """The same of a quadrature without deflated pairs; None where nothing is resolved."""
    if q.num_probes < 2 or np.shape(q.sketches)[:-1] != np.shape(q.nodes):
        return None  # one probe, no sketches, or not those of these rows
    found = list(rules(q))
    gaps = [_gaps(theta) for theta, *_ in found]
    good = [np.abs(r) + floor <= ISOLATED * gap for (_, _, r), gap in zip(found, gaps, strict=True)]
    nodes = _matches([theta for theta, *_ in found], gaps, good)  # (r, k)
    if not len(nodes):
        return None
    nodes = nodes[_parallel(q.sketches, nodes)]
    leaks, moved = (np.zeros(nodes.shape) for _ in range(2))
    for p, ((theta, w, r), gap) in enumerate(zip(found, gaps, strict=True)):
        at, half = nodes[:, p], gap[nodes[:, p]] / 2
        if r.any() and len(theta) > 1:
            leaks[:, p] = sum(largest_mass(theta, w, r, theta[at] + sign * half) for sign in (-1, 1))
            moved[:, p] = r[at] ** 2 / gap[at]
    keep = leaks.max(axis=1, initial=0) <= LEAK / q.size
    keep &= moved.max(axis=1, initial=0) <= max(floor, MOVED * _spacing(found, nodes))
    nodes, leaks, moved = nodes[keep], leaks[keep], moved[keep]
    if not len(nodes) or len(nodes) > q.size:
        return None
    atoms = _values(found, nodes, moved, floor)
    if len(nodes) == q.size:
        return Parts(atoms, None, float(moved.max()), np.zeros(len(nodes)))
    rest = _without(q, found, nodes, floor)
    if rest is None:
        return None
    left = np.array([1 - w[nodes[:, p]].sum() for p, (_, w, _) in enumerate(found)])
    coupling = float(moved.sum(axis=0).max())
    if any(not r.any() for _, _, r in found):
        coupling += dropped(q)
    return Parts(atoms, rest, coupling, np.mean(leaks / left, axis=1), Origin(q, nodes))


def _gaps(theta: np.ndarray) -> np.ndarray:
    """Distance of each node to the nearest other one."""
    apart = np.append(np.append(np.inf, np.diff(theta)), np.inf)
    return np.minimum(apart[:-1], apart[1:])


def _matches(thetas, gaps, good) -> np.ndarray:
    """Numbers (r, k) of nodes that are isolated in every probe and agree."""
    first = np.flatnonzero(good[0])
    columns, keep = [first], np.ones(len(first), bool)
    for theta, gap, fit in zip(thetas[1:], gaps[1:], good[1:], strict=True):
        value = thetas[0][first]
        right = np.clip(np.searchsorted(theta, value), 0, len(theta) - 1)
        left = np.maximum(right - 1, 0)
        near = np.where(np.abs(theta[left] - value) < np.abs(theta[right] - value), left, right)
        apart = np.minimum(gap[near], gaps[0][first])
        keep &= fit[near] & (np.abs(theta[near] - value) <= ISOLATED * apart)
        columns.append(near)
    return np.stack(columns, axis=1)[keep]


def _parallel(sketches, nodes: np.ndarray) -> np.ndarray:
    """Whether the Ritz vectors of all probes are one line, for each row of nodes.

    For a double eigenvalue the angle of another probe's vector to that of the first is uniform: k of them
    are within ε with the probability (2 ε / π)^(k-1), and less for more copies.
    """
    k = nodes.shape[1]
    limit = min(ANGLE, np.pi / 2 * MISTAKEN ** (1 / (k - 1)))
    vectors = np.asarray(sketches, np.float64)[np.arange(k), nodes]  # (r, k, d)
    sizes = np.linalg.norm(vectors, axis=2)
    if not vectors.size:
        return np.zeros(len(nodes), bool)
    line = np.linalg.svd(vectors, full_matrices=False)[2][:, :1]  # (r, 1, d)
    away = np.linalg.norm(vectors - (vectors @ line.transpose(0, 2, 1)) * line, axis=2)
    return np.all((away <= limit * sizes) & (sizes > 0), axis=1)


def _spacing(found, nodes: np.ndarray) -> float:
    """Median by weight of the gaps between nodes that are no candidates."""
    gaps, weights = [], []
    for p, (theta, w, _) in enumerate(found):
        rest = np.delete(np.arange(len(theta)), nodes[:, p])
        if len(rest) > 1:
            gaps.append(_gaps(theta[rest]))
            weights.append(w[rest])
    if not gaps:
        return 0.0
    gaps, weights = np.concatenate(gaps), np.concatenate(weights)
    order = np.argsort(gaps)
    return float(gaps[order][np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)])


def _values(found, nodes: np.ndarray, moved: np.ndarray, floor: float) -> np.ndarray:
    """The eigenvalues: means over probes, those that have converged best counting most."""
    values = np.stack([theta[nodes[:, p]] for p, (theta, *_) in enumerate(found)], axis=1)
    trust = 1 / (moved + floor + np.finfo(float).tiny)
    trust /= trust.max(axis=1, keepdims=True)
    return np.sum(trust * values, axis=1) / np.sum(trust, axis=1)


def _without(q, found, nodes: np.ndarray, floor: float):
    """The quadrature of the complement, of order n - r."""
    count, steps = len(nodes), q.num_steps
    lengths = np.asarray(q.lengths) - count
    if (lengths < 1).any():
        return None
    columns = np.zeros((3, q.num_probes, steps - count))
    for p, (theta, w, r) in enumerate(found):
        rest = np.delete(np.arange(len(theta)), nodes[:, p])
        w = w[rest] / w[rest].sum()
        columns[:, p, : len(rest)] = theta[rest], w, np.abs(r[rest])
        columns[0, p, len(rest) :] = theta[rest][-1]
    scale = float(np.abs(columns[0]).max())
    return dataclasses.replace(
        q,
        nodes=columns[0],
        weights=columns[1],
        residuals=columns[2],
        lengths=lengths,
        asymmetry=np.full(q.num_probes, floor / scale if scale else 0.0),  # products are those of all of H
        size=q.size - count,
        rounding=0.0,
        sketches=None,
    )
