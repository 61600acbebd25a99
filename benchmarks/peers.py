"""The tools that spectra is measured beside, each in its best configuration, on the same weights and data.

A tool is built for one problem; what it cannot do, it leaves out:

* `product(v)`: one Hessian-vector product, v in the tool's own form (see `vector`);
* `density(steps, probes)`: the quadrature's nodes and weights, (probes, steps) each;
* `starts(probes)`: the start vectors that `density` has used, flat, in the tool's order of parameters;
* `basis(steps)`: the Lanczos basis from one start vector, (steps, n).

Where a released version does not run with today's torch or JAX it gets a stand-in for what was removed, and
`note` says so.
"""

import contextlib
import functools
import importlib
import importlib.util
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import spectra
from benchmarks import problems
from spectra.base import draws, trees


class Tool:
    """What all tools share: the problem, with parameters flat in JAX's order or in PyTorch's."""

    package = ""
    order = "jax"
    note = ""

    def __init__(self, name: str, problem):
        self.problem_name, self.problem = name, problem
        self.loss_fn, self.params, self.batch = problem

    @property
    def label(self) -> str:
        return type(self).__name__.replace("_", "-")


class Spectra(Tool):
    label = "spectra"

    def __init__(self, name, problem):
        super().__init__(name, problem)
        self.op = spectra.HessianOperator(*problem)
        self.prepared = self.op.prepare()
        self.vector = problems.vector(self.params)
        self.jitted = jax.jit(lambda op, v: op.mv(v))

    def product(self, v):
        return self.jitted(self.prepared, v)

    def density(self, steps, probes):
        found = spectra.slq(self.op, key=jax.random.key(0), num_steps=steps, num_probes=probes)
        spectra.spectral_density(found)
        return np.asarray(found.nodes), np.asarray(found.weights)

    def starts(self, probes):
        keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(probes)]
        return np.stack([trees.ravel(draws.sphere_sample(key, self.op.structure)) for key in keys])

    def basis(self, steps):
        rows = spectra.lanczos(self.op, self.vector, steps).basis
        return np.concatenate([np.asarray(x).reshape(steps, -1) for x in jax.tree.leaves(rows)], axis=1)


@functools.partial(jax.jit, static_argnames=("loss_fn", "unravel"))
def _flat_product(loss_fn, unravel, flat, batch, v):
    """The product that a tool of flat vectors is given."""
    gradient = jax.grad(lambda x: loss_fn(unravel(x), batch))
    return jax.jvp(gradient, (flat,), (v,))[1]


class FlatJax(Tool):
    def __init__(self, name, problem):
        super().__init__(name, problem)
        self.flat, self.unravel = ravel_pytree(self.params)
        self.vector = jax.random.normal(jax.random.key(2), self.flat.shape)
        # From here on v -> Hv is a pytree: compiled code takes what it has saved as an argument.
        self.linear = jax.jit(self._linearize)(self.flat, self.batch)

    def _linearize(self, flat, batch):
        return jax.linearize(jax.grad(lambda x: self.loss_fn(self.unravel(x), batch)), flat)[1]

    def starts(self, probes):
        keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(probes)]
        return np.stack([np.asarray(jax.random.normal(key, self.flat.shape)) for key in keys])


class Matfree(FlatJax):
    """Full reorthogonalisation; `jvp` of `grad`, as in its tutorials, where XLA hoists what it can."""

    package = "matfree"
    label = "matfree"
    linearised = False

    @functools.cached_property
    def run(self):
        from matfree import decomp

        @functools.partial(jax.jit, static_argnames=("steps",))
        def run(vectors, linear, flat, batch, steps):
            tridiag = decomp.tridiag_sym(steps, reortho="full")

            def product(v):
                return (
                    linear(v)
                    if self.linearised
                    else _flat_product(self.loss_fn, self.unravel, flat, batch, v)
                )

            def one(v):
                found = tridiag(product, v)
                theta, turn = jnp.linalg.eigh(found.J_small)
                return found.Q_tall, theta, turn[0] ** 2

            return one(vectors) if vectors.ndim == 1 else jax.lax.map(lambda v: one(v)[1:], vectors)

        return lambda vectors, steps: run(vectors, self.linear, self.flat, self.batch, steps)

    def product(self, v):
        if self.linearised:
            return _apply(self.linear, v)
        return _flat_product(self.loss_fn, self.unravel, self.flat, self.batch, v)

    def density(self, steps, probes):
        keys = [jax.random.fold_in(jax.random.key(1), i) for i in range(probes)]
        vectors = jnp.stack([jax.random.normal(key, self.flat.shape) for key in keys])
        return tuple(np.asarray(x) for x in self.run(vectors, steps))

    def basis(self, steps):
        basis = np.asarray(self.run(self.vector, steps)[0])
        return basis if len(basis) == steps else basis.T


@jax.jit
def _apply(linear, v):
    return linear(v)


class MatfreeLinearised(Matfree):
    """The same with a linearisation made once outside, which its users have to think of themselves."""

    label = "matfree, linearised"
    linearised = True


class CoLA(FlatJax):
    package = "cola-ml"
    label = "CoLA"

    def run(self, start, steps):
        import cola
        from cola.linalg.decompositions.lanczos import lanczos

        n = self.flat.size

        def columns(v):
            return _apply(self.linear, v[:, 0])[:, None] if v.ndim == 2 else _apply(self.linear, v)

        op = cola.SelfAdjoint(cola.ops.LinearOperator(jnp.float32, (n, n), matmat=columns))
        return lanczos(op, start, max_iters=steps, tol=1e-30)

    def density(self, steps, probes):
        nodes, weights = [], []
        for start in self.starts(probes):
            _, tridiagonal, _ = self.run(jnp.asarray(start), steps)
            theta, turn = np.linalg.eigh(np.asarray(tridiagonal.to_dense()))
            nodes.append(theta)
            weights.append(turn[0] ** 2)
        return np.stack(nodes), np.stack(weights)

    def basis(self, steps):
        return np.asarray(self.run(self.vector, steps)[0].to_dense()).T


class Google(FlatJax):
    """google/spectral-density from a checkout; its Lanczos loop is unrolled in Python."""

    label = "google/spectral-density"
    note = "jax.ops.index_update, which JAX removed, is put back for it"
    path: Path | None = None

    @functools.cached_property
    def module(self):
        import jax.ops

        if not hasattr(jax.ops, "index_update"):
            jax.ops.index_update = lambda x, index, value: x.at[index].set(value)  # pyright: ignore
        assert self.path is not None
        spec = importlib.util.spec_from_file_location("google_lanczos", self.path / "jax" / "lanczos.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def run(self, key, steps):
        return self.module.lanczos_alg(lambda v: _apply(self.linear, v), self.flat.size, steps, key)

    def density(self, steps, probes):
        nodes, weights = [], []
        for i in range(probes):
            theta, turn = np.linalg.eigh(self.run(jax.random.fold_in(jax.random.key(1), i), steps)[0])
            nodes.append(theta)
            weights.append(turn[0] ** 2)
        return np.stack(nodes), np.stack(weights)

    def basis(self, steps):
        return np.asarray(self.run(jax.random.key(2), steps)[1])


class Torch(Tool):
    order = "torch"

    def __init__(self, name, problem):
        super().__init__(name, problem)
        import torch

        from benchmarks import torch_problems

        self.torch = torch
        # Beside JAX on a card, its products in true float32 as ours are, which is PyTorch's default there.
        self.device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"
        self.model, self.criterion, self.data = torch_problems.build(name, self.params, self.batch)
        self.model = self.model.to(self.device)
        self.data = tuple(x.to(self.device) for x in self.data)
        self.weights = list(self.model.parameters())
        self.size = sum(w.numel() for w in self.weights)
        self.vector = torch.randn(self.size, generator=torch.Generator().manual_seed(2)).to(self.device)

    def loss(self):
        return self.criterion(self.model(self.data[0]), self.data[1])

    def split(self, v):
        parts = self.torch.split(v, [w.numel() for w in self.weights])
        return [part.reshape(w.shape) for part, w in zip(parts, self.weights, strict=True)]


class HessianEigenthings(Torch):
    package = "hessian-eigenthings"
    label = "hessian-eigenthings"

    @functools.cached_property
    def op(self):
        import hessian_eigenthings as he

        return he.HessianOperator(self.model, [self.data], he.supervised_loss(self.criterion))

    def product(self, v):
        return self.op.matvec(v)

    def density(self, steps, probes):
        from hessian_eigenthings.algorithms.spectral_density import spectral_density

        found = spectral_density(self.op, num_runs=probes, lanczos_steps=steps, seed=0)
        return found.raw_eigenvalues.cpu().numpy(), found.raw_weights.cpu().numpy()

    def starts(self, probes):
        from hessian_eigenthings.linalg import SingleDeviceBackend

        generators = [self.torch.Generator().manual_seed(i) for i in range(probes)]
        backend, like = SingleDeviceBackend(), self.torch.empty(self.size)
        return np.stack([backend.rademacher_like(like, generator=g).numpy() for g in generators])

    def basis(self, steps):
        from hessian_eigenthings.algorithms.lanczos import lanczos_tridiagonal

        return np.stack([q.numpy() for q in lanczos_tridiagonal(self.op, self.vector, steps).basis])


class Curvlinops(Torch):
    package = "curvlinops-for-pytorch"
    label = "curvlinops"
    note = "never reorthogonalises; keeps no basis"

    @functools.cached_property
    def op(self):
        import curvlinops

        return curvlinops.HessianLinearOperator(self.model, self.criterion, self.weights, [self.data])

    def product(self, v):
        return self.op @ v

    def density(self, steps, probes):
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        self.torch.manual_seed(0)
        rules = [[x.cpu() for x in fast_lanczos(self.op, steps)] for _ in range(probes)]
        return np.stack([t.numpy() for t, _ in rules]), np.stack([v[0].numpy() ** 2 for _, v in rules])

    def starts(self, probes):
        self.torch.manual_seed(0)
        return np.stack([self.torch.randn(self.size).numpy() for _ in range(probes)])


class PyHessian(Torch):
    package = "PyHessian"
    label = "PyHessian"
    note = "calls torch.eig, which torch removed: a stand-in is put back for it"

    @contextlib.contextmanager
    def stand_in(self):
        def eig(matrix, eigenvectors=True):
            values, vectors = self.torch.linalg.eigh(matrix)
            return self.torch.stack([values, self.torch.zeros_like(values)], 1), vectors

        before = vars(self.torch).get("eig")
        self.torch.eig = eig
        try:
            yield
        finally:
            self.torch.eig = before

    @functools.cached_property
    def op(self):
        from pyhessian import hessian

        with self.quiet():
            return hessian(self.model, self.criterion, data=self.data, cuda=self.device == "cuda")

    @contextlib.contextmanager
    def quiet(self):
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a reference cycle through backward(create_graph=True)
            yield

    def product(self, v):
        from pyhessian.utils import hessian_vector_product

        return hessian_vector_product(self.op.gradsH, self.op.params, self.split(v))

    def density(self, steps, probes):
        self.torch.manual_seed(0)
        with self.stand_in():
            nodes, weights = self.op.density(iter=steps, n_v=probes)
        return np.asarray(nodes), np.asarray(weights)

    def starts(self, probes):
        self.torch.manual_seed(0)
        draws = [[self.torch.randint_like(w, high=2) for w in self.weights] for _ in range(probes)]
        return np.stack(
            [2 * np.concatenate([d.detach().numpy().ravel() for d in draw]) - 1 for draw in draws]
        )

    def basis(self, steps):
        module = importlib.import_module("pyhessian.hessian")
        rows, orthnormal = [], module.orthnormal

        def recorded(w, vectors):
            rows[:] = [*vectors, orthnormal(w, vectors)]
            return rows[-1]

        module.orthnormal = recorded
        try:
            self.density(steps, 1)
        finally:
            module.orthnormal = orthnormal
        return np.stack([np.concatenate([x.detach().numpy().ravel() for x in row]) for row in rows])


class TorchSecorder(Torch):
    package = "torch-secorder"
    label = "torch-secorder"

    def product(self, v):
        from torch_secorder.core.hvp import exact_hvp

        return exact_hvp(self.loss, self.weights, self.split(v))


class TorchRetained(Torch):
    """PyTorch alone: double backward through a graph that is built once and kept."""

    package = "torch"
    label = "torch, retained graph"

    @functools.cached_property
    def gradient(self):
        return self.torch.autograd.grad(self.loss(), self.weights, create_graph=True)

    def product(self, v):
        return self.torch.autograd.grad(self.gradient, self.weights, self.split(v), retain_graph=True)


DENSITY = (Matfree, MatfreeLinearised, HessianEigenthings, Curvlinops, PyHessian, CoLA, Google)
PRODUCT = (Matfree, TorchRetained, HessianEigenthings, Curvlinops, PyHessian, TorchSecorder)


def build(classes, name: str, problem, settings=None) -> tuple[list[Tool], list[str]]:
    """The tools that can be built and multiply, and a line for each: its version, or why it is skipped."""
    tools, notes = [], []
    for cls in classes:
        try:
            if cls is Google:
                Google.path = None if settings is None else settings.spectral_density
                if Google.path is None:
                    notes.append(f"{cls.label}: skipped, no checkout given (--spectral-density PATH)")
                    continue
            tool = cls(name, problem)
            if hasattr(tool, "product"):
                tool.product(tool.vector)
            release = f"{cls.label} {version(cls.package)}" if cls.package else cls.label
            notes.append(f"{release}: {cls.note}" if cls.note else release)
            tools.append(tool)
        except ImportError as error:
            notes.append(f"{cls.label}: skipped, {error}")
        except Exception as error:
            notes.append(f"{cls.label}: skipped, {type(error).__name__}: {str(error)[:80]}")
    return tools, list(dict.fromkeys(notes))
