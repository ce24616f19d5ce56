# SPDX-License-Identifier: MIT
"""What is known of each matrix W in y = W x after a text has run through the model. Names and row
orders are those of the GGUF."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class TensorStatistics:
    """Of one tensor. Each array has an entry for each matrix of a stack (experts)."""

    columns: np.ndarray  # f32 (n_slabs, n_cols): mean of x^2 over the tokens that reached the slab; zeros if none did
    # f32 (n_slabs, n_rows): mean of (dL/dy)^2 over all tokens, L the log-probability of a token
    # (gather.py)
    rows: np.ndarray | None = None
    hessians: tuple[Path | None, ...] | None = None  # f32 (n_cols, n_cols) in .npy, for each slab: mean of x x^T; not all None

    def hessian(self, slab: int) -> np.ndarray | None:
        """The mean of x x^T, f32 (n_cols, n_cols), mapped from its file, or None.

        An expert that no token reached gets a diagonal one, the mean of the others' diagonals: how
        its inputs go together is not known, but its rows need scales all the same.
        """
        if self.hessians is None:
            return None
        path = self.hessians[slab]
        if path is None:
            return np.diag(self.columns[[one is not None for one in self.hessians]].mean(axis=0, dtype=np.float32))
        return np.load(path, mmap_mode="r")


@dataclass(frozen=True)
class Statistics:
    """Of a whole model."""

    source: str  # for the file's metadata: how they were gathered, with hashes
    tensors: dict[str, TensorStatistics]  # by GGUF name, "blk.0.attn_q.weight"
