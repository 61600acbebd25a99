# %% [markdown]
# # The edge of stability, for gradient descent and for Adam
#
# Trained with the whole data in every step, a network grows sharper until its steps are as long as stability
# allows, and stays there: [Cohen et al. (2021)](https://arxiv.org/abs/2103.00065) for gradient descent, where
# the edge is $\lambda_1 = 2/\eta$, and [Cohen et al. (2022)](https://arxiv.org/abs/2207.14484) for Adam,
# where it is $38/\eta$ in the metric of its preconditioner. `stable_step` needs neither formula: it gives the
# multiple of any optimizer's own updates at which they turn unstable. At the edge that multiple is one.

# %%
import jax
import jax.numpy as jnp
import optax

import spectra
from spectra.demos import digits

images, labels = digits.load_digits()
batch = (jnp.asarray(images[:300]), jax.nn.one_hot(labels[:300], 10))
keys, widths = jax.random.split(jax.random.key(0), 3), (64, 24, 24, 10)
start = [0.5 * jax.random.normal(keys[i], widths[i : i + 2]) / widths[i] ** 0.5 for i in range(3)]


def loss_fn(params, batch):
    hidden = jnp.tanh(jnp.tanh(batch[0] @ params[0]) @ params[1])
    return 0.5 * jnp.mean(jnp.sum((hidden @ params[2] - batch[1]) ** 2, -1))


for name, optimizer in {"gradient descent": optax.sgd(0.15), "Adam": optax.adam(3e-3)}.items():

    def step(carry, _, optimizer=optimizer):
        updates, state = optimizer.update(jax.grad(loss_fn)(carry[0], batch), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    carry, multiples = (start, optimizer.init(start)), []
    for length in (20, 2980):
        carry = jax.lax.scan(step, carry, length=length)[0]
        op = spectra.HessianOperator(loss_fn, carry[0], batch)
        multiples.append(float(spectra.stable_step(op, optimizer, carry[1], key=jax.random.key(1))))
    print(f"{name}: stable up to {multiples[0]:.2f} times its step at first, {multiples[1]:.3f} at the edge")
    assert multiples[0] > 1.5 and abs(multiples[1] - 1) < 0.1
