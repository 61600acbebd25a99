"""The complete table: importing this module registers every operator."""

from spectra.bridge import (  # noqa: F401
    _ops_activation,
    _ops_attention,
    _ops_cast,
    _ops_compare,
    _ops_complex,
    _ops_control,
    _ops_conv,
    _ops_create,
    _ops_factor,
    _ops_fft,
    _ops_grouped,
    _ops_index,
    _ops_linalg,
    _ops_norm,
    _ops_order,
    _ops_pad,
    _ops_pointwise,
    _ops_pool,
    _ops_reduce,
    _ops_resize,
    _ops_rnn,
    _ops_shape,
    _ops_solve,
    _ops_special,
    _ops_sym,
    _packed,
)
from spectra.bridge._registry import ABSENT, OPERATORS, SIGNATURES

__all__ = ["ABSENT", "OPERATORS", "SIGNATURES"]
