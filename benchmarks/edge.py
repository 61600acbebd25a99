"""Networks and optimizers at the edge of stability: what `stable_step` says, and where training turns.

A network is trained on minibatches of digits with a learning rate that falls, then for 200 steps on all of
them with half of what `stable_step` allows. From there, its parameters moved at random by 0.3 % of their
length, the same training goes on, with its updates multiplied by what grows to m in 30 steps and stays there
for 120. It has turned unstable where the loss rises above its value at the start. The smallest such m is
found by bisection. `stable_step` is asked twice: at the first point, before anything of this, and at the end
of the longest run that stays stable, by which time the curvature may be another one.

`Run.rest` goes on to where it is not: five times 2,000 steps on all examples, each with a quarter of what
`stable_step` then allows, which is far enough from the edge not to be drawn to it.

Labels are smoothed (cross-entropy) or the loss is a square, so that there is a minimum to be near: at
interpolation the curvature of the plain cross-entropy falls to zero within the steps that are watched.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import spectra
from spectra.demos import digits

EXAMPLES, BATCH, STEPS, SETTLE, GROWING, WATCHED = 128, 32, 800, 200, 30, 120
ROUNDS, ROUND = 5, 2000
SMOOTHING, MOVED = 0.1, 3e-3


def mlp(p, x):
    """A 64-32-32-10 network with tanh units."""
    return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]


def convolutional(p, x):
    """Two convolutions and a linear layer."""
    h = x.reshape(-1, 8, 8, 1)
    for name, stride in (("a", 1), ("b", 2)):
        h = jax.lax.conv_general_dilated(
            h, p[name], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jax.nn.gelu(h)
    return h.reshape(len(h), -1) @ p["c"]


def attention(p, x):
    """One block of attention over the rows of an image, and a network behind it."""
    h = x.reshape(-1, 8, 8) @ p["embed"] + p["place"]
    q, k, v = (h @ p[name] for name in ("q", "k", "v"))
    h = h + jax.nn.softmax(q @ k.swapaxes(1, 2) / 4, -1) @ v
    h = h + jax.nn.gelu(h @ p["up"]) @ p["down"]
    return h.mean(axis=1) @ p["out"]


def smoothed(logits, labels):
    """Cross-entropy with smoothed labels."""
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), SMOOTHING)
    return optax.softmax_cross_entropy(logits, targets).mean()


def half_square(logits, labels):
    """Half of the squared distance to the label's unit vector."""
    return 0.5 * jnp.mean(jnp.sum((logits - jax.nn.one_hot(labels, 10)) ** 2, axis=1))


NETWORKS = {
    "mlp": (mlp, smoothed, {"a": (64, 32), "b": (32, 32), "c": (32, 10)}),
    "convolutional": (convolutional, half_square, {"a": (3, 3, 1, 4), "b": (3, 3, 4, 4), "c": (64, 10)}),
    "attention": (
        attention,
        smoothed,
        {"embed": (8, 16), "place": (8, 16), "q": (16, 16), "k": (16, 16), "v": (16, 16)}
        | {"up": (16, 32), "down": (32, 16), "out": (16, 10)},
    ),
}
OPTIMIZERS = {
    "sgd": (optax.sgd, 0.1),
    "momentum": (lambda rate: optax.sgd(rate, momentum=0.9), 0.01),
    "adam": (optax.adam, 3e-3),
}
OTHERS = {
    "rmsprop": (lambda rate: optax.rmsprop(rate, decay=0.99), 1e-3),
    "adamw": (lambda rate: optax.adamw(rate, weight_decay=0.1), 3e-3),
    "muon": (optax.contrib.muon, 3e-3),
}


class Run:
    """One network and one optimizer, with programs that are compiled once, by these options of XLA's."""

    def __init__(self, network: str, optimizer, rate: float, seed: int = 0, compiler_options=None):
        model, loss, shapes = NETWORKS[network]
        images, labels = digits.load_digits()
        self.batch = jnp.asarray(images[:EXAMPLES]), jnp.asarray(labels[:EXAMPLES])
        self.optimizer, self.rate, self.seed = optimizer(rate), rate, seed
        self.loss_fn = lambda params, batch: loss(model(params, batch[0]), batch[1])
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        self.params = {
            name: jax.random.normal(key, shape) / np.prod(shape[:-1]) ** 0.5
            for key, (name, shape) in zip(keys, sorted(shapes.items()), strict=True)
        }
        self.state, self.multiple = self.optimizer.init(self.params), 1.0
        self._go = jax.jit(self._steps, compiler_options=compiler_options)

    def prepare(self) -> None:
        """Train, and settle."""
        multiples = jnp.maximum(1 - jnp.arange(STEPS) / STEPS, 0.02)
        key = jax.random.key(self.seed + 1)
        order = jax.vmap(lambda k: jax.random.permutation(k, EXAMPLES)[:BATCH])(jax.random.split(key, STEPS))
        self.params, self.state, _ = self._go(self.params, self.state, multiples, order)
        self.params, self.state, _ = self.go(1e-6, SETTLE)  # the optimizer sees the gradient of all examples
        self.settle(0.5, SETTLE)

    def rest(self) -> None:
        """Train on until the curvature stands still; after `prepare`."""
        for _ in range(ROUNDS):
            self.settle(0.25, ROUND)
        self.settle(0.5, SETTLE)

    def settle(self, share: float, steps: int) -> None:
        """Steps on all examples with this share of the largest stable step."""
        self.multiple = share * float(self.stable_step())
        self.params, self.state, _ = self.go(self.multiple, steps)

    def move(self) -> None:
        """A small step at random, which oscillations grow from."""
        keys = jax.random.split(jax.random.key(self.seed + 2), len(self.params))
        noise = {
            name: jax.random.normal(key, x.shape)
            for key, (name, x) in zip(keys, self.params.items(), strict=True)
        }
        size = MOVED * optax.tree.norm(self.params) / optax.tree.norm(noise)
        self.params = jax.tree.map(lambda p, x: p + size * x, self.params, noise)

    def go(self, multiple: float, steps: int):
        """Parameters, state and losses of further steps on all examples."""
        return self._all(jnp.full(steps, multiple))

    def _all(self, multiples):
        every = jnp.broadcast_to(jnp.arange(EXAMPLES), (len(multiples), EXAMPLES))
        return self._go(self.params, self.state, multiples, every)

    def stable_step(self):
        op = spectra.HessianOperator(self.loss_fn, self.params, self.batch)
        return spectra.stable_step(op, self.optimizer, self.state, key=jax.random.key(self.seed))

    def threshold(self, near: float, width: float = 2.0, tol: float = 0.02) -> tuple[float, float]:
        """The multiple between `near / width` and `near * width` at which training turns unstable, between
        these; the ends themselves where it does not turn there."""
        low, high = near / width, near * width
        while high > (1 + tol) * low:
            middle = (low * high) ** 0.5
            low, high = (low, middle) if self.unstable(middle) else (middle, high)
        return low, high

    def unstable(self, multiple: float) -> bool:
        losses = np.asarray(self._watched(multiple)[2], float)
        return not np.max(losses) <= losses[0]

    def stay(self, multiple: float) -> None:
        """Go to the end of the steps that are watched."""
        self.params, self.state, _ = self._watched(multiple)

    def along(self, multiple: float, after: tuple[int, ...]) -> list[float]:
        """What `stable_step` says after these of the steps that are watched, from where the run is."""
        start, found = (self.params, self.state), []
        for steps in after:
            if steps:
                self.params, self.state, _ = self._all(self._multiples(multiple)[:steps])
            found.append(float(self.stable_step()))
            self.params, self.state = start
        return found

    def _watched(self, multiple: float):
        return self._all(self._multiples(multiple))

    def _multiples(self, multiple: float):
        growing = jnp.geomspace(self.multiple, multiple, GROWING)
        return jnp.concatenate([growing, jnp.full(WATCHED, multiple)])

    def _steps(self, params, state, multiples, order):
        images, labels = self.batch

        def step(carry, item):
            (params, state), (multiple, chosen) = carry, item
            value, gradient = jax.value_and_grad(self.loss_fn)(params, (images[chosen], labels[chosen]))
            updates, state = self.optimizer.update(gradient, state, params)
            return (jax.tree.map(lambda p, u: p + multiple * u, params, updates), state), value

        (params, state), losses = jax.lax.scan(step, (params, state), (multiples, order))
        return params, state, losses
