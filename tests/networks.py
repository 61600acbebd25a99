"""A small network with its curvature matrices in NumPy float64: no JAX, no automatic differentiation.

f(x) = A tanh(B x + c) with 2 inputs, 3 hidden units and 3 outputs; parameters in tree order A, B, c.
"""

import jax
import jax.numpy as jnp
import numpy as np

N, INPUTS, HIDDEN, OUTPUTS = 11, 2, 3, 3


def model_fn(params, x):
    return jnp.tanh(x @ params["B"].T + params["c"]) @ params["A"].T


def cross_entropy(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1))


def half_square(outputs, targets):
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, -1))


def binary(logits, targets):
    """Binary cross-entropy with logits, the mean over all numbers."""
    return jnp.mean(jax.nn.softplus(logits) - targets * logits)


class Network:
    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.A = rng.standard_normal((OUTPUTS, HIDDEN))
        self.B = rng.standard_normal((HIDDEN, INPUTS))
        self.c = rng.standard_normal(HIDDEN) / 2
        self.x = rng.standard_normal((N, INPUTS))
        self.labels = rng.integers(0, OUTPUTS, N)
        self.real = rng.standard_normal((N, OUTPUTS))
        self.bits = rng.integers(0, 2, (N, OUTPUTS)) * 1.0

    def params(self):
        return {k: jnp.asarray(getattr(self, k)) for k in ("A", "B", "c")}

    def outputs(self):
        return np.tanh(self.x @ self.B.T + self.c) @ self.A.T

    def jacobians(self):
        """∂f/∂θ for each example: (N, OUTPUTS, n)."""
        rows = []
        for x in self.x:
            h = np.tanh(self.B @ x + self.c)
            inner = self.A * (1 - h**2)  # ∂f/∂(Bx + c)
            by_a = np.kron(np.eye(OUTPUTS), h[None])
            by_b = (inner[:, :, None] * x).reshape(OUTPUTS, -1)
            rows.append(np.concatenate([by_a, by_b, inner], axis=1))
        return np.array(rows)

    def residual_term(self, gradients):
        """Σ_i Σ_k g_ik ∇²f_k(x_i), the part of a Hessian that the Gauss-Newton matrix leaves out."""
        size = OUTPUTS * HIDDEN + HIDDEN * INPUTS + HIDDEN
        total = np.zeros((size, size))
        for x, g in zip(self.x, gradients, strict=True):
            h = np.tanh(self.B @ x + self.c)
            d, dd = 1 - h**2, -2 * h * (1 - h**2)
            pre = np.zeros((HIDDEN, size))  # ∂(Bx + c)_j/∂θ
            for j in range(HIDDEN):
                start = OUTPUTS * HIDDEN + j * INPUTS
                pre[j, start : start + INPUTS] = x
                pre[j, OUTPUTS * HIDDEN + HIDDEN * INPUTS + j] = 1
            for k in range(OUTPUTS):
                for j in range(HIDDEN):
                    total += g[k] * self.A[k, j] * dd[j] * np.outer(pre[j], pre[j])
                    cross = np.zeros((size, size))
                    cross[k * HIDDEN + j] = d[j] * pre[j]
                    total += g[k] * (cross + cross.T)
        return total


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def sandwich(jacobians, middles):
    """Σ_i J_iᵀ M_i J_i."""
    return np.einsum("iam,iab,ibn->mn", jacobians, middles, jacobians)


def curvature(name, net):
    """∇²ℓ_i, the gradients ∇ℓ_i and the number of examples that the mean loss divides by."""
    f = net.outputs()
    if name == "cross_entropy":
        p = softmax(f)
        middle = np.einsum("ia,ab->iab", p, np.eye(OUTPUTS)) - np.einsum("ia,ib->iab", p, p)
        return middle / N, (p - np.eye(OUTPUTS)[net.labels]) / N
    if name == "half_square":
        return np.repeat(np.eye(OUTPUTS)[None], N, 0) / N, (f - net.real) / N
    s = sigmoid(f)
    return np.einsum("ia,ab->iab", s * (1 - s), np.eye(OUTPUTS)) / f.size, (s - net.bits) / f.size


LOSSES = {"cross_entropy": cross_entropy, "half_square": half_square, "binary": binary}
TARGETS = {"cross_entropy": "labels", "half_square": "real", "binary": "bits"}
