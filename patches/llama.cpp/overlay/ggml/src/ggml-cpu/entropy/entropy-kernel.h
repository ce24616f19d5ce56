// SPDX-License-Identifier: MIT
//
// The inner functions of fused mode on the CPU, at several levels:
//
//     ref      as docs/format.md reads, one bit and one product at a time; every other level is tested against it
//     generic  portable C: the codec's decoder (ggml-entropy-decode.h), and loops for the compiler to vectorise
//     avx2     64 weights at a time by pdep and byte shuffles; only there if the processor can, and pdep is not microcoded
//     avx2-nopdep  the products of avx2 with the decoder of generic, for AMD's processors before Zen 3
//     avx512   the same in registers of 64 bytes, with VNNI where it is there
//     neon     64 weights at a time by byte look-ups, on aarch64, with dot products if the library is compiled for them
//
// A level is a row of the table in entropy-kernel.cpp, best first. GGML_ENTROPY_KERNEL in the environment forces one by name; test
// backends that ask for ggml's reference implementation get ref.
//
// Weights pass from one function to the other in units as they stand in the file: 64 bytes, weight i being row i / 4 of a group and column
// i % 4. So a unit is 16 rows' dwords of four columns, and a dot instruction with four activations in every dword gives 16 rows at once.
//
// The contract of a new level: fill the struct below from a file of its own (entropy-kernel-<name>.cpp) and add it to the table.
// Codes must be equal to ref's, for any bits; products equal within rounding of float sums.

#pragma once

#include "../../ggml-entropy.h"

// Columns of activations as int8 with a scale for each block of 32: column i starts at q + i*n_cols, d + i*n_cols/32 and s + i*n_cols/32.
struct ggml_entropy_columns {
    const int8_t  * q;
    const float   * d;
    const int32_t * s;      // sums of the blocks' int8
    int64_t         n_cols; // values of a column
};

struct ggml_entropy_kernel {
    const char * name;

    // As ggml_entropy_decode_units. out is aligned to 64 bytes.
    ggml_entropy_decode_t decode;

    // Products of the units of a row group from column `first` of the matrix on (a multiple of 32; n_units is a multiple of 8) with n
    // columns of activations, those of the numbers index[0..n): adds to sums[i][row] the sum over blocks of 32 of d * (integer sum of the
    // block). units and sums are aligned to 64 bytes.
    void (*multiply)(
        const int8_t * units, int n_units, int64_t first, const ggml_entropy_columns & columns, const int32_t * index, int n,
        float (* sums)[GGML_ENTROPY_GROUP_ROWS]);
};

// The level in use: the best, or the forced one. Where an unknown name is forced, the program is stopped with the line that refuses it.
const ggml_entropy_kernel & ggml_entropy_kernel_active();

// That line, for the model loader, which refuses the model before; nullptr if the name is known or none is forced.
const char * ggml_entropy_kernel_refusal();

// Names of the levels that can run here, best first, separated by spaces.
const char * ggml_entropy_kernel_names();

// The level of that name, nullptr if there is none.
const ggml_entropy_kernel * ggml_entropy_kernel_find(const char * name);

// ---- levels ------------------------------------------------------------------------------------------------------------------------

ggml_entropy_kernel ggml_entropy_kernel_ref();
ggml_entropy_kernel ggml_entropy_kernel_generic();

// These are not for every processor: false, and nothing written, where they cannot run.
bool ggml_entropy_kernel_avx512(ggml_entropy_kernel * kernel);
bool ggml_entropy_kernel_avx2(ggml_entropy_kernel * kernel);
bool ggml_entropy_kernel_avx2_nopdep(ggml_entropy_kernel * kernel);
bool ggml_entropy_kernel_neon(ggml_entropy_kernel * kernel);
