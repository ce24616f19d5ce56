// SPDX-License-Identifier: MIT
//
// Table of levels and the choice among them; see entropy-kernel.h.

#include "entropy-kernel.h"

#include "ggml-impl.h"
#include "../../ggml-entropy-switch.h"

#include <cstring>
#include <string>
#include <vector>

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
        if (ggml_entropy_kernel_avx2_nopdep(&special)) {
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

// A level, or the reason why there is none.
struct kernel_choice {
    const ggml_entropy_kernel * kernel;
    std::string                 refusal;
};

static const kernel_choice & chosen() {
    static const kernel_choice choice = [] {
        const auto & table = kernels();
        const ggml_entropy_switch level("GGML_ENTROPY_KERNEL", table.front().name);
        std::string allowed;
        for (size_t i = 0; i < table.size(); i++) {
            allowed += std::string(i == 0 ? "" : i + 1 < table.size() ? ", " : " or ") + table[i].name;
        }
        const auto * kernel = ggml_entropy_kernel_find(level.value.c_str());
        return kernel_choice{ kernel, kernel != nullptr ? "" : level.refusal(allowed) };
    }();
    return choice;
}

const char * ggml_entropy_kernel_refusal() {
    return chosen().kernel != nullptr ? nullptr : chosen().refusal.c_str();
}

const ggml_entropy_kernel & ggml_entropy_kernel_active() {
    if (chosen().kernel == nullptr) {
        GGML_ABORT("%s", chosen().refusal.c_str());
    }
    return *chosen().kernel;
}
