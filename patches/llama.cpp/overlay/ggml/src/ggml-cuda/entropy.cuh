// SPDX-License-Identifier: MIT
//
// Ops with entropy-coded weights on CUDA devices; the seam to ggml-cuda.cu. Kernels are in entropy/.

#pragma once

#include "common.cuh"
#include "../ggml-entropy-lanes.h"

typedef void (*ggml_cuda_mul_mat_t)(ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst);

// Each returns true if the op's weights are entropy-coded: then it is done. Nothing here waits for the device, so CUDA graphs stay on.
// stock: what multiplies with weights of a stock type.
bool ggml_cuda_entropy_mul_mat(
        ggml_backend_cuda_context & ctx, const ggml_tensor * src0, const ggml_tensor * src1, ggml_tensor * dst, ggml_cuda_mul_mat_t stock);
bool ggml_cuda_entropy_mul_mat_id(ggml_backend_cuda_context & ctx, ggml_tensor * dst);
bool ggml_cuda_entropy_get_rows  (ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Two ops that follow one another in a graph, in one launch if they multiply different weights of ours with the same columns.
bool ggml_cuda_entropy_mul_mat_pair(ggml_backend_cuda_context & ctx, ggml_tensor * first, ggml_tensor * second);

// What ggml_backend_cuda_reg_get_proc_address answers for names of ours (ggml-backend-entropy.h); nullptr for others.
void * ggml_cuda_entropy_get_proc_address(const char * name);
