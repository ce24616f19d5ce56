// SPDX-License-Identifier: MIT
//
// Products of level neon, for entropy-kernel-neon.cpp, which defines INLINE. Lanes are rows; sdot multiplies four columns of 4 rows with
// four activations out of 16 in a register. Where the library is not compiled for it, products of 16 bits are added up by pairs.

#pragma once

#include "entropy-kernel.h"

#include <arm_neon.h>

namespace {

constexpr int UNIT = GGML_ENTROPY_UNIT;
constexpr int ROWS = GGML_ENTROPY_GROUP_ROWS;

// Adds the products of four columns of 4 rows with activations 4*LANE to 4*LANE + 3.
#ifdef __ARM_FEATURE_DOTPROD
template <int LANE>
INLINE int32x4_t dot(int32x4_t sum, int8x16_t w, int8x16_t x) {
    return vdotq_laneq_s32(sum, w, x, LANE);
}
#else
template <int LANE>
INLINE int32x4_t dot(int32x4_t sum, int8x16_t w, int8x16_t x) {
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), LANE));
    const int16x8_t low  = vmull_s8(vget_low_s8(w), vget_low_s8(four));
    const int16x8_t high = vmull_high_s8(w, four);
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
#endif

// Adds the products of a unit with activations 4*LANE to 4*LANE + 3 of the 16 of each of N columns.
template <int LANE, int N>
INLINE void add_unit(const int8_t * unit, const int8x16_t x[N], int32x4_t sum[N][4]) {
    for (int part = 0; part < 4; part++) {
        const int8x16_t w = vld1q_s8(unit + 16*part);
        for (int i = 0; i < N; i++) {
            sum[i][part] = dot<LANE>(sum[i][part], w, x[i]);
        }
    }
}

// N columns at a time: their integer sums of a block are 4*N registers.
template <int N>
void multiply_columns(
        const int8_t * units, int n_blocks, int64_t first, const ggml_entropy_columns & columns, const int32_t * index, float (* sums)[ROWS]) {
    const int8_t * x[N];
    const float  * d[N];
    for (int i = 0; i < N; i++) {
        x[i] = columns.q + index[i]*columns.n_cols + first;
        d[i] = columns.d + index[i]*(columns.n_cols/32) + first/32;
    }
    for (int block = 0; block < n_blocks; block++) {
        int32x4_t sum[N][4] = {};
        for (int half = 0; half < 2; half++, units += 4*UNIT) {
            int8x16_t x16[N];
            for (int i = 0; i < N; i++) {
                x16[i] = vld1q_s8(x[i] + 32*block + 16*half);
            }
            add_unit<0, N>(units,          x16, sum);
            add_unit<1, N>(units + UNIT,   x16, sum);
            add_unit<2, N>(units + 2*UNIT, x16, sum);
            add_unit<3, N>(units + 3*UNIT, x16, sum);
        }
        for (int i = 0; i < N; i++) {
            for (int part = 0; part < 4; part++) {
                float * to = sums[i] + 4*part;
                vst1q_f32(to, vfmaq_n_f32(vld1q_f32(to), vcvtq_f32_s32(sum[i][part]), d[i][block]));
            }
        }
    }
}

void multiply(
        const int8_t * units, int n_units, int64_t first, const ggml_entropy_columns & columns, const int32_t * index, int n, float (* sums)[ROWS]) {
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        multiply_columns<4>(units, n_units/8, first, columns, index + i, sums + i);
    }
    switch (n - i) {
        case 3: return multiply_columns<3>(units, n_units/8, first, columns, index + i, sums + i);
        case 2: return multiply_columns<2>(units, n_units/8, first, columns, index + i, sums + i);
        case 1: return multiply_columns<1>(units, n_units/8, first, columns, index + i, sums + i);
        default: return;
    }
}

} // namespace
