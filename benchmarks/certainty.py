"""Products until a figure is known to 1 % with 95 %, beside other packages, on five known spectra.

All products are those of one matrix in float64, counted. Other packages state no interval that holds; they
are given the number of products from which 1.96 root mean square errors over the keys are within the
tolerance, which none of their users can see. `spectra` is charged what it takes until its own interval is
that narrow; how far off log det then is, as measured for the others, and how many intervals hold, is below
its table. The trace and Σ log(1 + λ/δ), δ = max(|H| / 100, 2 |λmin|), are wanted to 1 %, each of the ten
largest eigenvalues to 1 %, the share of eigenvalues below -|H| / 1000 to 0.01, and the density to a
Wasserstein distance of 0.001 of the range, which no package knows by itself: it is measured for all.
SciPy's `eigsh` and that of `spectra` have the loosest tolerance with which 95 % of random starts are right.

Nothing of another package is written anew. Hutchinson's error with signs has a closed form, which stands for
all that have it.

The rows `at the least` bound deflation with samples outside. From r products no more than r directions are
known, and none are worth more than the eigenvectors of what deviates most; what is left is sampled, one
product for a sample even of f(H). The sum of both is the least over r, with 1.96 standard errors within the
tolerance: what deflation with samples outside would need if it were given the eigenvectors. Estimates that
use a product in both roles, as XTrace does, may need fewer. Ten eigenvalues are Ritz values of ten products
at the least.
"""

import dataclasses
import functools
import importlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import spectra
from benchmarks.certainty_problems import PROBLEMS
from benchmarks.settings import Goal, Report, Settings, table
from spectra.density import deflation

KEYS, OWN, WITHIN = 24, 10, 0.01
"""Random keys of other packages, of `spectra`, whose own interval decides, and the tolerance."""
STEPS, MOST_PROBES = (6, 10, 16, 25, 40, 64), 48
PROBES = (1, 2, 3, 4, 6, 8, 12, 16, 24)
SPACES, OUTSIDE = (32, 64, 96, 128, 192, 256, 320, 384), ((25, 4), (25, 2), (25, 1))
"""Ritz vectors that are taken out, and (steps, probes) of what is sampled outside of them."""
SPACE_KEYS = 4
TOLERANCES = 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4
STARTS, RIGHT = 24, 0.95
"""Random starts of eigensolvers, and the share of them that has to be right."""
FIGURES = ("trace", "log det", "top ten", "share", "density")
OUT_OF_REACH = math.inf
OWN_ROWS = "spectra", "spectra, by tol= alone", "spectra, loosest tolerance that is right"
"""Rows that `spectra` knows to be enough; of a figure, the best."""


class Matrix:
    """A problem: its matrix, operator and truth."""

    def __init__(self, name: str):
        self.name, self.array = name, PROBLEMS[name]()
        self.values = np.linalg.eigvalsh(self.array)
        self.op = spectra.MatrixOperator(self.array)
        self.size, self.norm = len(self.values), float(np.abs(self.values).max())
        self.delta = max(self.norm / 100, -2 * float(self.values[0]))
        self.shifted = self.array / self.delta + np.eye(self.size)
        self.log = float(np.sum(np.log1p(self.values / self.delta)))
        self.trace = float(self.values.sum())
        self.share = float(np.mean(self.values < -self.norm / 1000))
        self.range = float(np.ptp(self.values))


def budgets(least: int, most: int) -> list[int]:
    """Even numbers of products, a quarter apart."""
    found = [least]
    while found[-1] < most:
        found.append(2 * math.ceil(found[-1] * 0.625))
    return [x for x in found if x < most]


def first_within(errors: Callable[[int], np.ndarray], goal: float, grid: list[int]) -> float:
    """The least budget at which 1.96 root mean square errors are within the goal, by bisection."""
    low, high = 0, len(grid)
    while low < high:
        middle = (low + high) // 2
        within = 1.96 * float(np.sqrt(np.mean(errors(grid[middle]) ** 2))) <= goal
        low, high = (low, middle) if within else (middle + 1, high)
    return grid[low] if low < len(grid) else OUT_OF_REACH


def hutchinson(m: Matrix) -> float:
    """Var vᵀHv = 2 Σ_{a≠b} H_ab² for signs."""
    square = 2 * (np.sum(m.array**2) - np.sum(np.diag(m.array) ** 2))
    return math.ceil(square * (1.96 / (WITHIN * m.trace)) ** 2)


AT_LEAST = "at the least"


def least(values: np.ndarray, goal: float) -> float:
    """Directions and samples, one product each, whose 1.96 standard errors are within the goal; see above."""
    rest = values[np.argsort(-np.abs(values - np.median(values)))]
    found = []
    for taken in range(len(rest) - 1):
        left = rest[taken:]
        square = 2 * np.var(left) * len(left) ** 2 / (len(left) + 2)  # of a vector uniform on the sphere
        found.append(taken + max(math.ceil(square * (1.96 / goal) ** 2), 1))
    return float(min(found))


def traces(m: Matrix) -> dict[str, float]:
    """The trace: products of each package."""
    import curvlinops
    import lineax
    import torch
    import traceax
    from matfree import stochtrace

    tensor = torch.from_numpy(m.array)
    wrapped = lineax.MatrixLinearOperator(jnp.asarray(m.array))
    dense = jnp.asarray(m.array)

    @functools.partial(jax.jit, static_argnums=0)
    def matfree_all(budget, keys):
        sampler = stochtrace.sampler_normal(jnp.zeros(m.size), num=budget // 2)
        one = stochtrace.estimator_leave_one_out(stochtrace.leave_one_out_xtrace(), sampler)
        return jax.lax.map(lambda key: jnp.mean(one(lambda v: dense @ v, key)), keys)

    keys = jax.random.split(jax.random.key(1), KEYS)

    def by_matfree(budget):
        return np.asarray(matfree_all(budget, keys)) - m.trace

    @functools.partial(jax.jit, static_argnums=0)
    def traceax_all(budget, keys):
        estimator = traceax.XTraceEstimator(sampler=traceax.NormalSampler())
        return jax.lax.map(lambda key: estimator.estimate(key, wrapped, budget)[0], keys)

    def by_traceax(budget):
        return np.asarray(traceax_all(budget, keys)) - m.trace

    def by_curvlinops(budget):
        torch.manual_seed(0)
        return np.array([float(curvlinops.xtrace(tensor, budget, "normal")) for _ in keys]) - m.trace

    goal, grid = WITHIN * abs(m.trace), budgets(16, m.size)
    own = [spectra.trace(m.op, key=key, num_matvecs=m.size - 1, tol=WITHIN / 2) for key in keys[:OWN]]
    return {
        "spectra": float(np.mean([x.num_matvecs for x in own])),
        "XTrace of matfree": first_within(by_matfree, goal, grid),
        "XTrace of traceax": first_within(by_traceax, goal, grid),
        "XTrace of curvlinops": first_within(by_curvlinops, goal, grid),
        "Hutchinson, any package": hutchinson(m),
        AT_LEAST: least(m.values, goal),
    }


def cheapest(samples: Callable[[int], np.ndarray], truth: float, goal: float) -> float:
    """Steps times probes, from the values of single probes: 1.96 √(bias² + variance / k) within the goal."""
    best = OUT_OF_REACH
    for steps in STEPS:
        values = samples(steps)
        error = float(np.std(values, ddof=1))
        bias = max(abs(float(np.mean(values)) - truth) - 2 * error / len(values) ** 0.5, 0.0)
        left = (goal / 1.96) ** 2 - bias**2
        if left > 0:
            best = min(best, steps * max(math.ceil(error**2 / left), 1))
    return best


def log_determinants(m: Matrix) -> dict[str, float]:
    """Σ log(1 + λ/δ)."""
    from matfree import decomp, funm

    shifted = jnp.asarray(m.shifted)

    def by_matfree(steps):
        one = funm.monte_carlo_funm_sym_logdet(decomp.tridiag_sym(steps))

        @jax.jit
        def run(probes):
            return jax.lax.map(lambda v: one(lambda x: shifted @ x, v), probes)

        return np.asarray(run(jax.random.normal(jax.random.key(2), (MOST_PROBES, m.size))))

    return {
        "spectra": own_log_determinants(m)["spectra"],
        "SLQ of matfree": cheapest(by_matfree, m.log, WITHIN * abs(m.log)),
        AT_LEAST: least(np.log1p(m.values / m.delta), WITHIN * abs(m.log)),
    }


@functools.cache
def own_log_determinants(m: Matrix) -> dict[str, float]:
    """The same by `spectra`: products, and what they were worth."""
    op, keys = spectra.MatrixOperator(m.shifted), jax.random.split(jax.random.key(3), OWN)
    own = [spectra.logdet(op, key=key, tol=WITHIN / 2, num_probes=64) for key in keys]
    errors = np.array([x.value - m.log for x in own]) / (WITHIN * abs(m.log))
    held = sum(bool(x.interval()[0] <= m.log <= x.interval()[2]) for x in own)
    return {
        "spectra": float(np.mean([x.num_matvecs for x in own])),
        "error": 1.96 * float(np.sqrt(np.mean(errors**2))),
        "held": held,
        "keys": OWN,
    }


def eigenvalues(m: Matrix) -> dict[str, float]:
    """The ten largest eigenvalues."""
    import torch
    from hessian_eigenthings.algorithms.lanczos import lanczos
    from hessian_eigenthings.operators import LambdaOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    truth, tensor, counted = m.values[-10:], torch.from_numpy(m.array), []

    def right(found) -> bool:
        return bool(np.all(np.abs(np.sort(np.asarray(found)) - truth) <= WITHIN * np.abs(truth)))

    class Counted(LinearOperator):
        def _matvec(self, v):
            counted.append(1)
            return m.array @ v

    def first_right(run) -> float:
        for tol in TOLERANCES:
            ends = [run(tol, start) for start in range(STARTS)]
            if np.mean([right(found) for found, _ in ends]) >= RIGHT:
                return float(np.mean([products for _, products in ends]))
        return OUT_OF_REACH

    def by_scipy(tol, start):
        counted.clear()
        op = Counted(np.dtype(float), m.array.shape)
        v0 = np.random.default_rng(start).standard_normal(m.size)
        found = eigsh(op, 10, which="LA", tol=tol, return_eigenvectors=False, v0=v0)
        return found, len(counted)

    def by_eigenthings():
        operator = LambdaOperator(lambda v: tensor @ v, size=m.size, dtype=torch.float64)
        for most in budgets(16, m.size):
            if all(
                right(lanczos(operator, k=10, max_iter=most, tol=WITHIN, which="LA", seed=seed).eigenvalues)
                for seed in range(3)
            ):
                return most
        return OUT_OF_REACH

    keys = jax.random.split(jax.random.key(4), STARTS)

    def by_spectra(tol, start):
        found = spectra.eigsh(m.op, 10, which="LA", key=keys[start], tol=tol)
        return found.values, found.num_matvecs

    return {
        "spectra, loosest tolerance that is right": first_right(by_spectra),
        "eigsh of SciPy, the same": first_right(by_scipy),
        "Lanczos of hessian-eigenthings, steps in hindsight": by_eigenthings(),
        "power iteration of PyHessian": power_iteration(m, right),
        AT_LEAST: 10.0,
    }


def power_iteration(m: Matrix, right) -> float:
    """PyHessian's ten eigenvalues of the largest magnitude, of the loss pᵀHp/2."""
    import torch

    package: Any = importlib.import_module("pyhessian.hessian")  # the package has a class of the same name

    class Form(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(m.size, dtype=torch.float64))

        def forward(self, _):
            return self.p @ torch.from_numpy(m.array) @ self.p / 2

    counted, product = [], package.hessian_vector_product

    def counting(*arguments):
        counted.append(1)
        return product(*arguments)

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    package.hessian_vector_product = counting
    try:
        data = torch.zeros(1), torch.zeros(1)
        form = package.hessian(Form(), lambda outputs, _: outputs, data=data, cuda=False)
        found = form.eigenvalues(maxIter=100, tol=WITHIN / 10, top_n=10)[0]
    finally:
        package.hessian_vector_product = product
        torch.set_default_dtype(torch.float32)
    return len(counted) if right(found) else OUT_OF_REACH


def of_rows(q: spectra.Quadrature, first: int, count: int, *, plain: bool) -> spectra.Quadrature:
    """The same run with some of its probes alone; `plain` without what tells resolved eigenvalues."""
    rows = slice(first, first + count)
    parts = {
        name: np.asarray(getattr(q, name))[rows] for name in ("nodes", "weights", "residuals", "lengths")
    }
    spent = q.num_steps * count
    sketches = None if plain else np.asarray(q.sketches)[rows]
    return dataclasses.replace(q, **parts, asymmetry=q.asymmetry[rows], sketches=sketches, num_matvecs=spent)


def wasserstein(q: spectra.Quadrature, values: np.ndarray) -> float:
    """W1 between the estimate and the eigenvalues."""
    from scipy.stats import wasserstein_distance

    nodes, weights = q.parts.measure()
    return float(wasserstein_distance(nodes, values, weights))


def width_below(q: spectra.Quadrature, x: float) -> float:
    """Width of the 95 % interval of the share below x."""
    low, _, high = spectra.count_above(q, float(np.nextafter(x, -np.inf))).interval()
    return float(high - low) / q.size


@dataclasses.dataclass(frozen=True)
class Outside:
    """Whether so many products, with a space taken out, are enough for the share, and for the density."""

    products: int
    known: bool
    near: bool


def outside_of_spaces(m: Matrix, threshold: float) -> Iterator[Outside]:
    """All sizes of spaces, with few and with more probes outside of them."""
    for size in (x for x in SPACES if x < m.size // 2):
        steps, most = OUTSIDE[0]
        runs = [
            spectra.slq(m.op, key=key, num_steps=steps, num_probes=most, deflate=size)
            for key in jax.random.split(jax.random.key(6), SPACE_KEYS)
        ]
        for _, probes in OUTSIDE:
            part = [first_rows(q, probes) for q in runs]
            known = all(width_below(q, threshold) <= 2 * WITHIN for q in part)
            distances = [wasserstein(q, m.values) for q in part]
            near = max(distances) <= 1e-3 * m.range
            yield Outside(size + steps * probes, known, near)


def first_rows(q: spectra.Quadrature, count: int) -> spectra.Quadrature:
    """The same with the first probes alone outside of the same space.

    `links` is zero where a Ritz vector has converged: what that couples, below 1e-6 |H|, decides nothing.
    """
    rest = of_rows(q.bulk, 0, count, plain=False)
    return deflation.with_space(rest, np.asarray(q.atoms), np.asarray(q.links), q.size)


def halves(m: Matrix, steps: int) -> list[spectra.Quadrature]:
    """Eight probes of half the steps, outside of a space that takes the other half of the products."""
    keys = jax.random.split(jax.random.key(7), SPACE_KEYS)
    return [
        spectra.slq(m.op, key=key, num_steps=steps // 2, num_probes=8, deflate=8 * (steps - steps // 2))
        for key in keys
    ]


def by_tolerance(m: Matrix) -> float:
    """Products of a count below the threshold that is asked for with a tolerance."""
    x, keys = float(np.nextafter(-m.norm / 1000, -np.inf)), jax.random.split(jax.random.key(7), OWN)
    own = [spectra.count_above(m.op, x, key=key, tol=WITHIN, num_probes=64) for key in keys]
    return float(np.mean([x.num_matvecs for x in own]))


def bracket_steps(m: Matrix) -> float:
    """Steps of a vector that sees all eigenvalues alike, until 2 % below the threshold are left open.

    What moments leave is the weight of a Gauss-Radau rule there, 1 / Σ p_j². No probe does better on average.
    """
    run = spectra.lanczos(spectra.MatrixOperator(np.diag(m.values)), np.ones(m.size), m.size // 2)
    alpha, beta = (np.asarray(x, float) for x in (run.alpha, run.beta))
    before, now, total = 0.0, 1.0, 1.0
    for step in range(int(run.length) - 1):
        held = beta[step - 1] * before if step else 0.0
        before, now = now, ((-m.norm / 1000 - alpha[step]) * now - held) / beta[step]
        total += now**2
        if 1 / total <= 2 * WITHIN:
            return float(step + 1)
    return OUT_OF_REACH


def distributions(m: Matrix) -> tuple[dict[str, float], dict[str, float], dict[str, list[float]]]:
    """The share below -|H|/1000 and the density, both of quadratures; W1 with 8 probes on the way."""
    share = {
        "spectra": float(m.size),
        "spectra, by tol= alone": by_tolerance(m),
        "steps that a bracket takes, at the least": bracket_steps(m),
        "spectra, in hindsight": OUT_OF_REACH,
        "SLQ, any package": OUT_OF_REACH,
    }
    density = {"spectra": OUT_OF_REACH, "SLQ, any package": OUT_OF_REACH}
    gains: dict[str, list[float]] = {}
    threshold = -m.norm / 1000
    for found in outside_of_spaces(m, threshold):
        for kept, right in ((share, found.known), (density, found.near)):
            kept["spectra"] = min(kept["spectra"], found.products) if right else kept["spectra"]
    for steps in STEPS:
        whole = spectra.slq(m.op, key=jax.random.key(5), num_steps=steps, num_probes=MOST_PROBES)
        for k in PROBES:
            starts = range(0, MOST_PROBES - k + 1, max(k, MOST_PROBES // 8))
            sharp, plain = ([of_rows(whole, s, k, plain=p) for s in starts] for p in (False, True))
            distance, simple = ([wasserstein(q, m.values) for q in rows] for rows in (sharp, plain))
            if k == 8:
                half = [wasserstein(q, m.values) for q in halves(m, steps)]
                sizes = np.mean(simple), np.mean(distance), np.mean(half)
                gains[f"{steps} x 8"] = [float(x / sizes[0]) for x in sizes[1:]]
            for name, found in (("spectra", distance), ("SLQ, any package", simple)):
                if np.quantile(found, 0.95) <= 1e-3 * m.range:
                    density[name] = min(density[name], steps * k)
            if steps * k >= share["spectra"] and steps * k >= share["SLQ, any package"]:
                continue
            if all(width_below(q, threshold) <= 2 * WITHIN for q in sharp[:4]):
                share["spectra"] = min(share["spectra"], steps * k)
            for name, rows in (("spectra, in hindsight", sharp), ("SLQ, any package", plain)):
                seen = np.array([_below(q, threshold) for q in rows])
                if 1.96 * np.sqrt(np.mean((seen - m.share) ** 2)) <= WITHIN:
                    share[name] = min(share[name], steps * k)
    density["spectra"] = min(density["spectra"], m.size)
    return share, density, gains


def _below(q: spectra.Quadrature, x: float) -> float:
    places, masses = q.parts.measure()
    return float(np.sum(masses[places < x]))


def measure(name: str) -> dict:
    """All figures of one problem."""
    with jax.enable_x64(True):
        m = Matrix(name)
        found = {
            "size": m.size,
            "trace": traces(m),
            "log det": log_determinants(m),
            "log det, worth": own_log_determinants(m),
            "top ten": eigenvalues(m),
        }
        found["share"], found["density"], found["gains"] = distributions(m)
    return found


def _text(products: float, size: int) -> str:
    if not math.isfinite(products):
        return f"> {size}"
    return f"{products:.0f}"


def page(results: dict[str, dict]) -> Report:
    lines, goals = [], []
    for figure in FIGURES:
        methods = list(dict.fromkeys(name for found in results.values() for name in found[figure]))
        rows = [
            [name, *(_text(found[figure].get(name, math.inf), found["size"]) for found in results.values())]
            for name in methods
        ]
        lines += [f"## {figure.capitalize()}", "", *table(["products", *results], rows), ""]
        if figure == "log det":
            worth = [found["log det, worth"] for found in results.values()]
            errors = ["1.96 root mean square errors, in tolerances", *(f"{x['error']:.2f}" for x in worth)]
            held = ["intervals that hold", *(f"{x['held']} of {x['keys']}" for x in worth)]
            lines += [*table(["runs of spectra", *results], [errors, held]), ""]
        for problem, found in results.items():
            own = min(x for name, x in found[figure].items() if name in OWN_ROWS)
            peers = (
                x for name, x in found[figure].items() if not name.startswith(("spectra", "steps", AT_LEAST))
            )
            best = min(peers)
            best = min(best, found["size"])  # what all columns of the matrix cost
            bound = 0.2 if "network" in problem else 1.1
            goals.append(
                Goal(f"{figure}, {problem}: products over those of the best peer", own / best, bound)
            )
    lines += [
        "## W1 beside plain SLQ",
        "",
        "The same steps and probes, resolved eigenvalues beside weights as sampled; then half of the",
        "products for a space that is taken out, `slq(deflate=)`, and half of the steps outside of it.",
    ]
    kinds = list(next(iter(results.values()))["gains"])
    rows = [
        [f"{problem}, {name}", *(f"{found['gains'][kind][i]:.2f}" for kind in kinds)]
        for problem, found in results.items()
        for i, name in zip(range(len(found["gains"][kinds[0]])), ("resolved", "half taken out"), strict=False)
    ]
    lines += ["", *table(["W1 over that of plain SLQ", *kinds], rows), ""]
    for problem, found in results.items():
        if "network" in problem:
            goals.append(
                Goal(
                    f"W1, {problem}, {kinds[-1]}: over that of plain SLQ",
                    min(found["gains"][kinds[-1]]),
                    0.5,
                )
            )
    return Report(lines, goals)


def main(settings: Settings) -> Report:
    kept = Path(settings.results) / "certainty.json"
    results: dict[str, dict] = json.loads(kept.read_text()) if kept.exists() else {}
    names = list(PROBLEMS)[-1:] if settings.tiny else list(PROBLEMS)
    for name in names:
        if name not in results:
            results[name] = measure(name)
            kept.write_text(json.dumps(results, indent=1))
    return page(results)
