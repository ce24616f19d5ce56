// SPDX-License-Identifier: MIT
//
// Level generic: the codec's portable decoder, and ggml's dot and matrix products, which exist for every instruction set.

#include "entropy-kernel.h"

#include "ggml-cpu-impl.h"
#include "llamafile/sgemm.h"

// Those of these instruction sets need nothing of the thread pool, which is not passed on; PPC has one too, untried here.
#if defined(GGML_USE_LLAMAFILE) && (defined(__AVX__) || defined(__ARM_FEATURE_DOTPROD))
static bool multiply_generic(
        ggml_type type, const void * rows, const void * columns, int64_t m, int64_t n, int64_t n_blocks, float * dst, int64_t dst_stride) {
    ggml_compute_params alone = {};
    alone.nth = 1;
    return llamafile_sgemm(
        &alone, m, n, n_blocks, rows, n_blocks, columns, n_blocks, dst, dst_stride, type, GGML_TYPE_Q8_0, GGML_TYPE_F32);
}
#else
static bool multiply_generic(ggml_type, const void *, const void *, int64_t, int64_t, int64_t, float *, int64_t) {
    return false;
}
#endif

ggml_entropy_kernel ggml_entropy_kernel_generic() {
    ggml_entropy_kernel kernel;
    kernel.name         = "generic";
    kernel.decode_lanes = ggml_entropy_decoder_lanes;
    kernel.dot_eq8      = ggml_get_type_traits_cpu(GGML_TYPE_Q8_0)->vec_dot;
    kernel.dot_eq4      = ggml_get_type_traits_cpu(GGML_TYPE_Q4_0)->vec_dot;
    kernel.multiply     = multiply_generic;
    return kernel;
}
