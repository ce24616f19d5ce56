// SPDX-License-Identifier: MIT
//
// Level generic: the codec's portable decoder, and ggml's dot products, which exist for every instruction set.

#include "entropy-kernel.h"

ggml_entropy_kernel ggml_entropy_kernel_generic() {
    ggml_entropy_kernel kernel;
    kernel.name         = "generic";
    kernel.decode_lanes = ggml_entropy_decoder_lanes;
    kernel.dot_eq8      = ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->vec_dot;
    kernel.dot_eq4      = ggml_get_type_traits_cpu(GGML_TYPE_Q4_0)->vec_dot;
    return kernel;
}
