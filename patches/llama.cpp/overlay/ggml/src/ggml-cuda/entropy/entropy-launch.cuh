// SPDX-License-Identifier: MIT
//
// How kernels are launched: which instance, how many blocks and warps, how much shared memory. What a launch may depend on is what the host
// knows: type, ne, nb, and the device. Everything else (tile_cols, modes) the kernels read from the slab.
//
// A launcher is a callable launcher(kernel, grid, n_threads, n_shared, args); on a GPU it launches, in the tests it runs fibers. Its member
// `early`, with the same arguments, is for kernels that call grid_wait: they may begin before the kernel ahead has ended.

#pragma once

#include "entropy-rows.cuh"
#include "entropy-tuning.cuh"

#include <algorithm>

static constexpr int ENTROPY_MAX_COLUMNS = 8;      // of one mat-vec launch
static constexpr int ENTROPY_MAX_GRID_YZ = 65535;

static int64_t entropy_ceil_div(int64_t a, int64_t b) {
    return (a + b - 1)/b;
}

// Warps for n pieces of work, as evenly as a limit allows: 28 slices are 2 rounds of 14 warps, not 16 and 12.
static int entropy_even_warps(int64_t n, int limit) {
    return (int) entropy_ceil_div(n, entropy_ceil_div(n, limit));
}

// Slices of a row if the file has the encoder's own tile_cols. Another number is only slower.
static int64_t entropy_likely_slices(int64_t n_cols, int64_t n_rows, const entropy_tuning & tuning) {
    return entropy_ceil_div(n_cols, tuning.tile_cols > 0 ? tuning.tile_cols : ggml_entropy_lanes_default_tile_cols(n_rows, n_cols));
}

template <ggml_type TYPE, typename Launcher>
static void entropy_launch_quantize(const Launcher & launcher, const entropy_quantize_args & args) {
    constexpr int n_warps = 4;
    const int64_t n_columns = args.columns.n_columns;
    const int64_t ny = std::min<int64_t>(n_columns, ENTROPY_MAX_GRID_YZ);
    const dim3 grid((uint32_t) entropy_ceil_div(args.columns.n_cols/32, n_warps), (uint32_t) ny, (uint32_t) entropy_ceil_div(n_columns, ny));
    launcher.early(entropy_quantize_columns<TYPE>, grid, n_warps*32, 0, args);
}

// n_rows: of both matrices; 0 for the second if there is none.
template <ggml_type TYPE, typename Launcher>
static void entropy_launch_mat_vec(
        const Launcher & launcher, entropy_mat_vec_args args, int n_columns, const int64_t (&n_rows)[2], int64_t ny, int64_t nz,
        const entropy_tuning & tuning) {
    const int64_t n_blocks = (entropy_ceil_div(n_rows[0], ENTROPY_LANES) + entropy_ceil_div(n_rows[1], ENTROPY_LANES))*ny*nz;
    // 32 warps of a block have an SM for themselves; where there are blocks enough, two of 16 do more, as one begins while the other ends
    const int most    = std::min(tuning.mat_vec_warps, n_columns <= 4 && (tuning.n_sm == 0 || 2*n_blocks <= 3*tuning.n_sm) ? 32 : 16);
    const int limit   = std::min(most, (int) ((tuning.shared_size - ENTROPY_TABLE_SIZE)/ENTROPY_RING_SIZE));
    const int n_warps = entropy_even_warps(entropy_likely_slices(args.columns.n_cols, n_rows[0], tuning), limit);
    args.n_groups     = (int) entropy_ceil_div(n_rows[0], ENTROPY_LANES);
    const dim3 grid((uint32_t) (args.n_groups + entropy_ceil_div(n_rows[1], ENTROPY_LANES)), (uint32_t) ny, (uint32_t) nz);
    const int n_shared = entropy_mat_vec_shared_size(n_warps);
    switch (n_columns) {
        case 1: launcher.early(entropy_mat_vec<TYPE, 1>, grid, n_warps*32, n_shared, args); break;
        case 2: launcher.early(entropy_mat_vec<TYPE, 2>, grid, n_warps*32, n_shared, args); break;
        case 3: launcher.early(entropy_mat_vec<TYPE, 3>, grid, n_warps*32, n_shared, args); break;
        case 4: launcher.early(entropy_mat_vec<TYPE, 4>, grid, n_warps*32, n_shared, args); break;
        case 5: launcher.early(entropy_mat_vec<TYPE, 5>, grid, n_warps*32, n_shared, args); break;
        case 6: launcher.early(entropy_mat_vec<TYPE, 6>, grid, n_warps*32, n_shared, args); break;
        case 7: launcher.early(entropy_mat_vec<TYPE, 7>, grid, n_warps*32, n_shared, args); break;
        case 8: launcher.early(entropy_mat_vec<TYPE, 8>, grid, n_warps*32, n_shared, args); break;
        default: GGML_ABORT("%d columns", n_columns);
    }
}

// Decode n_groups row groups, from args.group0 on, of n_slabs slabs.
template <ggml_type TYPE, ggml_type PLAIN, typename Launcher>
static void entropy_launch_decode_rows(
        const Launcher & launcher, const entropy_rows_args & args, int64_t n_groups, int64_t n_cols, int64_t n_rows, int64_t n_slabs,
        const entropy_tuning & tuning) {
    const int64_t n_slices = entropy_likely_slices(n_cols, n_rows, tuning);
    const int limit   = std::min(tuning.rows_warps, (int) ((tuning.shared_size - ENTROPY_TABLE_SIZE)/(ENTROPY_RING_SIZE + ENTROPY_STAGE_SIZE)));
    const int n_warps = entropy_even_warps(n_slices, limit);
    const dim3 grid((uint32_t) n_groups, (uint32_t) entropy_ceil_div(n_slices, n_warps), (uint32_t) n_slabs);
    launcher(entropy_decode_rows<TYPE, PLAIN>, grid, n_warps*32, entropy_rows_shared_size(n_warps), args);
}

// The stock type is what the file decodes to (F16, Q8_0; Q4_0, Q4_1), or any of those without offsets. False if the pair is none of these.
template <typename Launcher>
static bool entropy_launch_decode(
        const Launcher & launcher, ggml_type type, ggml_type plain, const entropy_rows_args & args, int64_t n_groups, int64_t n_cols,
        int64_t n_rows, int64_t n_slabs, const entropy_tuning & tuning) {
    const auto is = [&](ggml_type t, ggml_type p) { return type == t && plain == p; };
    if (is(GGML_TYPE_EQ8, GGML_TYPE_F16)) {
        entropy_launch_decode_rows<GGML_TYPE_EQ8, GGML_TYPE_F16>(launcher, args, n_groups, n_cols, n_rows, n_slabs, tuning);
    } else if (is(GGML_TYPE_EQ8, GGML_TYPE_Q8_0)) {
        entropy_launch_decode_rows<GGML_TYPE_EQ8, GGML_TYPE_Q8_0>(launcher, args, n_groups, n_cols, n_rows, n_slabs, tuning);
    } else if (is(GGML_TYPE_EQ4, GGML_TYPE_F16)) {
        entropy_launch_decode_rows<GGML_TYPE_EQ4, GGML_TYPE_F16>(launcher, args, n_groups, n_cols, n_rows, n_slabs, tuning);
    } else if (is(GGML_TYPE_EQ4, GGML_TYPE_Q4_0)) {
        entropy_launch_decode_rows<GGML_TYPE_EQ4, GGML_TYPE_Q4_0>(launcher, args, n_groups, n_cols, n_rows, n_slabs, tuning);
    } else if (is(GGML_TYPE_EQ4, GGML_TYPE_Q4_1)) {
        entropy_launch_decode_rows<GGML_TYPE_EQ4, GGML_TYPE_Q4_1>(launcher, args, n_groups, n_cols, n_rows, n_slabs, tuning);
    } else {
        return false;
    }
    return true;
}

template <ggml_type TYPE, typename Launcher>
static void entropy_launch_get_rows(
        const Launcher & launcher, const entropy_get_rows_args & args, int64_t n_ids, int64_t n_cols, int64_t n_slabs,
        const entropy_tuning & tuning) {
    const int64_t n_slices = entropy_likely_slices(n_cols, args.n_rows, tuning);
    const int n_warps = entropy_even_warps(n_slices, 4);
    const dim3 grid((uint32_t) n_ids, (uint32_t) entropy_ceil_div(n_slices, n_warps), (uint32_t) n_slabs);
    launcher(entropy_get_rows<TYPE>, grid, n_warps*32, entropy_get_rows_shared_size(n_warps), args);
}

template <typename Launcher>
static void entropy_launch_add_offsets(const Launcher & launcher, const entropy_offsets_args & args, dim3 grid) {
    constexpr int n_threads = 128;
    launcher(entropy_add_offsets, grid, n_threads, (int) (n_threads*sizeof(float)), args);
}
