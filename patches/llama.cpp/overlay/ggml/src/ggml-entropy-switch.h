// SPDX-License-Identifier: MIT
//
// Switches of entropy-coded tensors in the environment, all read in one way. docs/runtime-modes.md and docs/cuda.md of EntroLLM-GGUF list
// them.
//
// A switch that is unset or empty has its default. A value that it does not know is refused, never ignored, with one line:
//
//     unknown value 'avx3' of GGML_ENTROPY_KERNEL: use avx2, generic or ref
//
// The model loader throws it. Backends do not throw: one that has switches exports ggml_backend_entropy_refusal (ggml-backend-entropy.h),
// which the loader asks before the first entropy-coded tensor of a file. So a model is refused, and only a program that computes without
// the loader is stopped, with the same line, where it first asks for the switch.

#pragma once

#include <cstdlib>
#include <string>

struct ggml_entropy_switch {
    std::string name;
    std::string value;
    bool        is_default;

    ggml_entropy_switch(const char * name, const char * fallback) : name(name) {
        const char * env = std::getenv(name);
        is_default = env == nullptr || env[0] == '\0';
        value      = is_default ? fallback : env;
    }

    // The line for a value that is not known. allowed reads on from "use": "auto, load or fused".
    std::string refusal(const std::string & allowed) const {
        return "unknown value '" + value + "' of " + name + ": use " + allowed;
    }
};
