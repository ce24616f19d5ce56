# SPDX-License-Identifier: MIT
"""Driver of llama.cpp's own converter classes: which class, its tensors one by one, its metadata.
Nothing of theirs is rewritten.

The classes call `gguf_writer.add_tensor(name, data, raw_dtype)` for each tensor under its GGUF
name. `each_tensor` stands in for that call. Types are decided upstream: with the file type BF16,
whatever arrives as BF16 is what llama.cpp would quantize; all else stays as it is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from entrollm_gguf.convert.model_card import tolerant_metadata
from entrollm_gguf.convert.upstream_errors import one_line_errors, tokenizer_errors, why_not_loadable
from entrollm_gguf.errors import ConversionError, UnsupportedModelError
from entrollm_gguf.gguf_io.loader import why_not_loaded
from entrollm_gguf.gguf_io.metadata import add_keys
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


class Integers(Enum):
    """What scales the integers of a quantized checkpoint have."""

    ROWS = "one for each row"
    GROUPS = "one for each group of columns"


@dataclass(frozen=True)
class Output:
    """A tensor of the output in its final type."""

    name: str
    tensor: Any  # has shape, dtype, nbytes and tofile, as gguf's writer wants it
    raw_shape: tuple[int, ...]  # of bytes where dtype is uint8
    ggml_type: int


class SourceModel:
    """A Hugging Face model folder, opened by the converter class of its architecture. Everything
    can be asked for any number of times.

    Args:
        folder: holds config.json, the tokenizer and safetensors (or pytorch .bin) files, as
            `check_checkpoint` wants them.
    Raises:
        ConversionError: files that the converter class does not take.
        UnsupportedModelError: llama.cpp's converter does not know the architecture.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._header: dict[str, Any] | None = None  # metadata and vocabulary, from `rehearse`
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
            # BF16 marks the tensors that upstream would quantize; each_tensor hands them over
            # unrounded. The file is named when it is written
            self._open = functools.partial(model_class, folder, self._gguf.LlamaFileType.MOSTLY_BF16, folder / "unnamed.gguf")
            self._model = self._open()  # answers questions; going through the tensors uses up an instance of its own

    def n_elements(self) -> int:
        """Weights in the model's files, for progress."""
        with one_line_errors(self.folder, self._model.hparams):
            return sum(math.prod(generate().shape) for generate in self._model.model_tensors.values())

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that an output could replace by mistake: none, since no file of a folder is a
        GGUF."""
        return ()

    @property
    def integers(self) -> Integers | None:
        """Whether the weights are integers already: int8 and int4 of compressed-tensors and
        GPTQ."""
        config = self._model.hparams.get("quantization_config") or {}
        method = config.get("quant_method")
        if method == "gptq":
            return Integers.ROWS if config.get("group_size") == -1 else Integers.GROUPS
        groups = config.get("config_groups")
        if method == "compressed-tensors" and isinstance(groups, dict):
            weights = [(one.get("weights") or {}) for one in groups.values() if isinstance(one, dict)]
            if weights and all(one.get("type", "int") == "int" for one in weights):
                return Integers.ROWS if all(one.get("strategy") == "channel" for one in weights) else Integers.GROUPS
        return None

    @property
    def quantized_bytes(self) -> int | None:
        """Bytes of the weights' files where the weights were quantized to a grid that cannot be
        kept; None for all others."""
        if self.integers is not Integers.GROUPS:
            return None
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.suffix in (".safetensors", ".bin"))

    def names(self) -> set[str]:
        """Names of the weights, as the checkpoint has them."""
        return set(self._model.model_tensors)

    def each_tensor(self, handle: Callable[[str, Any, int | None], None]) -> None:
        """Call handle(name, data, type) for every tensor under its GGUF name.

        data is an f16 or f32 array, lazily evaluated or not (`evaluate`), where type is BF16,
        meaning: to be quantized. It is not rounded: f16 and f32 checkpoints keep their precision.
        Otherwise data is in its final type already.

        Raises:
            ConversionError: damaged files; whatever `handle` raises passes through.
        """
        self._go_through(self._reopened(), handle)

    def _reopened(self) -> Any:
        with one_line_errors(self.folder, self._model.hparams):
            return self._open()

    def _go_through(self, model: Any, handle: Callable[[str, Any, int | None], None]) -> None:
        """`each_tensor` of an instance of the converter class, which is used up."""
        import torch

        writer = model.gguf_writer
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
            with torch.inference_mode(), _quantize_by(self._gguf, keep_floats), one_line_errors(self.folder, model.hparams):
                model.prepare_tensors()
        finally:
            del writer.add_tensor

    def _sources_of(self, name: str) -> str:
        """The weights of the checkpoint that get a GGUF name, as far as the names tell."""
        find = self._model.tensor_map.get_name
        return (
            ", ".join(sorted(one for one in self._model.model_tensors if find(one, try_suffixes=(".weight", ".bias")) == name))
            or "several weights"
        )

    def outline(self) -> Outline:
        """Every tensor; no weights are read."""
        shapes: dict[str, tuple[int, ...]] = {}
        quantized: set[str] = set()

        def look(name: str, data: Any, _: int | None) -> None:
            shapes[name] = tuple(data.shape)
            if data.dtype not in (np.float16, np.float32):
                quantized.add(name)

        self.each_tensor(look)
        return Outline(shapes, frozenset(quantized))

    def rearranged(self, values: dict[str, np.ndarray], handle: Callable[[str, np.ndarray], None]) -> None:
        """What the converter class does to the order of rows and columns, applied to numbers that
        stand in for the weights.

        Args:
            values: by the checkpoint's name, f32 that broadcasts to the weight's shape. All else is
                NaN.
            handle: called with the GGUF name and an f32 array of the tensor's shape.
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

        model = self._reopened()
        model.model_tensors = {name: stand_in(name, tuple(generate().shape)) for name, generate in model.model_tensors.items()}

        def evaluated(name: str, data: Any, _: int | None) -> None:
            array = evaluate(data)
            if array.dtype in (np.float16, np.float32):
                handle(name, array)

        self._go_through(model, evaluated)

    @property
    def architecture(self) -> str:
        """general.architecture of the GGUF, "llama"."""
        return self._gguf.MODEL_ARCH_NAMES[self._model.model_arch]

    def heads(self) -> tuple[int, int] | None:
        """Query heads and key-value heads of every layer, or None if they are not the same in all
        or not told."""
        hparams = self._model.hparams
        n = hparams.get("num_attention_heads")
        n_kv = hparams.get("num_key_value_heads", n)
        return (n, n_kv) if isinstance(n, int) and isinstance(n_kv, int) and n_kv > 0 and n % n_kv == 0 else None

    def rehearse(self) -> None:
        """Check whether llama.cpp would load the file, before any weight is read: metadata,
        vocabulary, and all tensors that it asks for, with their shapes.

        Raises:
            ConversionError: llama.cpp would not load it, naming what is missing or does not fit.
        """
        types, outputs, shapes = self._gguf.GGMLQuantizationType, [], {}

        def declare(name: str, data: Any, ggml_type: int | None) -> None:
            shapes[name] = shape = tuple(data.shape)
            dtype = data.dtype
            if ggml_type == types.BF16 and dtype != np.uint8:
                shape, dtype = self._gguf.quant_shape_to_byte_shape(shape, ggml_type), np.dtype(np.uint8)
            n_bytes = math.prod(shape) * dtype.itemsize
            outputs.append(Output(name, StreamedTensor(shape, dtype, n_bytes, functools.partial(_skip, n_bytes)), shape, ggml_type))

        self.each_tensor(declare)
        model = self._reopened()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rehearsal.gguf"
            try:
                self._write(model, path, outputs, {}, self._gguf.LlamaFileType.MOSTLY_BF16)
            except OSError:
                reason = None  # a file system without room for it says nothing about the model
            else:
                reason = why_not_loaded(path)
        header = model.gguf_writer.kv_data[0]
        if reason is not None:
            tokens = header.get("tokenizer.ggml.tokens")
            raise ConversionError(why_not_loadable(self.folder, reason, shapes, len(tokens.value) if tokens else 0, model.block_count))
        self._header = header

    def write_file(self, path: Path, outputs: Iterable[Output], metadata: dict[str, Any], file_type: int) -> None:
        """Metadata, tokenizer and tensors.

        Args:
            metadata: further keys; str, int, or list of str.
            file_type: general.file_type.
        Raises:
            ConversionError: no metadata or vocabulary can be made of the folder, if `rehearse` did
                not see it.
        """
        self._write(self._reopened(), path, outputs, metadata, file_type)

    def _write(self, model: Any, path: Path, outputs: Iterable[Output], metadata: dict[str, Any], file_type: int) -> None:
        writer = model.gguf_writer
        for one in outputs:
            writer.add_tensor(one.name, one.tensor, raw_shape=one.raw_shape, raw_dtype=one.ggml_type)
        if self._header is None:
            self._prepare_metadata(model)
        else:
            writer.kv_data[0] = dict(self._header)
        for values in writer.kv_data:  # one dictionary per output file
            values.pop("general.file_type", None)  # the converter class wrote its own; the writer warns of a second one
        add_keys(writer, metadata, file_type)
        writer.write_header_to_file(path=path)
        with one_line_errors(self.folder, model.hparams):  # fails where config.json has a number in place of a word
            writer.write_kv_data_to_file()
        writer.write_tensors_to_file(progress=False)
        writer.close()

    def _prepare_metadata(self, model: Any) -> None:
        set_vocab = model.set_vocab

        def set_vocab_explained() -> None:
            with tokenizer_errors(self.folder, model.hparams):
                set_vocab()

        model.set_vocab = set_vocab_explained
        with one_line_errors(self.folder, model.hparams), tolerant_metadata(self.folder):
            model.prepare_metadata(vocab_only=False)


def _skip(n_bytes: int, file: BinaryIO) -> None:
    """Write zeros that take no room on disk."""
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
