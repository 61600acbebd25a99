"""What computations return: frozen dataclasses that are pytrees, with the shape of each field beside it.

Arrays are JAX arrays inside `jit` and NumPy float64 arrays outside, where the small eigenproblems are
solved on the host.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from spectra import _quadrature
from spectra._errors import SpectraError
from spectra._status import Status

PyTree = Any
Array = Any


def _register(cls, meta: tuple[str, ...]):
    data = [f.name for f in dataclasses.fields(cls) if f.name not in meta]
    return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(meta))


def _rows(title: str, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _html(title: str, rows: list[tuple[str, str]]) -> str:
    import html

    left = " style='text-align:left'"
    cells = "".join(
        f"<tr><th{left}>{html.escape(name)}</th><td{left}>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table><caption>{html.escape(title)}</caption>{cells}</table>"


class Interval(NamedTuple):
    """A number or a curve with its band: `lower <= estimate <= upper`, each of the shape of the input."""

    lower: Array
    estimate: Array
    upper: Array


@dataclasses.dataclass(frozen=True)
class Tridiagonal:
    """The Lanczos decomposition H Qᵀ = Qᵀ T + r e_mᵀ of m steps; rows of Q are orthonormal.

    `T` has `alpha` on its diagonal and `beta` beside it. Entries beyond `length` are zero: the Krylov
    space became invariant there and T[:length, :length] holds exact eigenvalues of H.
    """

    alpha: Array  # (m,)
    beta: Array  # (m - 1,)
    residual_norm: Array  # (), |r|: zero after a breakdown
    length: Array  # (), integer
    asymmetry: Array  # (), largest |q_iᵀ H q_j| that symmetry makes zero, in units of |T|
    second_passes: Array  # (), steps that needed a second Gram-Schmidt pass
    segments: Any  # the basis in segments of rows, see krylov.basis; empty if not kept
    layout: Any  # how segments map to pytrees
    status: Status

    @property
    def basis(self) -> PyTree:
        """The rows of Q as one pytree with leaves (m, *leaf.shape). A copy, made on each access."""
        from spectra.krylov import basis

        self._need_basis()
        return basis.stack(self.segments, self.layout, self.alpha.shape[-1])

    @property
    def orthogonality(self) -> Array:
        """max |Q Qᵀ - I| over the first `length` rows. Costs m² n operations, at each access."""
        from spectra.krylov import basis

        self._need_basis()
        gram = basis.gram(self.segments)
        row = jnp.arange(len(gram)) < self.length
        return jnp.max(jnp.where(row[:, None] & row, jnp.abs(gram - jnp.eye(len(gram))), 0))

    def matrix(self) -> Array:
        """T as a dense (m, m) array."""
        return _quadrature.dense(self.alpha, self.beta, jnp if _is_jax(self.alpha) else np)

    def _need_basis(self):
        if not self.segments:
            raise ValueError("the basis was not kept: run lanczos with reorthogonalize='full' to have it.")

    def __repr__(self) -> str:
        return f"Tridiagonal(num_steps={self.alpha.shape[-1]}, length={self.length}, {self.status.code})"


def _is_jax(x) -> bool:
    return isinstance(x, jax.Array)


@dataclasses.dataclass(frozen=True)
class Quadrature:
    """Gauss quadratures of the spectral measures of k random probes.

    Row i integrates f against the measure of probe v_i: v_iᵀ f(H) v_i ≈ Σ_j weights[i, j] f(nodes[i, j]),
    exactly for polynomials of degree below 2 lengths[i]. The mean over rows estimates tr f(H) / n. Rows
    are sorted by node and sum to one; entries beyond a row's length have weight zero.
    """

    nodes: Array  # (k, m) Ritz values
    weights: Array  # (k, m) squared first components of the eigenvectors of T
    residuals: Array  # (k, m): an eigenvalue of H lies within this distance of the node
    lengths: Array  # (k,) true number of nodes
    asymmetry: Array  # (k,) see Tridiagonal
    size: int  # n, order of the operator
    num_matvecs: int
    precision: float  # relative error of one product, as stated by the operator
    status: Status
    bulk: "Quadrature | None" = None  # of the complement of deflated eigenvectors, of order n - r
    atoms: Array | None = None  # (r,) deflated eigenvalues: columns of weight 1/n in every row
    coupling: float = 0.0  # how far an eigenvalue can be moved by the residuals of the deflated ones

    @property
    def num_probes(self) -> int:
        """k, the number of probes."""
        return self.nodes.shape[0]

    @property
    def num_steps(self) -> int:
        """m, the number of Lanczos steps of each probe."""
        return self.nodes.shape[1]

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest Ritz value."""
        return float(np.min(self.nodes)), float(np.max(self.nodes))

    @property
    def noise_floor(self) -> float:
        """Magnitude below which an eigenvalue is not resolved: measured asymmetry times |H|.

        Never below the rounding of one product in the working precision, precision * |H|.
        """
        scale = max(map(abs, self.range))
        return scale * max(float(np.max(self.asymmetry)), self.precision)

    def cdf(self, x, *, level: float = 0.95) -> Interval:
        """Share of eigenvalues at or below `x`, with a band that holds for the whole curve.

        The band has two parts. For each probe, the Chebyshev-Markov-Stieltjes inequalities bracket the
        true weighted CDF between partial sums of the weights: that part is deterministic and shrinks
        with more steps. The share F(x) seen by a probe that is uniform on the sphere has the law
        Beta(nF/2, n(1-F)/2): that part is statistical, and shrinks with more probes. With probability
        at least `level` the true CDF lies in the band at all x at once (Bonferroni over the nodes).

        Args:
            x: points, any shape, in units of the eigenvalues.
            level: probability that the whole curve lies in the band.

        Returns:
            Interval(lower, estimate, upper), float64 arrays of the shape of `x`.

        References:
            Golub and Meurant, Matrices, Moments and Quadrature, 2010, ch. 6; Chen, Trogdon and Ubaru,
            arXiv:2105.06595.

        Examples:
            >>> import jax, jax.numpy as jnp, spectra
            >>> op = spectra.MatrixOperator(jnp.diag(jnp.linspace(-1.0, 3.0, 400)))
            >>> quadrature = spectra.slq(op, key=jax.random.key(0), num_steps=60, num_probes=4)
            >>> lower, estimate, upper = quadrature.cdf(0.0)
            >>> bool(lower < 0.25 < upper)
            True
        """
        return Interval(*_quadrature.cdf_band(self, np.asarray(x, np.float64), level))

    def mean(self, f) -> float:
        """Estimate of tr f(H) / n for a function of an array of eigenvalues."""
        return float(np.mean(np.sum(self.weights * f(np.asarray(self.nodes)), axis=1)))

    def band_width(self, *, level: float = 0.95) -> float:
        """Mean width of the CDF's band over the spectral range: the share of eigenvalues in doubt.

        Times the range it bounds the Wasserstein-1 distance between estimate and truth.
        """
        return sum(_quadrature.band_width_parts(self, level))

    def __repr__(self) -> str:
        text = f"Quadrature(num_probes={self.num_probes}, num_steps={self.num_steps}, size={self.size}"
        if not isinstance(self.nodes, Tracer):
            low, high = self.range
            text += f", range=({low:.6g}, {high:.6g})"
        return f"{text}, {self.status.code})"


@dataclasses.dataclass(frozen=True)
class Moments:
    """Chebyshev moments of the spectral measures of k random probes.

    moments[i, j] = v_iᵀ T_j(A) v_i with |v_i| = 1 and A = (2 H - a - b) / (b - a), so that [a, b], which
    holds the spectrum, becomes [-1, 1].
    """

    moments: Array  # (k, num_moments), within [-1, 1]
    bounds: Array  # (2,), a and b
    size: int  # n, order of the operator
    num_matvecs: int  # with those that found the bounds
    precision: float  # relative error of one product
    status: Status

    @property
    def num_probes(self) -> int:
        """k, the number of probes."""
        return self.moments.shape[0]

    @property
    def num_moments(self) -> int:
        """Moments of each probe, that of degree zero included."""
        return self.moments.shape[1]

    def __repr__(self) -> str:
        low, high = map(float, self.bounds)
        return (
            f"Moments(num_probes={self.num_probes}, num_moments={self.num_moments}, size={self.size}, "
            f"bounds=({low:.6g}, {high:.6g}), {self.status.code})"
        )


@dataclasses.dataclass(frozen=True)
class Density:
    """A spectral density smoothed by a kernel of location-dependent width.

    ∫ density = 1 by the trapezoidal rule on `grid`, without renormalising, as far as the grid covers
    the spectrum. `lower` and `upper` bound the exact spectrum smoothed by the same kernel, on the whole
    grid at once, at the confidence `level`.
    """

    grid: Array  # (g,) eigenvalues
    density: Array  # (g,) per unit of eigenvalue
    lower: Array  # (g,)
    upper: Array  # (g,)
    bandwidth: Array  # (g,) width of the kernel for mass at each grid point
    linear_scale: float  # |eigenvalue| below which a signed-log axis should be linear
    outliers: Array  # (r,) mean positions of eigenvalues resolved one by one
    size: int  # n
    level: float

    def integral(self) -> float:
        """Mass on the grid by the trapezoidal rule; below one where the grid cuts the spectrum off."""
        return float(np.trapezoid(self.density, self.grid))

    def __repr__(self) -> str:
        return (
            f"Density(points={len(self.grid)}, range=({self.grid[0]:.4g}, {self.grid[-1]:.4g}), "
            f"integral={self.integral():.6f}, outliers={len(self.outliers)})"
        )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number, or a pytree of them, with its standard error, what the error rests on, and what it cost.

    `stderr` takes in the spread over probes and the rounding of products, not the bracket. Fields are
    floats for one number, pytrees like the parameters for a diagonal, and dicts {group: number} where
    groups were asked for.
    """

    value: Any
    stderr: Any  # like value; 0 where nothing was sampled
    num_matvecs: int
    method: str
    status: Status = Status.COMPLETE
    reason: str = ""  # why this method, where it was chosen; what `lower` and `upper` rest on
    dof: float | None = None  # degrees of freedom of Student's t for the interval; None: normal law
    lower: Any = None  # bracket of `value` for the probes drawn, deterministic; None where there is none
    upper: Any = None
    total: "Estimate | None" = None  # the sum over groups, from the same products

    def interval(self, level: float = 0.95) -> Interval:
        """The interval that holds the truth with probability `level`: bracket plus t times stderr.

        Examples:
            >>> from spectra import Estimate
            >>> lower, value, upper = Estimate(10.0, 1.0, 64, "hutchinson", dof=63).interval()
            >>> round(lower, 2), round(upper, 2)
            (8.0, 12.0)
        """
        from scipy.special import ndtri, stdtrit

        if not 0 < level < 1:
            raise SpectraError(f"level={level} is not between 0 and 1.")
        tail = (1 + level) / 2
        t = float(ndtri(tail) if self.dof is None else stdtrit(self.dof, tail))
        low = self.value if self.lower is None else self.lower
        high = self.value if self.upper is None else self.upper
        return Interval(
            jax.tree.map(lambda x, s: x - t * s, low, self.stderr),
            self.value,
            jax.tree.map(lambda x, s: x + t * s, high, self.stderr),
        )

    def __repr__(self) -> str:
        tail = f"({self.method}, {self.num_matvecs} products" + (
            ")" if self.status is Status.COMPLETE else f", {self.status.code})"
        )
        if isinstance(self.value, Tracer):
            return f"Estimate {tail}"
        if isinstance(self.value, (int, float)) or getattr(self.value, "ndim", 1) == 0:
            return f"{float(self.value):.6g} ± {float(self.stderr):.2g} {tail}"
        if isinstance(self.value, dict) and all(isinstance(x, float) for x in self.value.values()):
            rows = [(name, f"{v:.6g} ± {self.stderr[name]:.2g}") for name, v in self.value.items()]
            return _rows(f"Estimate {tail}", rows)
        return f"Estimate of {len(jax.tree.leaves(self.value))} arrays {tail}"


@dataclasses.dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues with eigenvectors: H v_i ≈ values[i] v_i, in ascending order of the values.

    Vectors are orthonormal, in the form of the parameters. An eigenvalue of H lies within
    `residuals[i]` of `values[i]`.
    """

    values: Array  # (k,) ascending
    vectors: PyTree  # leaves (k, *leaf.shape)
    residuals: Array  # (k,) |H v - λ v|
    converged: Array  # (k,) bool
    which: str
    size: int  # n, order of the operator
    num_matvecs: int
    num_restarts: int
    missed: float  # bound on the probability that a repeated wanted eigenvalue was left out
    noise_floor: float  # |λ| below which products do not resolve an eigenvalue from zero
    status: Status

    @property
    def num_null(self) -> int:
        """How many of the eigenvalues are zero to the noise floor."""
        return int(np.sum(np.abs(self.values) <= self.noise_floor))

    def matrix(self) -> np.ndarray:
        """The vectors as the columns of an (n, k) array, parameters ravelled in tree order."""
        leaves = [np.asarray(x).reshape(len(self.values), -1) for x in jax.tree.leaves(self.vectors)]
        return np.concatenate(leaves, axis=1).T

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        pairs = zip(self.values, self.residuals, self.converged, strict=True)
        lines = [
            (f"{i}", f"{value:.8g} ± {residual:.1g}" + ("" if done else "  not converged"))
            for i, (value, residual, done) in enumerate(pairs)
        ]
        missed = f"{self.missed:.2g}" if self.missed < 1 else "not bounded"
        return [
            *lines,
            ("products", f"{self.num_matvecs:,} ({self.num_restarts} restarts)"),
            ("probability of a missed copy", f"at most {missed}" if self.missed < 1 else missed),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        return _rows(f"Eigenpairs ({self.which}, {len(self.values)} of {self.size:,})", self.rows())

    def _repr_html_(self) -> str:
        return _html(f"Eigenpairs ({self.which}, {len(self.values)} of {self.size:,})", self.rows())


@dataclasses.dataclass(frozen=True)
class ConditionNumber:
    """What can be said of the condition number of A = H + shift I.

    Eigenvalues with |λ| <= rank_tol * largest, or below the noise floor, count as zero: the *numerical
    range* is what is left. Where `is_lower_bound` is true the products leave it open whether smaller
    eigenvalues exist, and `effective` (and `value`, if finite) is at least what is stated.
    """

    value: float  # |λ|max / |λ|min; infinite if some eigenvalue is zero
    effective: float  # |λ|max / smallest_nonzero
    largest: float  # |λ|max
    smallest_nonzero: float
    rank: int
    nullity: int
    nullity_interval: Interval  # 95 %; all three equal where eigenvalues were counted
    noise_floor: float  # |λ| below which products do not resolve an eigenvalue from zero
    is_lower_bound: bool
    shift: float
    rank_tol: float
    size: int  # n
    num_matvecs: int
    method: str  # "dense" or "krylov"
    status: Status

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        least = "at least " if self.is_lower_bound else ""
        low, _, high = self.nullity_interval
        counted = f"{self.nullity:,}" + ("" if low == high else f" [{low:.0f}, {high:.0f}]")
        return [
            ("condition number", (least if np.isfinite(self.value) else "") + f"{self.value:.6g}"),
            ("over the numerical range", f"{least}{self.effective:.6g}"),
            ("largest |λ|", f"{self.largest:.6g}"),
            ("smallest |λ| above zero", f"{self.smallest_nonzero:.6g}"),
            ("rank", f"{self.rank:,} of {self.size:,}"),
            ("nullity", counted),
            ("counted as zero", f"|λ| <= {max(self.rank_tol * self.largest, self.noise_floor):.2g}"),
            ("noise floor", f"{self.noise_floor:.2g}"),
            ("method", f"{self.method}, {self.num_matvecs:,} products"),
            ("status", str(self.status)),
        ]

    def __repr__(self) -> str:
        return _rows("Condition number" + (f" of H + {self.shift:g} I" if self.shift else ""), self.rows())

    def _repr_html_(self) -> str:
        return _html("Condition number" + (f" of H + {self.shift:g} I" if self.shift else ""), self.rows())


@dataclasses.dataclass(frozen=True)
class LayerConditions:
    """Condition numbers of the diagonal blocks, one for each layer; prints as a table."""

    layers: dict[str, ConditionNumber]

    def __getitem__(self, name: str) -> ConditionNumber:
        return self.layers[name]

    def __iter__(self):
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def table(self) -> list[list[str]]:
        """Cells of the table, the head first."""
        head = ["layer", "n", "rank", "largest |λ|", "smallest |λ| > 0", "effective", "condition number"]
        body = [
            [
                name,
                f"{c.size:,}",
                f"{c.rank:,}",
                f"{c.largest:.4g}",
                f"{c.smallest_nonzero:.4g}",
                ("≥ " if c.is_lower_bound else "") + f"{c.effective:.4g}",
                f"{c.value:.4g}",
            ]
            for name, c in self.layers.items()
        ]
        return [head, *body]

    def __repr__(self) -> str:
        table = self.table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        return "\n".join(
            "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in table
        )

    def _repr_html_(self) -> str:
        import html

        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self.table()]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes and products of a run, before anything is allocated. All sizes in bytes."""

    size: int  # n
    num_steps: int
    num_probes: int
    probe_batch: int  # probes in flight together
    vector: int  # one vector
    basis: int  # Krylov basis of one probe
    vectors: int  # working vectors of one probe besides the basis
    linearization: int  # saved values of the linearised gradient, shared by all probes
    workspace: int  # temporaries of one product, from the compiled program; 0 if not compiled
    available: int | None  # free memory of the device, None if it cannot be known
    num_matvecs: int

    @property
    def total(self) -> int:
        """Peak of what the run adds to parameters and data."""
        return self.linearization + self.probe_batch * (self.basis + self.vectors + self.workspace)

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory that is free now."""
        return self.available is None or self.total <= self.available

    def __repr__(self) -> str:
        rows = [
            ("parameters", f"{self.size:,}"),
            (
                "products",
                f"{self.num_matvecs:,} ({self.num_steps} steps x {self.num_probes} probes)",
            ),
            ("basis", f"{format_bytes(self.basis)} a probe, {self.probe_batch} in flight"),
            ("working vectors", f"{format_bytes(self.vectors)} a probe"),
            ("saved linearisation", format_bytes(self.linearization)),
            ("workspace of a product", format_bytes(self.workspace)),
            ("peak", format_bytes(self.total)),
            ("available", "unknown" if self.available is None else format_bytes(self.available)),
            ("fits", "yes" if self.fits else "no"),
        ]
        return _rows("Plan", rows)


def format_bytes(count: int) -> str:
    """`1536` as `1.5 KiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


_register(Eigenpairs, ("which", "size", "num_matvecs", "num_restarts", "missed", "noise_floor", "status"))
_register(ConditionNumber, ("is_lower_bound", "shift", "rank_tol", "size", "num_matvecs", "method", "status"))
_register(LayerConditions, ())
_register(Tridiagonal, ("layout", "status"))
_register(Quadrature, ("size", "num_matvecs", "precision", "status", "coupling"))
_register(Moments, ("size", "num_matvecs", "precision", "status"))
_register(Density, ("linear_scale", "size", "level"))
_register(Estimate, ("num_matvecs", "method", "status", "reason", "dof"))
