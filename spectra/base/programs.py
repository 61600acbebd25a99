"""How the package compiles its programs: as `jax.jit` does, with what XLA has to be told on a platform."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer

from spectra.base.errors import StructureError

Options = Mapping[str, Mapping[str, bool | int]]
# Since jax 0.11 XLA has had no choice, and ends at a flag that it does not know.
_CHOICE = ("xla_cpu_use_fusion_emitters",) if jax.__version_info__ < (0, 11) else ()
EMITTERS: dict[str, bool | int] = dict.fromkeys(_CHOICE, False)
OPTIONS: dict[str, dict[str, bool | int]] = {
    "cpu": EMITTERS,
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}
"""Compiler options by platform.

On a CPU, XLA's emitters of fusions compile for longer and make most programs no faster. The first `slq` of an
MLP took 8.0 s of an EPYC's processor time with them and 5.7 without, that of a CNN 9.5 and 6.6. Later ones of
these and of a transformer took as much, within 3 %, and those of vectors alone up to a fifth more. A lower
level of optimisation would compile faster still, but a product of the transformer would take 7 % more. The
programs of deep networks are the exception, see `MANY`.

On a GPU, for a matrix product in true float32 XLA would generate kernels and try them out, where the card's
library has one. On an H200 the first Hessian product of a transformer of 818k parameters took 25 s with them
and 2.2 s without; later ones of GPT-2 take 49 ms, with kernels that were not tried out 244."""

FUSED: Options = OPTIONS | {"cpu": {}}
"""With the emitters on a CPU, for the exceptions: without them, to combine the rows of a basis takes a third
more time (n = 300,000), and to compile an orthonormalisation, four passes written out, takes 60 % more. To
save what a product needs of an MLP of 30 layers takes 0.7 s with them and 3.2 without."""
MANY = 200
"""Arrays that go into a program, from which on it has the emitters as well: what is saved for the product of
a deep network. Its layers are alike, and emitters compile what is alike once. Hessian products take 1.4 s
with them and 7.6 without (an MLP of 30 layers, 275 arrays), 12 and 19 (a transformer of 8, 838), 4.9 and 16
(a CNN of 21, 637); with fewer 6.4 and 5.0 (a transformer of 2, 238) or 3.6 and 4.1 (a CNN of 5, 141)."""
_ANY = np.float32(0)
"""What `is_traced` computes with."""


def is_traced(tree: Any) -> bool:
    """Whether values are out of reach: a leaf is a tracer, or the caller itself is being traced.

    Under `jit` JAX stages every operation, also those on concrete arrays that a function closes over. Results
    ask too, where they are printed, outside of the rules of a call.
    """
    with jax.transfer_guard_host_to_device("allow"):
        leaves = [*jax.tree.leaves(tree), lax.neg(_ANY)]
    return any(isinstance(leaf, Tracer) for leaf in leaves)


def jit(function: Callable[..., Any], options: Options = OPTIONS, **arguments: Any) -> "Program":
    """`jax.jit` with the options of the platform; inside of a program of somebody else's, with theirs."""
    return Program(function, arguments, options)


def options(platform: str, those: Options = OPTIONS, arrays: int = 0) -> dict[str, bool | int]:
    """Those of a platform for a program of so many arrays, without what the user chose in XLA_FLAGS."""
    those = FUSED if those is OPTIONS and arrays >= MANY else those
    chosen = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in those.get(platform, {}).items() if name not in chosen}


class Program:
    """What `jit` returns, called as what `jax.jit` returns.

    By itself it is compiled with the options of the default platform, once for each set of them, since
    XLA_FLAGS may change; as a part of another program, or without options, as `jax.jit` would.
    """

    def __init__(self, function: Callable[..., Any], arguments: dict[str, Any], those: Options):
        functools.update_wrapper(self, function)
        self._options = those
        self._jit = functools.partial(jax.jit, function, **arguments)
        self._plain: Any = self._jit()
        self._with: dict[tuple[Any, ...], Any] = {}
        self.trace: Callable[..., jax.stages.Traced] = self._plain.trace
        self.lower: Callable[..., jax.stages.Lowered] = self._plain.lower  # `options` are left to `compile`
        self.eval_shape: Callable[..., Any] = self._plain.eval_shape

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result; compiles at the first call for these shapes.

        Raises:
            StructureError: arrays are on devices that no one program runs on.
        """
        leaves = jax.tree.leaves((args, kwargs))
        chosen = options(jax.default_backend(), self._options, len(leaves))
        try:
            if not chosen or is_traced(leaves):  # JAX takes options for a whole program only
                return self._plain(*args, **kwargs)
            pairs = tuple(chosen.items())
            if pairs not in self._with:
                self._with[pairs] = self._jit(compiler_options=chosen)
            return self._with[pairs](*args, **kwargs)
        except ValueError as error:
            _, found, names = str(error).partition(
                "Received incompatible devices for jitted computation. Got "
            )
            if not found:
                raise
            raise StructureError(
                f"arrays that belong together are on different devices: {names.rstrip('.')}. Put them on the "
                "same, by jax.device_put(tree, device), or on one mesh: jax.device_put(tree, "
                "jax.NamedSharding(mesh, jax.P())) puts a copy on each of its devices."
            ) from error

    def cache_size(self) -> int:
        """For how many arguments, by shape and type, it has been compiled, or was made part of a program."""
        return sum(each._cache_size() for each in (self._plain, *self._with.values()))

    def compiled(self, *args: Any, **kwargs: Any) -> jax.stages.Compiled:
        """What runs for arguments of these shapes."""
        lowered: Any = self.lower(*args, **kwargs)
        arrays = len(jax.tree.leaves((args, kwargs)))
        return lowered.compile(compiler_options=options(jax.default_backend(), self._options, arrays))
