"""Kronecker-factored approximations of the Gauss-Newton and Fisher matrices of any JAX function."""

# pyright: reportPrivateUsage=false
# Operators have parts that only this package uses.

import abc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp

from spectra.base import programs
from spectra.base.arrays import diagonal
from spectra.base.calls import automatic
from spectra.base.errors import SpectraError
from spectra.base.trees import PyTree
from spectra.operators.accumulate import weighted_sum
from spectra.operators.arguments import DataOptions
from spectra.operators.batches import as_batch, batch_size
from spectra.operators.data import shows_options
from spectra.operators.factored import FactoredOperator
from spectra.operators.fisher import FisherOperator
from spectra.operators.ggn import ModelFn, OutputLossFn
from spectra.operators.kfac_checks import loss_form, require_convex, require_examples
from spectra.operators.kfac_plan import Group, Plan, plan_of
from spectra.operators.kfac_sums import Setup, factor_sums, second_moments, traced
from spectra.operators.kronecker import Block, Corrected, Kronecker, Place
from spectra.operators.pytree import operator

SEQUENCES = ("expand", "reduce")
BIASES = ("joint", "separate")
EXACT_LIMIT = 256
FACTOR_LIMIT = 8192
_LAST = 2**32 - 1
"""Examples fold their number into the key from below, further samples from above."""


class _Build:
    """The factors of a model, from its Fisher operator: what both operators start with."""

    def __init__(
        self, fisher: FisherOperator, data: Any, key: jax.Array | None, num_samples: int, setup: Setup
    ):
        self.key, self.num_samples = key, num_samples
        if fisher.kind == "mc":  # of the data as they are: the samples are drawn anew, several an example
            stream = fisher.stream is not None
            fisher = fisher._with(key=None) if stream else fisher._with(data=as_batch(data), key=None)
        self.fisher, self.setup = fisher, setup
        piece = fisher.first_piece()
        _, found, _ = traced(piece)
        self.plan: Plan = plan_of(fisher.like, found, setup)

    def _pieces(self) -> Iterator[tuple[float, tuple[Any, jax.Array | None]]]:
        fisher = self.fisher
        pieces = iter([(1.0, fisher)]) if fisher.stream is None else super(FisherOperator, fisher)._pieces()
        for index, (weight, piece) in enumerate(pieces):
            key = self.key
            if key is not None and self.fisher.stream is not None:
                key = jax.random.fold_in(key, index)
            size = batch_size(piece.data, piece.shared)
            yield weight, (piece, None if key is None else _keys(key, size, self.num_samples))

    def _sum(self, fn: Callable[[tuple[Any, jax.Array | None]], PyTree]) -> PyTree:
        if self.fisher.stream is None:
            ((_, piece),) = self._pieces()
            return fn(piece)
        return weighted_sum(fn, self._pieces())

    def factors(self) -> tuple[Kronecker, ...]:
        """A Kronecker product for each layer, and the exact or diagonal blocks of the others."""
        inputs, outputs, moments = self._sum(lambda piece: factor_sums(*piece, setup=self.setup))
        groups = zip(self.plan.groups, inputs, outputs, strict=True)
        layers = [_merged(group, a, b) for group, a, b in groups]
        rest = [
            Kronecker(moment, jnp.ones((moment.shape[0], 1), moment.dtype), place)
            for place, moment in zip(self.plan.rest, moments, strict=True)
        ]
        return (*layers, *rest)

    def corrected(self, factors: tuple[Kronecker, ...]) -> tuple[Block, ...]:
        """The blocks in the eigenbases of their factors, with the second moments as eigenvalues."""
        count = len(self.plan.groups)
        layers = [_eigh(part) for part in factors[:count]]
        bases = [(part.input_basis, part.output_basis) for part in layers]
        values = self._sum(lambda piece: second_moments(*piece, bases=bases, setup=self.setup))
        moved = [
            Corrected(part.input_basis, part.output_basis, own, part.place)
            for part, own in zip(layers, values, strict=True)
        ]
        return (*moved, *factors[count:])


@partial(programs.jit, static_argnames=("examples", "samples"))
def _keys(key: jax.Array, examples: int, samples: int) -> jax.Array:
    """(N, samples): the first sample of an example is that of `FisherOperator` with this key."""
    along = jax.vmap(jax.random.fold_in, (None, 0))
    more = along(key, jnp.uint32(_LAST) - jnp.arange(samples - 1, dtype=jnp.uint32))
    return jax.vmap(along, (0, None), 1)(jnp.concatenate([key[None], more]), jnp.arange(examples))


@programs.jit
def _eigh(part: Kronecker) -> Corrected:
    return part.eigh()


def _merged(group: Group, inputs: list[jax.Array], outputs: list[jax.Array]) -> Kronecker:
    """One product; of a parameter that is read both ways, that with the partial traces of the sum."""
    if group.turns == (False,):
        return Kronecker(inputs[0], outputs[0], group.place)
    pairs = [(b, a) if turned else (a, b) for turned, a, b in zip(group.turns, inputs, outputs, strict=True)]
    if len(pairs) == 1:
        return Kronecker(*pairs[0], group.place)
    return _with_partial_traces(pairs, group.place, group.factor_limit)


def _with_partial_traces(pairs: list[tuple[jax.Array, jax.Array]], place: Place, limit: int) -> Kronecker:
    """R ⊗ C / τ with R = Σ R_u tr C_u, C = Σ C_u tr R_u, τ = Σ tr R_u tr C_u."""

    def alike(sides: list[jax.Array]) -> list[jax.Array]:
        if len({side.ndim for side in sides}) == 1:
            return sides
        if sides[0].shape[1] > limit:
            return [side if side.ndim == 2 else jax.vmap(diagonal)(side) for side in sides]
        return [side if side.ndim == 3 else jax.vmap(jnp.diag)(side) for side in sides]

    def trace(side: jax.Array) -> jax.Array:
        return jnp.sum(side, -1) if side.ndim == 2 else jnp.trace(side, axis1=1, axis2=2)

    first, second = (alike([pair[i] for pair in pairs]) for i in (0, 1))
    traces = [(trace(r), trace(c)) for r, c in zip(first, second, strict=True)]
    total = sum((r * c for r, c in traces), jnp.zeros(()))

    def weighted(sides: list[jax.Array], weights: list[jax.Array]) -> jax.Array:
        pairs = zip(sides, weights, strict=True)
        return sum((w.reshape(-1, *[1] * (s.ndim - 1)) * s for s, w in pairs), jnp.zeros(()))

    scale = jnp.where(total > 0, 1 / jnp.where(total > 0, total, 1), 0)
    rows = weighted(first, [c * scale for _, c in traces])
    return Kronecker(rows, weighted(second, [r for r, _ in traces]), place)


class _FromData(FactoredOperator):
    """What the operators that are made from a model and data have in common."""

    kind: str
    sequence: str
    treatment: tuple[tuple[str, str], ...]

    @abc.abstractmethod
    def _blocks(self, build: _Build) -> tuple[Block, ...]:
        """The blocks of the layers, from the data."""

    @shows_options
    @automatic
    def __init__(
        self,
        model_fn: ModelFn,
        loss_fn: OutputLossFn,
        params: PyTree,
        data: Any,
        *,
        kind: Literal["type2", "mc", "empirical"] = "type2",
        key: jax.Array | None = None,
        num_samples: int = 1,
        sequence: Literal["expand", "reduce"] = "expand",
        bias: Literal["joint", "separate"] = "joint",
        sample_fn: Callable[[jax.Array, PyTree, PyTree], PyTree] | None = None,
        exact_limit: int = EXACT_LIMIT,
        factor_limit: int = FACTOR_LIMIT,
        **options: Unpack[DataOptions],
    ):
        if sequence not in SEQUENCES:
            raise SpectraError(f"sequence={sequence!r}: use one of {SEQUENCES}.")
        if bias not in BIASES:
            raise SpectraError(f"bias={bias!r}: use one of {BIASES}.")
        if num_samples < 1 or (num_samples > 1 and kind != "mc"):
            raise SpectraError(
                f"num_samples={num_samples}: kind='mc' draws one or more targets per example; the other "
                "kinds draw none."
            )
        fisher = FisherOperator(
            model_fn, loss_fn, params, data, kind=kind, key=key, sample_fn=sample_fn, **options
        )
        require_examples(fisher)
        form = "dense" if kind != "type2" else loss_form(fisher.first_piece())
        if kind == "type2":
            require_convex(fisher.first_piece(), form)
        setup = Setup(sequence, bias, form, exact_limit, factor_limit)
        build = _Build(fisher, data, key, num_samples, setup)
        fields = {
            "params": fisher.like,
            "stacks": tuple(fisher._stacks().items()),
            "kind": kind,
            "sequence": sequence,
            "treatment": build.plan.coverage,
            "parts": self._blocks(build),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def coverage(self) -> dict[str, str]:
        """{path of each leaf: how it is treated}: as which layer, with which sizes, or why it is none."""
        return dict(self.treatment)

    def __repr__(self) -> str:
        kinds = [text.split(",")[0] for _, text in self.treatment]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        return (
            f"{type(self).__name__}(size={self.size:,}, dtype={self.dtype}, kind={self.kind!r}, "
            f"sequence={self.sequence!r}; leaves: {counts})"
        )


@operator(leaves=("params", "parts"))
class KFACOperator(_FromData):
    """KFAC: each layer's block of the Gauss-Newton or Fisher matrix as one Kronecker product.

    A layer y = W a + b, seen N times with inputs a_n (a one appended for the bias) and vectors g_nk whose
    outer products sum to the loss's curvature in y, has the block Σ_nk (a_n a_nᵀ) ⊗ (g_nk g_nkᵀ). KFAC
    replaces the mean of products by the product of means: A ⊗ B with A = Σ_n w_n a_n a_nᵀ and B = Σ_nk g_nk
    g_nkᵀ. It is exact for one example that each layer sees once, and for deep linear networks with squared
    error whose layers see an example once, see positions that the loss counts one by one and alike
    ("expand"), or see positions that are pooled before the loss ("reduce"). Positions that a mask takes from
    the loss still count in A.

    Layers need no registration: they are found in the jaxpr of `model_fn`, through transposes, reshapes,
    casts, `jit`, `remat` and `scan`. They are products with a parameter (dense layers, the projections of
    attention, einsums with several output axes), convolutions (rows are patches; groups are separate layers)
    and lookups of rows (embeddings, whose A is diagonal). Layers under `lax.scan` each have their own
    factors. If a parameter is used several times, the uses count as further positions. A parameter that is
    also used transposed (an embedding tied to the last layer) has the Kronecker product with the same partial
    traces as the sum over its uses. Everything else, such as scales and biases of norms, has its exact block,
    or only the diagonal of it if it is large; `coverage` says which.

    An operator that is made inside jax.grad has derivatives in parameters and inputs, through its factors;
    products with its inverse have the first ones. An EKFAC and second derivatives of an exact inverse use
    eigenvectors of the factors, whose derivatives are NaN where two eigenvalues are equal, and wrong where
    these differ by rounding alone, as in a null space.

    Args:
        model_fn: pure function (params, inputs) -> outputs, which processes examples independently. Static.
        loss_fn: pure function (outputs, targets) -> scalar, the mean over the batch. Static.
        params: pytree of parameters.
        data: one batch, a pair (inputs, targets), or a re-iterable of such pairs.
        kind: the matrix that is approximated, as for `FisherOperator`: "type2", by an exact square root of
            the loss's Hessian in the outputs; "mc", by targets drawn from the model; "empirical", by the
            targets of the data.
        key: JAX random key of the samples, for "mc". The first sample of each example is that of
            `FisherOperator` with the same key.
        num_samples: samples per example, for "mc".
        sequence: how the positions of one example (tokens, pixels) are combined: "expand" treats them as
            examples, A = Σ_n w_n mean_s a aᵀ and B = Σ_nks g gᵀ; "reduce" first takes the mean of a and the
            sum of g over positions, which is right for networks that pool before their loss.
        bias: "joint" with the weight, as a last input equal to one, or a separate block ("separate").
        sample_fn: as for `FisherOperator`.
        exact_limit: leaves that are not layers have their exact block up to this size, and only its diagonal
            beyond.
        factor_limit: size beyond which a factor is kept as its diagonal, as for the vocabulary of a last
            layer.
        **options: see `DataOperator`. `weight_fn` of one example gives w_n, by default equal.

    Raises:
        StructureError: the model's outputs for an example depend on the others (batch statistics), or have no
            axis of examples; the loss sets examples against each other (a contrastive one, a function of a
            mean), or is not convex in the outputs (a negated one); as `FisherOperator` otherwise.
        MemoryLimitError: "type2" with many outputs and a loss that is neither a softmax nor diagonal.

    Cost: the model once and, for "type2", as many backward passes as an example has outputs (tokens times
    classes); for "mc" `num_samples`; for "empirical" as many as an example has terms. Gradients of single
    examples are formed only for leaves that are not layers. A product multiplies by each factor once. The
    operator keeps the factors, not the data.

    References:
        Martens and Grosse, arXiv:1503.05671; Grosse and Martens, arXiv:1602.01407 (convolutions);
        Eschenhagen et al., arXiv:2311.00636 (expand and reduce).

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> def model_fn(params, x):
        ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> def loss_fn(outputs, targets):
        ...     return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, -1))
        >>> params = {"w1": jnp.eye(2), "w2": jnp.ones((2, 1))}
        >>> op = spectra.KFACOperator(model_fn, loss_fn, params, (jnp.eye(2), jnp.zeros((2, 1))))
        >>> [side.shape for side in op.factors["w2"]]
        [(2, 2), (1, 1)]
        >>> bool(jnp.allclose(op.inverse(0.1) @ (op.shift(0.1) @ jnp.ones(6)), jnp.ones(6), atol=1e-5))
        True
    """

    kind: str
    sequence: str
    treatment: tuple[tuple[str, str], ...]

    __init__ = _FromData.__init__

    def _blocks(self, build: _Build) -> tuple[Block, ...]:
        return build.factors()


@operator(leaves=("params", "parts"))
class EKFACOperator(_FromData):
    """EKFAC: KFAC with corrected eigenvalues, the best ones for the eigenvectors of its factors.

    With A = U diag(a) Uᵀ and B = V diag(b) Vᵀ of `KFACOperator`, each layer's block is
    (U ⊗ V) diag(Λ) (U ⊗ V)ᵀ with Λ = Σ_nk (Uᵀ G_nk V)², where G_nk = Σ_s a_ns g_nksᵀ is the gradient of
    example n and root k over all positions and uses. Among all operators with these eigenvectors it is the
    nearest to the block in the Frobenius norm, and its trace is the block's own. Where eigenvalues of a
    factor are equal to rounding its eigenvectors may be any, and so may this operator be among those.

    Args:
        model_fn: as for `KFACOperator`.
        loss_fn: as for `KFACOperator`.
        params: pytree of parameters.
        data: one batch, a pair (inputs, targets), or a re-iterable of such pairs.
        kind: "type2", "mc" or "empirical".
        key: JAX random key of the samples, for "mc".
        num_samples: samples per example, for "mc".
        sequence: "expand" or "reduce", for the factors; Λ sums over positions exactly.
        bias: "joint" or "separate".
        sample_fn: as for `FisherOperator`.
        exact_limit: as for `KFACOperator`.
        factor_limit: as for `KFACOperator`.
        **options: see `DataOperator`.

    Raises:
        SpectraError: as `KFACOperator`.

    Cost: two passes over the data, each like that of `KFACOperator`; an eigendecomposition of each factor;
    for layers with several positions the gradients of single examples, a few at a time.

    References:
        George et al., arXiv:1806.03884; Grosse et al., arXiv:2308.03296.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> def model_fn(params, x):
        ...     return jnp.tanh(x @ params["w1"]) @ params["w2"]
        >>> def loss_fn(outputs, targets):
        ...     return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, -1))
        >>> params = {"w1": jnp.eye(2), "w2": jnp.ones((2, 1))}
        >>> data = jnp.array([[1.0, 0.5], [0.0, 2.0]]), jnp.zeros((2, 1))
        >>> op = spectra.EKFACOperator(model_fn, loss_fn, params, data)
        >>> exact = spectra.GGNOperator(model_fn, loss_fn, params, data)
        >>> bool(jnp.allclose(op.trace(), jnp.trace(exact.as_matrix())))
        True
    """

    kind: str
    sequence: str
    treatment: tuple[tuple[str, str], ...]

    __init__ = _FromData.__init__

    def _blocks(self, build: _Build) -> tuple[Block, ...]:
        return build.corrected(build.factors())
