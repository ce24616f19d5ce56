# SPDX-License-Identifier: MIT
"""The patched llama.cpp: build it, install it into the environment, find its tools and libraries.

The modules in the order of a build: pin (what), fetch (source), tree (overlay and patches), builder
(cmake), wheels (packing), install. `locate` answers where things are, without building anything.
"""

from entrollm_gguf.runtime.builder import BuildOptions, build
from entrollm_gguf.runtime.locate import RuntimeInfo, conversion_path, info, library, tool
from entrollm_gguf.runtime.paths import cache_folder

__all__ = ["BuildOptions", "RuntimeInfo", "build", "cache_folder", "conversion_path", "info", "library", "tool"]
