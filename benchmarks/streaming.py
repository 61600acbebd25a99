"""Products over a stream of batches against the same batches in memory, accumulated under `lax.scan`.

Goal: at most 1.10. `slow source` spends as long on making a batch as a product of it takes: with reading
and computing side by side a pass over b batches takes (b + 1) / b of one without waiting, not 2.
"""

import time

import jax
import numpy as np

import spectra
from benchmarks import problems
from benchmarks.settings import Settings
from benchmarks.timing import alternate, median_ms, ratio, spread


def measure(name: str, size: int, rounds: int = 9) -> list[str]:
    loss_fn, params, data = getattr(problems, name)()
    data = jax.tree.map(np.asarray, data)
    count = jax.tree.leaves(data)[0].shape[0] // size
    data = jax.tree.map(lambda x: x[: count * size], data)
    batches = [jax.tree.map(lambda x, i=i: x[i * size : (i + 1) * size], data) for i in range(count)]
    v = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), params)
    memory = spectra.HessianOperator(loss_fn, params, data, microbatch=size, linearize=False)
    stream = spectra.HessianOperator(loss_fn, params, batches)
    times = alternate({"in memory": lambda: memory @ v, "stream": lambda: stream @ v}, rounds=rounds)
    pause = median_ms(times["stream"]) / count / 1e3

    def slow():
        for batch in batches:
            time.sleep(pause)
            yield batch

    late = spectra.HessianOperator(loss_fn, params, slow)
    times |= alternate({"slow source": lambda: late @ v}, rounds=5)
    rows = [
        f"| {name}, {count} batches of {size} | {what} | {median_ms(t):.1f} | {spread(t):.0%} | {share} |"
        for what, t, share in (
            ("in memory, microbatches", times["in memory"], "1"),
            ("stream", times["stream"], f"{ratio(times, 'stream', 'in memory'):.2f}"),
        )
    ]
    both = median_ms(times["slow source"]) / median_ms(times["stream"])
    rows.append(
        f"| {name}, {count} batches of {size} | stream from a slow source | "
        f"{median_ms(times['slow source']):.1f} | {spread(times['slow source']):.0%} | "
        f"{both:.2f} of the stream, {1 + 1 / count:.2f} if reading and computing overlap, 2.00 if not |"
    )
    return rows


def main(settings: Settings) -> list[str]:
    head = ["| data | what | ms | spread | / in memory |", "|---|---|---|---|---|"]
    if settings.tiny:
        return head + measure("mlp", 1024, 1)
    return head + measure("mlp", 256) + measure("transformer", 2)


if __name__ == "__main__":
    print("\n".join(main(Settings())))
