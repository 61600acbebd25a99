"""The kernel polynomial method: a spectral density from Chebyshev moments, with three vectors per probe."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from spectra.base import arrays, draws, meshes, programs, trees
from spectra.base.calls import automatic
from spectra.base.errors import NonFiniteError, NotSymmetricError, SpectraError, Status
from spectra.base.host import one_thread
from spectra.base.trees import PyTree
from spectra.krylov.cancelled import asymmetry_limit
from spectra.krylov.chebyshev import following
from spectra.krylov.lanczos import lanczos
from spectra.krylov.plan import VECTORS, check_probe_batch, choose_batch
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.jaxprs import outside_loops
from spectra.quadrature.rules import dense
from spectra.results import Moments
from spectra.runs.checkpoint import Checkpoint
from spectra.runs.watch import Journal, watched

BOUND_STEPS = 24
"""Lanczos steps that find the ends of the spectrum."""
MARGIN = 0.01
"""The bounds are widened by this share of the range, or of |H| if that is more, beyond Ritz values and
residuals: rounding of a product, relative to the range, must stay small."""
CHUNK = 16
"""Products in one compiled call."""


@automatic
def kpm(
    op: LinearOperator,
    *,
    key: jax.Array,
    num_moments: int = 200,
    num_probes: int = 8,
    bounds: tuple[float, float] | None = None,
    probe_batch: int | None = None,
    progress: bool = False,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
) -> Moments:
    """Compute Chebyshev moments of the spectral measure by three-term recurrence, without a basis.

    With t_j = T_j(A) v for A = (2 H - a - b) / (b - a), one product gives two moments: μ_2j = 2 t_j·t_j - μ_0
    and μ_2j+1 = 2 t_j+1·t_j - μ_1. `spectral_density` turns them into a density. The resolution is the same
    everywhere, π (b - a) / 2 num_moments. If a few outliers dwarf the bulk, `slq` resolves the bulk far
    better from the same products; `kpm` is for operators so large that a Krylov basis does not fit.

    Half the products are enough because of symmetry, T_i T_j = (T_i+j + T_|i-j|) / 2. So the identity
    t_j-1·t_j+1 - t_j·t_j = t_1·t_1 - t_0·t_0 also holds, and is tested: maps that are not symmetric or not
    linear violate it.

    Args:
        op: symmetric operator of order n.
        key: JAX random key; probe i depends on the key and i alone.
        num_moments: moments per probe, at least 2.
        num_probes: k.
        bounds: (a, b) that contain the spectrum; default: the ends of 24 Lanczos steps without a basis,
            widened by their residuals and 1 % of the range, and further if a moment exceeds one.
        probe_batch: number of probes run side by side.
        progress: show the number of products.
        checkpoint: a folder, or a `Checkpoint`, to save the run in. The same call resumes from there, bit for
            bit as if uninterrupted; a call with other arguments is refused.

    Returns:
        `Moments` of shape (k, num_moments).

    Raises:
        SpectraError: an argument is out of range, or eigenvalues lie outside the given bounds.
        NonFiniteError: a product is NaN or infinite.
        NotSymmetricError: the operator is not symmetric, or not linear.
        CheckpointError: the folder holds the checkpoint of another run.
        PreemptedError: the process was asked to end (SIGTERM or Ctrl-C), and the run is saved.

    Cost: num_probes x num_moments / 2 products, but at least two per probe; 24 for the bounds; three vectors
    per probe in progress.

    References:
        Weiße, Wellein, Alvermann and Fehske, doi:10.1103/RevModPhys.78.275.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 200)))
        >>> moments = spectra.kpm(op, key=jax.random.key(0), num_moments=60, num_probes=4)
        >>> round(spectra.spectral_density(moments).integral(), 6)
        1.0
    """
    require_operator(op)
    if trees.is_traced((op, key)):
        raise SpectraError("kpm chooses bounds by values: call it outside jit, vmap and grad, or use slq.")
    if num_moments < 2 or num_probes < 1:
        raise SpectraError(f"num_moments={num_moments} and num_probes={num_probes}: use at least 2 and 1.")
    check_probe_batch(probe_batch, num_probes)
    if bounds is not None and not _are_bounds(bounds):
        raise SpectraError(f"bounds={bounds!r}: use two finite numbers, the smaller one first.")
    batch = probe_batch or choose_batch(op, VECTORS * trees.tree_bytes(op.structure), 0, None, num_probes)
    options = {
        "num_moments": num_moments,
        "num_probes": num_probes,
        "bounds": None if bounds is None else [*map(float, bounds)],
    }
    total = num_probes * _num_products(num_moments)
    with watched("kpm", progress, checkpoint, total, options) as watch, watch.journal(op, key) as journal:
        batch = journal.batch(batch) if journal else batch
        return _run_probes(outside_loops(op.prepare()), key, num_moments, num_probes, bounds, batch, journal)


_Pair = tuple[PyTree, PyTree]  # T_{j-1} v and T_j v of each probe


def _are_bounds(bounds: tuple[float, float]) -> bool:
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError):
        return False
    return -np.inf < low < high < np.inf


def _run_probes(
    op: LinearOperator,
    key: jax.Array,
    num_moments: int,
    num_probes: int,
    bounds: tuple[float, float] | None,
    batch: int,
    journal: Journal | None,
) -> Moments:
    """The moments of all probes, within bounds that are widened until they hold the spectrum."""
    given, count, widened = bounds is not None, 0, 0
    if bounds is None:
        *ends, count = _found_bounds(op, key, journal)
        bounds = (ends[0], ends[1])
    moments = np.empty((num_probes, num_moments))
    done = 0
    while done < num_probes:
        stop = min(done + batch, num_probes)
        found = _moments(op, key, range(done, stop), num_moments, bounds, journal)
        moments[done:stop] = found[:, :num_moments]
        count += (stop - done) * _num_products(num_moments)
        # Outside of [a, b] Chebyshev polynomials grow like cosh: beyond rounding, |μ| <= 1 inside. All that
        # the products give is looked at, since the first two moments say next to nothing of it.
        if (np.abs(found) <= 1 + np.sqrt(op.precision)).all():
            done = stop
        elif given:
            raise SpectraError(
                f"bounds={bounds} do not contain the spectrum: a Chebyshev moment exceeds one."
            )
        elif widened == 5:
            raise NonFiniteError(f"Chebyshev moments grow in any interval. {op.explain_non_finite()}")
        else:
            widened += 1
            wide = 0.1 * (bounds[1] - bounds[0])
            bounds, done = (bounds[0] - wide, bounds[1] + wide), 0
    return Moments(moments, np.array(bounds), op.size, count, op.precision, Status.COMPLETE)


def _found_bounds(op: LinearOperator, key: jax.Array, journal: Journal | None) -> tuple[float, float, int]:
    """Ends of the spectrum and the products that they took; those of before where a run goes on."""

    def find() -> np.ndarray:
        (low, high), count = _find_bounds(op, key)
        return np.array([low, high, count]).view(np.uint32)  # bits that no dtype of JAX's rounds

    found = find() if journal is None else journal.keep(find, 0)
    low, high, count = np.asarray(found).view(np.float64)
    return float(low), float(high), int(count)


def _find_bounds(op: LinearOperator, key: jax.Array) -> tuple[tuple[float, float], int]:
    """Ends of the spectrum from Lanczos without a basis, and its products."""
    steps = min(BOUND_STEPS, op.size)
    start = draws.unit_vector(jax.random.fold_in(key, 2**31 - 2), op)
    run = lanczos(op, start, steps, reorthogonalize="none")
    length = int(run.length)
    alpha, beta = (np.asarray(x, np.float64) for x in jax.device_get((run.alpha, run.beta)))
    low, high = _outer_ends(
        dense(alpha, beta, np)[:length, :length], [*beta[: length - 1], run.residual_norm]
    )
    size = max(abs(low), abs(high)) or 1.0  # H = 0 has no scale
    margin = MARGIN * max(high - low, size)
    return (low - margin, high + margin), length


def _outer_ends(matrix: np.ndarray, norms: list[float]) -> tuple[float, float]:
    """The ends of T, each moved out by the smallest residual of that end in any leading part of T.

    Without reorthogonalisation copies of an end appear once it has converged. Rounding decides when, and so
    how large their residuals are after the last step; ends that hold these differ between devices.
    """
    ends: list[np.ndarray] = []
    with one_thread():
        for m, norm in enumerate(norms, 1):
            theta, vectors = np.linalg.eigh(matrix[:m, :m])
            ends.append(np.array([[-theta[0], theta[-1]], norm * np.abs(vectors[-1, [0, -1]])]))
    last, (values, reach) = ends[-1][0], np.stack(ends, axis=1)
    low, high = last + np.min(np.where(values + reach >= last, reach, np.inf), axis=0)
    return -float(low), float(high)


def _num_products(num_moments: int) -> int:
    """Products of a probe: two moments each, and at least those that test the symmetry."""
    return max(num_moments // 2, 2)


def _moments(
    op: LinearOperator,
    key: jax.Array,
    probes: range,
    num_moments: int,
    bounds: tuple[float, float],
    journal: Journal | None,
) -> np.ndarray:
    """Moments of some probes side by side, float64 (k, num_moments at least): all that the products give."""
    a, b = bounds
    map_ = jnp.asarray([2 / (b - a), -(a + b) / (b - a)], op.dtype)
    steps, columns = _num_products(num_moments), list[np.ndarray]()
    indices = np.arange(probes.start, probes.stop, dtype=np.int32)
    state = _start(op, key, indices, meshes.places(op.like))

    def advance(state: _Pair, start: int, stop: int) -> tuple[_Pair, jax.Array]:
        if not op.on_host:
            return _run(op, state, map_, start, stop - start)
        found: list[jax.Array] = []
        for i in range(start, stop):
            state, dots = _absorb(op.mv_batch(state[1]), state, map_, i == 0)
            found.append(dots[None])
        return state, jnp.concatenate(found)

    def check() -> None:
        _require_symmetric(op, np.concatenate(columns)[:CHUNK], max(abs(a), abs(b)) * 2 / (b - a))

    if journal is not None:
        singly, looks = [(i, i + 1) for i in range(steps)], (op.like, op.like)
        state, found = journal.fold(advance, state, singly, carried=looks, out=0, products=len(probes))
        columns = [np.asarray(dots, np.float64) for dots in found]
        check()
    for done in range(0, steps, CHUNK) if journal is None else ():
        state, dots = advance(state, done, min(done + CHUNK, steps))
        columns.append(np.asarray(dots, np.float64))
        if done == 0:
            check()
    dots = np.concatenate(columns)  # (steps, 3, k): t_j·t_j, t_j·t_j+1 and t_j-1·t_j+1
    if not np.isfinite(dots[:1]).all():
        raise NonFiniteError(f"a Chebyshev moment is NaN or infinite. {op.explain_non_finite()}")
    even, odd = 2 * dots[:, 0] - dots[0, 0], 2 * dots[:, 1] - dots[0, 1]
    moments = np.stack([even, odd], axis=1).reshape(2 * steps, -1)
    if num_moments % 2:  # the last even one needs one more inner product, not one more product
        last = np.asarray(_squares(state[1]), np.float64)
        moments = np.concatenate([moments, (2 * last - dots[0, 0])[None]])
    return (moments / dots[0, 0]).T  # of probes of length one, to the last bit


def _require_symmetric(op: LinearOperator, dots: np.ndarray, size: float) -> None:
    """Raise where the first steps contradict symmetry by far more than their rounding.

    A step rounds by the precision of a product, which is relative to |H|: `size` in units of A. As in Lanczos
    runs the square root of the precision may be missing.
    """
    square, _, across = dots[1:].swapaxes(0, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(across - square - (dots[1, 0] - dots[0, 0]))
        # Outside of [a, b] everything grows, and so does what is rounded.
        error /= np.maximum.accumulate(dots[:, 0], axis=0)[1:]
    worst = float(np.max(error, initial=0.0, where=np.isfinite(error)))
    unit = max(size, 1.0)
    limit = asymmetry_limit(op, worst / unit) * unit
    if worst > limit:
        raise NotSymmetricError(
            "the operator is not symmetric, or not linear: T_j-1·T_j+1 - T_j² misses T_1² - T_0² by "
            f"{worst:.1e}, and the precision of its products explains {limit:.1e}. A loss that is random or "
            "depends on call order (dropout, batch statistics that are updated) is a common reason."
        )


@partial(programs.jit, static_argnames="where")
def _start(op: LinearOperator, key: jax.Array, indices: arrays.Indices, where: meshes.Places) -> _Pair:
    """(t_-1, t_0) = (anything, v) for each probe."""

    def one(i: arrays.Indices) -> PyTree:
        return draws.sphere_sample(jax.random.fold_in(key, i), op.structure, where=where)

    probes = jax.vmap(one)(indices)
    return jax.tree.map(jnp.zeros_like, probes), probes


def _advance(
    products: PyTree, state: _Pair, map_: jax.Array, first: bool | jax.Array
) -> tuple[_Pair, jax.Array]:
    """t_j+1 = 2 A t_j - t_j-1, or A t_0; and inner products: t_j·t_j, t_j·t_j+1 and t_j-1·t_j+1."""
    previous, current = state
    image = jax.tree.map(
        lambda hv, v: map_[0].astype(v.dtype) * hv + map_[1].astype(v.dtype) * v, products, current
    )
    new = following(image, previous, first)
    pairs = (current, current), (current, new), (previous, new)
    dots = jnp.stack([jax.vmap(trees.vdot)(*pair) for pair in pairs])
    return (current, new), dots


_absorb = programs.jit(_advance, donate_argnums=(0,))


@programs.jit
def _squares(stack: PyTree) -> jax.Array:
    return jax.vmap(trees.vdot)(stack, stack)


@partial(programs.jit, static_argnames="count", donate_argnames="state")
def _run(
    op: LinearOperator, state: _Pair, map_: jax.Array, done: int | jax.Array, count: int
) -> tuple[_Pair, jax.Array]:
    def step(state: _Pair, i: jax.Array) -> tuple[_Pair, jax.Array]:
        return _advance(op.mv_batch(state[1]), state, map_, i == 0)

    return lax.scan(step, state, done + jnp.arange(count))
