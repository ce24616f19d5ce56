# SPDX-License-Identifier: MIT
"""A GGUF as the source of a conversion: its matrices are coded anew, its metadata and vocabulary
stay as they are.

Tensors come as `SourceModel` hands them over, so that a file of llama.cpp's converter gives the
tensors that its folder gives. Weights that were quantized before are dequantized: what they lost
stays lost, and the new grid adds to it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from entrollm_gguf.convert.eligibility import can_be_q8_0, reason_to_keep
from entrollm_gguf.convert.llama_cpp import Integers, Outline, Output
from entrollm_gguf.errors import ConversionError, ConversionWarning, FormatError
from entrollm_gguf.gguf_io.loader import why_not_loaded
from entrollm_gguf.gguf_io.metadata import add_keys, copy_metadata
from entrollm_gguf.gguf_io.patched import import_gguf
from entrollm_gguf.gguf_io.reader import TensorEntry, open_model

_FLOATS = ("F32", "F16", "BF16")
_ALMOST_EXACT = (*_FLOATS, "Q8_0")  # for all other types the user is warned
_NOT_WEIGHTS = ("F64", "I8", "I16", "I32", "I64")


class _Dequantized:
    """A tensor's weights as f32 or f16, made when numpy asks for them."""

    def __init__(self, path: Path, entry: TensorEntry) -> None:
        self.shape = entry.shape
        self.dtype = np.dtype(np.float16 if entry.type_name == "F16" else np.float32)
        self._path, self._entry = path, entry

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        gguf = import_gguf()
        entry = self._entry
        if entry.type_name in ("F16", "F32"):
            data = np.array(entry.data)  # a copy: the file stays open, and the caller may write into the weights
        else:
            try:
                data = gguf.quants.dequantize(entry.data, gguf.GGMLQuantizationType[entry.type_name])
            except NotImplementedError as error:
                raise ConversionError(
                    f"{self._path}: tensor {entry.name}: weights of type {entry.type_name} cannot be read; convert the model's folder, or a file in F16 or BF16"
                ) from error
        return data.reshape(self.shape)


class GgufSource:
    """A GGUF file, or the first part of a split one.

    Args:
        path: the file.
    Raises:
        FormatError: no complete GGUF.
        ConversionError: no model, or one that is entropy-coded already.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gguf = import_gguf()
        self._model = open_model(path)
        architecture = self._model.text("general.architecture")
        if architecture is None:
            raise FormatError(f"{path}: names no general.architecture, so that nothing can load it; download or convert it again")
        kind = self._model.text("general.type") or "model"
        if kind != "model":
            raise ConversionError(f"{path}: is no model but of the kind {kind!r}; name the model's file")
        self.architecture = architecture
        self._entries = list(self._model.tensors())
        if any(one.kind is not None for one in self._entries):
            raise ConversionError(f"{path}: is entropy-coded already; convert what it was made from, or decode it first (entrollm decode)")

    @property
    def files(self) -> tuple[Path, ...]:
        """All parts."""
        return self._model.paths

    @property
    def integers(self) -> Integers | None:
        """None: integers in GGUF have a scale for each block of 32 or 256 weights, which cannot be
        kept."""
        return None

    @property
    def quantized_bytes(self) -> int | None:
        """Bytes of all tensors where matrices were quantized before; None if none were."""
        if all(one.type_name in _FLOATS for one in self._entries if self._is_matrix(one)):
            return None
        return sum(one.n_bytes for one in self._entries)

    def n_elements(self) -> int:
        """Weights, for progress."""
        return sum(one.n_elements for one in self._entries)

    def each_tensor(self, handle: Callable[[str, Any, int | None], None]) -> None:
        """Call handle(name, data, type) for every tensor: as `SourceModel.each_tensor`.

        Raises:
            ConversionError: a type that cannot be dequantized; whatever `handle` raises passes
                through.
        """
        types = self._gguf.GGMLQuantizationType
        for entry in self._entries:
            if self._is_matrix(entry):
                handle(entry.name, _Dequantized(self.path, entry), types.BF16)
            else:
                # gguf hands out BF16 as bytes, and nobody else widens small tensors of that type
                data = entry.data if entry.type_name not in ("F16", "F32") else entry.data.reshape(entry.shape)
                handle(entry.name, data, types[entry.type_name])

    def _is_matrix(self, entry: TensorEntry) -> bool:
        """Whether llama.cpp would quantize the tensor. What its converter leaves in F32 beside
        other types is left alone."""
        if reason_to_keep(entry.name, entry.shape) is not None:
            # in 16 bits, as it comes from the converter: a stock type is found for it
            if entry.type_name == "F32":
                return self._all_in_f32() and can_be_q8_0(entry.name, entry.shape)
            return entry.type_name in ("F16", "BF16") and len(entry.shape) > 1
        if entry.type_name == "F32":
            return self._all_in_f32()
        return entry.type_name not in _NOT_WEIGHTS

    def _all_in_f32(self) -> bool:
        return all(one.type_name == "F32" for one in self._entries if len(one.shape) > 1)

    def _warn_of_losses(self) -> None:
        """Warn where weights were quantized before, coarser than in eight bits."""
        types = sorted({one.type_name for one in self._entries if self._is_matrix(one) and one.type_name not in _ALMOST_EXACT})
        if types:
            warnings.warn(
                f"{self.path}: weights are {', '.join(types)} already, and what that lost stays lost; convert the original where you have it",
                ConversionWarning,
                stacklevel=2,
            )

    def outline(self) -> Outline:
        """Every tensor; no weights are read."""
        return Outline(
            {one.name: one.shape for one in self._entries},
            frozenset(one.name for one in self._entries if not self._is_matrix(one) and one.type_name not in _FLOATS),
        )

    def heads(self) -> tuple[int, int] | None:
        """Query heads and key-value heads of every layer, or None if they are not the same in all
        or not told."""
        n, n_kv = (self._one_number(f"{self.architecture}.attention.{key}") for key in ("head_count", "head_count_kv"))
        n_kv = n if n_kv is None else n_kv
        return (n, n_kv) if n and n_kv and n % n_kv == 0 else None

    def _one_number(self, key: str) -> int | None:
        value = self._model.field(key)
        values = set(value) if isinstance(value, list) else {value}
        return values.pop() if len(values) == 1 and all(isinstance(one, int) for one in values) else None

    def rehearse(self) -> None:
        """Check whether llama.cpp loads the file.

        Raises:
            ConversionError: it does not.
        """
        reason = why_not_loaded(self.path)
        if reason is not None:
            raise ConversionError(f"{self.path}: llama.cpp {reason}; download or convert it again")
        self._warn_of_losses()

    def write_file(self, path: Path, outputs: Iterable[Output], metadata: dict[str, Any], file_type: int) -> None:
        """The file's own metadata and vocabulary, further keys and tensors: as
        `SourceModel.write_file`."""
        writer = self._gguf.GGUFWriter(path, self.architecture)
        for one in outputs:
            writer.add_tensor(one.name, one.tensor, raw_shape=one.raw_shape, raw_dtype=one.ggml_type)
        copy_metadata(self._model, writer)
        add_keys(writer, metadata, file_type)
        writer.write_header_to_file(path=path)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()


@contextlib.contextmanager
def huggingface_folder(path: Path, sample: str | None) -> Iterator[Path]:
    """The model of a GGUF as a Hugging Face folder, for as long as the context lasts. transformers
    reads the GGUF by its own means.

    Args:
        path: the file.
        sample: text that is going to be read. Its tokens must be those of llama.cpp.
    Raises:
        ConversionError: transformers cannot load the file, or makes other tokens of the sample.
    """
    instead = "use an importance matrix (--imatrix, made by llama-imatrix), or convert the model's folder"
    os.environ.setdefault("TQDM_DISABLE", "1")  # transformers draws a bar for every GGUF; read when tqdm is imported
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        try:
            source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
            transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16).save_pretrained(folder)
            tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
            tokenizer.save_pretrained(folder)
        except Exception as error:  # its reader of GGUF is young and raises nearly anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConversionError(f"{path}: transformers cannot load it for calibration ({reason}); {instead}") from error
        if sample is not None and tokenizer.encode(sample, add_special_tokens=False) != _llama_cpp_tokens(path, sample):
            raise ConversionError(
                f"{path}: transformers makes other tokens of the text than llama.cpp, so that calibration would mislead; {instead}"
            )
        yield Path(folder)


def _llama_cpp_tokens(path: Path, text: str) -> list[int]:
    from entrollm_gguf import runtime

    command = [runtime.tool("llama-tokenize"), "-m", path, "--ids", "--no-bos", "--no-parse-special", "--log-disable", "--stdin"]
    result = subprocess.run(command, input=text.encode(), capture_output=True)
    said = result.stdout.decode(errors="replace").strip().removeprefix("[").removesuffix("]")
    try:
        return [int(one) for one in said.split(",")]
    except ValueError as error:
        raise ConversionError(f"{path}: llama-tokenize gives no tokens (exit code {result.returncode})") from error
