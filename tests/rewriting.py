# SPDX-License-Identifier: MIT
"""GGUF files that no writer makes: the header of a sound file is written again with other keys or
other tensor infos."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Info:
    """What the header says of one tensor."""

    name: bytes
    dims: list[int]  # columns first
    type: int
    offset: int  # in the data section


def text(value: bytes | str) -> bytes:
    """A string as it stands in a GGUF."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: bytes | str, type_id: int, raw: bytes) -> bytes:
    """A key, its GGUF type (4 u32, 6 f32, 8 string, 9 array) and its value's bytes."""
    return text(name) + struct.pack("<I", type_id) + raw


def array(type_id: int, *items: bytes) -> bytes:
    """The bytes of an array value."""
    return struct.pack("<IQ", type_id, len(items)) + b"".join(items)


def rewrite(
    source: Path, out: Path, *, keys: Sequence[bytes] = (), without: str = "", edit: Callable[[dict[str, Info]], None] | None = None
) -> Path:
    """Write source again with other keys and tensor infos; the data stays.

    Args:
        keys: to be added, see `key`.
        without: name of a key to leave out.
        edit: changes the infos, by name.
    """
    import gguf

    reader, data = gguf.GGUFReader(source), source.read_bytes()
    infos = {t.name: Info(bytes(t.field.parts[1]), t.shape.tolist(), int(t.tensor_type), int(t.field.parts[5][0])) for t in reader.tensors}
    if edit:
        edit(infos)
    fields = [f for f in reader.fields.values() if not f.name.startswith("GGUF.") and f.name != without]
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(fields) + len(keys))
    head += b"".join(data[f.offset : f.offset + sum(int(p.nbytes) for p in f.parts)] for f in fields) + b"".join(keys)
    for one in infos.values():
        head += text(one.name) + struct.pack(f"<I{len(one.dims)}QIQ", len(one.dims), *one.dims, one.type, one.offset)
    out.write_bytes(head + bytes(-len(head) % 32) + data[reader.data_offset :])
    return out
