# SPDX-License-Identifier: MIT
"""`inspect_file` tells what is in a GGUF, `verify_file` whether it is sound, and `decode_file`
turns it back to stock types."""

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
