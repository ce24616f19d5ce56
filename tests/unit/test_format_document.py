# SPDX-License-Identifier: MIT
"""The worked example of docs/format.md decodes to what the document says, with both decoders; the encoder makes the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from reference import decoder as ref_decoder

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
CODES = np.array([[0, 1, 0, -1] * 8, [0] * 28 + [4, 5, 6, 7]], np.int8)


def worked_example() -> bytes:
    """The slab of the document's listing."""
    listing = re.search(r"```slab\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert listing
    slab = bytearray(1792)
    for line in listing[1].splitlines():
        if line.startswith("#"):
            continue
        match = re.fullmatch(r"@([0-9a-f]{4})(?: x(\d+))?: ([0-9a-f ]+)", line)
        assert match, line
        data = bytes.fromhex(match[3]) * int(match[2] or 1)
        at = int(match[1], 16)
        slab[at : at + len(data)] = data
    return bytes(slab)


def test_the_reference_decoder_reads_it():
    slab = ref_decoder.parse_slab(worked_example(), 1, 32, 2, 1)
    ref_decoder.verify(slab)
    assert np.array_equal(ref_decoder.decode_codes(slab), CODES)
    assert np.array_equal(ref_decoder.decode_weights(slab), CODES * np.float32(0.5))
    name, rows = ref_decoder.decode_plain(slab)
    assert name == "Q8_0" and rows == b"".join(b"\x00\x38" + row.tobytes() for row in CODES)


def test_the_codec_reads_and_writes_it():
    example = np.frombuffer(worked_example(), np.uint8)
    codec.verify(EntropyType.EQ8, example, (2, 32))
    assert np.array_equal(codec.decode(EntropyType.EQ8, example, (2, 32)), CODES)
    assert np.array_equal(codec.encode(EntropyType.EQ8, CODES, np.float16([0.5])).payload, example)
