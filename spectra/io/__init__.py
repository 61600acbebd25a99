"""Result files: one `.npz` for a result, one `.jsonl` that grows for a history along training."""

from spectra.io.files import load, save

__all__ = ["load", "save"]
