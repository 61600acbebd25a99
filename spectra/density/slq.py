"""Stochastic Lanczos quadrature: the spectral measure from a few random vectors."""

import contextlib
import dataclasses
import os
from collections.abc import Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base import draws, host, stacks, trees
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError, Status
from spectra.base.host import Progress
from spectra.density import deflation, krylov_space
from spectra.density.recorder import Recorder
from spectra.density.run import ProbeRun
from spectra.krylov import known_pairs, recurrence
from spectra.krylov.basis import sketch
from spectra.krylov.layout import Layout
from spectra.krylov.plan import estimate, place_basis, require_fit
from spectra.krylov.product_rounding import vanished
from spectra.operators.base import LinearOperator, require_operator
from spectra.operators.composed import DeflatedOperator, beside_pairs
from spectra.operators.jaxprs import outside_loops
from spectra.quadrature import distribution, rules
from spectra.quadrature.rules import merge_traced, spread
from spectra.results import Eigenpairs, Quadrature
from spectra.runs.checkpoint import Checkpoint

SPACE = 2**31 - 2
"""Number of the key that starts a space to take out; no probe reaches it."""


@overload
def slq(
    op: LinearOperator,
    *,
    key: jax.Array,
    num_steps: int = ...,
    num_probes: int = ...,
    tol: float | None = ...,
    probe_batch: int | None = ...,
    progress: bool = ...,
    deflate: Eigenpairs | int | None = ...,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = ...,
    basis: str = ...,
    basis_dtype: Any = ...,
) -> Quadrature: ...


@overload
def slq(
    op: Mapping[str, LinearOperator],
    *,
    key: jax.Array,
    num_steps: int = ...,
    num_probes: int = ...,
    tol: float | None = ...,
    probe_batch: int | None = ...,
    progress: bool = ...,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = ...,
    basis: str = ...,
    basis_dtype: Any = ...,
) -> dict[str, Quadrature]: ...


@automatic
def slq(
    op: LinearOperator | Mapping[str, LinearOperator],
    *,
    key: jax.Array,
    num_steps: int = 100,
    num_probes: int = 8,
    tol: float | None = None,
    probe_batch: int | None = None,
    progress: bool = False,
    deflate: Eigenpairs | int | None = None,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    basis: str = "inherit",
    basis_dtype: Any = None,
) -> Quadrature | dict[str, Quadrature]:
    """Estimate the spectral measure of an operator by Lanczos from random vectors on the unit sphere.

    For each probe v_i, m Lanczos steps give the Gauss quadrature of its spectral measure μ_i(f) = v_iᵀ f(H)
    v_i ≈ Σ_j w_ij f(θ_ij), exact for polynomials of degree below 2m; the mean over probes estimates tr f(H) /
    n without bias. `slq` works inside `jit`. The small eigenproblem is then solved on the device in the
    working dtype, `tol` and checks of values are not available, nodes are NaN if the operator is not
    symmetric, and a run may continue past an invariant space (see docs/guarantees.md).

    Args:
        op: symmetric operator of order n; or a mapping of several, such as `op.blocks(by="layer")`. Those of
            equal shape share the compiled recurrence.
        key: JAX random key; probe i depends on the key and i alone, so more probes extend a run.
        num_steps: m, at most n (in a mapping, reduced to n for smaller operators); with `tol`, the maximum.
        num_probes: k; with `tol`, the maximum.
        tol: stop as soon as the mean width of the CDF's 95 % band over the spectral range is below
            `tol`: steps are added until the bracket takes half of it, then probes.
        probe_batch: number of probes run side by side, each with its own basis; default from `plan`.
        progress: show a progress bar.
        deflate: eigenpairs from `eigsh`. They become atoms of weight 1/n without sampling error in every row,
            and all steps go to the rest of the spectrum, in their orthogonal complement. This resolves the
            bulk even where outliers are 1e4 times larger; the band holds as it does without. Or a number r,
            to deflate all Ritz vectors of r more Lanczos steps, converged or not. One coefficient couples
            them to the rest, so no count is off by more than one (see `spectra.quadrature.links`), and only
            the rest is sampled. Half of the products is a good share for r, from about 16 steps of 8 probes
            on; with fewer, probes alone do as well.
        checkpoint: a folder, or a `Checkpoint`, to save the run in: finished probes, and the basis of the
            current one. The same call resumes from there, with bit-identical results on the same devices
            and results equal to rounding on others.
        basis: where basis vectors are stored. "inherit": like the parameters. "sharded": if the parameters
            are replicated over the devices of a mesh, spread over these. "host": in host memory; the host
            then also reorthogonalises, and the device keeps three vectors. "none": nowhere. The three-term
            recurrence alone needs six vectors for any number of steps; copies of eigenvalues that it finds
            again are merged, and brackets and bands still hold, slightly wider. A step that finds an
            eigenvalue again is wasted: with large outliers deflated, as many steps are needed as with a
            basis; otherwise about three times as many.
        basis_dtype: dtype of stored basis vectors, for example "bfloat16": half the memory, with an
            orthogonality near 1e-4 instead of 1e-6. Default: that of the vectors.

    Returns:
        `Quadrature` with nodes and weights (k, m); `.cdf(x)` is the distribution with its band. For a
        mapping of operators, a dict of these.

    Raises:
        SpectraError: num_steps, num_probes, probe_batch or tol out of range.
        NonFiniteError: the loss or a product is NaN or infinite.
        NotSymmetricError: the operator is not symmetric.
        MemoryLimitError: the plan does not fit into the free memory.
        CheckpointError: the folder holds the checkpoint of another run.
        PreemptedError: the process was asked to end (SIGTERM or Ctrl-C), and the run is saved.

    Cost: k m products, and two more to test symmetry if m = 1; r more with deflate=r, and one to test that
    pairs are those of the operator. Memory as `plan` states: (m + 6) n numbers per probe in progress, 6 n
    without a basis, n more for streamed data, and r n for r deflated pairs, 2 r n at first for deflate=r.

    References:
        Golub and Welsch, doi:10.1090/S0025-5718-69-99647-1; Ubaru, Chen and Saad,
        doi:10.1137/16M1104974; Ghorbani, Krishnan and Xiao, arXiv:1901.10159. Without a basis: Greenbaum,
        doi:10.1016/0024-3795(89)90285-1; Knizhnerman, USSR Comput. Math. Math. Phys. 36 (1996) 1027; Chen and
        Trogdon, arXiv:2302.14842.

    Examples:
        >>> import jax, jax.numpy as jnp, spectra
        >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(0.0, 1.0, 200)))
        >>> quadrature = spectra.slq(op, key=jax.random.key(0), num_steps=30, num_probes=4)
        >>> quadrature.nodes.shape
        (4, 30)
    """
    if tol is not None and not 0 < tol < 1:
        raise SpectraError(f"tol={tol} is a share of the spectral range: use a number in (0, 1).")
    options: dict[str, Any] = {"num_probes": num_probes, "tol": tol, "probe_batch": probe_batch}
    options |= {"basis": basis, "basis_dtype": basis_dtype}
    watched = contextlib.nullcontext()
    if checkpoint is not None:
        checkpoint, watched = Checkpoint.of(checkpoint), host.watching()
    if isinstance(op, Mapping):
        if deflate is not None:
            raise SpectraError("deflate belongs to one operator: call slq for each of them.")
        for block in op.values():
            require_operator(block)
        total = sum(min(num_steps, block.size) for block in op.values()) * num_probes
        with watched, Progress(progress, total) as bar:
            return {
                name: _one(
                    block,
                    jax.random.fold_in(key, i),
                    min(num_steps, block.size),
                    bar,
                    shared=True,
                    checkpoint=checkpoint and checkpoint.child(name),
                    **options,
                )
                for i, (name, block) in enumerate(op.items())
            }
    more = None
    if isinstance(deflate, int | np.integer) and not isinstance(deflate, bool):
        more, deflate = int(deflate), None
    options |= {"deflate": deflate, "more": more, "checkpoint": checkpoint}
    with watched, Progress(progress, num_steps * num_probes + (more or 0)) as bar:
        return _one(op, key, num_steps, bar, **options)


def _one(
    op: LinearOperator,
    key: jax.Array,
    num_steps: int,
    bar: Progress,
    *,
    num_probes: int,
    tol: float | None,
    probe_batch: int | None,
    basis: str,
    basis_dtype: Any,
    checkpoint: Checkpoint | None,
    deflate: Eigenpairs | None = None,
    more: int | None = None,
    shared: bool = False,
) -> Quadrature:
    """The measure of one operator.

    `more`: Lanczos steps whose Ritz vectors are deflated. `shared`: with a recurrence that serves all
    operators of its size.
    """
    place, keep = place_basis(op, basis, basis_dtype), basis != "none"
    sizes: dict[str, Any] = {"num_steps": num_steps, "num_probes": num_probes, "probe_batch": probe_batch}
    plan = estimate(op, place, **sizes, keep_basis=keep)
    if trees.is_traced((op, key)):
        if any(option is not None for option in (tol, deflate, more, checkpoint)):
            raise SpectraError(
                "tol=, deflate= and checkpoint= need values, which do not exist inside jit or vmap."
            )
        return _traced(op, key, num_steps, num_probes, plan.probe_batch, keep)
    require_fit(plan)
    size, vectors, norm = op.size, None, 0.0
    space = None
    if more is not None:
        space = _space(op, key, more, num_steps, bar, (basis, basis_dtype, checkpoint))
        size, vectors, norm = op.size - len(space.values), space.vectors, space.norm
        op = DeflatedOperator(op, vectors)
    elif deflate is not None:
        pairs = deflation.check(op, deflate)
        size, vectors = op.size - len(pairs.values), pairs.vectors
        norm = float(np.max(np.abs(pairs.values), initial=0.0))
        recurrence.check_steps(num_steps, size)
        known_pairs.require_own(op, pairs)
        op, key = DeflatedOperator(op, vectors), beside_pairs(key, len(pairs.values), use=1)
    recorder = None
    if checkpoint is not None:
        recorder = Recorder(checkpoint, op, place.layout, key, keep_basis=keep)
    with recorder.running() if recorder else contextlib.nullcontext():
        prepared = outside_loops(op.prepare())
        setup = recurrence.Setup(prepared, place, vectors, norm, shared)
        run = ProbeRun(setup, key, bar, size=size, recorder=recorder, keep_basis=keep)
        if tol is None:
            for start in range(0, num_probes, plan.probe_batch):
                run.add(range(start, min(start + plan.probe_batch, num_probes)), num_steps)
            result = run.result()
        else:
            result = _adaptive(run, num_steps, num_probes, tol, plan.probe_batch, space)
    if space is not None:
        return space.joined(result)
    if deflate is not None:
        return deflation.with_atoms(result, deflate)
    return result if np.any(result.nodes) else dataclasses.replace(result, rounding=vanished(op))


def _space(
    op: LinearOperator, key: jax.Array, steps: int, num_steps: int, bar: Progress, places: tuple[Any, ...]
) -> krylov_space.Space:
    """The Ritz vectors of so many steps from a random vector that is none of the probes."""
    if places != ("inherit", None, None):
        raise SpectraError(
            "deflate=r stores r vectors like the parameters: leave out basis=, basis_dtype= and checkpoint=."
        )
    if num_steps == op.size:
        raise SpectraError(
            f"num_steps={num_steps} leaves none of {op.size} Ritz vectors to deflate: use fewer."
        )
    if not 1 <= steps <= op.size - num_steps:
        raise SpectraError(
            f"deflate={steps} is not between 1 and {op.size - num_steps}, which leaves the probes "
            f"{num_steps} dimensions of {op.size}."
        )
    place = place_basis(op)
    require_fit(estimate(op, place, num_steps=steps, num_probes=1))
    key = jax.random.fold_in(key, SPACE)
    setup = recurrence.Setup(outside_loops(op.prepare()), place)
    run = ProbeRun(setup, key, bar, size=op.size, keep_last=True)
    run.add(range(1), steps)
    found = run.result()
    return krylov_space.taken_out(run, found, np.ones(int(found.lengths[0]), bool))


def _adaptive(
    run: ProbeRun,
    num_steps: int,
    num_probes: int,
    tol: float,
    batch: int,
    space: krylov_space.Space | None,
) -> Quadrature:
    """Find the steps with the first probe, then add probes as the sampling part asks for them.

    The band is that of the whole, with what couples a space that was taken out.
    """

    def found() -> Quadrature:
        return run.result() if space is None else space.joined(run.result())

    run.add(range(1), num_steps, stop_when=lambda q: distribution.band_width_parts(q, 0.95)[0] <= tol / 2)
    steps = run.steps_done
    while (width := found().band_width()) > tol and run.num_probes < num_probes:
        # The sampling part falls at least like 1 / sqrt(k): never more probes than that predicts.
        inner, sampling = distribution.band_width_parts(found(), 0.95)
        ratio = (sampling / max(tol - inner, tol / 4)) ** 2
        more = int(np.clip(np.ceil(run.num_probes * (ratio - 1)), 1, batch))
        run.add(range(run.num_probes, min(run.num_probes + more, num_probes)), steps)
    return run.result(Status.CONVERGED if width <= tol else Status.BUDGET_EXHAUSTED)


def _traced(
    op: LinearOperator, key: jax.Array, num_steps: int, num_probes: int, batch: int, keep: bool
) -> Quadrature:
    """The whole run as one traced program: probes one after another, or `batch` at a time."""
    size, precision = op.size, op.precision
    layout = Layout.leafwise(op.structure)
    op = op.prepare()

    def run(i: int | jax.Array, steps: int) -> recurrence.LanczosState:
        v0 = draws.sphere_sample(jax.random.fold_in(key, i), layout.structure)
        state = recurrence.init(layout, v0, steps, keep_basis=keep)
        return recurrence.run(op, layout, state, 0, steps)

    def probe(i: jax.Array) -> tuple[Any, Any]:
        state = run(i, num_steps)
        rows = sketch(layout, state.basis, key)[:num_steps] if keep else jnp.zeros((num_steps, 0))
        rule = rules.gauss_rule_traced(state.alpha, state.beta, state.length, rows)
        theta, weights, residuals, sketched = rule
        asymmetry = state.asymmetry / jnp.where(state.scale > 0, state.scale, 1)
        if keep:
            return (theta, weights, residuals, state.length, asymmetry), (None, sketched)
        floor = jnp.maximum(asymmetry, 4 * precision) * jnp.max(jnp.abs(theta))
        merged = merge_traced(theta, weights, residuals, state.length, 2 * spread(num_steps) * floor)
        return (*merged, asymmetry), (jnp.stack([state.alpha, state.beta]), None)

    columns, (coefficients, sketched) = stacks.mapped(probe, jnp.arange(num_probes), max(batch, 1))
    nodes, *columns = columns
    asymmetry = jnp.max(columns[-1])
    if num_steps == 1 < size:  # a single step has no coefficient that symmetry makes zero
        state = run(0, 2)
        asymmetry = state.asymmetry / jnp.where(state.scale > 0, state.scale, 1)
    return Quadrature(
        jnp.where(asymmetry > precision**0.5, jnp.nan, nodes),
        *columns,
        coefficients=coefficients,
        size=size,
        num_matvecs=num_steps * num_probes,
        precision=precision,
        status=Status.TRACED,
        sketches=sketched.astype(jnp.float32) if keep else None,
    )
