// SPDX-License-Identifier: MIT
//
// Level generic: the codec's portable decoder, and products in loops that compilers vectorise for whatever they compile for.

#include "entropy-kernel.h"

#include "../../ggml-entropy-decode.h"

#include <cstring>

static constexpr int ROWS  = GGML_ENTROPY_GROUP_ROWS;
static constexpr int BLOCK = 32;

static void multiply_generic(
        const int8_t * units, int n_units, int64_t first, const ggml_entropy_columns & columns, const int32_t * index, int n, float (* sums)[ROWS]) {
    for (int block = 0; block < n_units/8; block++) {
        for (int i = 0; i < n; i++) {
            const int8_t * x = columns.q + index[i]*columns.n_cols + first + block*BLOCK;
            const float    d = columns.d[index[i]*(columns.n_cols/BLOCK) + first/BLOCK + block];
            // column j of all units by itself, so that the loop is over neighbours; two products fit in 16 bits: 2*128*127 = 32 512
            int32_t sum[UNIT] = { 0 };
            for (int u = 0; u < 8; u++) {
                const int8_t * w = units + (8*block + u)*UNIT;
                int8_t four[UNIT];
                for (int row = 0; row < ROWS; row++) {
                    std::memcpy(four + 4*row, x + 4*u, 4);
                }
                for (int k = 0; k < UNIT; k++) {
                    sum[k] += (int16_t) (w[k]*four[k]);
                }
            }
            for (int row = 0; row < ROWS; row++) {
                const int total = sum[4*row] + sum[4*row + 1] + sum[4*row + 2] + sum[4*row + 3];
                sums[i][row] += d*(float) total;
            }
        }
    }
}

ggml_entropy_kernel ggml_entropy_kernel_generic() {
    return { "generic", decode_units, multiply_generic };
}
