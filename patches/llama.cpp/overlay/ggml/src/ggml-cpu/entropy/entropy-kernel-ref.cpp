// SPDX-License-Identifier: MIT
//
// Level ref: docs/format.md 6, sentence by sentence. Slow on purpose; shares no code with the codec.

#include "entropy-kernel.h"

#define GGML_COMMON_DECL_CPP
#include "ggml-common.h"
#include "ggml-impl.h"

#include <algorithm>

namespace {

// One lane as a string of bits.
struct lane_bits {
    const uint32_t * words;                                // of the tile
    int              n;                                    // length in words
    int              position[GGML_ENTROPY_MAX_LANE_WORDS]; // of the lane's word j among them

    // Step 2: word j stands behind all word rows before row j, and in row j behind the lanes before this one that have a word j.
    lane_bits(const uint32_t * tile_words, const uint8_t * lane_words, int lane) : words(tile_words), n(lane_words[lane]) {
        int row_begin = 0;
        for (int j = 0; j < n; j++) {
            const auto has_word_j = [j](uint8_t length) { return length > j; };
            position[j] = row_begin + (int) std::count_if(lane_words, lane_words + lane, has_word_j);
            row_begin  += (int) std::count_if(lane_words, lane_words + GGML_ENTROPY_LANES, has_word_j);
        }
    }

    // Zeros beyond the last word.
    int bit(int at) const {
        return at / 32 < n ? words[position[at / 32]] >> (31 - at % 32) & 1 : 0;
    }

    int bits(int at, int count) const {
        int value = 0;
        for (int i = 0; i < count; i++) {
            value = value << 1 | bit(at + i);
        }
        return value;
    }
};

} // namespace

static void decode_lanes_ref(ggml_entropy_decoder * decoder, int64_t group, int64_t slice, int lane0, int lane1) {
    const ggml_entropy_view   & view = decoder->view;
    const ggml_entropy_header & h    = *view.header;
    // step 1
    const int64_t i_tile    = group * view.n_slices + slice;
    const int64_t n_cols    = std::min<int64_t>(h.tile_cols, h.n_cols - slice * h.tile_cols);
    const int64_t n_symbols = h.kind == GGML_ENTROPY_KIND_EQ4 ? n_cols / 2 : n_cols;
    for (int lane = lane0; lane < lane1; lane++) {
        const lane_bits stream(
            view.bitstream + view.word_offsets[i_tile], view.lane_words + i_tile * GGML_ENTROPY_LANES, lane);
        int at = 0;
        for (int64_t k = 0; k < n_symbols; k++) {
            // step 3
            const ggml_entropy_entry entry = view.table[stream.bits(at, 8)];
            decoder->symbols[lane][k] = (uint8_t) (stream.bits(at, entry.t) + entry.bias);
            at += entry.t;
        }
    }
}

static void dot_q8_0_ref(int n, float * s, size_t, const void * vx, size_t, const void * vy, size_t, int) {
    const block_q8_0 * x = (const block_q8_0 *) vx;
    const block_q8_0 * y = (const block_q8_0 *) vy;
    float sum = 0.0f;
    for (int i = 0; i < n / QK8_0; i++) {
        int dot = 0;
        for (int j = 0; j < QK8_0; j++) {
            dot += x[i].qs[j] * y[i].qs[j];
        }
        sum += (float) dot * GGML_FP16_TO_FP32(x[i].d) * GGML_FP16_TO_FP32(y[i].d);
    }
    *s = sum;
}

static void dot_q4_0_ref(int n, float * s, size_t, const void * vx, size_t, const void * vy, size_t, int) {
    const block_q4_0 * x = (const block_q4_0 *) vx;
    const block_q8_0 * y = (const block_q8_0 *) vy;
    float sum = 0.0f;
    for (int i = 0; i < n / QK4_0; i++) {
        int dot = 0;
        for (int j = 0; j < QK4_0 / 2; j++) { // byte j holds weight j below and weight j + 16 above
            dot += ((x[i].qs[j] & 15) - 8) * y[i].qs[j] + ((x[i].qs[j] >> 4) - 8) * y[i].qs[j + QK4_0 / 2];
        }
        sum += (float) dot * GGML_FP16_TO_FP32(x[i].d) * GGML_FP16_TO_FP32(y[i].d);
    }
    *s = sum;
}

ggml_entropy_kernel ggml_entropy_kernel_ref() {
    ggml_entropy_kernel kernel;
    kernel.name         = "ref";
    kernel.decode_lanes = decode_lanes_ref;
    kernel.dot_eq8      = dot_q8_0_ref;
    kernel.dot_eq4      = dot_q4_0_ref;
    kernel.multiply     = [](ggml_type, const void *, const void *, int64_t, int64_t, int64_t, float *, int64_t) { return false; };
    return kernel;
}
