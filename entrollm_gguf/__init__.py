# SPDX-License-Identifier: MIT
"""EntroLLM-GGUF: entropy-coded tensor types for GGUF and llama.cpp.

Rooms, each of which may use those after it: eval; convert, inspect; calibrate; gguf_io, quant;
codec; runtime, which builds the patched llama.cpp and knows where it is. pyproject.toml holds this
order as a rule, which `make lint` checks. Each command of `entrollm` is a function here as well,
imported on first use.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "convert_model": "entrollm_gguf.convert.pipeline",
    "plan_model": "entrollm_gguf.convert.pipeline",
    "Calibration": "entrollm_gguf.convert.basis",
    "decode_file": "entrollm_gguf.inspect.decode",
    "inspect_file": "entrollm_gguf.inspect.report",
    "plot_file": "entrollm_gguf.inspect.plot",
    "verify_file": "entrollm_gguf.inspect.verify",
    "measure_perplexity": "entrollm_gguf.eval.perplexity",
    "measure_speed": "entrollm_gguf.eval.bench",
    "Chat": "entrollm_gguf.eval.chat",
    "compare": "entrollm_gguf.eval.compare",
    "write_report": "entrollm_gguf.eval.report",
    "run_demo": "entrollm_gguf.eval.demo",
    "build_runtime": "entrollm_gguf.runtime",
    "runtime_info": "entrollm_gguf.runtime",
}
_RENAMED = {"build_runtime": "build", "runtime_info": "info"}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    # lazily: torch takes seconds to import, and `entrollm --help` needs none of it
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), _RENAMED.get(name, name))
