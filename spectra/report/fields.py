"""What the fields of results are, by class: checked before a loaded result is made.

A file is material from outside: an array of another shape or a text in place of a number would
fail later, in a picture or in a table, or silently be another result. Each class has a table with a rule of
`rules` for each of its fields, and claims that several of them meet together.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from spectra.base.errors import Status
from spectra.report import rules
from spectra.report.rules import Rule, Sizes, facts
from spectra.report.spectrum import SpectrumReport
from spectra.report.summary import Summary
from spectra.report.variability import DataVariability
from spectra.results import (
    ClassSplit,
    ConditionNumber,
    Density,
    Eigenpairs,
    Estimate,
    FunctionProduct,
    GradientOverlap,
    Interval,
    LayerConditions,
    LossSlice,
    Moments,
    NoiseScale,
    OperatorComparison,
    Perturbation,
    Plan,
    Population,
    Quadrature,
    Sharpness,
    SingularTriplets,
    Snapshot,
    Solution,
    SpectrumHistory,
    StableStep,
    StepQuality,
    Tridiagonal,
)

# Short names for the tables.
_array, _number, _count, _a, _or_none = rules.array, rules.number, rules.count, rules.instance, rules.optional
_numbers, _vectors, _flags = rules.numbers, rules.vectors, rules.flags
_steps, _names, _scalars = rules.steps, rules.names, rules.scalars
_shape, _directions = rules.shape, rules.directions
_interval, _intervals = rules.interval, rules.intervals
_of_class, _by_name, _curve_or_number = rules.sequence_of, rules.named, rules.curve_or_number
_SIZE, _COUNT, _REAL, _SHARE, _POSITIVE = _count(1), _count(), _number(), _number(0, 1), _number(0)
_TEXT, _STATUS, _FLAG = _a(str), _a(Status), _a(bool)
_LEVEL = _or_none(_SHARE)

_ESTIMATE: dict[str, Rule] = {
    "value": _numbers, "stderr": _numbers, "num_matvecs": _COUNT, "method": _TEXT, "status": _STATUS,
    "reason": _TEXT, "dof": _or_none(_POSITIVE), "lower": _numbers, "upper": _numbers,
    "total": _or_none(_a(Estimate)), "least": _or_none(_REAL), "most": _or_none(_REAL),
    "normals": _or_none(_POSITIVE), "num_sampled": _or_none(_SIZE),
}  # fmt: skip
_RULES: dict[type, Mapping[str, Rule]] = {
    Quadrature: {
        "nodes": _array("probes steps"),
        **dict.fromkeys(("weights", "residuals"), _array("probes steps", low=0)),
        "lengths": _array("probes", "iu", low=0), "asymmetry": _array("probes", low=0),
        "size": _SIZE, "num_matvecs": _COUNT, "precision": _POSITIVE, "status": _STATUS,
        "bulk": _or_none(_a(Quadrature)), "atoms": _or_none(_array("deflated")),
        "coupling": _POSITIVE, "rounding": _POSITIVE, "coefficients": _or_none(_array("probes 2 length")),
        "sketches": _or_none(_array("probes steps sketch")), "links": _or_none(_array("deflated", low=0)),
    },
    Moments: {
        "moments": _array("probes moments"), "bounds": _array("2"), "size": _SIZE, "num_matvecs": _COUNT,
        "precision": _POSITIVE, "status": _STATUS,
    },
    Density: {
        **dict.fromkeys(("grid", "density", "lower", "upper", "bandwidth"), _array("points")),
        "linear_scale": _POSITIVE, "outliers": _array("outliers"), "size": _SIZE, "level": _SHARE,
        "status": _STATUS, "single": _or_none(_array("outliers", "b")),
    },
    Estimate: _ESTIMATE,
    NoiseScale: _ESTIMATE | {
        **dict.fromkeys(("value", "stderr", "noise", "signal", "skewness"), _REAL),
        "covariance": _array("2 2"),
        "num_examples": _COUNT, "noise_dof": _or_none(_POSITIVE),
    },
    Interval: dict.fromkeys(Interval._fields, _curve_or_number),
    ConditionNumber: {
        **dict.fromkeys(("value", "effective", "largest", "smallest_nonzero", "noise_floor"), _REAL),
        **dict.fromkeys(("rank", "nullity", "num_matvecs"), _COUNT), "size": _SIZE,
        "nullity_interval": _interval, "is_lower_bound": _FLAG, "shift": _REAL, "rank_tol": _POSITIVE,
        "method": _TEXT, "status": _STATUS,
        **dict.fromkeys(("largest_interval", "smallest_interval", "effective_interval"), _or_none(_interval)),
    },
    LayerConditions: {"layers": _by_name(ConditionNumber)},
    Eigenpairs: {
        "values": _array("k"), "vectors": _vectors, "residuals": _array("k"), "converged": _array("k", "b"),
        "which": _TEXT, "size": _SIZE, "num_matvecs": _COUNT, "num_restarts": _COUNT, "missed": _POSITIVE,
        "noise_floor": _POSITIVE, "status": _STATUS,
    },
    SingularTriplets: {
        **dict.fromkeys(("values", "errors"), _array("k", low=0)),
        **dict.fromkeys(("left", "right"), _vectors), "converged": _array("k", "b"), "which": _TEXT,
        "shape": _shape, "num_matvecs": _COUNT,
        **dict.fromkeys(("missed", "noise_floor", "gram_floor"), _POSITIVE),
        "status": _STATUS,
    },
    Tridiagonal: {
        "alpha": _array("steps"), "beta": _array("steps-1"),
        **dict.fromkeys(("residual_norm", "asymmetry"), _number()), "length": _COUNT, "second_passes": _COUNT,
        "segments": _a(tuple), "layout": _a(type(None)), "status": _STATUS,
    },
    Plan: {
        **dict.fromkeys(("size", "num_steps", "num_probes", "probe_batch", "num_devices"), _SIZE),
        **dict.fromkeys(("vector", "basis", "vectors", "linearization", "workspace", "host"), _COUNT),
        "num_matvecs": _COUNT, "compiling": _COUNT, "process": _or_none(_COUNT),
        "available": _or_none(_COUNT), "seconds": _or_none(_POSITIVE), "status": _STATUS,
    },
    Summary: {"quadratures": _by_name(Quadrature)},
    LossSlice: {
        "x": _array("x"), "y": _array("y"), "loss": _array("y x"), "quadratic": _array("y x"),
        "slope": _array("d"), "eigenvalues": _array("d"), "center": _REAL, "num_evaluations": _COUNT,
        "status": _STATUS, "names": _directions, **dict.fromkeys(("cross", "cosine"), _REAL),
    },
    OperatorComparison: {
        **dict.fromkeys(("frobenius", "trace", "overlap", "wasserstein"), _interval),
        "eigenvalues": _array("2 k"), "residuals": _array("2 k", low=0), "layers": _intervals,
        "size": _SIZE, "num_matvecs": _COUNT, "level": _SHARE, "status": _STATUS,
    },
    Sharpness: {
        **dict.fromkeys(("value", "lower", "upper", "loss"), _REAL), "descends": _FLAG,
        "num_evaluations": _COUNT, "status": _STATUS,
    },
    Population: {
        **dict.fromkeys(("eigenvalues", "lower", "upper", "held_out", "in_sample"), _array("k")),
        "stderr": _array("k", low=0), "trace": _interval, "trace_stderr": _POSITIVE,
        "trace_probe_stderr": _POSITIVE, "shares": _a(Interval), "level": _SHARE, "status": _STATUS,
        **dict.fromkeys(("size", "num_examples", "num_batches"), _SIZE),
        **dict.fromkeys(("num_to_halve", "num_matvecs"), _COUNT), "num_passes": _POSITIVE,
    },
    StepQuality: {
        **dict.fromkeys(("slope", "curvature", "loss", "measured"), _REAL),
        **dict.fromkeys(("length", "rounding"), _POSITIVE), "num_matvecs": _COUNT, "status": _STATUS,
    },
    GradientOverlap: {"shares": _array("k", low=0), "length": _POSITIVE, "status": _STATUS},
    StableStep: {
        **dict.fromkeys(("multiple", "lower", "upper", "learning_rate"), _REAL), "num_matvecs": _COUNT,
        "status": _STATUS,
    },
    ClassSplit: {
        **dict.fromkeys(("whole", "within", "same"), _array("k")), "class_means": _array("C", low=0),
        "cross": _array("pairs", low=0), **dict.fromkeys(("class_trace", "cross_trace"), _POSITIVE),
        **dict.fromkeys(("within_trace", "same_trace"), _a(Estimate)), "weights": _array("C C", low=0),
        "num_classes": _SIZE, "num_matvecs": _COUNT, "status": _STATUS,
    },
    Perturbation: {
        "names": _names, "slopes": _array("p"), "curvature": _array("p p"), "lengths": _array("p", low=0),
        "loss": _REAL, "num_matvecs": _COUNT, "status": _STATUS, "measured": _or_none(_array("p")),
        "measured_all": _or_none(_REAL),
        "rounding": _or_none(_array("p", low=0)), "rounding_all": _or_none(_POSITIVE),
    },
    Solution: {
        "x": _numbers, **dict.fromkeys(("residual_norm", "rounding", "error_bound"), _numbers),
        "quadratic_form": _a(Interval), "converged": _flags,
        **dict.fromkeys(("num_matvecs", "preconditioner_matvecs"), _COUNT),
        "method": _TEXT, "bound": _TEXT, "status": _STATUS,
    },
    FunctionProduct: {
        "value": _numbers, "error_bound": _numbers, "num_matvecs": _COUNT, "num_steps": _COUNT,
        "function": _TEXT, "bound": _TEXT, "status": _STATUS,
    },
    DataVariability: {
        "largest": _array("subsets k"), "smallest": _array("subsets k"), "trace": _array("subsets"),
        "trace_probe_stderr": _array("subsets"), "whole_largest": _array("k"), "whole_smallest": _array("k"),
        "whole_trace": _REAL, "num_matvecs": _COUNT,
        **dict.fromkeys(("trace_spread", "trace_population"), _or_none(_interval)),
        "limits": _or_none(_array("2")),
        **dict.fromkeys(("largest_residuals", "smallest_residuals"), _or_none(_array("subsets k", low=0))),
        "whole_largest_residuals": _or_none(_array("k", low=0)),
        "weights": _or_none(_array("subsets", low=0)),
        "whole_smallest_residuals": _or_none(_array("k", low=0)),
        "status": _STATUS,
    },
    Snapshot: {
        "step": _count(-(2**63)), "eigenvalues": _array("k"), "residuals": _array("k", low=0),
        "largest": _interval, "smallest": _interval, "trace": _a(Estimate), "quadrature": _a(Quadrature),
        "scalars": _scalars, "num_matvecs": _COUNT, "seconds": _REAL, "trained": _REAL, "level": _LEVEL,
    },
    SpectrumHistory: {"snapshots": _of_class(Snapshot), "provenance": facts, "skipped": _steps},
    SpectrumReport: {
        "name": _TEXT, "quadrature": _a(Quadrature), "density": _a(Density),
        **dict.fromkeys(("largest", "smallest", "negative", "near_zero"), _interval), "trace": _a(Estimate),
        **dict.fromkeys(("zero_tol", "condition_lower_bound", "noise_floor"), _POSITIVE),
        "provenance": facts, "level": _LEVEL,
    },
}  # fmt: skip


def _same_form(estimate: Estimate) -> bool:
    bounds = (bound for bound in (estimate.lower, estimate.upper) if bound is not None)
    form, *others = (jax.tree.map(np.shape, part) for part in (estimate.value, estimate.stderr, *bounds))
    return all(other == form for other in others)


def _whole(pairs: Eigenpairs) -> bool:
    count = len(pairs.values)
    entries = sum(leaf.size for leaf in jax.tree.leaves(pairs.vectors))
    return entries == count * pairs.size and all(
        len(leaf) == count for leaf in jax.tree.leaves(pairs.vectors)
    )


def _whole_sides(triplets: SingularTriplets) -> bool:
    count = len(triplets.values)
    sides = zip((triplets.left, triplets.right), triplets.shape, strict=True)
    return all(sum(leaf.size for leaf in jax.tree.leaves(side)) == count * size for side, size in sides)


_FINITE: dict[type, tuple[str, ...]] = {
    Quadrature: ("nodes", "weights"),
    Moments: ("moments", "bounds"),
    Density: ("grid", "density"),
    Eigenpairs: ("values",),
    SingularTriplets: ("values",),
    Tridiagonal: ("alpha", "beta"),
}
"""Fields that are finite unless they were computed inside jit: what computes them raises otherwise."""


def contradiction(result: Any) -> str | None:
    """How numbers that are NaN or infinite contradict the status of a result, if they do."""
    if type(result) not in _FINITE or result.status is Status.TRACED:
        return None
    for name in _FINITE[type(result)]:
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(getattr(result, name))):
            return f"'{name}' is NaN or infinite, and the status is '{result.status.code}'"
    return None


_Claims = dict[str, Callable[[Any], bool]]
_FORM: _Claims = {"errors and bounds are of another form than the value": _same_form}
_CLAIMS: dict[type, _Claims] = {
    Quadrature: {
        "a quadrature has nodes": lambda q: q.nodes.size > 0 and bool(np.any(q.lengths)),
        "a length is more than the steps": lambda q: not (q.lengths > q.nodes.shape[-1]).any(),
    },
    Moments: {"moments are missing": lambda m: m.moments.size > 0},
    Density: {"a density has points": lambda d: len(d.grid) > 0},
    Estimate: _FORM,
    NoiseScale: _FORM | {"a variance is negative": lambda s: not (np.diag(s.covariance) < 0).any()},
    Interval: {"its ends are of other shapes": lambda i: len({np.shape(end) for end in i}) == 1},
    Eigenpairs: {"the vectors are not those of the operator": _whole},
    SingularTriplets: {"the vectors are not those of the Jacobian": _whole_sides},
    Tridiagonal: {"beta has another length than alpha": lambda t: t.beta.shape[-1] == t.alpha.shape[-1] - 1},
    LossSlice: {"the plane is empty": lambda plane: plane.loss.size > 0},
    DataVariability: {
        "there are no subsets": lambda v: v.largest.size > 0,
        "no subset has a weight": lambda v: v.weights is None or np.sum(v.weights) > 0,
    },
    Snapshot: {
        "there are no eigenvalues": lambda s: len(s.eigenvalues) > 0,
        "its trace is not a number": lambda s: all(
            type(x) in (int, float) for x in (s.trace.value, s.trace.stderr)
        ),
    },
    SpectrumReport: {
        "its trace is not a number": lambda r: all(
            type(x) in (int, float) for x in (r.trace.value, r.trace.stderr)
        ),
    },
}


def checked(cls: type, fields: dict[str, Any]) -> Any:
    """The result with these fields.

    Raises:
        TypeError: a field is missing or unknown.
        ValueError: a field is not what the class holds.
    """
    sizes: Sizes = {"*": 1} if fields.get("status") is Status.TRACED else {}
    for name, value in fields.items():
        rule = _RULES[cls].get(name)
        if rule is None:
            raise TypeError(f"{cls.__name__} has no field '{name[:40]}'")
        if (wrong := rule(value, sizes)) is not None:
            raise ValueError(f"{cls.__name__}.{name} {wrong}")
    result = cls(**fields)
    for claim, holds in _CLAIMS.get(cls, {}).items():
        if not holds(result):
            raise ValueError(f"{cls.__name__}: {claim}")
    if (wrong := contradiction(result)) is not None:
        raise ValueError(f"{cls.__name__}: {wrong}")
    return result
