// SPDX-License-Identifier: MIT
//
// Level generic: the codec's portable decoder, and products in loops that compilers vectorise for whatever they compile for.

#include "entropy-kernel.h"

#include "../../ggml-entropy-decode.h"

#include <cstring>

static constexpr int ROWS  = GGML_ENTROPY_GROUP_ROWS;
static constexpr int BLOCK = 32;

#if defined(__GNUC__)

// Vectors of GCC and Clang, as long as the processor's: loops over the same are not found by GCC 12.
#ifdef __AVX2__
static constexpr int VECTOR = 32; // bytes
#else
static constexpr int VECTOR = 16;
#endif
static constexpr int PART = VECTOR/2; // weights in a vector of 16 bits each

typedef int8_t  bytes  __attribute__((vector_size(PART)));
typedef int16_t shorts __attribute__((vector_size(VECTOR)));
typedef int32_t pairs  __attribute__((vector_size(VECTOR)));
typedef int32_t fours  __attribute__((vector_size(PART)));

static inline shorts widen(const int8_t * from) {
    bytes v;
    std::memcpy(&v, from, sizeof(v));
    return __builtin_convertvector(v, shorts);
}

// Four activations, once for each of the rows in a vector.
static inline shorts repeat(const int8_t * x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return __builtin_convertvector((bytes) (fours{} + four), shorts);
}

// Sums of neighbours.
static inline pairs add_pairs(shorts v) {
    const pairs both = (pairs) v;
    return (both << 16 >> 16) + (both >> 16);
}

static void multiply_generic(
        const int8_t * units, int n_units, int64_t first, const ggml_entropy_columns & columns, const int32_t * index, int n, float (* sums)[ROWS]) {
    for (int block = 0; block < n_units/8; block++) {
        shorts w[8][UNIT/PART];
        for (int u = 0; u < 8; u++) {
            for (int part = 0; part < UNIT/PART; part++) {
                w[u][part] = widen(units + (8*block + u)*UNIT + part*PART);
            }
        }
        for (int i = 0; i < n; i++) {
            const int8_t * x = columns.q + index[i]*columns.n_cols + first + block*BLOCK;
            const float    d = columns.d[index[i]*(columns.n_cols/BLOCK) + first/BLOCK + block];
            shorts four[8];
            for (int u = 0; u < 8; u++) {
                four[u] = repeat(x + 4*u);
            }
            pairs sum[UNIT/PART];
            for (int part = 0; part < UNIT/PART; part++) {
                sum[part] = pairs{};
                for (int u = 0; u < 8; u += 2) { // two products fit in 16 bits: 2*128*127 = 32 512
                    sum[part] += add_pairs(w[u][part]*four[u] + w[u + 1][part]*four[u + 1]);
                }
            }
            int32_t of_row[ROWS][2];
            std::memcpy(of_row, sum, sizeof(of_row));
            for (int row = 0; row < ROWS; row++) {
                sums[i][row] += d*(float) (of_row[row][0] + of_row[row][1]);
            }
        }
    }
}

#else

static void multiply_generic(
        const int8_t * units, int n_units, int64_t first, const ggml_entropy_columns & columns, const int32_t * index, int n, float (* sums)[ROWS]) {
    for (int block = 0; block < n_units/8; block++) {
        for (int i = 0; i < n; i++) {
            const int8_t * x = columns.q + index[i]*columns.n_cols + first + block*BLOCK;
            const float    d = columns.d[index[i]*(columns.n_cols/BLOCK) + first/BLOCK + block];
            for (int row = 0; row < ROWS; row++) {
                int sum = 0;
                for (int j = 0; j < BLOCK; j++) {
                    sum += units[(8*block + j/4)*UNIT + row*4 + j%4]*x[j];
                }
                sums[i][row] += d*(float) sum;
            }
        }
    }
}

#endif

ggml_entropy_kernel ggml_entropy_kernel_generic() {
    return { "generic", decode_units, multiply_generic };
}
