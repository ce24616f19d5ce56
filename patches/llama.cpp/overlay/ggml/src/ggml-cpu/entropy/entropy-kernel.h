// SPDX-License-Identifier: MIT
//
// The inner functions of fused mode on the CPU, at several levels:
//
//     ref      as docs/format.md reads, one bit and one product at a time; every other level is tested against it
//     generic  portable C decoding (ggml-entropy.c), ggml's own dot and matrix products
//     avx512   32 lanes at once; only there if the processor can
//
// A level is a row of the table in entropy-kernel.cpp, best first. GGML_ENTROPY_KERNEL in the environment forces one by name; test
// backends that ask for ggml's reference implementation get ref.
//
// The contract of a new level: fill the struct below from a file of its own (entropy-kernel-<name>.cpp) and add it to the table.
// Symbols must be equal to ref's, bit by bit; products equal within rounding of float sums.

#pragma once

#include "ggml-cpu.h"
#include "../../ggml-entropy.h"

struct ggml_entropy_kernel {
    const char * name;

    // As ggml_entropy_decoder_lanes: symbols of the lanes [lane0, lane1) of a tile of a validated slab into decoder->symbols. Stays in bounds
    // for any bitstream: reads at most GGML_ENTROPY_SLACK bytes past its end, writes nothing but *decoder. Symbols of other lanes, and those
    // behind the tile's last, may change.
    void (*decode_lanes)(ggml_entropy_decoder * decoder, int64_t group, int64_t slice, int lane0, int lane1);

    // Dot product of n weights (a multiple of 32) with a column of Q8_0, nrc = 1. EQ8: weights as Q8_0, EQ4: as Q4_0.
    ggml_vec_dot_t dot_eq8;
    ggml_vec_dot_t dot_eq4;

    // Products of m rows with n columns, both of n_blocks blocks of 32 and so many blocks apart; the product of row i and column j into
    // dst[j*dst_stride + i]. The sums of stock types: what ggml computes for several columns. False, and nothing done, where it has no such
    // function for these types or sizes; then dot products do it.
    bool (*multiply)(
        ggml_type type, const void * rows, const void * columns, int64_t m, int64_t n, int64_t n_blocks, float * dst, int64_t dst_stride);
};

// The level in use: the best, or the forced one. An unknown name is reported once and ignored.
const ggml_entropy_kernel & ggml_entropy_kernel_active();

// Names of the levels that can run here, best first, separated by spaces.
const char * ggml_entropy_kernel_names();

// The level of that name, nullptr if there is none.
const ggml_entropy_kernel * ggml_entropy_kernel_find(const char * name);

// ---- levels ------------------------------------------------------------------------------------------------------------------------

ggml_entropy_kernel ggml_entropy_kernel_ref();
ggml_entropy_kernel ggml_entropy_kernel_generic();

// These are not for every processor: false, and nothing written, where they cannot run.
bool ggml_entropy_kernel_avx512(ggml_entropy_kernel * kernel);
