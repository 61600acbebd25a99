"""A Gauss-Newton matrix divided by classes."""

from spectra._status import Status
from spectra.results._base import Array, Result, html_table, result, text_table
from spectra.results.estimates import Estimate


@result("num_classes", "num_matvecs", "status")
class ClassSplit(Result):
    """Leading eigenvalues and traces of the parts that sum to a Gauss-Newton matrix, see `class_operators`.

    Eigenvalues are descending. Those of the class means and of the cross part are all that are not zero by
    construction; of the whole, within and same they are the k largest.
    """

    whole: Array  # (k,)
    class_means: Array  # (C,)
    cross: Array  # (C (C - 1),)
    within: Array  # (k,)
    same: Array  # (k,)
    class_trace: float
    cross_trace: float
    within_trace: Estimate
    same_trace: Estimate
    weights: Array  # (C, C) probability of class j summed over the examples of class i, over N
    num_classes: int
    num_matvecs: int
    status: Status

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""

        def some(values):
            return ", ".join(f"{x:.3g}" for x in values[: self.num_classes])

        parts = [("whole", self.whole, None), ("class means", self.class_means, f"{self.class_trace:.4g}")]
        parts.append(("cross", self.cross, f"{self.cross_trace:.4g}"))
        for name, values, trace in (
            ("within", self.within, self.within_trace),
            ("same class", self.same, self.same_trace),
        ):
            parts.append((name, values, f"{trace.value:.4g} ± {trace.stderr:.2g}"))
        rows = [(name, some(values) + (f"; trace {trace}" if trace else "")) for name, values, trace in parts]
        return [*rows, ("classes", f"{self.num_classes}"), ("products", f"{self.num_matvecs}")]

    def __repr__(self) -> str:
        return text_table("Gauss-Newton matrix by classes, largest eigenvalues", self.rows())

    def _repr_html_(self) -> str:
        return html_table("Gauss-Newton matrix by classes, largest eigenvalues", self.rows())
