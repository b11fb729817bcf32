"""The recursions of M-FAC (arXiv:2107.03356), one gradient at a time, in any precision.

The package does not use them: in float32 they lose all digits at small dampings.
"""

import torch
from torch import Tensor


def static_vectors(gradients: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return v_i = H_{i-1}^{-1} g_i, ``[m, d]``, and the denominators q_i = m + g_i^T v_i."""
    m = len(gradients)
    vectors = gradients / damping
    denominators = gradients.new_empty(m)
    for i, vector in enumerate(vectors):
        denominators[i] = m + gradients[i] @ vector
        factors = gradients[i + 1 :] @ vector / denominators[i]
        vectors[i + 1 :] -= factors.unsqueeze(1) * vector
    return vectors, denominators


def static_diagonal(gradients: Tensor, damping: float) -> Tensor:
    """Return the diagonal of H^{-1} as the recursion finds it."""
    vectors, denominators = static_vectors(gradients, damping)
    found = torch.full_like(gradients[0], 1 / damping)
    for vector, denominator in zip(vectors, denominators, strict=True):
        found -= vector.square() / denominator
    return found


def dynamic_cores(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return D, upper triangular, and B, lower triangular, from G G^T."""
    m = len(gram)
    d = (gram / damping).triu()
    for i in range(1, m):
        factors = d[:i, i] / (m + d.diagonal()[:i])
        d[i, i:] -= factors @ d[:i, i:]
    b = torch.eye(m, dtype=gram.dtype) / damping
    for i in range(1, m):
        b[i] -= (d[:i, i] / (m + d.diagonal()[:i])) @ b[:i]
    return d, b


def dynamic_product(gradients: Tensor, x: Tensor, damping: float) -> Tensor:
    """Return H^{-1} x as the recursion finds it, in the precision of the gradients."""
    m = len(gradients)
    d, b = dynamic_cores(gradients @ gradients.T, damping)
    y = gradients @ x / damping
    for i in range(1, m):
        y[i] -= (d[:i, i] / (m + d.diagonal()[:i])) @ y[:i]
    return x / damping - gradients.T @ (b.T @ (y / (m + d.diagonal())))
