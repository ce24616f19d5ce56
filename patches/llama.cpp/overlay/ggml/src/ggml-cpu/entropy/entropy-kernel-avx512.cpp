// SPDX-License-Identifier: MIT
//
// Level avx512: all 32 lanes of a tile at once, one lane in each 16-bit element of a register. Dot products are ggml's own.
//
// Needs AVX-512 F, BW, VL and VBMI2 (Intel from Ice Lake on, AMD from Zen 4 on), asked of the processor at run time: the file is compiled for
// them whatever the rest is compiled for.
//
// A code costs the same number of instructions whatever its length: the table of 256 entries stands in eight registers, and a look-up is four
// permutations of two registers each. Codes are taken in twos, since two are at most 30 bits: a window of 32 bits per lane holds them.

#include "entropy-kernel.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace {

constexpr int LANES = GGML_ENTROPY_LANES;

// Of fewer lanes the portable decoder takes each for itself: a row of GET_ROWS, a short last group.
constexpr int MIN_LANES = 8;

// Symbols of a lane that are put together before they are stored: a cache line.
constexpr int BLOCK = 64;

constexpr __mmask32 ODD_WORDS = 0xaaaaaaaa;         // 16-bit elements
constexpr __mmask64 ODD_BYTES = 0xaaaaaaaaaaaaaaaa;

// Vectors of 16-bit elements hold lane l in element 2*l and lane 16 + l in element 2*l + 1, so that each half is a vector of 32-bit
// elements after one mask or shift.

// Words of 16 lanes around their positions. The third word is there to be waited for: its load has two codes' time.
struct half {
    __m512i         word;            // index of the current word
    __m512i         now, next, then; // this word and the two behind it
    __m512i         columns;         // where the lanes stand in a word row
};

struct table {
    __m512i entries[8]; // bias << 8 | t
};

} // namespace

static INLINE __m512i load(const void * from) {
    return _mm512_loadu_si512(from);
}

static INLINE __m512i look_up(const table & tab, __m512i index) {
    const __mmask32 upper_half    = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x80));
    const __mmask32 upper_quarter = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x40));
    const __m512i q0 = _mm512_permutex2var_epi16(tab.entries[0], index, tab.entries[1]);
    const __m512i q1 = _mm512_permutex2var_epi16(tab.entries[2], index, tab.entries[3]);
    const __m512i q2 = _mm512_permutex2var_epi16(tab.entries[4], index, tab.entries[5]);
    const __m512i q3 = _mm512_permutex2var_epi16(tab.entries[6], index, tab.entries[7]);
    return _mm512_mask_blend_epi16(
        upper_half, _mm512_mask_blend_epi16(upper_quarter, q0, q1), _mm512_mask_blend_epi16(upper_quarter, q2, q3));
}

// The tile's word rows with a place for every lane, zero where a lane has no more words, and a row of zeros behind the last, whose number is
// returned. rows has room for MAX_LANE_WORDS + 1 of them. Reads up to 64 bytes past the tile.
static INLINE int expand_tile(const uint32_t * src, const uint8_t * lane_words, uint32_t * rows) {
    const __m256i lengths = _mm256_loadu_si256((const __m256i *) lane_words);
    for (int j = 0;; j++, rows += LANES) {
        // lengths are at most 255: at j = 255 no lane is left, before the comparison of bytes would wrap
        const uint32_t has_word = _mm256_cmpgt_epu8_mask(lengths, _mm256_set1_epi8((char) j));
        const __mmask16 low  = (__mmask16) has_word;
        const __mmask16 high = (__mmask16) (has_word >> 16);
        _mm512_storeu_si512(rows, _mm512_maskz_expand_epi32(low, load(src)));
        src += __builtin_popcount(low);
        _mm512_storeu_si512(rows + 16, _mm512_maskz_expand_epi32(high, load(src)));
        src += __builtin_popcount(high);
        if (has_word == 0) {
            return j;
        }
    }
}

// Move on to the words that the positions are in, at most one further than before.
static INLINE void advance(half & h, __m512i word, const uint32_t * rows, __m512i last_row) {
    const __mmask16 moved = _mm512_cmpneq_epi32_mask(word, h.word);
    h.word = word;
    h.now  = _mm512_mask_mov_epi32(h.now,  moved, h.next);
    h.next = _mm512_mask_mov_epi32(h.next, moved, h.then);
    // wrong bits can run past the end, where all is zeros
    const __m512i row = _mm512_min_epu32(_mm512_add_epi32(word, _mm512_set1_epi32(2)), last_row);
    h.then = _mm512_mask_i32gather_epi32(h.then, moved, _mm512_add_epi32(_mm512_slli_epi32(row, 5), h.columns), rows, 4);
}

static INLINE half start(const uint32_t * rows, int n_rows, int lane) {
    half h;
    h.word    = _mm512_setzero_si512();
    h.now     = load(rows + lane);
    h.next    = load(rows + lane + LANES*std::min(1, n_rows));
    h.then    = load(rows + lane + LANES*std::min(2, n_rows));
    h.columns = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(lane));
    return h;
}

// One code of every lane off the windows. The symbols are the low bytes; the high ones are of no meaning.
static INLINE __m512i decode_one(const table & tab, __m512i & low_window, __m512i & high_window, __m512i & position) {
    const __m512i top   = _mm512_mask_blend_epi16(ODD_WORDS, _mm512_srli_epi32(low_window, 16), high_window);
    const __m512i entry = look_up(tab, _mm512_srli_epi16(top, 8));
    const __m512i t     = _mm512_and_si512(entry, _mm512_set1_epi16(0xff));
    low_window  = _mm512_sllv_epi32(low_window, _mm512_and_si512(entry, _mm512_set1_epi32(0xff)));
    high_window = _mm512_sllv_epi32(high_window, _mm512_srli_epi32(t, 16));
    position    = _mm512_add_epi16(position, t);
    const __m512i taken = _mm512_srlv_epi16(top, _mm512_sub_epi16(_mm512_set1_epi16(16), t));
    return _mm512_add_epi16(taken, _mm512_srli_epi16(entry, 8));
}

// Two codes of every lane; the first symbol in the low byte.
static INLINE __m512i decode_two(const table & tab, half & low, half & high, __m512i & position, const uint32_t * rows, __m512i last_row) {
    const __m512i high_position = _mm512_srli_epi32(position, 16);
    advance(low,  _mm512_srli_epi32(_mm512_and_si512(position, _mm512_set1_epi32(0xffff)), 5), rows, last_row);
    advance(high, _mm512_srli_epi32(high_position, 5), rows, last_row);
    // a shift's count is taken modulo 32
    __m512i low_window  = _mm512_shldv_epi32(low.now,  low.next,  position);
    __m512i high_window = _mm512_shldv_epi32(high.now, high.next, high_position);
    const __m512i first  = decode_one(tab, low_window, high_window, position);
    const __m512i second = decode_one(tab, low_window, high_window, position);
    return _mm512_mask_blend_epi8(ODD_BYTES, first, _mm512_slli_epi16(second, 8));
}

// 16 vectors of 16 lanes, four symbols an element, to 16 lanes of 64 symbols.
static INLINE void store_lanes(const uint32_t (*fours)[LANES], uint8_t (*to)[GGML_ENTROPY_MAX_TILE_COLS], int at) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i++) {
        a[i] = load(fours[i]);
    }
    for (int i = 0; i < 16; i += 2) { // pairs
        b[i]     = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) { // a[i + j]: lanes j, 4 + j, 8 + j, 12 + j of four vectors
        a[i]     = _mm512_unpacklo_epi64(b[i],     b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i],     b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; j++) { // parts of 128 bits: a 4 x 4 of them
        const __m512i even0 = _mm512_shuffle_i32x4(a[j],     a[j + 4],  0x88); // lanes j, 8 + j of vectors 0..7
        const __m512i odd0  = _mm512_shuffle_i32x4(a[j],     a[j + 4],  0xdd); // lanes 4 + j, 12 + j
        const __m512i even1 = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0x88); // of vectors 8..15
        const __m512i odd1  = _mm512_shuffle_i32x4(a[j + 8], a[j + 12], 0xdd);
        _mm512_storeu_si512(&to[j]     [at], _mm512_shuffle_i32x4(even0, even1, 0x88));
        _mm512_storeu_si512(&to[j + 4] [at], _mm512_shuffle_i32x4(odd0,  odd1,  0x88));
        _mm512_storeu_si512(&to[j + 8] [at], _mm512_shuffle_i32x4(even0, even1, 0xdd));
        _mm512_storeu_si512(&to[j + 12][at], _mm512_shuffle_i32x4(odd0,  odd1,  0xdd));
    }
}

static TARGET void decode_lanes_avx512(ggml_entropy_decoder * decoder, int64_t group, int64_t slice, int lane0, int lane1) {
    if (lane1 - lane0 < MIN_LANES) {
        ggml_entropy_decoder_lanes(decoder, group, slice, lane0, lane1);
        return;
    }
    const ggml_entropy_view   & view = decoder->view;
    const ggml_entropy_header & h    = *view.header;
    const int64_t i_tile    = group*view.n_slices + slice;
    const int     n_cols    = (int) std::min<int64_t>(h.tile_cols, h.n_cols - slice*h.tile_cols);
    const int     n_symbols = h.kind == GGML_ENTROPY_KIND_EQ4 ? n_cols/2 : n_cols; // a multiple of 16

    uint32_t * rows = &decoder->words[0][0];
    static_assert(sizeof(decoder->words) >= sizeof(uint32_t)*LANES*(GGML_ENTROPY_MAX_LANE_WORDS + 1), "a row of zeros behind the last");
    const int n_rows = expand_tile(view.bitstream + view.word_offsets[i_tile], view.lane_words + i_tile*LANES, rows);

    table tab;
    for (int i = 0; i < 8; i++) {
        tab.entries[i] = load(view.table + 32*i);
    }
    const __m512i last_row = _mm512_set1_epi32(n_rows);
    half low      = start(rows, n_rows, 0);
    half high     = start(rows, n_rows, 16);
    __m512i position = _mm512_setzero_si512();

    alignas(64) uint32_t fours[BLOCK/4][LANES] = {};
    for (int at = 0; at < n_symbols; at += BLOCK) { // a row of symbols has room for the whole last block
        const int n_fours = std::min(BLOCK, n_symbols - at)/4;
        for (int i = 0; i < n_fours; i++) {
            const __m512i two0 = decode_two(tab, low, high, position, rows, last_row);
            const __m512i two1 = decode_two(tab, low, high, position, rows, last_row);
            _mm512_store_si512(&fours[i][0],  _mm512_mask_blend_epi16(ODD_WORDS, two0, _mm512_slli_epi32(two1, 16)));
            _mm512_store_si512(&fours[i][16], _mm512_mask_blend_epi16(ODD_WORDS, _mm512_srli_epi32(two0, 16), two1));
        }
        store_lanes((const uint32_t (*)[LANES]) &fours[0][0],  decoder->symbols,      at);
        store_lanes((const uint32_t (*)[LANES]) &fours[0][16], decoder->symbols + 16, at);
    }
}

bool ggml_entropy_kernel_avx512(ggml_entropy_kernel * kernel) {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512f")  || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vbmi2")) {
        return false;
    }
    *kernel              = ggml_entropy_kernel_generic();
    kernel->name         = "avx512";
    kernel->decode_lanes = decode_lanes_avx512;
    return true;
}

#else

bool ggml_entropy_kernel_avx512(ggml_entropy_kernel *) {
    return false;
}

#endif
