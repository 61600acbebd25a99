"""Where a Lanczos run has exhausted an invariant space, read from its coefficients alone.

In exact arithmetic the run from a start with components on d distinct eigenvalues ends: β_d = 0. In
floating point each product brings an error f_i of relative size ν outside the space, and the recurrence
carries it on as it carries the vectors themselves. Along an eigenvector of λ the error behind product l is

    w_l = (λ - α_l) x_l - β_{l-1} x_{l-1} + ν |H|,   x_{l+1} = w_l / β_l,

so that β_d comes out as up to A_d ν |H|, with A_d the norm of w_{d-1} over the sources of the errors, at the
worst λ. In 4,320 runs with planted errors β_d was never above 1.3 A_d ν |H|; A_d reaches 1e4 for six
eigenvalues, and no fixed multiple of eps separates such a β_d from a bulk that narrow. What follows tells
them apart. Behind an exhausted space the run begins again, from rounding, among the copies of the *same*
eigenvalues: what it adds repeats Ritz values that are there, or wanders between them on next to no weight.
A bulk that has been a single node until then splits that node, by about β_d.
"""

import numpy as np

MOST = 64.0
"""Largest `breakdown_factor`."""
COPIES = 50.0
"""How far, in units of β_d, the rest of a run strays from every single Ritz value of an exhausted space. The
rest of a bulk stays within a few β_d of its node."""
WANDERING = 1e-3
"""Weight of nodes between those of an exhausted space. By perturbation theory it is (β_d / gap)²."""


COARSE = 2.0**-12
"""Precision of products that do not compute in float32, tensorfloat32 included."""


def breakdown_factor(size: int) -> float:
    """The residual that rounding leaves of a vanishing one, in units of eps |H|.

    A dense product of order n sums n terms of random sign one after another, which costs √n / 2 roundings;
    ten more are those of the recurrence. Beyond n = 1e4 products are no longer dense, and sums are taken in
    blocks: 64 at most, so that a bulk of 1e-5 |H| stays visible in float32.
    """
    return min(10 + np.sqrt(size) / 2, MOST)


def breakdown_noise(size: int, precision: float) -> float:
    """The same in units of |H|, for products of a given precision.

    Products in bfloat16 or less state what they are off by as a whole, and are summed in float32: the sums
    add nothing to that.
    """
    return (breakdown_factor(size) if precision < COARSE else 4) * precision


def invariant_length(
    alpha, beta, length: int, size: int, precision: float, *, orthogonal: bool = True
) -> int | None:
    """Dimension of the invariant space that a run went through; None if it went through none.

    Args:
        alpha, beta: coefficients (m,), in float64; beta[i] is the residual behind step i.
        length: steps done.
        size: n, the order of the operator.
        precision: relative error of one product.
        orthogonal: whether the vectors were kept orthogonal. If not, copies appear of any eigenvalue that has
            converged, and n steps need not have seen the whole space; what is asked for here is that there
            is nothing but copies.
    """
    alpha, beta = np.asarray(alpha[:length], np.float64), np.asarray(beta[:length], np.float64)
    scale = np.max(np.abs(alpha) + np.append(0, beta[:-1]) + beta, initial=0.0)
    if scale == 0:
        return 1
    alpha, beta = alpha / scale, beta / scale
    noise = breakdown_noise(size, precision)
    resolved = noise * np.sqrt(length)  # by Weyl: errors of the products, `length` columns of them
    nodes = None
    for d in (np.flatnonzero(beta[:-1] <= precision ** (1 / 3)) + 1).tolist():
        if _goes_on(alpha, beta, d, resolved):
            continue
        theta = _eigenvalues(alpha[:d], beta[: d - 1])
        if np.min(np.diff(theta), initial=1.0) < 4 * resolved:
            break  # too near each other to tell a copy from a neighbour, and no farther apart later
        nodes = _eigenvalues(alpha, beta[:-1]) if nodes is None else nodes
        beside = np.abs(nodes[:, None] - theta).min(axis=1) > resolved
        copies = not beside.any() or _wanders(alpha, beta, d, theta, beside, resolved)
        if copies and _is_rounding(alpha, beta, theta, noise):
            return d
    return length if beta[-1] <= noise or (orthogonal and length == size) else None


def _goes_on(alpha: np.ndarray, beta: np.ndarray, d: int, resolved: float) -> bool:
    """Whether what came behind step d looks like a bulk: the usual case, told without an eigenproblem."""
    spread = max(np.ptp(alpha[d:]), 2 * np.max(beta[d:-1], initial=0.0))
    return bool(len(alpha) > d + 1 and resolved < spread < COPIES * beta[d - 1] / 2)


def _wanders(alpha, beta, d: int, theta: np.ndarray, beside: np.ndarray, resolved: float) -> bool:
    """Whether what came behind step d strays among the Ritz values `theta` of the first d, on no weight."""
    tail = _eigenvalues(alpha[d:], beta[d:-1])
    strays = np.abs(tail[:, None] - theta).max(axis=0).min() > COPIES * beta[d - 1]
    within = theta[0] - 4 * resolved <= tail[0] and tail[-1] <= theta[-1] + 4 * resolved
    return bool(strays and within and _weights(alpha, beta[:-1])[beside].sum() <= WANDERING)


def _is_rounding(alpha: np.ndarray, beta: np.ndarray, theta: np.ndarray, noise: float) -> bool:
    """Whether errors of the products alone can have left a residual behind the step of these Ritz values."""
    d = len(theta)
    if beta[d - 1] <= noise:
        return True
    behind = vector = before = np.zeros((d, d))  # row i: the error that product i brought in
    for step in range(d):
        behind = (theta - alpha[step]) * vector - (beta[step - 1] if step else 0) * before
        behind[step] = 1
        before, vector = vector, np.clip(behind / beta[step], -1e150, 1e150)
    return bool(beta[d - 1] <= noise * np.linalg.norm(behind, axis=0).max())


def _eigenvalues(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    from scipy.linalg import eigvalsh_tridiagonal

    return np.asarray(eigvalsh_tridiagonal(alpha, beta))


def _weights(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    from scipy.linalg import eigh_tridiagonal

    return eigh_tridiagonal(alpha, beta)[1][0] ** 2
