// SPDX-License-Identifier: MIT
//
// Numbers that depend on the device, in one table. bench/gpu of EntroLLM-GGUF measures them; the file with the measurement is named beside
// a number that comes from one. What is not measured says so.

#pragma once

#include <cstddef>
#include <cstdint>

struct entropy_tuning {
    int    mat_vec_warps;  // of a block, at most 32; with more than 4 columns 16 (the kernel's launch bounds)
    int    rows_warps;     // of a block, at most 8
    int    n_sm;           // streaming multiprocessors; 0: as many warps as told, however many blocks there are
    int    tile_cols;      // that matrices are expected to have; 0: what the encoder takes by itself
    size_t shared_size;    // bytes of shared memory a block may have
    size_t scratch_size;   // bytes of decoded weights at a time, for batches of more than 8 columns
};

// compute_capability: 900 for sm_90, as ggml counts. shared_size: what the device gives a block, after opting in.
static entropy_tuning entropy_tuning_of(int compute_capability, size_t shared_size, int n_sm) {
    entropy_tuning tuning;
    // 32 warps on an SM hide the 54 clocks of a code. They may stand in one block: matrices of 4096 rows have 128 row groups, one for each
    // SM of a large device (bench/results/gpu-h200-first.json). Smaller devices are bound by memory sooner, which is not measured.
    tuning.mat_vec_warps = compute_capability == 860 || compute_capability == 890 || compute_capability >= 1200 ? 12 : 32;
    tuning.rows_warps    = 8;
    tuning.n_sm          = n_sm;
    tuning.tile_cols     = 0;
    tuning.shared_size   = shared_size;
    // Decoded rows should be written and read again within the L2 cache where they can, but a product wants many rows. Not measured.
    tuning.scratch_size  = (size_t) 256 << 20;
    return tuning;
}
