# SPDX-License-Identifier: MIT
"""Importance matrices must hold sums of squares, and belong to the model that is converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from entrollm_gguf.calibrate import check_fit, read_imatrix
from entrollm_gguf.calibrate.statistics import Statistics, TensorStatistics
from entrollm_gguf.errors import ConversionError, ConversionWarning, FormatError
from entrollm_gguf.gguf_io.patched import import_gguf

SHAPES = {
    "token_embd.weight": (500, 64),
    "blk.0.attn_q.weight": (96, 64),
    "blk.0.ffn_up_exps.weight": (4, 32, 64),
    "blk.1.attn_q.weight": (96, 64),
}


def of(**slabs_and_columns: tuple[int, int]) -> Statistics:
    named = {f"blk.{key[-1]}.{key[:-2]}.weight": TensorStatistics(np.ones(shape, np.float32)) for key, shape in slabs_and_columns.items()}
    return Statistics("test", named)


def test_one_that_fits():
    check_fit(Path("i.gguf"), of(attn_q_0=(1, 64), ffn_up_exps_0=(4, 64), attn_q_1=(1, 64)), SHAPES)


@pytest.mark.parametrize(
    "statistics, words",
    [
        (of(ffn_up_exps_0=(8, 64)), "blk.0.ffn_up_exps.weight has 8 matrices in the imatrix and 4 in the model"),
        (of(ffn_up_exps_0=(1, 64)), "has 1 matrices in the imatrix and 4"),
        (of(attn_q_0=(1, 32)), "blk.0.attn_q.weight has 32 columns in the imatrix and 64 in the model"),
        (of(attn_q_0=(1, 64), attn_q_2=(1, 64)), r"has blk.2.attn_q.weight \(1 in all\), which the model lacks"),
        (of(attn_x_0=(1, 64)), "knows none of this model's tensors"),
    ],
)
def test_of_another_model(statistics, words):
    with pytest.raises(ConversionError, match=rf"i\.gguf: .*{words}.*; this imatrix belongs to another model"):
        check_fit(Path("i.gguf"), statistics, SHAPES)


def test_layers_without_values_are_told():
    with pytest.warns(ConversionWarning, match="no values for layers 1"):
        check_fit(Path("i.gguf"), of(attn_q_0=(1, 64), ffn_up_exps_0=(4, 64)), SHAPES)


@pytest.mark.parametrize("sums, counts", [([1.0, -1.0], [3.0]), ([1.0, 1.0], [-3.0]), ([np.nan, 1.0], [3.0]), ([1.0, np.inf], [3.0])])
def test_values_that_are_no_sums_of_squares(tmp_path, sums, counts):
    path = tmp_path / "i.gguf"
    writer = import_gguf().GGUFWriter(path, "imatrix")
    writer.add_tensor("blk.0.attn_q.weight.in_sum2", np.float32([sums]))
    writer.add_tensor("blk.0.attn_q.weight.counts", np.float32([counts]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"i\.gguf: blk.0.attn_q.weight has no valid sums and counts"):
        read_imatrix(path)
