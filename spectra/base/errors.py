"""How things end: the errors that `spectra` raises, and the status of an iterative computation.

Both say what is wrong, where, and what to do.
"""

import enum
import inspect
import signal
import warnings


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
    """The loss cannot be differentiated, not even once; the message includes JAX's own reason."""


class MemoryLimitError(SpectraError, MemoryError):
    """The computation would not fit in memory; the message states the bytes, and arguments that would fit."""


class ResultFileError(SpectraError):
    """A file is not a `spectra` result, is truncated, or was written by a newer schema."""


class CheckpointError(SpectraError):
    """A checkpoint belongs to another run, or cannot be used."""


class PreemptedError(SpectraError):
    """The run was asked to end and has been saved; the same call resumes it."""

    def __init__(self, message: str, *, signal: int = 15):
        super().__init__(message)
        self.signal = signal  # the number of the signal that asked: 15 for SIGTERM, 2 for SIGINT


class EndedEarlyError(BaseException):
    """A signal came before there was anything to save; no `except Exception` of a problem stops it."""

    def __init__(self, number: int):
        super().__init__(
            f"the run was asked to end ({signal.Signals(number).name}) and did, before its first product: "
            "nothing has been computed that could be saved. Start the same command again."
        )
        self.signal = number


DIGIT = 0.1
"""Share of a number that rounding has no digit of right where it is off by more."""
LEAST_NORMAL = 2.0**-126
"""The least normal number of float32: of zero an error up to this says that nothing was seen to be off."""


class Status(enum.Enum):
    """How a computation ended. Each member has a `message` and a `remedy`.

    The value is a short code that is stored in result files; members are compared by identity. A status never
    replaces an error: failures raise, while a status qualifies a valid number.

    Examples:
        >>> from spectra import Status
        >>> Status.COMPLETE.ok, Status.BUDGET_EXHAUSTED.ok
        (True, False)
        >>> print(Status.BUDGET_EXHAUSTED.remedy)
        Raise the budget of products or evaluations (of a quadrature num_steps narrows the bracket, \
num_probes the sampling part), or accept the reported width.
    """

    COMPLETE = ("complete", "all requested steps and probes ran", "")
    CONVERGED = ("converged", "the requested tolerance was reached", "")
    INVARIANT = (
        "invariant",
        "the Krylov space became invariant: the quadrature is exact and shorter than requested",
        "",
    )
    DENSE = (
        "dense",
        "the iteration had not converged within n products: all eigenpairs were computed from the dense "
        "matrix, for n more",
        "",
    )
    EXACT = (
        "exact",
        "all eigenvalues were computed from the dense matrix: its n products are no more than the steps and "
        "probes would have taken",
        "",
    )
    BUDGET_EXHAUSTED = (
        "budget_exhausted",
        "the budget of steps, probes or products ended before the tolerance was reached",
        "Raise the budget of products or evaluations (of a quadrature num_steps narrows the bracket, "
        "num_probes the sampling part), or accept the reported width.",
    )
    NOT_CONVERGED = (
        "not_converged",
        "not every eigenpair met the tolerance with the products allowed",
        "Raise max_matvecs or num_basis, loosen tol, deflate pairs that are accurate to it, or use "
        "the pairs whose `converged` is true.",
    )
    SINGULAR = (
        "singular",
        "the operator is singular to the noise floor: some of the eigenvalues asked for are zero, or a "
        "right-hand side lies outside of its range, so that there is no solution",
        "Ask for more pairs to pass the null space, or damp the operator with `op.shift(delta)`.",
    )
    INDEFINITE = (
        "indefinite",
        "conjugate gradients met a direction of negative or vanishing curvature: x is where they stood",
        "Use method='auto', which continues with MINRES, or a larger shift.",
    )
    STAGNATED = (
        "stagnated",
        "the precision of the products was met before the tolerance",
        "Loosen tol, or compute in float64; a larger shift makes the system better conditioned.",
    )
    NOISY = (
        "noisy",
        "products with the operator are less symmetric than their precision explains, or rounding leaves "
        "no digit of the largest eigenvalue",
        "Eigenvalues below the reported noise floor are not resolved: use "
        "matmul_precision='float32', float64, or a smoother loss.",
    )
    TRACED = (
        "traced",
        "computed inside jit or vmap, where values cannot be checked",
        "Call outside jit to have products checked for NaN and for symmetry.",
    )

    def __init__(self, code: str, message: str, remedy: str):
        self.code = code
        self.message = message
        self.remedy = remedy

    @property
    def ok(self) -> bool:
        """Whether the computation did all that was requested, without a reservation."""
        return self in (Status.COMPLETE, Status.CONVERGED, Status.INVARIANT, Status.DENSE, Status.EXACT)

    def beside(self, floor: float, size: float) -> "Status":
        """This status, or NOISY in place of one that is `ok` where rounding leaves no digit of |H|.

        `floor` is how far rounding may move an eigenvalue, and `size` is |H|.
        """
        lost = floor >= DIGIT * size if size else floor > LEAST_NORMAL
        return Status.NOISY if self.ok and lost else self

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" ({self.remedy})" if self.remedy else "")


_NOT_THE_USERS = ("spectra", "jax", "contextlib", "functools")


def warn_user(text: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the line of the user's code that called this package, however deep it is raised."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_USERS:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
