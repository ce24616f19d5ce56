# SPDX-License-Identifier: MIT
"""Rounding with error feedback (GPTQ, arXiv 2210.17323) on a uniform grid whose codes are
entropy-coded.

Columns are rounded to nearest one after the other; the error of each is compensated in the columns
still to come, as far as their inputs are correlated. Taking the length of the codes into account
when rounding was tried and brought nothing (docs/quantization.md).
"""

from __future__ import annotations

import numpy as np

_DAMPING = 0.01  # of the Hessian's mean diagonal, added to it
_BLOCK = 64  # columns whose errors are passed on together
_AT_ONCE = 1 << 24  # weights that are worked on at a time; further rows wait


def workspace(n_cols: int) -> int:
    """Memory that `round_with_feedback` and `fitted_scales` take beside the weights, in f32
    numbers. The inversion runs in f64; 50 bytes for each number of the Hessian were measured."""
    return 13 * n_cols * n_cols


def round_with_feedback(weights: np.ndarray, steps: np.ndarray, hessian: np.ndarray, top: int) -> np.ndarray:
    """Codes q such that (w - steps q) H (w - steps q)^T is small.

    Args:
        weights: f32 (n_rows, n_cols).
        steps: f32 (n_rows,), above 0.
        hessian: f32 (n_cols, n_cols), mean of x x^T; any damping is added here.
        top: codes lie in -top..top.
    Returns:
        int8, the shape of weights.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes = np.empty(weights.shape, np.int8)
    with torch.inference_mode():
        upper = _inverse_factor(torch.from_numpy(np.array(hessian, np.float32)).to(device))
        rows = max(1, _AT_ONCE // weights.shape[1])
        for begin in range(0, len(weights), rows):  # rows are independent of each other
            s = slice(begin, begin + rows)
            w = torch.from_numpy(np.array(weights[s], np.float32)).to(device)
            step = torch.from_numpy(np.ascontiguousarray(steps[s], np.float32)).to(device)
            codes[s] = _round(w.T.contiguous(), step, upper, top).T.cpu().numpy()
    return codes


def _round(remaining, step, upper, top: int):
    """Codes i8 (n_cols, n_rows) of weights f32 (n_cols, n_rows), which are overwritten: columns are
    taken one by one, so they are contiguous here."""
    import torch

    inverse, codes = 1 / step, torch.empty(remaining.shape, dtype=torch.int8, device=remaining.device)
    n_cols, n_rows = remaining.shape
    for begin in range(0, n_cols, _BLOCK):
        end = min(begin + _BLOCK, n_cols)
        errors = torch.empty((end - begin, n_rows), device=remaining.device)
        for j in range(begin, end):
            q = torch.round(remaining[j] * inverse).clamp_(-top, top)
            codes[j] = q
            error = (remaining[j] - q * step) / upper[j, j]
            errors[j - begin] = error
            if j + 1 < end:
                remaining[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        if end < n_cols:
            remaining[end:].addmm_(upper[begin:end, end:].T, errors, alpha=-1)
    return codes


def fitted_scales(weights: np.ndarray, codes: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """The scale s of each row for which (w - s q) H (w - s q)^T is least, f64 (n_rows,); 0 for a
    row of zeros.

    Args:
        weights: f32 (n_rows, n_cols).
        codes: int8, the same shape.
        hessian: as for `round_with_feedback`.
    """
    q = codes.astype(np.float32)
    damped = np.array(hessian, np.float32)
    damped[np.diag_indices_from(damped)] += _DAMPING * np.diagonal(damped).mean()
    weighted = q @ damped
    energy = np.einsum("ij,ij->i", weighted, q, dtype=np.float64)
    return np.einsum("ij,ij->i", weighted, weights, dtype=np.float64) / np.where(energy > 0, energy, np.inf)


def _inverse_factor(hessian):
    """Upper triangular U with U^T U the inverse of the damped Hessian, f32."""
    import torch

    h = hessian.double()
    mean = h.diagonal().mean().clamp_min(1e-30)
    for damping in (_DAMPING, 10 * _DAMPING, 100 * _DAMPING):  # rounding errors can make a Hessian of few tokens indefinite
        damped = h.clone()
        damped.diagonal().add_(damping * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            break
    else:
        factor = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()
