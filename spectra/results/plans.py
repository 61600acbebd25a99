"""Bytes and products of a run."""

import dataclasses

from spectra.results._base import format_bytes, text_table


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes and products of a run, before anything is allocated. All sizes in bytes."""

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

    @property
    def total(self) -> int:
        """Peak of what the run adds to parameters and data."""
        return self.linearization + self.probe_batch * (self.basis + self.vectors + self.workspace)

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
            ("basis", f"{format_bytes(self.basis)} a probe, {self.probe_batch} in flight"),
            ("working vectors", f"{format_bytes(self.vectors)} a probe"),
            ("saved linearisation", format_bytes(self.linearization)),
            ("workspace of a product", format_bytes(self.workspace)),
            ("peak", format_bytes(self.total)),
            ("available", "unknown" if self.available is None else format_bytes(self.available)),
            ("fits", "yes" if self.fits else "no"),
        ]
        return text_table("Plan", rows)
