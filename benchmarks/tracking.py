"""What a tracked run costs: 20 snapshots against the same training without them.

The network is the demo's (85,002 parameters, 1,797 digits) in a plain optax loop, after a step and a snapshot
that compile. Two trainings alternate in parts of a twentieth, one with a snapshot in each part: load of the
machine that comes and goes meets both. `more` is the median over the parts of the ratio of their times, less
one.

Goal: at most 30 % for 20 snapshots, nothing compiled after the first.
"""

import argparse
import statistics
import time
from datetime import date
from pathlib import Path

import jax
import jax.monitoring
import jax.numpy as jnp
import optax

import spectra
from benchmarks import timing
from spectra.demos import digits

PARTS = 20


class Training:
    """A loop over batches that can be run a part at a time."""

    def __init__(self, batches, optimizer, tracker=None):
        self.batches, self.tracker, self.done = batches, tracker, 0
        self.params = digits.MODEL.init(jax.random.key(0), batches[0][0][:1])["params"]
        self.state = optimizer.init(self.params)

        @jax.jit
        def step(params, state, batch):
            gradient = jax.grad(digits.loss_fn)(params, batch)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        self.step = step
        jax.block_until_ready(step(self.params, self.state, batches[0]))
        if tracker is not None:
            tracker(0, self.params)

    def run(self, steps: int) -> float:
        """Seconds of so many steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.done += 1
            batch = self.batches[self.done % len(self.batches)]
            self.params, self.state = self.step(self.params, self.state, batch)
            if self.tracker is not None:
                self.tracker(self.done, self.params)
        jax.block_until_ready(self.params)
        return time.perf_counter() - start


def row(name: str, batches, optimizer, data, steps: int, **options) -> str:
    compiled = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    part = steps // PARTS
    tracker = spectra.SpectrumTracker(
        lambda params: spectra.HessianOperator(digits.loss_fn, params, data), part, **options
    )
    plain, tracked = Training(batches, optimizer), Training(batches, optimizer, tracker)
    jax.monitoring.register_event_duration_secs_listener(listen)
    pairs = [(plain.run(part), tracked.run(part)) for _ in range(PARTS)]
    jax.monitoring.unregister_event_duration_listener(listen)
    history = tracker.history
    later = history.snapshots[1:]
    products = statistics.mean(s.num_matvecs for s in later) if later else 0.0
    more = statistics.median(b / a for a, b in pairs) - 1
    without, with_ = (sum(column) for column in zip(*pairs, strict=True))
    each = 1e3 * statistics.median(s.seconds for s in later) if later else 0.0
    return (
        f"| {name} | {len(data[1]):,} | {len(later)} of {PARTS} | {products:.1f} | {each:.0f} | "
        f"{1e3 * without / steps:.2f} | {without:.1f} | {with_:.1f} | {more:.0%} | {len(compiled)} |"
    )


def main() -> list[str]:
    batch = tuple(map(jnp.asarray, digits.load_digits()))
    part = tuple(x[:512] for x in batch)
    small = [tuple(x[i * 128 : (i + 1) * 128] for x in batch) for i in range(14)]
    descent, adam = optax.sgd(0.2), optax.adam(1e-3)
    return [
        "| loop | examples tracked | snapshots | products each | ms each | ms a training step | "
        "s without | s with | more | compiled after the first |",
        "|---|---|---|---|---|---|---|---|---|---|",
        row("full batch, 2,000 steps", [batch], descent, batch, 2000),
        row("minibatches of 128, 500 epochs (7,000 steps)", small, adam, part, 7000),
        row("minibatches of 128, 30 epochs (420 steps)", small, adam, part, 420),
        row("the same, one batch tracked", small, adam, small[0], 420),
        row("the same with budget=0.3", small, adam, part, 420, budget=0.3),
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).with_name("results") / "tracking.md"
    parser.add_argument("-o", "--output", type=Path, default=default)
    output = parser.parse_args().output
    head = [f"# Tracking, {date.today()}", "", timing.machine(), "", (__doc__ or "").strip(), ""]
    lines = [*head, *main(), ""]
    output.write_text("\n".join(lines))
    print("\n".join(lines))
