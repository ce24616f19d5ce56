// SPDX-License-Identifier: MIT
//
// Which devices may see entropy-coded tensors. Included by ggml-backend.cpp and the model loader.
//
// Many backends answer supports_op by the op and the float types around it and take any type of weight: Metal for MUL_MAT and GET_ROWS, RPC
// for everything, the CPU for most. They would read an entropy-coded payload as rows. So ggml_backend_dev_supports_op, the one function
// that the scheduler and the model loader ask, says no for an op that touches such a tensor, unless the device's registry exports
//
//     bool ggml_backend_entropy_supports_op(ggml_backend_dev_t device, const struct ggml_tensor * op)
//
// through ggml_backend_reg_get_proc_address; then the answer is that function's, and the device's own supports_op is not asked. The CPU's
// does (ggml-cpu/entropy/entropy-cpu.cpp), and CUDA's (ggml-cuda/entropy.cu).
//
// A registry whose backend has switches of its own (ggml-entropy-switch.h) exports besides
//
//     const char * ggml_backend_entropy_refusal(void)
//
// the line for one that is set to a value it does not know, and nullptr if there is none. The model loader asks all registries.
//
// In the memory of a device that is not the CPU such tensors have the device layout (ggml-entropy-lanes.h), with nb[2] the bytes of a slab
// in it; in host memory they have the layout of the file. The model loader makes one from the other.

#pragma once

#include "ggml-backend.h"
#include "ggml-entropy.h"

typedef bool (*ggml_backend_entropy_supports_op_t)(ggml_backend_dev_t device, const struct ggml_tensor * op);
typedef const char * (*ggml_backend_entropy_refusal_t)(void);

static inline bool ggml_backend_entropy_is_in_op(const struct ggml_tensor * op) {
    if (ggml_entropy_is_type(op->type)) {
        return true;
    }
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        if (op->src[i] != nullptr && ggml_entropy_is_type(op->src[i]->type)) {
            return true;
        }
    }
    return false;
}

static inline ggml_backend_entropy_supports_op_t ggml_backend_entropy_dev_get(ggml_backend_dev_t device) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(device);
    return reg == nullptr ? nullptr :
        (ggml_backend_entropy_supports_op_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_entropy_supports_op");
}

// Does the device compute on entropy-coded tensors, in some ops at least?
static inline bool ggml_backend_entropy_dev_declares(ggml_backend_dev_t device) {
    return ggml_backend_entropy_dev_get(device) != nullptr;
}

static inline bool ggml_backend_entropy_dev_supports_op(ggml_backend_dev_t device, const struct ggml_tensor * op) {
    const auto supports_op = ggml_backend_entropy_dev_get(device);
    return supports_op != nullptr && supports_op(device, op);
}
