"""What connects a part of a Krylov space that was taken out of an operator with the rest of it: one column.

For the Ritz pairs (θ_j, y_j) of a run, H y_j = θ_j y_j ± r_j u with one unit vector u outside of the space.
So where some of them, or all, are taken out,

    H = [[T, E], [Eᵀ, B]],    T = diag θ_j,    E = r uᵀ of rank one,    β = |r|,

and whether they have converged does not matter: T is known, B alone is sampled, and tr f(H) is known up to

    D(f) = tr f(H) - tr f(T) - tr f(B).

As f(T ⊕ B) has no part along E, D is of second order. With t running from T ⊕ B to H, the second derivative
of tr f is a mean of f'' over the spectrum times |E|² + |Eᵀ|², and the perturbation has the eigenvalues ± β:

* |D| <= β² max |f''|, and D has the sign of f'', between the ends of the spectrum;
* |D| <= 2 β max |f'|, as Σ |λ_i(H) - λ_i(T ⊕ B)| <= 2 β (Lidskii);
* |D| <= the variation of f, as no count of eigenvalues differs by more than one (Weyl).

Counts are known better than that. By Haynsworth's formula the number of eigenvalues of H below x is that of
T, and that of B - h(x) u uᵀ, with

    h(x) = rᵀ (T - x)⁻¹ r = Σ_j r_j² / (θ_j - x):

that of B at x, but for one, and no more than what B has within |h(x)| of x: nothing, beside an outlier.

References:
    Chen and Hallman, arXiv:2205.01736 (Krylov-aware traces); Haynsworth, Linear Algebra Appl. 1 (1968) 73;
    Bhatia, Matrix Analysis, 1997, ch. III and V (Lidskii, pinchings and convex functions).
"""

import dataclasses

import numpy as np

ISOLATED = 1e-2
"""Residual and noise of a Ritz value that is an eigenvalue, in gaps to the nearest node."""


@dataclasses.dataclass(frozen=True)
class Links:
    """Ritz values of vectors that were taken out, and their residuals."""

    theta: np.ndarray  # (m,)
    residuals: np.ndarray  # (m,) without signs; 0 of those that have converged, which couple otherwise

    @property
    def beta(self) -> float:
        """β, the norm of E."""
        return float(np.linalg.norm(self.residuals))

    def moved(self, x: np.ndarray, floor: float) -> np.ndarray:
        """The largest |h| within `floor` of each point; infinite where a Ritz value lies there."""
        away = self.theta - np.asarray(x)[..., None]
        near = np.abs(away) <= floor
        with np.errstate(divide="ignore"):
            terms = [self.residuals**2 / np.where(near, np.inf, away + end) for end in (-floor, floor)]
        largest = np.max([np.abs(np.sum(part, axis=-1)) for part in terms], axis=0)
        return np.where(np.any(near & (self.residuals > 0), axis=-1), np.inf, largest)

    def end(self, outside: float, sign: float) -> float:
        """How far H reaches where B reaches to `outside`: the root of x = outside + Σ_j r_j² / (x - θ_j).

        It is outside of T, and no further than β from the further one of both: there the sum is at most β.
        """
        if not np.isfinite(outside):
            return outside
        theta, far = sign * self.theta, sign * outside
        low = max(far, float(theta.max()))
        high = low + self.beta
        squares, theta = self.residuals[self.residuals > 0] ** 2, theta[self.residuals > 0]
        for _ in range(60):
            middle = (low + high) / 2
            with np.errstate(divide="ignore"):
                beyond = middle - float(np.sum(squares / (middle - theta))) >= far
            low, high = (low, middle) if beyond else (middle, high)
        return sign * high

    def eigenvalues(self, resolved: np.ndarray, others: np.ndarray, floor: float) -> np.ndarray:
        """Those of H among the Ritz values and the `resolved` eigenvalues of B.

        `others` are the nodes of what is left of B.

        A residual r that is small beside the gap to any other node leaves r² / gap. An eigenvalue of B is
        moved by no more than |h| about it, where no other one is as near: that has to be as small.
        """
        values = np.append(self.theta, resolved)
        away = np.abs(values[:, None] - np.append(values, others))
        away[np.arange(len(values)), np.arange(len(values))] = np.inf
        gaps, m = away.min(axis=1), len(self.theta)
        least = ISOLATED**2 * gaps[m:]
        own = self.theta[self.residuals + floor <= ISOLATED * gaps[:m]]
        moved = [float(self.moved(x, floor + d)) for x, d in zip(resolved, least, strict=True)]
        return np.sort(np.append(own, resolved[np.asarray(moved) <= least]))
