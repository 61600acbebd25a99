"""Signs by a mixed index: as random as moved parameters need them."""

import jax
import jax.numpy as jnp
import numpy as np

from spectra.base.draws import cheap_signs

SHAPES = [(), (0, 3), (100, 41), (4100,), (5, 4, 205)]


def test_signs_are_balanced_and_tell_keys_arrays_and_neighbours_apart():
    """Sums over n = 4,100 products: by Hoeffding each exceeds 6 sqrt(n) with probability 2 exp(-18), 3e-8."""
    like = [jnp.zeros(shape, jnp.float32) for shape in SHAPES]
    program = jax.jit(cheap_signs)
    rows = []
    for seed in range(4):
        signs = program(jax.random.key(seed), like)
        assert [x.shape for x in signs] == SHAPES
        assert all(x.dtype == jnp.float32 for x in signs)
        rows += [np.ravel(x) for x in signs[2:]]
    rows = np.array(rows)
    assert (np.abs(rows) == 1).all()
    limit = 6 * rows.shape[1] ** 0.5
    assert np.abs(rows.sum(axis=1)).max() <= limit
    products = rows @ rows.T - np.diag([rows.shape[1]] * len(rows))
    assert np.abs(products).max() <= limit
    for lag in (1, 2, 41, 205, 1024):
        assert np.abs((rows[:, lag:] * rows[:, :-lag]).sum(axis=1)).max() <= limit
