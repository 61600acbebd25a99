"""Predicted changes of the loss under perturbations of the parameters."""

import json
import math
from collections.abc import Sequence

import numpy as np

from spectra._errors import SpectraError
from spectra._status import Status
from spectra.results._base import Array, Result, html_table, result, text_table


@result("names", "num_matvecs", "status")
class Perturbation(Result):
    """Change of the loss under each perturbation and any sum of them, to second order.

    gᵀδ + ½ δᵀHδ for δ = Σ of the perturbations in a set: linear parts add, and every pair adds δ_iᵀHδ_j.
    `measured` are the true changes, where they were asked for.
    """

    names: tuple[str, ...]  # p perturbations
    slopes: Array  # (p,) gᵀδ
    curvature: Array  # (p, p) δ_iᵀHδ_j
    lengths: Array  # (p,) |δ|
    loss: float  # at the parameters themselves
    num_matvecs: int
    status: Status = Status.COMPLETE
    measured: Array | None = None  # (p,) true change of each
    measured_all: float | None = None  # of all together

    @property
    def changes(self) -> np.ndarray:
        """(p,) predicted change of each perturbation alone."""
        return np.asarray(self.slopes + np.diagonal(self.curvature) / 2, float)

    @property
    def pairs(self) -> np.ndarray:
        """(p, p) predicted change of two perturbations together; of one alone on the diagonal."""
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
            SpectraError: a name is unknown, or twice there.
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

        One after the other that takes the most off what is left, interactions included.

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
        """A recipe for llm-compressor (YAML): which layers are rounded to so many bits, and which are left.

        Names of leaves that end in `.weight` are those of PyTorch's modules.

        Args:
            bits: of the weights; those that the perturbations were made with.
            most: predicted change of the loss that is allowed; see `to_leave_out`.
        """
        out = self.to_leave_out(most)
        left = self._change(np.array([name not in out for name in self.names]))
        ranks = [f"#   {name}: {self.changes[self.names.index(name)]:+.3g}" for name in self.ranking]
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
                text += f"; measured {self.measured[i]:+.3g}"
            rows.append((self.names[i], text))
        total = f"{self.change():+.3g} on a loss of {self.loss:.5g}"
        if self.measured_all is not None:
            total += f"; measured {self.measured_all:+.3g}"
        return [*rows, ("all together", total), ("products", f"{self.num_matvecs}")]

    def __repr__(self) -> str:
        return text_table("Change of the loss = slope + curvature", self.rows())

    def _repr_html_(self) -> str:
        return html_table("Change of the loss = slope + curvature", self.rows())
