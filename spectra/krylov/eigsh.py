"""Eigenpairs at the ends of the spectrum by thick-restart Lanczos, with a check for repeated ones."""

import dataclasses
import functools
import os
from typing import Any

import jax
import numpy as np
from jax import lax

from spectra.base import trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError, Status
from spectra.base.trees import PyTree
from spectra.krylov import known_pairs, wanted
from spectra.krylov.chebyshev import smallest_eigenpairs
from spectra.krylov.dense import allowed, dense_eigenpairs
from spectra.krylov.eigen_run import EigenRun
from spectra.krylov.layout import Layout
from spectra.krylov.metric import generalized_eigenpairs
from spectra.krylov.pair_gradients import differentiable
from spectra.krylov.plan import place_basis
from spectra.krylov.product_rounding import vanished, with_measured_floor
from spectra.krylov.recurrence import check_start
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.composed import beside_pairs
from spectra.operators.doubled import doubled
from spectra.operators.hoisted import hoisted
from spectra.operators.jaxprs import outside_loops
from spectra.results import Eigenpairs
from spectra.runs.checkpoint import Checkpoint
from spectra.runs.watch import Watch, watched


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
    v0: PyTree = None,
    deflate: Eigenpairs | None = None,
    metric: Any = None,
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    basis: str = "inherit",
    basis_dtype: Any = None,
) -> Eigenpairs:
    """Compute k eigenpairs of a symmetric operator by thick-restart Lanczos.

    H v = λ v, with v a pytree like the parameters. The basis is fully reorthogonalised, and converged vectors
    are locked at every restart. Convergence is tested every few steps, not only at restarts, and the basis is
    twice ARPACK's: both save products. `which="SM"` uses a Chebyshev filter in H² instead, see
    `spectra.krylov.chebyshev`.

    **Repeated eigenvalues.** A Krylov space from one start vector holds a single vector of each eigenspace.
    So when all k pairs have converged, a fresh random vector is made orthogonal to them, and Lanczos steps
    from it search for another eigenvalue that belongs among the k. If one appears, both sequences continue as
    a block, until a further random vector finds nothing. `missed` bounds the probability that a copy of a
    found one exists nevertheless and would change a value by more than the tolerance; it is 0 where the k
    values are equal.

    With verify="auto", the search ends when that probability is at most 1 %, because the steps leave so
    little of the random vector beyond the value in question (see `spectra.quadrature.christoffel`). It also
    ends when it has cost a share of 1/(k - 1) of the run before it, or a tenth. After a run that ends within
    ARPACK's first sweep, of ncv = max(2k + 1, 20) products, the search may continue until 1.1 (ncv + 1)
    products, and at tol > 1e-4 until ncv + 1. As measured, 2 to 15 products find copies well inside the
    wanted set; the copy of the top one of 100 equally spaced eigenvalues took 36. Once a copy has been found,
    the search may double the cost of the run. If the products run out too early, `missed` is 1, which bounds
    nothing. `status` and `converged` say nothing about copies: they only state the residuals of the pairs
    returned.

    **Small operators.** If n products were not enough, and n is at most 2000, n more give the dense matrix
    and all of its eigenpairs; `status` is then DENSE. These n products count towards `max_matvecs`, so
    Lanczos stops n products before that limit. If `num_basis` is given, which limits memory, no matrix is
    formed.

    **Derivatives.** jax.grad differentiates the values, dλ = vᵀ dH v, and the vectors, by one linear system
    for each vector used; it does not go through the iteration. Of equal eigenvalues only the sum has a
    derivative, if all of them are among the k. A vector that is not separated from the others has no
    derivative, and asking for it is an error. In forward mode, jax.jvp and jax.jacfwd, values have
    derivatives, and those of vectors are NaN. Both work once, outside jit, and cost k more products. For all
    other fields, such as residuals, derivatives are zero.

    Args:
        op: symmetric operator of order n.
        k: number of pairs, 1 to n.
        which: "LM" largest |λ|, "LA" largest, "SA" smallest (most negative), "BE" from both ends
            (the larger half from the top), "SM" smallest |λ|.
        key: JAX random key of all random vectors.
        tol: largest accepted residual |Hv - λv| in units of |H|; an eigenvalue is then accurate to tol² |H|²
            / gap, a vector to tol |H| / gap. A pair whose residual is below the rounding of products, 10
            times `op.precision`, counts as converged. For "SM", tol is in units of |λ| itself.
        num_basis: maximum number of vectors kept, which determines the memory; default 2 max(2k + 1, 20), or
            n. Memory is allocated for num_basis + block_size + deflated vectors, rounded up to a multiple of
            8; with one start vector, num_basis=7 therefore takes half as much as 8. Not for "SM".
        block_size: number of start vectors. 1 needs the fewest products unless eigenvalues repeat. Not for
            "SM", which filters a block of its own.
        max_matvecs: maximum number of products; default 50 num_basis + 1000, for "SM" 4000 per vector of its
            block, and 2 n for small operators. Those that measure rounding are not counted.
        verify: look for missed copies: "auto", True (until the probability is at most 1e-6), or False. Not
            used for "SM", whose block finds them, nor for dense matrices.
        v0: first start vector, a pytree or a flat array; default random. Not for "SM".
        deflate: known pairs of this operator, as one product verifies; the operator is restricted to their
            orthogonal complement. Start vectors are independent of those of the run that found these pairs,
            even with the same key.
        metric: M of H v = λ M v, positive definite: an operator, up to order 2000, or its diagonal, a pytree
            like the parameters. Vectors are orthonormal in it, v_iᵀ M v_j = δ_ij, and residuals are
            |H v - λ M v| in the norm of M⁻¹. If M is an operator, this takes n products with each, and ten
            more of those that measure rounding.
        progress: show the number of products, the converged pairs and the largest residual.
        checkpoint: a folder, or a `Checkpoint`, to save the run in. The same call resumes from there, with
            bit-identical results on the same devices; a run that ran out of products resumes with a larger
            `max_matvecs`. Nothing is saved where a dense matrix is formed.
        basis: where basis vectors are stored: "inherit", "sharded" or "host", as in `slq`.
        basis_dtype: dtype of stored basis vectors: "bfloat16" halves their memory. Ritz vectors are sums of
            these rows, so residuals cannot fall below their rounding (8e-3 in bfloat16, 1e-7 in float32), and
            neither may `tol`. k more products then measure the residuals and the values, which are accurate
            to residual² / gap, in full precision; this takes memory for 4 k vectors in addition to the rows
            (the k vectors, their products, and combinations of both). Not for "SM".

    Returns:
        `Eigenpairs`: values ascending, vectors as one pytree with leaves (k, *leaf.shape), residuals
        and `converged` for each. Residuals are those of the vectors returned, computed at the end from
        the products of the run (H v = Σ s_i H q_i) and not from the recurrence: exact to the rounding
        of one product. `status` is NOT_CONVERGED if the products ran out, SINGULAR if "SM" met null
        directions, whose number is `num_null`, and NOISY where rounding leaves no digit of |H|. Some
        eigenvalue of H lies within the residual plus `noise_floor` of each value; the floor is measured where
        there are parameters (see `spectra.krylov.wanted`).

    Raises:
        SpectraError: k, which or another argument out of range; `deflate` holds pairs of another operator;
            called inside jit or vmap.
        NonFiniteError: a product is NaN or infinite.
        NotSymmetricError: the operator is not symmetric.
        CheckpointError: the folder holds the checkpoint of another run.
        PreemptedError: the process was asked to end (SIGTERM or Ctrl-C), and the run is saved.

    Fails to find copies that the search cannot reach; `missed` is then 1. Use verify=True or block_size.
    Passes over an eigenvalue that differs from a wanted one by less than about 2 tol |H|, where the start
    vector has little of it, which `missed` does not count. At tol > 1e-4 the search excludes those that
    differ by more, at 1 %, if ARPACK's first sweep has room for it; below, convergence alone speaks against
    them. Of 300 runs without that search 58 took 7.2 for 7.4 (k=1, tol=1e-2), 13 took 5.6 for 8.6 beside
    1000 (k=2, tol=1e-3), and with it none.

    Cost: num_basis n numbers of memory, whatever the number of products; for n <= ncv + 1, and for "SM" up to
    n = 2000, n products and a dense eigenproblem in float64. For a loss, seven more products measure its
    rounding.

    References:
        Wu and Simon, doi:10.1137/S0895479898334605; Stewart, doi:10.1137/S0895479800371529;
        Golub and Meurant, Matrices, Moments and Quadrature, 2010, ch. 2 and 6 (the bound).

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
    _check_kinds(which, v0, deflate, metric, basis)
    known = 0 if deflate is None else len(deflate.values)
    _check_arguments(op, k, which, tol, block_size, verify, known)
    means: dict[str, Any] = {"num_basis": num_basis, "block_size": block_size, "max_matvecs": max_matvecs}
    means |= {"progress": progress, "checkpoint": checkpoint, "basis": basis, "basis_dtype": basis_dtype}
    if trees.is_traced((op, metric, key)):
        options = {"k": k, "which": which, "tol": tol, "verify": verify} | means
        return _traced(op, metric, key, v0, deflate, options)
    if v0 is not None:
        v0 = op.as_vector(v0, "v0")
        check_start(v0)
    if deflate is not None and known:
        known_pairs.check(op, deflate)
        known_pairs.require_own(op, deflate)
        key = beside_pairs(key, known, use=0)
    place = place_basis(op, basis, basis_dtype)
    _check_rows(place.layout, which, tol)
    least = k if place.layout.row_dtype is None else 2 * k  # with rounded rows, k more measure the residuals
    if max_matvecs is not None and max_matvecs < least:
        raise SpectraError(f"max_matvecs={max_matvecs}: {k} pairs take at least {least} products.")
    if metric is not None:
        solve = functools.partial(eigsh, k=k, which=which, key=key, tol=tol, verify=verify, **means)
        return generalized_eigenpairs(op, metric, k, which, tol, max_matvecs, solve)

    request = wanted.Request(
        k, which, key, tol, num_basis, block_size, max_matvecs, verify, v0, deflate, place
    )
    with watched("eigsh", progress, checkpoint, max_matvecs, request.described) as watch:
        pairs, images = _pairs(op, request, watch)
    found = with_measured_floor(op, pairs, images)
    if np.any(found.values) or which == "SM":
        return found
    floor = max(found.noise_floor, vanished(op))
    return dataclasses.replace(found, noise_floor=floor, status=found.status.beside(floor, 0.0))


def _traced(
    op: LinearOperator,
    metric: LinearOperator | None,
    key: jax.Array,
    v0: PyTree,
    deflate: Eigenpairs | None,
    options: dict[str, Any],
) -> Eigenpairs:
    """The pairs of values behind the tracers of `jax.grad`, with the derivatives of eigenpairs."""
    op = hoisted(op)
    still = lax.stop_gradient((op, metric, v0, deflate))
    if trees.is_traced((still, key)):
        raise SpectraError(
            "eigsh restarts from the host and cannot run inside jit or vmap: call it outside, or use "
            "lanczos, which can. jax.grad goes through it."
        )
    fixed, weight, start, own = still
    pairs = eigsh(fixed, key=key, v0=start, deflate=own, metric=weight, **options)
    return differentiable(op, metric, pairs)


def _pairs(
    op: LinearOperator, request: wanted.Request, watch: Watch
) -> tuple[Eigenpairs, list[PyTree] | None]:
    """The pairs by what suits the order of the operator and the products allowed, and what H makes of their
    `mixtures`, where these products say so."""
    k, which, tol, deflate = request.k, request.which, request.tol, request.deflate
    num_basis, max_matvecs = request.num_basis, request.max_matvecs
    ncv, rest = max(2 * k + 1, 20), op.size - len(request.deflated)
    if (rest <= ncv + 1 or k >= rest) and (max_matvecs is None or max_matvecs >= op.size):
        return dense_eigenpairs(op, k, which, tol, deflate)
    if which == "SM":
        return smallest_eigenpairs(op, request, watch), None
    limit = min(2 * ncv if num_basis is None else num_basis, rest)
    if limit < k + request.block_size + 2:
        if limit == rest:
            raise SpectraError(f"max_matvecs={max_matvecs}: an operator this small takes {op.size} products.")
        least = k + request.block_size + 2
        raise SpectraError(f"num_basis={limit} is too small for k={k}: at least {least}.")
    budget, small = _budget(op, 50 * limit + 1000, max_matvecs, num_basis)
    if small and budget <= ncv:
        return dense_eigenpairs(op, k, which, tol, deflate)
    with watch.saver(op, request.key) as saver:
        run = EigenRun(outside_loops(op.prepare()), request, limit, watch.bar, saver)
        rounded = request.place.layout.row_dtype is not None
        run.budget = budget - (k if rounded else 0)  # the last k measure residuals
        going = not run.done
        while going:
            if run.search is None:
                run.until_converged()
            going = run.converged and wanted.search(run, request.verify, ncv)
        run.save()
        wanted.leave(run)
    spent = run.band.num_matvecs
    certain = run.converged and (request.verify is not True or run.missed <= wanted.CERTAIN)
    if small and not certain and spent >= run.budget:
        found, images = dense_eigenpairs(op, k, which, tol, deflate)
        return dataclasses.replace(found, num_matvecs=spent + op.size, status=Status.DENSE), images
    return run.result(images_too=doubled(op) is not None)


def _budget(
    op: LinearOperator, default: int, max_matvecs: int | None, num_basis: int | None
) -> tuple[int, bool]:
    """Products of Lanczos, and whether a dense matrix may follow, for n more."""
    n = op.size
    if num_basis is not None or not allowed(op, max_matvecs):
        return default if max_matvecs is None else max_matvecs, False
    return n if max_matvecs is None else min(n, max_matvecs - n), True


def _check_kinds(which: str, v0: PyTree, deflate: object, metric: object, basis: str) -> None:
    """Raise where arguments do not go together."""
    if metric is not None and (v0 is not None or deflate is not None):
        raise SpectraError("v0 and deflate work only without a metric: leave them out.")
    if not isinstance(deflate, Eigenpairs | None):
        raise SpectraError(f"deflate is of type {type(deflate).__name__}: pass the result of eigsh.")
    if which == "SM" and v0 is not None:
        raise SpectraError(
            "v0 has no effect with which='SM', which filters a block of its own: leave it out, or use 'LA', "
            "'SA', 'LM' or 'BE'."
        )
    if basis == "none":
        raise SpectraError(
            'basis="none": eigenvectors are sums of basis vectors. Use slq, which works without a basis.'
        )


def _check_arguments(
    op: LinearOperator, k: object, which: str, tol: float, block_size: int, verify: bool | str, known: int
) -> None:
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


def _check_rows(layout: Layout, which: str, tol: float) -> None:
    """Raise where rows in the dtype that they are stored in cannot give what is asked for."""
    if layout.row_dtype is None:
        return
    if which == "SM":
        raise SpectraError('basis_dtype is of Lanczos rows; which="SM" filters vectors in full precision.')
    if tol < layout.row_precision:
        least = layout.row_precision
        raise SpectraError(
            f"tol={tol} is below {least:.1e}: rows in {layout.row_dtype} are rounded to that, and residuals "
            f"cannot fall below that. Use tol={1.25 * least:.1g} (an eigenvalue is then accurate to "
            "tol² |H|² / gap), or a basis_dtype with more digits."
        )
