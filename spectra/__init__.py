"""Spectra of the curvature of neural networks, with an error bar on every number.

An operator multiplies a vector by a curvature matrix without forming it; Lanczos and quadrature turn a
few hundred such products into the full eigenvalue density. With n parameters θ, the Hessian is
H = ∇²L(θ), a vector is a pytree like θ, and eigenvalues are in units of the loss over units of θ squared.

The public names are declared in `spectra/public.py`.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # which finds misspelt names only where no __getattr__ is seen
    from spectra.public import *  # noqa: F403
    from spectra.public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        """A public name; the first one that is asked for imports them all, and JAX with them.

        Until then `spectra --help`, `--version` and completion need neither. All at once, since later modules
        provide what earlier ones call by name, such as the pictures of results.
        """
        if name == "__all__" or not name.startswith("__"):
            public = importlib.import_module("spectra.public")
            names = getattr(public, "__all__", None)
            if names is not None:  # None: it is being imported, and asks for one of its own modules
                for each in ("__all__", *names):
                    globals().setdefault(each, getattr(public, each))
            if name in globals():
                return globals()[name]
        raise AttributeError(
            f"module 'spectra' has no attribute '{name}'", name=name, obj=sys.modules[__name__]
        )

    def __dir__() -> list[str]:
        """What completion and `help` list."""
        return sorted([*__getattr__("__all__"), *(name for name in globals() if name.startswith("__"))])
