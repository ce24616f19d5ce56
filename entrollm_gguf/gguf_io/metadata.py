# SPDX-License-Identifier: MIT
"""Metadata of a GGUF that is written: copied from its source, or added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.gguf_io.reader import ModelFile

if TYPE_CHECKING:
    import gguf

# Keys that describe how the file was made, and keys that the writer sets itself.
_DROPPED_PREFIXES = ("entrollm.", "split.", "GGUF.")
_DROPPED_KEYS = {"general.file_type", "general.architecture", "general.alignment"}


def copy_metadata(model: ModelFile, writer: gguf.GGUFWriter) -> None:
    """All keys but those that tell how this very file was made: our own, the parts of a split file,
    its type and alignment."""
    array = import_gguf().GGUFValueType.ARRAY
    for field in model.readers[0].fields.values():
        if field.name.startswith(_DROPPED_PREFIXES) or field.name in _DROPPED_KEYS:
            continue
        value_type = field.types[0]
        writer.add_key_value(field.name, field.contents(), value_type, sub_type=field.types[-1] if value_type == array else None)


def add_keys(writer: gguf.GGUFWriter, metadata: dict[str, Any], file_type: int) -> None:
    """general.file_type and further keys.

    Args:
        metadata: str, int, or list of str.
    """
    writer.add_file_type(file_type)
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
