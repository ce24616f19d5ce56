// SPDX-License-Identifier: MIT
//
// Numbers that depend on the device, in one table. bench/gpu of EntroLLM-GGUF measures them; the file with the measurement is named beside a number
// that comes from one. What is not measured says so.

#pragma once

#include <cstddef>
#include <cstdint>

struct entropy_tuning {
    int    mat_vec_warps;  // of a block, at most 16 (the kernel's launch bounds)
    int    rows_warps;     // of a block, at most 8
    size_t shared_size;    // bytes of shared memory a block may have
    size_t scratch_size;   // bytes of decoded weights at a time, for batches of more than 8 columns
};

// compute_capability: 900 for sm_90, as ggml counts. shared_size: what the device gives a block, after opting in.
static entropy_tuning entropy_tuning_of(int compute_capability, size_t shared_size) {
    entropy_tuning tuning;
    // Two blocks of 16 warps on an SM of sm_80, sm_87 and sm_90 (204 KB of 164 to 228) hide the 54 clocks of a code; smaller devices
    // are bound by memory sooner. Not measured.
    tuning.mat_vec_warps = compute_capability == 860 || compute_capability == 890 || compute_capability >= 1200 ? 12 : 16;
    tuning.rows_warps    = 8;
    tuning.shared_size   = shared_size;
    // Decoded rows should be written and read again within the L2 cache where they can, but a product wants many rows. Not measured.
    tuning.scratch_size  = (size_t) 256 << 20;
    return tuning;
}
