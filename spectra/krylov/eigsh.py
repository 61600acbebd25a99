"""Eigenpairs at the ends of the spectrum by thick-restart Lanczos, with a check for repeated ones."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra import _tree
from spectra._errors import SpectraError
from spectra._mesh import automatic
from spectra._status import Status
from spectra.krylov import missing, rounding, wanted
from spectra.krylov.band import Band
from spectra.krylov.dense import allowed, dense_eigenpairs
from spectra.krylov.layout import Layout
from spectra.krylov.metric import generalized_eigenpairs
from spectra.krylov.pair_gradients import differentiable
from spectra.krylov.smallest import smallest_eigenpairs, split
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.stepwise import outside_loops
from spectra.results import Eigenpairs


@automatic
def eigsh(
    op: LinearOperator,
    k: int,
    *,
    which: str = "LM",
    key: jax.Array,
    tol: float = 1e-5,
    num_basis: int | None = None,
    block_size: int = 1,
    max_matvecs: int | None = None,
    verify: bool | str = "auto",
    v0=None,
    deflate: Eigenpairs | None = None,
    metric: Any = None,
) -> Eigenpairs:
    """Compute k eigenpairs of a symmetric operator by thick-restart Lanczos.

    H v = λ v on vectors in the form of the parameters. The basis has full reorthogonalisation;
    converged vectors are locked in it at every restart. Convergence is tested every few steps, not only
    at restarts, and the basis is twice ARPACK's: both save products. `which="SM"` uses a Chebyshev
    filter in H² instead, see `spectra.krylov.smallest`.

    **Repeated eigenvalues.** From one start vector a Krylov space holds one vector of each eigenspace.
    So when all k pairs have converged, a fresh random vector is made orthogonal to them and Lanczos
    steps from it look for an eigenvalue that belongs among the k. If one shows, both sequences go on
    as a block, until a further random vector finds nothing; if none shows, `missed` bounds the
    probability that one is there all the same (Kuczynski and Wozniakowski), one that would change
    a value by more than the tolerance: it is 0 where the k values are equal. "auto" stops at 5 %, or
    when the search has cost 1/(k - 1) of the run before it, or a tenth; a run that ends within ARPACK's
    first sweep, of ncv = max(2k + 1, 20), is searched until 1.1 (ncv + 1), and at tol > 1e-4 until
    ncv + 1. Measured: 2 to 15 products find copies that are well inside the wanted set, 36 the copy of
    the top of 100 equally spaced ones. Once one was found the search may double the run.

    **Small operators.** Where n products have not been enough, up to n = 2000, n more give the dense matrix
    and all of its eigenpairs: `status` is DENSE then. They are within `max_matvecs`, n before which Lanczos
    ends. With `num_basis`, which limits the memory, there is no matrix.

    Products that end too early leave `missed` above 5 %, up to 1, which is no bound: `status` and
    `converged` speak of the residuals of the pairs returned alone.

    **Derivatives.** jax.grad goes through the values, dλ = vᵀ dH v, and through the vectors, which takes a
    linear system for each that is used; not through the iteration. Of equal eigenvalues the sum has a
    derivative, if all of them are among the k; a vector that is not separated from the others has none,
    which is an error where it is asked for. Reverse mode, once, outside of jit; k products more.

    Args:
        op: symmetric operator of order n.
        k: number of pairs, 1 to n.
        which: "LM" largest |λ|, "LA" largest, "SA" smallest (most negative), "BE" from both ends
            (the larger half from the top), "SM" smallest |λ|.
        key: JAX random key of all random vectors.
        tol: largest accepted residual |Hv - λv| in units of |H|; an eigenvalue is then accurate to
            tol² |H|² / gap, a vector to tol |H| / gap. Below the rounding of products, 10 times
            `op.precision`, a pair counts as converged. For "SM" in units of |λ| itself.
        num_basis: vectors kept at most, the memory of the run; default 2 max(2k + 1, 20), or n.
        block_size: start vectors. 1 needs the fewest products unless eigenvalues repeat.
        max_matvecs: products allowed; default 50 num_basis + 1000, for "SM" 4000 a vector of its block, and
            2 n for small operators. Those that measure rounding are not counted.
        verify: look for missed copies: "auto", True (until the probability is below 1e-6), or False.
        v0: first start vector, a pytree or a flat array; default random.
        deflate: pairs known already: the operator is restricted to the orthogonal complement.
        metric: M of H v = λ M v, positive definite: an operator, up to order 2000, or its diagonal, a pytree
            like the parameters. Vectors are orthonormal in it, v_iᵀ M v_j = δ_ij, and residuals are
            |H v - λ M v| in the norm of M⁻¹. n products with either for an operator.

    Returns:
        `Eigenpairs`: values ascending, vectors as one pytree with leaves (k, *leaf.shape), residuals
        and `converged` for each. Residuals are those of the vectors returned, formed at the end from
        the products of the run (H v = Σ s_i H q_i) and not from the recurrence: exact to the rounding
        of one product. `status` is NOT_CONVERGED if the products allowed ran out, SINGULAR if "SM"
        met null directions, whose number is `num_null`. An eigenvalue of H lies within the residual and
        `noise_floor`, which is measured where there are parameters (see `spectra.krylov.rounding`).

    Raises:
        SpectraError: k, which or another argument out of range; called inside jit or vmap.
        NonFiniteError: a product is NaN or infinite.
        NotSymmetricError: the operator is not symmetric.

    Fails to find copies where the search cannot reach them: `missed` near one says so; use verify=True or
    block_size.

    Cost: num_basis n numbers of memory, whatever the number of products; for n <= ncv + 1 and for "SM"
    up to n = 2000, n products and a dense eigenproblem in float64. Of a loss five products more, that measure
    its rounding.

    References:
        Wu and Simon, doi:10.1137/S0895479898334605; Stewart, doi:10.1137/S0895479800371529;
        Kuczynski and Wozniakowski, doi:10.1137/0613066.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.array([3.0, 3.0, 3.0] + [1.0] * 97)))
        >>> pairs = spectra.eigsh(op, 3, which="LA", key=jax.random.key(0))
        >>> [round(float(value), 4) for value in pairs.values]
        [3.0, 3.0, 3.0]
        >>> pairs.vectors.shape
        (3, 100)
    """
    require_operator(op)
    if metric is not None and (v0 is not None or deflate is not None):
        raise SpectraError("v0 and deflate are of runs without a metric: leave them out.")
    known = 0 if deflate is None else len(deflate.values)
    _check_arguments(op, k, which, tol, block_size, verify, known)
    if max_matvecs is not None and max_matvecs < k:
        raise SpectraError(f"max_matvecs={max_matvecs}: {k} pairs take at least as many products.")
    limits = {"num_basis": num_basis, "block_size": block_size, "max_matvecs": max_matvecs}
    if _tree.is_traced((op, metric, key)):
        still = lax.stop_gradient((op, metric, v0, deflate))
        if _tree.is_traced((still, key)):
            raise SpectraError(
                "eigsh restarts from the host and cannot run inside jit or vmap: call it outside, or use "
                "lanczos, which can. jax.grad goes through it."
            )
        fixed, weight, start, known_pairs = still
        rest = {"v0": start, "deflate": known_pairs, "metric": weight, **limits}
        pairs = eigsh(fixed, k, which=which, key=key, tol=tol, verify=verify, **rest)
        return differentiable(op, metric, pairs)
    if metric is not None:
        solve = functools.partial(eigsh, k=k, which=which, key=key, tol=tol, verify=verify, **limits)
        return generalized_eigenpairs(op, metric, k, which, tol, max_matvecs, solve)
    return rounding.with_measured_floor(
        op, _pairs(op, k, which, key, tol, num_basis, block_size, max_matvecs, verify, v0, deflate)
    )


def _pairs(op, k, which, key, tol, num_basis, block_size, max_matvecs, verify, v0, deflate) -> Eigenpairs:
    """The pairs by what suits the order of the operator and the products allowed."""
    ncv, rest = max(2 * k + 1, 20), op.size - (0 if deflate is None else len(deflate.values))
    if (rest <= ncv + 1 or k >= rest) and (max_matvecs is None or max_matvecs >= op.size):
        return dense_eigenpairs(op, k, which, tol, deflate)
    if which == "SM":
        return smallest_eigenpairs(op, k, key=key, tol=tol, max_matvecs=max_matvecs, deflate=deflate)
    limit = min(2 * ncv if num_basis is None else num_basis, rest)
    if limit < k + block_size + 2:
        if limit == rest:
            raise SpectraError(f"max_matvecs={max_matvecs}: an operator this small takes {op.size} products.")
        raise SpectraError(f"num_basis={limit} is too small for k={k}: at least {k + block_size + 2}.")
    budget, small = _budget(op, 50 * limit + 1000, max_matvecs, num_basis)
    if small and budget <= ncv:
        return dense_eigenpairs(op, k, which, tol, deflate)
    run = _Run(outside_loops(op.prepare()), k, which, key, tol, limit, block_size, v0, deflate)
    run.budget = budget
    run.until_converged()
    while verify is not False and run.converged and not missing.search(run, verify, ncv):
        run.until_converged()
    spent = run.band.num_matvecs
    certain = run.converged and (verify is not True or run.missed <= missing.CERTAIN)
    if small and not certain and spent >= budget:
        found = dense_eigenpairs(op, k, which, tol, deflate)
        return dataclasses.replace(found, num_matvecs=spent + op.size, status=Status.DENSE)
    return run.result()


def _budget(op, default: int, max_matvecs: int | None, num_basis: int | None) -> tuple[int, bool]:
    """Products of Lanczos, and whether a dense matrix may follow, for n more."""
    n = op.size
    if num_basis is not None or not allowed(op, max_matvecs):
        return default if max_matvecs is None else max_matvecs, False
    return n if max_matvecs is None else min(n, max_matvecs - n), True


def _check_arguments(op, k, which, tol, block_size, verify, known) -> None:
    if which not in wanted.WHICH:
        raise SpectraError(f"which={which!r}: use one of {wanted.WHICH}.")
    if not isinstance(k, int | np.integer) or not 1 <= k <= op.size - known:
        rest = f", of which {known} are deflated" if known else ""
        raise SpectraError(f"k={k} is not between 1 and the order of the operator, {op.size}{rest}.")
    if not 0 <= tol < 1:
        raise SpectraError(f"tol={tol} is a residual in units of |H|: use a number in [0, 1).")
    if block_size < 1:
        raise SpectraError(f"block_size={block_size}: at least one start vector is needed.")
    if verify not in (True, False, "auto"):
        raise SpectraError(f"verify={verify!r}: use 'auto', True or False.")


class _Run:
    """The state of one call: a band of rows, and what has been learnt of the k wanted pairs."""

    def __init__(self, op, k, which, key, tol, limit, block_size, v0, deflate):
        self.op, self.k, self.which, self.key, self.tol = op, k, which, key, tol
        self.starts, self.restarts, self.missed = 0, 0, 1.0
        self.converged, self.budget = False, 0
        self.copies = self.extended = 0  # missed copies found so far
        self.allowed = 0  # products that a search may go up to
        given = [] if deflate is None else split(deflate.vectors, len(deflate.values))
        known = len(given)
        layout = Layout.of(op.like)
        self.band = Band(op, layout, limit + block_size + known)
        self.capacity = limit + block_size + known
        for vector in given:
            self.band.append(vector, locked=True)
        if v0 is not None:
            v0 = op.as_vector(v0, "v0")
            size = _tree.length(v0)
            if not np.isfinite(size) or size == 0:
                raise SpectraError(f"v0 has norm {size}; pass a finite vector that is not zero.")
            self.band.append(v0)
        while len(self.band.pending) < block_size:
            self.append_random()
        self.history: list[tuple[int, float]] = []

    @property
    def accepted(self) -> float:
        """Largest residual of a converged pair."""
        return max(self.tol, 10 * self.op.precision) * self.band.scale

    @property
    def aim(self) -> float:
        """Where the iteration stops: turning copies of an eigenpair mixes their residuals."""
        share = 0.5 if self.copies else 0.95
        return max(share * self.tol, float(jnp.finfo(self.op.dtype).eps)) * self.band.scale

    @property
    def exhausted(self) -> bool:
        """Whether no direction of the whole space is left."""
        return self.band.filled >= self.op.size

    def append_random(self) -> int:
        self.starts += 1
        key = jax.random.fold_in(self.key, self.starts)
        return self.band.append(_tree.sphere_sample(key, self.op.structure))

    def until_converged(self) -> None:
        """Steps and restarts until the k best Ritz pairs have converged, or the budget is spent."""
        band = self.band
        while True:
            best = np.arange(0)
            if len(band.processed):
                theta, vectors, coupling, _ = band.ritz()
                best = wanted.order(theta, self.which)
                error = np.linalg.norm(coupling[:, best[: self.k]], axis=0)
                open_ = error > self.aim
                self.converged = len(best) >= self.k and not open_.any()
                if self.converged:
                    return
                self.history.append((band.num_matvecs, float(error.max())))
            if band.num_matvecs >= self.budget or (not band.pending and self.exhausted):
                return
            room = self.capacity - band.filled
            if room < 1:
                self.restart(vectors, best)
                continue
            if not band.pending:  # the space is invariant, and too small
                self.append_random()
                continue
            row = band.pending[-1]
            if len(best):
                weight = np.linalg.norm(coupling[:, best[: self.k]][:, open_], axis=1)
                row = band.pending[int(np.argmax(weight))] if open_.any() else row
            band.extend(row, min(room, self._chunk(len(best)), self.budget - band.num_matvecs))

    def _chunk(self, done: int) -> int:
        """Products until the next test: few where convergence is near, by the rate of the last two."""
        if done < self.k:
            return max(self.k - done, 1)
        if len(self.history) < 2:
            return 2
        (a, before), (b, now) = self.history[-2:]
        rate = np.log(before / now) / (b - a) if 0 < now < before and b > a else 0.0
        left = np.log(now / self.aim) / rate if rate > 0 else np.inf
        return int(np.clip(left / 2, 1, max(1, min(self.band.num_matvecs // 12, 8))))

    def restart(self, vectors: np.ndarray, best: np.ndarray) -> None:
        """Keep the best Ritz vectors: all that are wanted, and enough to fill half of what is free."""
        free = self.capacity - len(self.band.locked) - len(self.band.pending)
        keep = self.k + (free - self.k) // 2
        chosen = np.sort(best[: int(np.clip(keep, self.k, free - 1))])
        self.band.restart(vectors[:, chosen])
        self.restarts += 1

    def result(self) -> Eigenpairs:
        """The best pairs, in ascending order."""
        band, op = self.band, self.op
        theta, vectors, _, _ = band.ritz()
        chosen = np.sort(wanted.order(theta, self.which)[: self.k])
        values = theta[chosen]
        band.restart(vectors[:, chosen])
        residuals = band.residuals(values)
        converged = residuals <= self.accepted
        done = converged.all() and len(values) == self.k
        noisy = band.asymmetry > 100 * op.precision
        return Eigenpairs(
            values=values,
            vectors=band.vectors(len(values)),
            residuals=residuals,
            converged=converged,
            which=self.which,
            size=op.size,
            num_matvecs=band.num_matvecs,
            num_restarts=self.restarts,
            missed=self.missed,
            noise_floor=band.scale * max(band.asymmetry, 4 * op.precision),  # as `Quadrature.noise_floor`
            status=Status.NOT_CONVERGED if not done else Status.NOISY if noisy else Status.CONVERGED,
        )
