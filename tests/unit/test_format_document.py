# SPDX-License-Identifier: MIT
"""The worked example of docs/format.md: both decoders read what the document says, and the
reference encoder makes the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from reference import decoder as ref_decoder
from reference import encoder as ref_encoder
from reference import lanes

from entrollm_gguf import codec
from entrollm_gguf.codec import EntropyType

DOCUMENT = Path(__file__).parents[2] / "docs" / "format.md"
NAME = "example.weight"
CODES = np.array([[0, 1, 0, -1] * 8, [0] * 28 + [4, 5, 9, 100]], np.int8)


def worked_example() -> bytes:
    """The slab of the document's listing."""
    listing = re.search(r"```slab\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert listing
    slab = bytearray(1024)
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
    ref_decoder.verify(slab, NAME)
    assert np.array_equal(ref_decoder.decode_codes(slab), CODES)
    assert np.array_equal(ref_decoder.decode_weights(slab), CODES * np.float32(0.5))
    name, rows = ref_decoder.decode_plain(slab)
    assert name == "Q8_0" and rows == b"".join(b"\x00\x38" + row.tobytes() for row in CODES)


def test_the_reference_encoder_writes_it():
    code = ref_encoder.make_code(3, 1, 1, -2)
    assert ref_encoder.encode_slab(CODES, 1, np.float16([0.5]), name=NAME, code=code, device_size=1792) == worked_example()


def test_the_codec_reads_it():
    example = np.frombuffer(worked_example(), np.uint8)
    codec.Payload(EntropyType.EQ8, example, (2, 32), NAME).verify()
    assert np.array_equal(codec.Payload(EntropyType.EQ8, example, (2, 32)).codes(), CODES)
    device = codec.Payload(EntropyType.EQ8, example, (2, 32), NAME).to_lanes()
    slab = lanes.parse(device.tobytes(), ref_decoder.parse_slab(worked_example(), 1, 32, 2, 1))
    lanes.verify(slab)
    assert np.array_equal(lanes.decode_codes(slab), CODES)


def test_the_tail_shapes_are_the_document_s():
    """5.2: digits, classes and planes of each shape."""
    rows = re.findall(r"^\| (\d+) \| ([\d, ]+|none) \| (\d+) \| (\d+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    shapes = {int(number): tuple(map(int, re.findall(r"\d", digits))) for number, digits, _, _ in rows}
    assert shapes == ref_decoder.TAIL_SHAPES
    for number, _, n_classes, n_planes in rows:
        code = ref_decoder.Code(4, 0, int(number), 0, ())
        assert (code.n_classes, code.n_planes) == (int(n_classes), int(n_planes))
