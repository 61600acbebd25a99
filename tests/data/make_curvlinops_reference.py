"""Make curvlinops.npz: curvature matrices of one PyTorch network by curvlinops 3.0.1, in float64.

    pip install curvlinops-for-pytorch==3.0.1
    python tests/data/make_curvlinops_reference.py

The network is 4-5-3 with tanh, on 12 examples in batches of 5, 5 and 2, with the mean cross-entropy and
the mean squared error of PyTorch. Saved are weights and data, and per loss the Hessian, Gauss-Newton
matrix, exact Fisher (type 2), empirical Fisher, and the empirical Fisher of sampled targets, which is the
Monte Carlo Fisher of these samples. Rows follow the order of `named_parameters`.
"""

from pathlib import Path

import numpy as np
import torch
from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
from torch import nn


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    params = dict(model.named_parameters())
    x = torch.randn(12, 4, dtype=torch.float64)
    targets = {
        "cross_entropy": torch.randint(0, 3, (12,)),
        "mse": torch.randn(12, 3, dtype=torch.float64),
    }
    outputs = model(x).detach()
    sampled = {
        "cross_entropy": torch.distributions.Categorical(logits=outputs).sample(),
        "mse": outputs + torch.randn_like(outputs) / np.sqrt(2),
    }
    losses = {"cross_entropy": nn.CrossEntropyLoss(), "mse": nn.MSELoss()}
    saved = {f"params/{name}": p.detach().numpy() for name, p in params.items()} | {"x": x.numpy()}
    for name, loss in losses.items():

        def dense(operator, labels, loss=loss):
            batches = [(x[a:b], labels[a:b]) for a, b in ((0, 5), (5, 10), (10, 12))]
            op = operator(model, loss, list(params.values()), batches)
            return (op @ torch.eye(op.shape[1], dtype=torch.float64)).numpy()

        saved |= {
            f"{name}/targets": targets[name].numpy(),
            f"{name}/sampled": sampled[name].numpy(),
            f"{name}/hessian": dense(HessianLinearOperator, targets[name]),
            f"{name}/ggn": dense(GGNLinearOperator, targets[name]),
            f"{name}/empirical": dense(EFLinearOperator, targets[name]),
            f"{name}/mc": dense(EFLinearOperator, sampled[name]),
        }
    np.savez_compressed(Path(__file__).parent / "curvlinops.npz", **saved)


if __name__ == "__main__":
    main()
