"""Matrix products of groups of rows, as mixtures of experts use them."""

import jax.numpy as jnp
from jax import lax

from spectra.bridge._errors import BridgeError
from spectra.bridge._promotion import cast
from spectra.bridge._registry import aten, register


def _sizes(offs):
    return jnp.diff(offs, prepend=jnp.zeros(1, offs.dtype))


@register("transformers.grouped_mm_fallback.default")
def grouped_rows(input, weight, offs):
    """Rows `offs[g - 1]` to `offs[g]` of (rows, inside) times `weight[g]`; 0 beyond the last group."""
    return lax.ragged_dot(input, weight, cast(_sizes(offs), jnp.int32))


@aten("_grouped_mm.default")
def grouped_mm(self, mat2, offs=None, bias=None, out_dtype=None):
    """Groups of rows, of columns or of the summed axis, by which of the operands are stacks of matrices."""
    if bias is not None:
        raise BridgeError("_grouped_mm with a bias: add it to the result")
    if offs is None:
        out = jnp.matmul(self, mat2)
    elif self.ndim == 2 and mat2.ndim == 3:
        out = grouped_rows(self, mat2, offs)
    elif self.ndim == 3 and mat2.ndim == 2:
        out = grouped_rows(mat2.T, jnp.swapaxes(self, 1, 2), offs).T
    elif self.ndim == mat2.ndim == 2:
        position = jnp.arange(self.shape[1])
        inside = (position >= (offs - _sizes(offs))[:, None]) & (position < offs[:, None])
        out = jnp.einsum("mk,gk,kn->gmn", self, cast(inside, self.dtype), mat2)
    else:
        raise BridgeError(f"_grouped_mm of shapes {self.shape} and {mat2.shape} with offsets")
    return out if out_dtype is None else cast(out, out_dtype)
