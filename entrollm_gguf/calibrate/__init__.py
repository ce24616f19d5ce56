# SPDX-License-Identifier: MIT
"""What a model does with its inputs: statistics that tell which weights matter. From a text, from the model's own text, or from an imatrix file."""

from entrollm_gguf.calibrate.gather import gather
from entrollm_gguf.calibrate.imatrix import check_fit, read_imatrix
from entrollm_gguf.calibrate.statistics import Statistics, TensorStatistics

__all__ = ["Statistics", "TensorStatistics", "check_fit", "gather", "read_imatrix"]
