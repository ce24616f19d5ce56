# SPDX-License-Identifier: MIT
"""Driver of llama.cpp's own converter classes: which class, its tensors one by one, its metadata. Nothing of theirs is rewritten.

The classes call `gguf_writer.add_tensor(name, data, raw_dtype)` for each tensor under its GGUF name. `each_tensor` stands in for that call. Types
are decided upstream: with the file type BF16, whatever comes as BF16 is what llama.cpp would quantize, all else stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from entrollm_gguf.convert.model_card import tolerant_metadata
from entrollm_gguf.convert.upstream_errors import one_line_errors, tokenizer_errors, why_not_loadable
from entrollm_gguf.errors import ConversionError, UnsupportedModelError
from entrollm_gguf.gguf_io.loader import why_not_loaded
from entrollm_gguf.gguf_io.output import StreamedTensor
from entrollm_gguf.gguf_io.patched import import_gguf


def _import_conversion():
    """llama.cpp's `conversion` package, from the runtime."""
    from entrollm_gguf import runtime

    folder = str(runtime.conversion_path())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import conversion

    return conversion


@dataclass(frozen=True)
class Outline:
    """What a model consists of, by GGUF name."""

    shapes: dict[str, tuple[int, ...]]  # numpy order; of bytes where the checkpoint is quantized
    quantized: frozenset[str]  # tensors whose weights are no floats, so that nothing can be multiplied into them


class SourceModel:
    """A Hugging Face model folder, opened by the converter class of its architecture.

    Args:
        folder: holds config.json, the tokenizer and safetensors (or pytorch .bin) files, as `check_checkpoint` wants them.
        out_path: the file that `write_file` writes.
    Raises:
        ConversionError: files that the converter class does not take.
        UnsupportedModelError: llama.cpp's converter does not know the architecture.
    """

    def __init__(self, folder: Path, out_path: Path) -> None:
        self.folder = folder
        self._gguf = import_gguf()
        conversion = _import_conversion()
        logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
        with one_line_errors(folder):
            hparams = conversion.ModelBase.load_hparams(folder, False)
            architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
            try:
                model_class = conversion.get_model_class(architecture)
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{folder}: architecture {architecture} is not known to llama.cpp's converter; "
                    "its list: entrollm convert --list-architectures"
                ) from error
            # BF16 here marks the tensors that upstream would quantize; each_tensor hands them over unrounded. Braces in the name are fields to fill
            escaped = out_path.with_name(out_path.name.replace("{", "{{").replace("}", "}}"))
            self._model = model_class(folder, self._gguf.LlamaFileType.MOSTLY_BF16, escaped)

    def n_elements(self) -> int:
        """Weights in the model's files, for progress."""
        with one_line_errors(self.folder, self._model.hparams):
            return sum(math.prod(generate().shape) for generate in self._model.model_tensors.values())

    def names(self) -> set[str]:
        """Of the weights, as the checkpoint has them."""
        return set(self._model.model_tensors)

    def each_tensor(self, handle: Callable[[str, Any, int | None], None]) -> None:
        """Call handle(name, data, type) for every tensor under its GGUF name.

        data is an f16 or f32 array, lazily evaluated or not (`evaluate`), where type is BF16, meaning: to be quantized. It is not rounded: f16 and
        f32 checkpoints keep their precision. Otherwise data is in its final type already.

        Raises:
            ConversionError: damaged files; whatever `handle` raises passes through.
        """
        import torch

        writer = self._model.gguf_writer
        round_as_upstream = self._gguf.quants.quantize

        seen: set[str] = set()

        def add_tensor(name, tensor, raw_shape=None, raw_dtype=None, tensor_endianess=None):
            if name in seen:
                raise ConversionError(f"{self.folder}: {self._sources_of(name)} all become {name}; leave one in the checkpoint")
            seen.add(name)
            with _quantize_by(self._gguf, round_as_upstream):  # a gguf.LazyChunkedTensor is rounded while it is written
                handle(name, tensor, raw_dtype)

        def keep_floats(data, qtype):
            return data if qtype == self._gguf.GGMLQuantizationType.BF16 else round_as_upstream(data, qtype)

        writer.add_tensor = add_tensor
        try:
            with torch.inference_mode(), _quantize_by(self._gguf, keep_floats), one_line_errors(self.folder, self._model.hparams):
                self._model.prepare_tensors()
        finally:
            del writer.add_tensor

    def _sources_of(self, name: str) -> str:
        """The weights of the checkpoint that get a GGUF name, as far as the names tell."""
        find = self._model.tensor_map.get_name
        return ", ".join(sorted(one for one in self._model.model_tensors if find(one, try_suffixes=(".weight", ".bias")) == name)) or "several weights"

    def outline(self) -> Outline:
        """Every tensor; no weights are read. The model cannot be used again."""
        shapes: dict[str, tuple[int, ...]] = {}
        quantized: set[str] = set()

        def look(name: str, data: Any, _: int | None) -> None:
            shapes[name] = tuple(data.shape)
            if data.dtype not in (np.float16, np.float32):
                quantized.add(name)

        self.each_tensor(look)
        return Outline(shapes, frozenset(quantized))

    def rearranged(self, values: dict[str, np.ndarray], handle: Callable[[str, np.ndarray], None]) -> None:
        """What the converter class does to the order of rows and columns, applied to numbers that stand in for the weights.

        Args:
            values: by the checkpoint's name, f32 that broadcasts to the weight's shape. All else is NaN.
            handle: called with the GGUF name and an f32 array of the tensor's shape. The model cannot be used again.
        Raises:
            ConversionError: as each_tensor.
        """
        import torch

        lazy = _import_conversion().LazyTorchTensor
        nothing = np.full((1,), np.nan, np.float32)

        def stand_in(name: str, shape: tuple[int, ...]) -> Callable[[], Any]:
            given = values.get(name)
            fits = given is not None and len(shape) == 2 and all(n in (1, m) for n, m in zip(given.shape, shape, strict=True))
            return lambda: lazy.from_eager(torch.from_numpy(given if fits else nothing).expand(shape))

        tensors = self._model.model_tensors
        self._model.model_tensors = {name: stand_in(name, tuple(generate().shape)) for name, generate in tensors.items()}

        def evaluated(name: str, data: Any, _: int | None) -> None:
            array = evaluate(data)
            if array.dtype in (np.float16, np.float32):
                handle(name, array)

        self.each_tensor(evaluated)

    @property
    def architecture(self) -> str:
        """general.architecture of the GGUF, "llama"."""
        return self._gguf.MODEL_ARCH_NAMES[self._model.model_arch]

    def heads(self) -> tuple[int, int] | None:
        """Query heads and key-value heads of every layer, or None if they are not the same in all or not told."""
        hparams = self._model.hparams
        n = hparams.get("num_attention_heads")
        n_kv = hparams.get("num_key_value_heads", n)
        return (n, n_kv) if isinstance(n, int) and isinstance(n_kv, int) and n_kv > 0 and n % n_kv == 0 else None

    def add_tensor(self, name: str, tensor: Any, raw_shape: tuple[int, ...], raw_dtype: int) -> None:
        """Declare a tensor of the output in its final type; `tensor` has shape, dtype, nbytes and tofile. raw_shape counts bytes where dtype is uint8."""
        self._model.gguf_writer.add_tensor(name, tensor, raw_shape=raw_shape, raw_dtype=raw_dtype)

    def rehearse(self) -> dict[str, Any]:
        """See whether llama.cpp would load the file, before any weight is read: metadata, vocabulary, and all tensors that it asks for with their shapes. The model cannot be used again.

        Returns:
            what `write_file` of the same model needs not make again.
        Raises:
            ConversionError: llama.cpp would not load it, naming what is missing or does not fit.
        """
        types, found = self._gguf.GGMLQuantizationType, []
        self.each_tensor(lambda name, data, ggml_type: found.append((name, tuple(data.shape), data.dtype, ggml_type)))
        for name, shape, dtype, ggml_type in found:
            if ggml_type == types.BF16 and dtype != np.uint8:
                shape, dtype = self._gguf.quant_shape_to_byte_shape(shape, ggml_type), np.dtype(np.uint8)
            n_bytes = math.prod(shape) * dtype.itemsize
            self.add_tensor(name, StreamedTensor(shape, dtype, n_bytes, functools.partial(_skip, n_bytes)), shape, ggml_type)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rehearsal.gguf"
            try:
                self.write_file({}, self._gguf.LlamaFileType.MOSTLY_BF16, path)
            except OSError:
                reason = None  # a file system without room for it tells nothing of the model
            else:
                reason = why_not_loaded(path)
        header = self._model.gguf_writer.kv_data[0]
        if reason is not None:
            tokens = header.get("tokenizer.ggml.tokens")
            shapes = {name: shape for name, shape, *_ in found}
            raise ConversionError(why_not_loadable(self.folder, reason, shapes, len(tokens.value) if tokens else 0, self._model.block_count))
        return header

    def _prepare_metadata(self) -> None:
        model = self._model
        set_vocab = model.set_vocab

        def set_vocab_explained() -> None:
            with tokenizer_errors(self.folder, model.hparams):
                set_vocab()

        model.set_vocab = set_vocab_explained
        with one_line_errors(self.folder, model.hparams), tolerant_metadata(self.folder):
            model.prepare_metadata(vocab_only=False)

    def write_file(self, metadata: dict[str, Any], file_type: int, path: Path, header: dict[str, Any] | None = None) -> None:
        """Metadata, tokenizer and all declared tensors into the output.

        Args:
            metadata: further keys; str, int, or list of str.
            file_type: general.file_type.
            header: from `rehearse`; made here where it is not given.
        """
        writer = self._model.gguf_writer
        if header is None:
            self._prepare_metadata()
        else:
            writer.kv_data[0] = dict(header)
        for values in writer.kv_data:  # one dictionary per output file
            values.pop("general.file_type", None)  # the converter class wrote its own; the writer warns of a second one
        writer.add_file_type(file_type)
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_string(key, value)
        writer.write_header_to_file(path=path)
        with one_line_errors(self.folder, self._model.hparams):  # a number where config.json has a word shows here
            writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()


def _skip(n_bytes: int, file: BinaryIO) -> None:
    """Write zeros that take no room on the disk."""
    if n_bytes:
        file.seek(n_bytes - 1, os.SEEK_CUR)
        file.write(b"\0")


@contextlib.contextmanager
def _quantize_by(gguf, function: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Let the converter classes call another function(data, type) for gguf.quants.quantize."""
    previous = gguf.quants.quantize
    gguf.quants.quantize = function
    try:
        yield
    finally:
        gguf.quants.quantize = previous


def evaluate(data: Any) -> np.ndarray:
    """The array behind the converter's lazy tensors."""
    gguf = import_gguf()
    if isinstance(data, gguf.LazyBase):
        data = gguf.LazyNumpyTensor.to_eager(data)
    return np.asarray(data)


def list_architectures() -> list[str]:
    """Architectures that llama.cpp's converter knows, as config.json names them."""
    conversion = _import_conversion()
    conversion.load_all_models()
    models = conversion.ModelBase._model_classes[conversion.ModelType.TEXT]
    return sorted(models)
