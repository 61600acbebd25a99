"""What a tracked run costs: 20 snapshots against the same training without them.

The network is the demo's (85,002 parameters, 1,797 digits), in a plain optax loop, after one step and one
snapshot that compile.

Goal: at most 30 % of the training time for 20 snapshots, nothing compiled after the first.
"""

import argparse
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

SNAPSHOTS = 20


def run(batches, optimizer, tracker, steps: int) -> float:
    """Seconds of a loop over batches; `tracker` is called in every step."""
    params = digits.MODEL.init(jax.random.key(0), batches[0][0][:1])["params"]
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, batch):
        gradient = jax.grad(digits.loss_fn)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    jax.block_until_ready(step(params, state, batches[0]))
    tracker(0, params)
    start = time.perf_counter()
    for i in range(1, steps + 1):
        params, state = step(params, state, batches[i % len(batches)])
        tracker(i, params)
    jax.block_until_ready(params)
    return time.perf_counter() - start


def row(name: str, batches, optimizer, data, steps: int, **options) -> str:
    compiled = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    tracker = spectra.SpectrumTracker(
        lambda params: spectra.HessianOperator(digits.loss_fn, params, data), steps // SNAPSHOTS, **options
    )
    plain = run(batches, optimizer, lambda *_: None, steps)
    tracker_calls = 0

    def tracked(i, params):
        nonlocal tracker_calls
        if i == 1:
            jax.monitoring.register_event_duration_secs_listener(listen)
        tracker(i, params)
        tracker_calls += 1

    seconds = run(batches, optimizer, tracked, steps)
    jax.monitoring.unregister_event_duration_listener(listen)
    history = tracker.history
    taken = len(history) - 1
    each = (seconds - plain) / max(taken, 1)
    products = sum(s.num_matvecs for s in history.snapshots[1:]) / max(taken, 1)
    return (
        f"| {name} | {len(data[1]):,} | {taken} of {SNAPSHOTS} | {products:.1f} | {1e3 * each:.0f} | "
        f"{each / (plain / steps):.0f} | {plain:.2f} | {seconds:.2f} | {seconds / plain - 1:.0%} | "
        f"{history.cost:.0%} | {len(compiled)} |"
    )


def main() -> list[str]:
    batch = tuple(map(jnp.asarray, digits.load_digits()))
    part = tuple(x[:512] for x in batch)
    small = [tuple(x[i * 128 : (i + 1) * 128] for x in batch) for i in range(14)]
    descent, adam = optax.sgd(0.2), optax.adam(1e-3)
    return [
        "| loop | examples in the operator | snapshots | products each | ms each | in training steps | "
        "s without | s with | more | as the history says | compiled after the first |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        row("full batch, 2,000 steps", [batch], descent, batch, 2000),
        row("full batch, 2,000 steps, 512 examples tracked", [batch], descent, part, 2000),
        row("minibatches of 128, 30 epochs (420 steps)", small, adam, part, 420),
        row("the same with budget=0.3", small, adam, part, 420, budget=0.3),
        row("minibatches of 128, 500 epochs (7,000 steps)", small, adam, part, 7000),
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
