# SPDX-License-Identifier: MIT
"""The named malformed cases through the C codec: it refuses what the document says to refuse, for
the reason the document gives."""

from __future__ import annotations

import numpy as np
import pytest
from malformed.cases import CASES, NAME

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType
from entrollm_gguf.errors import FormatError

TYPES = {1: EntropyType.EQ8, 2: EntropyType.EQ4, 3: EntropyType.EBF16}

# what ggml_entropy_status_str says for each rule of the document
MESSAGES = {
    "truncated": "shorter",
    "bad-magic": "magic",
    "old-version": "version 1, .* convert the model again",
    "bad-version": "a format version",
    "bad-kind": "another type",
    "bad-shape": "shape",
    "bad-mode": "mode",
    "bad-layout": "layout",
    "bad-reserved": "reserved",
    "bad-scale": "scale or offset",
    "bad-table": "code parameters",
    "bad-index": "index",
    "bad-hash": "hash",
    "bad-stream": "exactly its codes",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case):
    data, kind, ne = case.build()
    payload = np.frombuffer(data, np.uint8)
    shape = (ne[1], ne[0]) if ne[2] == 1 else (ne[2], ne[1], ne[0])
    if case.verdict == "reject":
        with pytest.raises(FormatError, match=MESSAGES[case.rule]):
            codec.Payload(TYPES[kind], payload, shape)
        return
    opened = codec.Payload(TYPES[kind], payload, shape, NAME)
    assert opened.codes().shape == shape  # in bounds, whatever the bits
    with pytest.raises(FormatError, match=MESSAGES[case.rule]):
        opened.verify()


def test_every_rule_has_a_case():
    assert {case.rule for case in CASES} == set(MESSAGES)
    assert len({case.name for case in CASES}) == len(CASES)
