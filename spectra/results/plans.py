"""Bytes and products of a run."""

from spectra._status import Status
from spectra.results._base import Result, format_bytes, result, text_table


@result("status")
class Plan(Result):
    """Bytes and products of a run, before anything is allocated. Sizes in bytes, on one device."""

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
    status: Status = Status.COMPLETE

    @property
    def total(self) -> int:
        """Peak of what the run adds to parameters and data."""
        return self.linearization + self.probe_batch * (self.basis + self.vectors + self.workspace)

    @property
    def without_basis(self) -> int:
        """The same with `basis="none"` and one probe in flight."""
        return self.linearization + self.vectors + self.workspace

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory that is free now."""
        return self.available is None or self.total <= self.available

    def __repr__(self) -> str:
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
            ("peak", format_bytes(self.total)),
            ("available", "unknown" if self.available is None else format_bytes(self.available)),
            ("fits", "yes" if self.fits else "no"),
            ('with basis="none"', self._offer()) if self.basis and not self.fits else None,
            None if self.seconds is None else ("time", f"about {self.seconds:.3g} s after compilation"),
        ]
        return text_table("Plan", [row for row in rows if row is not None])

    def _offer(self) -> str:
        fits = self.available is None or self.without_basis <= self.available
        size = format_bytes(self.without_basis)
        return f"{size}, one probe in flight: {'fits' if fits else 'does not fit either'}"
