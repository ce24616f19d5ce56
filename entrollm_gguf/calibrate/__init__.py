# SPDX-License-Identifier: MIT
"""Statistics that tell which weights matter: from a text, from text that the model writes itself,
or from an imatrix file."""

from entrollm_gguf.calibrate.gather import gather
from entrollm_gguf.calibrate.imatrix import check_fit, read_imatrix
from entrollm_gguf.calibrate.statistics import Statistics, TensorStatistics

__all__ = ["Statistics", "TensorStatistics", "check_fit", "gather", "read_imatrix"]
