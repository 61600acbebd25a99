"""Errors and warnings of the bridge."""

from spectra._errors import SpectraError


class BridgeError(SpectraError):
    """Report a PyTorch module, file or input that the bridge cannot use.

    The message names what is wrong, where (file, node, tensor), and what to do. Every failure on a
    graph or weights file, however damaged, ends in this class or a subclass of it.
    """


class UnsupportedOperatorError(BridgeError):
    """Report graph operators that have no JAX counterpart, each with the modules that use it.

    Attributes:
        operators: `{operator name: module paths}`.
    """

    def __init__(self, operators: dict[str, list[str]], hints: dict[str, str] | None = None):
        self.operators = operators
        hints = hints or {}
        lines = []
        for name, paths in sorted(operators.items()):
            shown = ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
            hint = hints.get(name.rpartition(".")[0])  # by name, for all overloads
            reason = f" ({hint})" if hint else ""
            lines.append(f"  {name[:80]}{reason} in module {shown}")
        super().__init__(
            "these operators have no JAX counterpart in the bridge:\n"
            + "\n".join(lines)
            + "\nReplace them in the module, or move them out of the function whose curvature is wanted."
        )


class StaticBatchWarning(UserWarning):
    """Say that a module could only be exported for the example's batch size."""


class FrozenParametersWarning(UserWarning):
    """Say which parameters had `requires_grad=False` and are constants of the model, not in its `params`."""
