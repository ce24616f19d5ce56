# SPDX-License-Identifier: MIT
"""All errors that users meet. Each message is one line: which file or tensor, what is wrong, what
to do."""


class EntroLLMError(Exception):
    """Base of the package's errors; the command line prints the message and exits with
    `exit_code`."""

    exit_code = 1


class RuntimeMissingError(EntroLLMError):
    """The patched llama.cpp is not built or not installed, or another one is in its place."""


class BuildError(EntroLLMError):
    """The runtime cannot be built: a missing tool, a patch that does not apply, a compiler
    error."""


class FetchError(EntroLLMError):
    """Something cannot be downloaded, or is not what its hash says."""


class FormatError(EntroLLMError):
    """A file is missing, is no GGUF, or its entropy-coded data is invalid."""


class TextError(EntroLLMError):
    """A text file is missing, or is no text in UTF-8."""


class ConversionError(EntroLLMError):
    """A model cannot be converted, or a file cannot be written."""


class UnsupportedModelError(ConversionError):
    """llama.cpp's converter does not know the architecture."""


class OutputExistsError(ConversionError):
    """The output exists and may not be replaced."""


class ToolError(EntroLLMError):
    """One of llama.cpp's tools failed."""


class ConversionWarning(UserWarning):
    """A conversion goes on without something that no model needs."""
