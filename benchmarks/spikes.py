"""Warnings before spikes of the loss, and none in runs without: a tracker that looks ahead.

A spike is a loss, over all examples, of more than 1.5 times its lowest of the last 50 steps. Five courses
are led into one, slowly enough that it can be seen to come: the learning rate grows by 1.5 or 2 % a step
(gradient descent, momentum, Adam, RMSProp), or the images of a convolutional network become brighter by 1 %
a step, which raises the curvature. Five are not: constant rates, warm-ups that end, a rate that falls.
Minibatches of half of the data in all of them. What nobody can see from the curvature before it happens is
not among them: a rate that jumps, or one batch that is broken.

The tracker measures `stable_step` every five steps on one batch of the size that training uses (its edge is
nearer than that of all examples, as that of the updates is), and warns where its course leads below 1 within
50 steps. Twenty steps of warning are wanted; an oscillation at the edge grows like exp(r t²) for a ramp of
rate r, and shows 10 to 20 steps behind it, which may be as few as none with noise; five pass between two
readings, and a line through eight of them lags a course that bends by half of its length, 18 steps. With the
doubt of the forecast on top that makes 50.
"""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import spectra
from benchmarks.edge import EXAMPLES, OPTIMIZERS, OTHERS, Run

EVERY, AHEAD, CALM, LENGTH = 5, 50, 100, 500
SPIKE, PAST = 1.5, 50


class Course(NamedTuple):
    """What is done to a run after `CALM` steps: factors a step."""

    optimizer: str
    rate: float = 1.0  # growth of the learning rate a step
    start: float = 4.0  # headroom that the rate is set for
    until: float = np.inf  # largest factor of the rate
    brightness: float = 1.0  # growth of the images
    network: str = "mlp"


PROVOKED = {
    "sgd, rate grows": Course("sgd", rate=1.015),
    "momentum, rate grows": Course("momentum", rate=1.02),
    "adam, rate grows": Course("adam", rate=1.015),
    "rmsprop, rate grows": Course("rmsprop", rate=1.02),
    "sgd, images brighten": Course("sgd", brightness=1.01, start=3.0, network="convolutional"),
}
QUIET = {
    "sgd, constant": Course("sgd", start=2.0),
    "momentum, warm-up": Course("momentum", rate=1.02, until=2.0),
    "adam, constant": Course("adam", start=2.5),
    "sgd, warm-up": Course("sgd", rate=1.01, until=2.0, start=3.0),
    "adam, falling": Course("adam", rate=0.99, start=2.5),
}


class Outcome(NamedTuple):
    spike: int | None  # the first step of one
    warned: list[int]  # steps of warnings
    lowest: float  # headroom


def follow(course: Course, seed: int) -> Outcome:
    """Train along a course with a tracker, to the first spike."""
    run = Run(course.network, *(OPTIMIZERS | OTHERS)[course.optimizer], seed=seed)
    images, labels = run.batch
    optimizer, base, half = run.optimizer, 1.0, EXAMPLES // 2

    @jax.jit
    def step(params, state, multiple, batch):
        updates, state = optimizer.update(jax.grad(run.loss_fn)(params, batch), state, params)
        return jax.tree.map(lambda p, u: p + multiple * u, params, updates), state

    def headroom(params, state, multiple, scale):
        op = spectra.HessianOperator(run.loss_fn, params, (scale * images[:half], labels[:half]))
        return spectra.stable_step(op, optimizer, state, key=jax.random.key(0)).multiple / multiple

    tracker = spectra.SpectrumTracker(
        lambda *_: None,  # pyright: ignore[reportArgumentType]  # no snapshots
        10**9,
        measures={"headroom": (EVERY, headroom)},
        warn_below={"headroom": 1.0},
        warn_ahead=AHEAD,
    )
    value = jax.jit(run.loss_fn)
    params, state, rng = run.params, run.state, np.random.default_rng(seed)
    losses, warned = [], []
    for t in range(1, LENGTH):
        if t == CALM:
            op = spectra.HessianOperator(run.loss_fn, params, (images[:half], labels[:half]))
            base = spectra.stable_step(op, optimizer, state, key=jax.random.key(0)).multiple / course.start
        past = max(t - CALM, 0)
        multiple = base * min(course.rate**past, course.until)
        scale = course.brightness**past
        if t >= CALM:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                tracker(t, params, state, multiple, scale)
            warned += [t] * len(caught)
            losses.append(float(value(params, (scale * images, labels))))
            if not losses[-1] <= SPIKE * min(losses[-PAST:]):
                break
        chosen = jnp.asarray(rng.permutation(EXAMPLES)[:half])
        params, state = step(params, state, multiple, (scale * images[chosen], labels[chosen]))
    spiked = not losses[-1] <= SPIKE * min(losses[-PAST:])
    lowest = min(reading.value for reading in tracker.console.readings["headroom"])
    return Outcome(CALM + len(losses) - 1 if spiked else None, warned, lowest)


def table(courses: dict[str, Course], seeds: tuple[int, ...]) -> list[str]:
    """A row for each run."""
    rows = [
        "| run | seed | spike in step | warned in step | steps ahead | least headroom |",
        "|" + "---|" * 6,
    ]
    for name, course in courses.items():
        for seed in seeds:
            found = follow(course, seed)
            ahead = found.spike - found.warned[-1] if found.spike and found.warned else ""
            cells = [name, seed, found.spike or "none", ", ".join(map(str, found.warned)) or "not", ahead]
            rows.append("| " + " | ".join(map(str, cells)) + f" | {found.lowest:.2f} |")
            print(rows[-1], flush=True)
    return rows
