"""Small dense mathematics of Gauss quadrature: rules, brackets, copies, what is resolved for certain."""

from typing import Any, ClassVar, Protocol

import numpy as np

Rule = tuple[np.ndarray, ...]
"""Nodes, weights and residuals of a probe, and its sketch where there is one."""


class Measures(Protocol):
    """What is asked of a `Quadrature`: results are a later layer."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def nodes(self) -> Any:
        """(k, m) Ritz values."""
        ...

    @property
    def weights(self) -> Any:
        """(k, m) of the nodes."""
        ...

    @property
    def residuals(self) -> Any:
        """(k, m): an eigenvalue lies within this distance of the node."""
        ...

    @property
    def lengths(self) -> Any:
        """(k,) true number of nodes."""
        ...

    @property
    def coefficients(self) -> Any:
        """(k, 2, m) α and β, where copies were merged."""
        ...

    @property
    def sketches(self) -> Any:
        """(k, m, 8) products of Ritz vectors with random ones."""
        ...

    @property
    def links(self) -> Any:
        """(r,) residuals of atoms that are Ritz values, converged or not."""
        ...

    @property
    def atoms(self) -> Any:
        """(r,) deflated eigenvalues."""
        ...

    @property
    def bulk(self) -> "Measures | None":
        """Of the complement of the deflated ones."""
        ...

    @property
    def coupling(self) -> float:
        """How far the residuals of the deflated ones move an eigenvalue."""
        ...

    @property
    def parts(self) -> Any:
        """What is known for certain, and what is sampled."""
        ...

    @property
    def range(self) -> tuple[float, float]:
        """Of the nodes."""
        ...

    @property
    def spread(self) -> float:
        """How far copies of an eigenvalue are from it, over the rounding of a product."""
        ...

    @property
    def size(self) -> int:
        """n, order of the operator."""
        ...

    @property
    def precision(self) -> float:
        """Relative error of one product."""
        ...

    @property
    def noise_floor(self) -> float:
        """What rounding moves an eigenvalue by."""
        ...

    @property
    def num_probes(self) -> int:
        """k."""
        ...

    @property
    def num_steps(self) -> int:
        """m."""
        ...
