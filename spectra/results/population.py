"""What a sample says about the distribution it was drawn from."""

import math

from spectra._status import Status
from spectra.results._base import Array, Interval, Result, html_table, result, text_table
from spectra.results._digits import directed


@result("size", "num_examples", "num_batches", "num_to_halve", "num_matvecs", "level", "status")
class Population(Result):
    """Leading eigenvalues and trace of the mean over all examples that could be drawn, from those drawn.

    `lower` and `upper` hold each eigenvalue with probability `level`. The interval has two parts: bias, what
    lies between `held_out` (the curvature of a vector on examples that it was not fitted to, never too large
    on average) and `in_sample` (never too small on average), and `stderr`, the spread between batches.
    The bias falls like one over the number of examples, the error like one over its root.

    The [glossary](glossary.md#population) says what is meant by population and interval.
    """

    eigenvalues: Array  # (k,) debiased estimates, descending
    lower: Array  # (k,)
    upper: Array  # (k,)
    held_out: Array  # (k,)
    in_sample: Array  # (k,) of the mean over all examples drawn
    stderr: Array  # (k,) of the curvature along the eigenvector, over examples
    trace: Interval
    trace_stderr: float  # over examples
    trace_probe_stderr: float  # over probes, beside it
    shares: Interval  # (k,) each: part of the trace that the j largest eigenvalues make up; NaN if trace <= 0
    size: int
    num_examples: int
    num_batches: int
    num_to_halve: int  # examples with which the interval of the largest eigenvalue is half as wide
    num_matvecs: int
    num_passes: float  # the same in products with all examples drawn
    level: float
    status: Status

    def __len__(self) -> int:
        return len(self.eigenvalues)

    def interval(self, index: int = 0) -> Interval:
        """Of one eigenvalue, the largest by default."""
        values = (float(x[index]) for x in (self.lower, self.eigenvalues, self.upper))
        return Interval(*values)

    def rows(self) -> list[tuple[str, str]]:
        """Label and value of each line of the printed result."""
        rows = []
        for i in range(len(self)):
            low, value, high = self.interval(i)
            text = f"{value:.4g} [{directed(low, up=False)}, {directed(high, up=True)}]"
            rows.append(("largest eigenvalue" if i == 0 else f"  no. {i + 1}", text))
        low, value, high = self.trace
        rows.append(("trace", f"{value:.4g} [{directed(low, up=False)}, {directed(high, up=True)}]"))
        rows.append(
            ("  its errors", f"examples ± {self.trace_stderr:.2g}, probes ± {self.trace_probe_stderr:.2g}")
        )
        low, value, high = (float(x[-1]) for x in self.shares)
        if math.isfinite(value):
            text = f"{100 * value:.3g} % [{100 * low:.3g}, {100 * high:.3g}]"
            rows.append((f"share of the largest {len(self)}" if len(self) > 1 else "its share of it", text))
        rows += [
            ("drawn", f"{self.num_examples:,} examples in {self.num_batches} batches"),
            ("for half the width", f"{self.num_to_halve:,} examples"),
            ("cost", f"{self.num_passes:.1f} products with all of them"),
        ]
        return rows

    @property
    def _title(self) -> str:
        return f"Population, intervals of {100 * self.level:g} %"

    def __repr__(self) -> str:
        return text_table(self._title, self.rows())

    def _repr_html_(self) -> str:
        return html_table(self._title, self.rows())
