"""The loss in a plane of parameter space."""

from spectra._status import Status
from spectra.results._base import Array, Result, notebook_view, result, text_table


@result("num_evaluations", "status")
class LossSlice(Result):
    """loss[i, j] = L(θ + x[j] v₁ + y[i] v₂) in the plane of two unit eigenvectors, of eigenvalues λ₁ and λ₂.

    `quadratic` is what slopes and eigenvalues predict, L + g·(x, y) + (λ₁ x² + λ₂ y²) / 2: where it
    departs from the loss, curvature at a point no longer describes the landscape.
    """

    x: Array  # (p,) distances along the first vector
    y: Array  # (p,) along the second
    loss: Array  # (p, p)
    quadratic: Array  # (p, p)
    slope: Array  # (2,) of the loss at the centre
    eigenvalues: Array  # (2,) |λ₁| >= |λ₂|
    center: float  # the loss at the parameters
    num_evaluations: int
    status: Status = Status.COMPLETE

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        low, high = float(self.loss.min()), float(self.loss.max())
        return [
            ("eigenvalues", f"{self.eigenvalues[0]:.6g}, {self.eigenvalues[1]:.6g}"),
            ("loss", f"{self.center:.6g} at the centre, {low:.6g} to {high:.6g} in the plane"),
            ("distances", f"up to {self.x[-1]:.4g} and {self.y[-1]:.4g}"),
            ("evaluations", f"{self.num_evaluations:,}"),
        ]

    def __repr__(self) -> str:
        return text_table("Loss in the plane of two eigenvectors", self.rows())

    def _repr_html_(self) -> str:
        return notebook_view(self, "Loss in the plane of two eigenvectors", self.rows())
