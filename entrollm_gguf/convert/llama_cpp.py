# SPDX-License-Identifier: MIT
"""Driver of llama.cpp's own converter classes: which class, its tensors one by one, its metadata. Nothing of theirs is rewritten.

The classes call `gguf_writer.add_tensor(name, data, raw_dtype)` for each tensor under its GGUF name. `each_tensor` stands in for that call. Types
are decided upstream: with the file type BF16, whatever comes as BF16 is what llama.cpp would quantize, all else stays as it is.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrollm_gguf.errors import ConversionError, EntroLLMError, UnsupportedModelError
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


@contextlib.contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Anything the converter classes raise becomes a ConversionError that names the model folder.

    They meet arbitrary files with bare indexing, asserts and library calls, so that every exception type is possible.
    """
    try:
        yield
    except (EntroLLMError, KeyboardInterrupt, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None and error.filename is None:
            raise  # disk trouble of our own output, worded by its owner
        raise ConversionError(f"{what}: {' '.join(str(error).split())}") from error
    except Exception as error:
        reason = " ".join(str(error).split()) or "no further message"
        raise ConversionError(f"{what}: cannot be read ({type(error).__name__}: {reason[:300]})") from error


@dataclass(frozen=True)
class Outline:
    """What a model consists of, by GGUF name."""

    shapes: dict[str, tuple[int, ...]]  # numpy order; of bytes where the checkpoint is quantized
    quantized: frozenset[str]  # tensors whose weights are no floats, so that nothing can be multiplied into them


class SourceModel:
    """A Hugging Face model folder, opened by the converter class of its architecture.

    Args:
        folder: holds config.json, the tokenizer and safetensors (or pytorch .bin) files.
        out_path: the file that `write_file` writes.
    Raises:
        ConversionError: not a model folder, or files that are damaged or missing.
        UnsupportedModelError: llama.cpp's converter does not know the architecture.
    """

    def __init__(self, folder: Path, out_path: Path) -> None:
        self.folder = folder
        self._gguf = import_gguf()
        if not folder.is_dir():
            raise ConversionError(f"{folder}: no such folder; name the folder of a Hugging Face model")
        if not (folder / "config.json").is_file():
            raise ConversionError(f"{folder}: has no config.json; this is not a Hugging Face model folder")
        conversion = _import_conversion()
        logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
        with one_line_errors(str(folder)):
            hparams = conversion.ModelBase.load_hparams(folder, False)
            architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
            try:
                model_class = conversion.get_model_class(architecture)
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{folder}: architecture {architecture} is not known to llama.cpp's converter; "
                    "its list: entrollm convert --list-architectures"
                ) from error
            # BF16 here marks the tensors that upstream would quantize; each_tensor hands them over unrounded
            self._model = model_class(folder, self._gguf.LlamaFileType.MOSTLY_BF16, out_path)
        if not self._model.model_tensors:
            raise ConversionError(f"{folder}: holds no weights (model*.safetensors or pytorch_model*.bin)")

    def n_elements(self) -> int:
        """Weights in the model's files, for progress."""
        with one_line_errors(str(self.folder)):
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

        def add_tensor(name, tensor, raw_shape=None, raw_dtype=None, tensor_endianess=None):
            with _quantize_by(self._gguf, round_as_upstream):  # a gguf.LazyChunkedTensor is rounded while it is written
                handle(name, tensor, raw_dtype)

        def keep_floats(data, qtype):
            return data if qtype == self._gguf.GGMLQuantizationType.BF16 else round_as_upstream(data, qtype)

        writer.add_tensor = add_tensor
        try:
            with torch.inference_mode(), _quantize_by(self._gguf, keep_floats), one_line_errors(str(self.folder)):
                self._model.prepare_tensors()
        finally:
            del writer.add_tensor

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

    def write_file(self, metadata: dict[str, Any], file_type: int, path: Path) -> None:
        """Metadata, tokenizer and all declared tensors into the output.

        Args:
            metadata: further keys; str, int, or list of str.
            file_type: general.file_type.
        """
        writer = self._model.gguf_writer
        with one_line_errors(str(self.folder)):
            self._model.prepare_metadata(vocab_only=False)
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
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()


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
