"""What curvature says about the loss around the parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from spectra.base.errors import SpectraError, Status
from spectra.results.base import Array, Result, notebook_view, result
from spectra.results.text import html_table, text_table, within

if TYPE_CHECKING:
    from jaxtyping import Float


@result("names", "num_evaluations", "status")
class LossSlice(Result):
    """loss[i, j] = L(θ + x[j] v₁ + y[i] v₂) in the plane of two orthonormal directions.

    The directions are eigenvectors with their eigenvalues λ, or given directions with the curvature λ = vᵀHv
    of each. `quadratic` is the prediction from slopes and curvature, L + g·(x, y) + (λ₁ x² + λ₂ y²) / 2 +
    v₁ᵀHv₂ x y. Where it departs from the loss, curvature at a point no longer describes the landscape. Along
    a single direction `y` is [0], and `slope` and `eigenvalues` have one entry.

    Returned by `loss_slice`, whose page has an example and the cost; `plot_landscape` draws it.
    """

    x: Float[Array, " columns"]  # distances along the first direction
    y: Float[Array, " rows"]  # along the second
    loss: Float[Array, "rows columns"]
    quadratic: Float[Array, "rows columns"]
    slope: Float[Array, " directions"]  # of the loss at the centre along each of one or two directions
    eigenvalues: Float[Array, " directions"]  # curvature along each; of eigenvectors |λ₁| >= |λ₂|
    center: float  # the loss at the parameters
    num_evaluations: int
    status: Status = Status.COMPLETE
    names: tuple[str, ...] = ("v1", "v2")  # v1 and v2 are eigenvectors
    cross: float = 0.0  # v₁ᵀHv₂; zero between eigenvectors
    cosine: float = 0.0  # of the angle between the directions as given; the second is made orthogonal

    @property
    def of_eigenvectors(self) -> bool:
        """Whether the directions are eigenvectors."""
        return self.names == ("v1", "v2")

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        low, high = float(self.loss.min()), float(self.loss.max())
        values = [f"{value:.6g}" for value in self.eigenvalues]
        first = ("eigenvalues", ", ".join(values))
        if not self.of_eigenvectors:
            each = (f"{value} along {name}" for value, name in zip(values, self.names, strict=True))
            first = ("curvature", ", ".join(each))
        where = "plane" if len(self.y) > 1 else "slice"
        reach = f"up to {self.x[-1]:.4g}" + f" and {self.y[-1]:.4g}" * (len(self.y) > 1)
        return [
            first,
            ("loss", f"{self.center:.6g} at the centre, {low:.6g} to {high:.6g} in the {where}"),
            ("distances", reach),
            ("evaluations", f"{self.num_evaluations:,}"),
        ]

    def __repr__(self) -> str:
        return text_table(self._title(), self.rows())

    def _repr_html_(self) -> str:
        return notebook_view(self, self._title(), self.rows())

    def _title(self) -> str:
        if self.of_eigenvectors:
            return "Loss in the plane of two eigenvectors"
        return "Loss in the plane of two directions" if len(self.y) > 1 else "Loss along a direction"


@result("names", "num_matvecs", "status")
class Perturbation(Result):
    """Change of the loss under each perturbation and any sum of them, to second order.

    gᵀδ + ½ δᵀHδ for δ = Σ of the perturbations in a set: linear parts add, and every pair adds δ_iᵀHδ_j.
    `measured` holds the true changes, if requested, each to within its `rounding`.

    Returned by `perturbation`, one product per perturbation.

    Examples:
        >>> import numpy as np
        >>> from spectra import Perturbation
        >>> slopes, curvature = np.array([0.1, 0.2]), np.array([[0.2, 0.3], [0.3, 0.0]])
        >>> found = Perturbation(("first", "second"), slopes, curvature, np.ones(2), loss=2.0, num_matvecs=2)
        >>> [round(float(x), 3) for x in found.changes], round(found.change(), 3)  # 0.3 of the pair
        ([0.2, 0.2], 0.7)
        >>> found.to_leave_out(0.3)
        ('first',)
    """

    names: tuple[str, ...]  # p perturbations
    slopes: Float[Array, " perturbations"]  # gᵀδ
    curvature: Float[Array, "perturbations perturbations"]  # δ_iᵀHδ_j
    lengths: Float[Array, " perturbations"]  # |δ|
    loss: float  # at the parameters themselves
    num_matvecs: int
    status: Status = Status.COMPLETE
    measured: Float[Array, " perturbations"] | None = None  # true change of each
    measured_all: float | None = None  # of all together
    rounding: Float[Array, " perturbations"] | None = None  # of `measured`: smaller changes are not resolved
    rounding_all: float | None = None

    @property
    def changes(self) -> Float[np.ndarray, " perturbations"]:
        """Predicted change of each perturbation alone."""
        return np.asarray(self.slopes + np.diagonal(self.curvature) / 2, float)

    @property
    def pairs(self) -> Float[np.ndarray, "perturbations perturbations"]:
        """Predicted change of two perturbations together; of one alone on the diagonal."""
        single = self.changes
        both = single[:, None] + single + self.curvature
        return np.where(np.eye(len(single), dtype=bool), single, both)

    @property
    def ranking(self) -> tuple[str, ...]:
        """The names from the largest predicted change to the smallest."""
        return tuple(self.names[i] for i in np.argsort(-self.changes, kind="stable"))

    def change(self, names: Sequence[str] | None = None) -> float:
        """Predicted change of the perturbations of these names together; of all by default.

        Raises:
            SpectraError: a name is unknown, or appears twice.
        """
        chosen = self.names if names is None else tuple(names)
        unknown = [name for name in chosen if name not in self.names]
        if unknown or len(set(chosen)) < len(chosen):
            wrong = f"unknown: {', '.join(map(repr, unknown))}" if unknown else "each may be there once"
            raise SpectraError(
                f"names={list(chosen)}: {wrong}; the perturbations are {', '.join(self.names)}."
            )
        index = [self.names.index(name) for name in chosen]
        part = np.asarray(self.curvature)[np.ix_(index, index)]
        return float(np.sum(np.asarray(self.slopes)[index]) + np.sum(part) / 2)

    def to_leave_out(self, most: float) -> tuple[str, ...]:
        """The names to leave out so that all others together raise the loss by `most`, as predicted.

        They are chosen one after the other: each time the layer whose removal lowers the change of the rest
        most, interactions included.

        Raises:
            SpectraError: `most` is NaN or below zero: leaving everything out changes nothing.
        """
        if not most >= 0:
            raise SpectraError(f"most={most}: a change of the loss that is allowed, zero or more.")
        inside = np.ones(len(self.names), bool)
        curvature, out = np.asarray(self.curvature, float), []
        while inside.any() and self._change(inside) > most:
            # Without i: its slope and half of its own curvature, and its part in every pair.
            less = self.slopes + curvature @ inside - np.diagonal(curvature) / 2
            worst = int(np.argmax(np.where(inside, less, -np.inf)))
            inside[worst] = False
            out.append(self.names[worst])
        return tuple(out)

    def _change(self, inside: np.ndarray) -> float:
        return float(inside @ self.slopes + inside @ np.asarray(self.curvature, float) @ inside / 2)

    def recipe(self, *, bits: int, most: float = math.inf) -> str:
        """A recipe for llm-compressor (YAML): which layers are rounded to `bits` bits, which are left out.

        Names of leaves that end in `.weight` are those of PyTorch's modules.

        Args:
            bits: of the weights; the number with which the perturbations were made.
            most: largest predicted change of the loss that is allowed; see `to_leave_out`.

        Returns:
            The text of the recipe, with the predictions as comments.

        Raises:
            SpectraError: `most` is NaN or below zero.

        Examples:
            >>> import jax.numpy as jnp, spectra
            >>> params = {"up.weight": jnp.array([[1.0, 0.6]]), "down.weight": jnp.ones((2, 1))}
            >>> op = spectra.HessianOperator(
            ...     lambda w, _: sum(jnp.sum(x**4) for x in w.values()), params, None)
            >>> deltas = spectra.rounding_deltas(op, 2, channel_axis=0)  # as PyTorch has its weights
            >>> found = spectra.perturbation(op, deltas)
            >>> 'ignore: ["up"]' in found.recipe(bits=2, most=0.1)
            True
        """
        out = self.to_leave_out(most)
        left = self._change(np.array([name not in out for name in self.names]))
        # On one line each, whatever names a file holds: a comment ends with its line.
        ranks = [
            f"#   {' '.join(name.split())}: {self.changes[self.names.index(name)]:+.3g}"
            for name in self.ranking
        ]
        modules = json.dumps([name.removesuffix(".weight") for name in out])
        lines = [
            "# Change of the loss by rounding each layer, predicted by spectra, the largest first:",
            *ranks,
            f"# All but those ignored, together: {left:+.3g} on a loss of {self.loss:.5g}.",
            "quant_stage:",
            "  quant_modifiers:",
            "    QuantizationModifier:",
            f"      ignore: {modules}",
            "      config_groups:",
            "        group_0:",
            f"          weights: {{num_bits: {bits}, type: int, symmetric: true, strategy: channel}}",
            "          targets: [Linear]",
        ]
        return "\n".join(lines) + "\n"

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result, the largest change first."""
        rows = []
        for i in np.argsort(-self.changes, kind="stable"):
            text = f"{self.changes[i]:+.3g} = {self.slopes[i]:+.2g} {self.curvature[i, i] / 2:+.2g}"
            if self.measured is not None:
                rounding = None if self.rounding is None else float(self.rounding[i])
                text += f"; measured {_within(float(self.measured[i]), rounding)}"
            rows.append((self.names[i], text))
        total = f"{self.change():+.3g} on a loss of {self.loss:.5g}"
        if self.measured_all is not None:
            total += f"; measured {_within(self.measured_all, self.rounding_all)}"
        return [*rows, ("all together", total), ("products", f"{self.num_matvecs}")]

    def __repr__(self) -> str:
        return text_table("Change of the loss = slope + curvature", self.rows())

    def _repr_html_(self) -> str:
        return html_table("Change of the loss = slope + curvature", self.rows())


def _within(change: float, rounding: float | None) -> str:
    if rounding is None:
        return f"{change:+.3g}"
    return ("" if change < 0 else "+") + within(change, rounding)
