"""What a run will cost, stated before anything is allocated."""

import dataclasses

from spectra.base.errors import Status
from spectra.results.base import Result, result
from spectra.results.text import format_bytes, text_table


@result("status")
class Plan(Result):
    """Bytes and products of a run, before anything is allocated. Sizes in bytes, on one device.

    Returned by `plan`, which computes nothing but may compile a product to read its workspace.

    Examples:
        >>> import jax.numpy as jnp, spectra
        >>> op = spectra.DiagonalOperator(jnp.ones(1000))
        >>> found = spectra.plan(op, num_steps=100, num_probes=4)
        >>> found.num_matvecs, found.vector, found.basis >= 100 * found.vector
        (400, 4000, True)
    """

    size: int  # n
    num_steps: int
    num_probes: int
    probe_batch: int  # probes in flight together
    vector: int  # one vector
    basis: int  # Krylov basis of one probe
    vectors: int  # working vectors of one probe besides the basis
    linearization: int  # saved values of the linearised gradient, shared by all probes
    workspace: int  # temporaries of one product, from the compiled program; 0 if not compiled
    available: int | None  # free memory of the device, None if it cannot be known
    num_matvecs: int
    num_devices: int = 1
    host: int = 0  # basis in the host's memory
    seconds: float | None = None  # of the whole run, if a product was measured
    process: int | None = None  # of a CPU: what the process holds now, parameters and data among it
    compiling: int = 0  # allowance for compiling the run, in the host's memory
    status: Status = Status.COMPLETE

    @property
    def total(self) -> int:
        """Peak of what the run adds to parameters and data."""
        return self.linearization + self.probe_batch * (self.basis + self.vectors + self.workspace)

    @property
    def without_basis(self) -> int:
        """The same with `basis="none"` and one probe in progress."""
        return dataclasses.replace(self, basis=0, probe_batch=1).total

    @property
    def fits(self) -> bool:
        """Whether the peak fits in the memory that is free now; on a CPU, with the compiler's allowance."""
        shared = 0 if self.process is None else self.compiling
        return self.available is None or self.total + shared <= self.available

    @property
    def process_peak(self) -> int | None:
        """Approximate memory of the whole process, on a CPU: what it holds now, the run, the compiler."""
        return None if self.process is None else self.process + self.total + self.compiling

    def __repr__(self) -> str:
        peak = self.process_peak
        rows = [
            ("parameters", f"{self.size:,}"),
            (
                "products",
                f"{self.num_matvecs:,} ({self.num_steps} steps x {self.num_probes} probes)",
            ),
            ("devices", f"{self.num_devices}, each with:") if self.num_devices > 1 else None,
            ("basis", f"{format_bytes(self.basis)} a probe, {self.probe_batch} in flight"),
            ("basis on the host", f"{format_bytes(self.host)} a probe") if self.host else None,
            ("working vectors", f"{format_bytes(self.vectors)} a probe"),
            ("saved linearisation", format_bytes(self.linearization)),
            ("workspace of a product", format_bytes(self.workspace)),
            ("peak", f"{format_bytes(self.total)}, on top of parameters and data"),
            ("compiling", f"about {format_bytes(self.compiling)} on the host") if self.compiling else None,
            None if self.process is None else ("process now", format_bytes(self.process)),
            None if peak is None else ("process at its peak", f"about {format_bytes(peak)}"),
            ("available", "unknown" if self.available is None else format_bytes(self.available)),
            ("fits", "yes" if self.fits else "no"),
            ('with basis="none"', self._offer()) if self.basis and not self.fits else None,
            None if self.seconds is None else ("time", f"about {self.seconds:.3g} s after compilation"),
        ]
        return text_table("Plan", [row for row in rows if row is not None])

    def _offer(self) -> str:
        smallest = dataclasses.replace(self, basis=0, probe_batch=1)
        fits = "fits" if smallest.fits else "does not fit either"
        return f"{format_bytes(smallest.total)}, one probe in flight: {fits}"
