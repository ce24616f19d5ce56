// SPDX-License-Identifier: MIT
//
// Fused mode on the CPU: MUL_MAT, MUL_MAT_ID and GET_ROWS whose weights stay entropy-coded in memory.
//
// The way from ggml_mul_mat to the decoder: ggml_compute_forward (ggml-cpu.c) asks ggml_cpu_extra_compute_forward (traits.cpp) first, which
// asks ggml_cpu_entropy_compute_forward here, which decodes groups of 16 rows through the kernel level in use (entropy-kernel.h).
//
// The seam is three functions with one meaning of true: "this op is mine".

#pragma once

#include "ggml-backend.h"
#include "ggml-cpu-impl.h"

// Compute op, called by all threads. False, and nothing done, if it has no entropy-coded weight.
bool ggml_cpu_entropy_compute_forward(ggml_compute_params * params, ggml_tensor * op);

// Bytes of work buffer the op needs with n_threads threads.
bool ggml_cpu_entropy_work_size(int n_threads, const ggml_tensor * op, size_t * size);

// Functions of ggml_backend_reg_get_proc_address of the CPU backend; nullptr for other names. There are
//   ggml_backend_entropy_supports_op    bool (ggml_backend_dev_t, const ggml_tensor *): ggml-backend-entropy.h
//   ggml_backend_entropy_decoder        ggml_entropy_decode_t (): decoder of the kernel level in use, for load mode
//   ggml_backend_entropy_kernel         const char * (): name of the kernel level in use
//   ggml_backend_entropy_kernels        const char * (): names of those that can run here, best first, separated by spaces
//   ggml_backend_entropy_refusal        const char * (): why GGML_ENTROPY_KERNEL or GGML_ENTROPY_PRODUCTS is refused: ggml-backend-entropy.h
void * ggml_cpu_entropy_get_proc_address(const char * name);
