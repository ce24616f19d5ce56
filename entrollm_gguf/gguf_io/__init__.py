# SPDX-License-Identifier: MIT
"""Reading and writing GGUF files with entropy-coded tensors, on top of the patched gguf package of
the runtime."""
