"""The errors that `spectra` raises: what is wrong, where, and what to do.

Every error is a `SpectraError`, which is a `ValueError`; where Python has a closer built-in (a type, a
memory or a floating-point error) the class is that as well, so callers can catch either.
"""


class SpectraError(ValueError):
    """Base of all errors raised on purpose by `spectra`; a `ValueError`."""


class StructureError(SpectraError, TypeError):
    """A pytree has the wrong structure, shape or dtype; the message names the path of the leaf."""


class DataError(SpectraError):
    """A data source is empty, inconsistent, unreadable a second time, or changes between passes."""


class NonFiniteError(SpectraError, FloatingPointError):
    """A loss, a gradient or a product with the operator is NaN or infinite."""


class NotSymmetricError(SpectraError):
    """Products with the operator contradict symmetry by far more than their rounding error."""


class DifferentiationError(SpectraError, TypeError):
    """The loss cannot be differentiated, not even once; the message carries JAX's own reason."""


class MemoryLimitError(SpectraError, MemoryError):
    """The computation would not fit; the message states the bytes and the arguments that would."""


class ResultFileError(SpectraError):
    """A file is not a `spectra` result, is truncated, or was written by a newer schema."""


class CheckpointError(SpectraError):
    """A checkpoint belongs to another run, or cannot be used."""


class PreemptedError(SpectraError):
    """The run was asked to end, saved itself, and goes on when it is started again."""

    def __init__(self, message: str, *, signal: int = 15):
        super().__init__(message)
        self.signal = signal  # the number of the signal that asked: 15 for SIGTERM, 2 for SIGINT
