# SPDX-License-Identifier: MIT
"""Whether a file is whole and every entropy-coded tensor decodes to exactly its codes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from entrollm_gguf.codec import Payload
from entrollm_gguf.errors import FormatError
from entrollm_gguf.gguf_io.loader import why_not_loaded
from entrollm_gguf.gguf_io.reader import ModelFile, TensorEntry, open_model
from entrollm_gguf.progress import Progress

_MIN_ALIGNMENT = 32  # ggml's backends take nothing less from a mapping
# Files that are loaded beside a model. Whatever else stands in general.type is not looked at by
# llama.cpp.
_NO_MODELS = ("adapter", "mmproj", "imatrix")


@dataclass(frozen=True)
class VerifyReport:
    """What was checked. `problems` is empty for a sound file."""

    path: str
    n_tensors: int
    n_coded: int  # entropy-coded tensors: each has a hash, and its codes are walked through. Stock types carry nothing to check
    problems: tuple[str, ...]


def verify_file(path: str | Path, *, threads: int | None = None, progress: Progress | None = None) -> VerifyReport:
    """Check length, structure, hashes and codes; and, where these are right, that llama.cpp loads
    the file.

    Raises:
        FormatError: the file cannot be read as a GGUF at all (cut in its header, not a GGUF).
        RuntimeMissingError, ToolError: the patched runtime is not installed, or does not start.

    >>> from entrollm_gguf import verify_file
    >>> report = verify_file("model.gguf")
    >>> report.n_tensors, report.n_coded, report.problems
    (21, 16, ())
    """
    model = open_model(Path(path))
    problems = _check_length(model) + _check_alignment(model)
    entries = list(model.tensors())
    total = sum(e.n_bytes for e in entries)
    done = 0
    for entry in entries:
        if entry.kind is not None:
            problems += _check_coded(entry, threads)
        done += entry.n_bytes
        if progress:
            progress(done, total, entry.name, "bytes")
    if not problems:
        is_model = model.text("general.type") not in _NO_MODELS and model.text("general.architecture") != "clip"
        # the parts of a model are loaded with the first one; parts of anything else are files of
        # their own
        for part in model.paths[:1] if is_model else model.paths:
            reason = why_not_loaded(part, is_model=is_model)
            problems += [f"llama.cpp {reason}"] if reason else []
    return VerifyReport(str(path), len(entries), sum(e.kind is not None for e in entries), tuple(problems))


def _check_length(model: ModelFile) -> list[str]:
    """A GGUF ends with the padding of its last tensor."""
    problems = []
    for path, reader in zip(model.paths, model.readers):
        if not reader.tensors:
            continue
        last = max(reader.tensors, key=lambda t: int(t.data_offset))
        end = int(last.data_offset) + int(last.n_bytes)
        end += -end % int(reader.alignment)
        size = path.stat().st_size
        if size < end:
            problems.append(f"{path}: {end - size} bytes are missing at the end")
        elif size > end:
            problems.append(f"{path}: {size - end} bytes too many at the end")
    return problems


def _check_alignment(model: ModelFile) -> list[str]:
    small = [reader.alignment for reader in model.readers if reader.alignment < _MIN_ALIGNMENT]
    return [f"general.alignment is {small[0]}, llama.cpp needs at least {_MIN_ALIGNMENT}"] if small else []


def _check_coded(entry: TensorEntry, threads: int | None) -> list[str]:
    label = f"tensor {entry.name}"
    if entry.n_elements == entry.shape[-1]:
        return [f"{label}: has one dimension; llama.cpp reads such tensors as floats"]
    try:
        Payload(entry.kind, entry.data, entry.shape, entry.name, label=label).verify(threads)
    except FormatError as error:
        return [str(error)]
    return []
