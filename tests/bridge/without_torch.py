"""Run as a program: load exported folders where importing PyTorch is impossible, and compare.

Usage: python without_torch.py FOLDER... Each folder holds a model and `case.npz` with
the inputs (`input/<index>`) and PyTorch's floating outputs (`output/<index>`).
"""

import sys


class _Blocker:
    """Refuse torch and everything below it."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is blocked in this process")


sys.meta_path.insert(0, _Blocker())  # type: ignore[arg-type]

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from spectra import bridge  # noqa: E402
from spectra.bridge import _structure  # noqa: E402


def evaluate(model, params, leaves):
    args, kwargs = _structure.unflatten(model.graph.input_tree, leaves)
    return model.apply(params, *args, **kwargs)


def main(folders: list[str]) -> None:
    for folder in folders:
        model = bridge.load(folder)
        data = np.load(f"{folder}/case.npz")
        leaves = [data[f"input/{i}"] for i in range(len(model.graph.inputs))]
        outputs = jax.tree.leaves(jax.jit(evaluate, static_argnums=0)(model, model.params, leaves))
        outputs = [x for x in outputs if jnp.issubdtype(x.dtype, jnp.floating)]
        expected = [data[k] for k in sorted(k for k in data.files if k.startswith("output/"))]
        error = max(
            float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(outputs, expected, strict=True)
        )
        print(folder, error)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1:])
