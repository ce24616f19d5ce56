// SPDX-License-Identifier: MIT
//
// Table of levels and the choice among them; see entropy-kernel.h.

#include "entropy-kernel.h"

#include "ggml-impl.h"

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static constexpr const char * ENV_KERNEL = "GGML_ENTROPY_KERNEL";

static const std::vector<ggml_entropy_kernel> & kernels() {
    static const std::vector<ggml_entropy_kernel> table = [] {
        std::vector<ggml_entropy_kernel> usable;
        ggml_entropy_kernel special;
        if (ggml_entropy_kernel_avx512(&special)) {
            usable.push_back(special);
        }
        if (ggml_entropy_kernel_avx2(&special)) {
            usable.push_back(special);
        }
        if (ggml_entropy_kernel_neon(&special)) {
            usable.push_back(special);
        }
        usable.push_back(ggml_entropy_kernel_generic());
        usable.push_back(ggml_entropy_kernel_ref());
        return usable;
    }();
    return table;
}

const ggml_entropy_kernel * ggml_entropy_kernel_find(const char * name) {
    for (const auto & kernel : kernels()) {
        if (std::strcmp(kernel.name, name) == 0) {
            return &kernel;
        }
    }
    return nullptr;
}

const char * ggml_entropy_kernel_names() {
    static const std::string names = [] {
        std::string list;
        for (const auto & kernel : kernels()) {
            list += list.empty() ? kernel.name : std::string(" ") + kernel.name;
        }
        return list;
    }();
    return names.c_str();
}

static const ggml_entropy_kernel & choose() {
    const auto & best = kernels().front();
    const char * name = std::getenv(ENV_KERNEL);
    if (name == nullptr || name[0] == '\0') {
        return best;
    }
    if (const auto * forced = ggml_entropy_kernel_find(name)) {
        return *forced;
    }
    GGML_LOG_WARN(
        "%s=%s: there is no such kernel level here, using %s (there are: %s)\n", ENV_KERNEL, name, best.name, ggml_entropy_kernel_names());
    return best;
}

const ggml_entropy_kernel & ggml_entropy_kernel_active() {
    static const ggml_entropy_kernel & active = choose();
    return active;
}
