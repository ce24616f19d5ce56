# SPDX-License-Identifier: MIT
"""What is in a GGUF: `inspect_file`, whether it is sound: `verify_file`, and back to stock types: `decode_file`."""

from entrollm_gguf.inspect.decode import DecodeReport, decode_file
from entrollm_gguf.inspect.report import FileReport, TensorReport, inspect_file
from entrollm_gguf.inspect.verify import VerifyReport, verify_file

__all__ = [
    "DecodeReport",
    "FileReport",
    "TensorReport",
    "VerifyReport",
    "decode_file",
    "inspect_file",
    "verify_file",
]
