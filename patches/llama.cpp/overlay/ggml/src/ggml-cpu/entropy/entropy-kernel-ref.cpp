// SPDX-License-Identifier: MIT
//
// Level ref: docs/format.md 5 and 6, sentence by sentence. Slow on purpose; shares no code with the codec.

#include "entropy-kernel.h"

#include <algorithm>

static constexpr int UNIT = GGML_ENTROPY_UNIT;
static constexpr int ROWS = GGML_ENTROPY_GROUP_ROWS;

// 5.2: widths of the digits of a tail shape, 0 behind the last
static const int tail_digits[][5] = { { 0 }, { 2, 2, 0 }, { 1, 1, 2, 2, 0 } };
static_assert(sizeof(tail_digits)/sizeof(tail_digits[0]) == GGML_ENTROPY_N_TAILS, "every tail shape is here");

static int bit_of(const uint8_t * bytes, uint64_t i) {
    return bytes[i / 8] >> (i % 8) & 1;
}

// 5.6: r of a weight; the parts that B consists of, the lowest bits first
static int raw_number(int raw_bits, const uint8_t * raw, int weight) {
    if (raw_bits == 8) {
        return raw[weight];
    }
    int r     = 0;
    int shift = 0;
    if (raw_bits & 4) {
        r    |= raw[weight % 32] >> 4*(weight / 32) & 15;
        raw  += 32;
        shift = 4;
    }
    if (raw_bits & 2) {
        r    |= (raw[weight % 16] >> 2*(weight / 16) & 3) << shift;
        raw  += 16;
        shift += 2;
    }
    if (raw_bits & 1) {
        r |= bit_of(raw, weight) << shift;
    }
    return r;
}

static void decode_ref(const ggml_entropy_code * code, ggml_entropy_stream * s, int n_units, int8_t * out) {
    const int direct = code->raw_bits == 8 ? 256 : (1 << code->raw_bits) - (1 << code->bin_bits);
    for (int u = 0; u < n_units; u++, s->unit++) {
        int  r[UNIT];
        int  value[UNIT]; // code, modulo 256
        bool open[UNIT];
        for (int i = 0; i < UNIT; i++) { // step 1
            r[i]     = raw_number(code->raw_bits, s->raw, i);
            open[i]  = r[i] >= direct;
            value[i] = code->base + r[i];
        }
        s->raw += 8*code->raw_bits;
        if (s->unit % 4 == 0) { // step 2
            s->pos = std::min(s->pos, s->end);
        }
        int first = 0; // class that the digit's value 0 names
        for (const int * digit_width = tail_digits[code->tail]; *digit_width > 0; digit_width++) { // step 3
            const int width = *digit_width;
            int digit[UNIT] = {};
            for (int plane = 0; plane < width; plane++) {
                for (int i = 0; i < UNIT; i++) {
                    if (open[i]) {
                        digit[i] |= bit_of(s->tail, s->pos++) << plane;
                    }
                }
            }
            const int on = (1 << width) - 1;
            for (int i = 0; i < UNIT; i++) {
                if (open[i] && digit[i] < on) {
                    open[i]  = false;
                    value[i] = code->class_base[first + digit[i]] + r[i] - direct;
                }
            }
            first += on;
        }
        for (int i = 0; i < UNIT; i++) { // steps 4 and 5
            if (open[i]) {
                value[i] = s->far > s->tail ? *--s->far : 0;
            }
            out[u*UNIT + i] = (int8_t) (uint8_t) value[i];
        }
    }
}

static void multiply_ref(
        const int8_t * units, int n_units, int64_t first, const ggml_entropy_columns & columns, const int32_t * index, int n, float (* sums)[ROWS]) {
    for (int i = 0; i < n; i++) {
        const int8_t * x = columns.q + index[i]*columns.n_cols + first;
        const float  * d = columns.d + index[i]*(columns.n_cols/32) + first/32;
        for (int row = 0; row < ROWS; row++) {
            for (int block = 0; block < n_units/8; block++) {
                int sum = 0;
                for (int j = 0; j < 32; j++) {
                    sum += units[(8*block + j/4)*UNIT + row*4 + j%4]*x[32*block + j];
                }
                sums[i][row] += d[block]*(float) sum;
            }
        }
    }
}

ggml_entropy_kernel ggml_entropy_kernel_ref() {
    return { "ref", decode_ref, multiply_ref };
}
