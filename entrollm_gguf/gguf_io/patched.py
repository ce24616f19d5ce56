# SPDX-License-Identifier: MIT
"""The gguf package of the runtime. The one on PyPI has the same name and refuses our types, so each
use comes through here."""

from __future__ import annotations

from types import ModuleType

from entrollm_gguf.errors import RuntimeMissingError


def import_gguf() -> ModuleType:
    """The patched gguf package.

    Raises:
        RuntimeMissingError: gguf is missing or is not the patched one.
    """
    try:
        import gguf
    except ImportError as error:
        raise RuntimeMissingError("the patched gguf package is not installed; run `entrollm runtime build`") from error
    if not hasattr(gguf.GGMLQuantizationType, "EQ8"):
        raise RuntimeMissingError("the installed gguf package is the stock one; run `entrollm runtime build` to replace it")
    if not hasattr(gguf.entropy, "OldVersionError"):
        raise RuntimeMissingError("the installed gguf package belongs to another version of this package; run `entrollm runtime build`")
    return gguf
