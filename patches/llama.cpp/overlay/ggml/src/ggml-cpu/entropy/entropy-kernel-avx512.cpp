// SPDX-License-Identifier: MIT
//
// Level avx512: all 32 lanes of a tile at once, one lane in each 16-bit element of a register. Products are those of generic.
//
// Needs AVX-512 F, BW, VL, VBMI and VBMI2 (Intel's servers from Ice Lake on, AMD from Zen 4 on), asked of the processor at run time: the file
// is compiled for them whatever the rest is compiled for.
//
// A code costs the same number of instructions whatever its length: the table of 256 entries stands in eight registers, and a look-up is
// four permutations for its lengths and four for its biases. Codes are taken in twos, since two are at most 30 bits: a window of 32 bits
// per lane holds them.

#include "entropy-kernel.h"

// GCC for Windows keeps the stack aligned to 16 bytes only and spills registers of 64 as if it were aligned to 64 (its bug 54412).
#if defined(__x86_64__) && defined(__GNUC__) && (!defined(_WIN32) || defined(__clang__))

#include <immintrin.h>

#include <algorithm>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi,avx512vbmi2")))
#define INLINE TARGET inline __attribute__((always_inline))

namespace {

constexpr int LANES = GGML_ENTROPY_LANES;

// Fewer lanes are the portable decoder's, whose time goes with their number: a row of GET_ROWS, a short last group.
constexpr int MIN_LANES = 8;

// Symbols of a lane that are put together before they are stored: a cache line.
constexpr int BLOCK = 64;

constexpr __mmask32 ODD_WORDS = 0xaaaaaaaa;         // 16-bit elements
constexpr __mmask64 ODD_BYTES = 0xaaaaaaaaaaaaaaaa;

// Vectors of 16-bit elements hold lane l in element 2*l and lane 16 + l in element 2*l + 1, so that each half is a vector of 32-bit
// elements after one mask or shift.

// Words of 16 lanes around their positions. The third word is there to be waited for: its load has two codes' time.
struct half {
    __m512i word;            // 32 times the index of the current word, which is where it stands in the word rows, but for the lane
    __m512i now, next, then; // this word and the two behind it
    __m512i ahead;           // from word to where the third one stands
    __m512i last;            // a row of zeros, in which lanes stay that run past their end
};

// The slab's table by columns, 64 entries a register.
struct table {
    __m512i t   [4];
    __m512i bias[4];
};

} // namespace

static INLINE __m512i load(const void * from) {
    return _mm512_loadu_si512(from);
}

static INLINE table load_table(const ggml_entropy_entry * entries) {
    table tab;
    for (int i = 0; i < 4; i++) {
        const __m512i low  = load(entries + 64*i); // bias << 8 | t
        const __m512i high = load(entries + 64*i + 32);
        tab.t[i]    = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(low)), _mm512_cvtepi16_epi8(high), 1);
        tab.bias[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(_mm512_srli_epi16(low, 8))),
            _mm512_cvtepi16_epi8(_mm512_srli_epi16(high, 8)), 1);
    }
    return tab;
}

// t and bias of the entries that the low bytes of index name; of t the high bytes are zero. The way to t is the short one, since the next
// look-up waits for it.
static INLINE void look_up(const table & tab, __m512i index, __m512i & t, __m512i & bias) {
    const __mmask32 upper_half    = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x80));
    const __mmask32 upper_quarter = _mm512_test_epi16_mask(index, _mm512_set1_epi16(0x40));
    const __m512i t0 = _mm512_maskz_permutexvar_epi8(~ODD_BYTES, index, tab.t[0]);
    const __m512i t1 = _mm512_maskz_permutexvar_epi8(~ODD_BYTES, index, tab.t[1]);
    const __m512i t2 = _mm512_maskz_permutexvar_epi8(~ODD_BYTES, index, tab.t[2]);
    const __m512i t3 = _mm512_maskz_permutexvar_epi8(~ODD_BYTES, index, tab.t[3]);
    t = _mm512_mask_blend_epi16(
        upper_half, _mm512_mask_blend_epi16(upper_quarter, t0, t1), _mm512_mask_blend_epi16(upper_quarter, t2, t3));
    const __m512i b0 = _mm512_permutexvar_epi8(index, tab.bias[0]);
    const __m512i b1 = _mm512_permutexvar_epi8(index, tab.bias[1]);
    const __m512i b2 = _mm512_permutexvar_epi8(index, tab.bias[2]);
    const __m512i b3 = _mm512_permutexvar_epi8(index, tab.bias[3]);
    bias = _mm512_mask_blend_epi16(
        upper_half, _mm512_mask_blend_epi16(upper_quarter, b0, b1), _mm512_mask_blend_epi16(upper_quarter, b2, b3));
}

// The tile's word rows with a place for every lane, zero where a lane has no more words, and a row of zeros behind the last, whose number is
// returned. rows has room for MAX_LANE_WORDS + 1 of them. Reads up to 64 bytes past the tile.
static INLINE int expand_tile(const uint32_t * src, const uint8_t * lane_words, uint32_t * rows) {
    static_assert(GGML_ENTROPY_SLACK >= 64, "what is read past the last tile");
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

static INLINE half start(const uint32_t * rows, int n_rows, int lane) {
    const __m512i lanes = _mm512_add_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(lane));
    half h;
    h.word  = _mm512_setzero_si512();
    h.now   = load(rows + lane);
    h.next  = load(rows + lane + LANES*std::min(1, n_rows));
    h.then  = load(rows + lane + LANES*std::min(2, n_rows));
    h.ahead = _mm512_add_epi32(lanes, _mm512_set1_epi32(LANES*2));
    h.last  = _mm512_add_epi32(lanes, _mm512_set1_epi32(LANES*n_rows));
    return h;
}

// Move on to the words that the positions are in, at most one further than before.
static INLINE void advance(half & h, __m512i position, const uint32_t * rows) {
    static_assert(LANES == 32, "a position is in bits, of which a word has as many as a word row has words");
    const __m512i   word  = _mm512_and_si512(position, _mm512_set1_epi32(0xffff & ~31));
    const __mmask16 moved = _mm512_cmpneq_epi32_mask(word, h.word);
    h.word = word;
    h.now  = _mm512_mask_mov_epi32(h.now,  moved, h.next);
    h.next = _mm512_mask_mov_epi32(h.next, moved, h.then);
    h.then = _mm512_mask_i32gather_epi32(h.then, moved, _mm512_min_epu32(_mm512_add_epi32(word, h.ahead), h.last), rows, 4);
}

// Two codes of every lane; the first symbol in the low byte.
static INLINE __m512i decode_two(const table & tab, half & low, half & high, __m512i & position, const uint32_t * rows) {
    const __m512i high_position = _mm512_srli_epi32(position, 16);
    advance(low,  position,      rows);
    advance(high, high_position, rows);
    // a shift's count is taken modulo 32
    const __m512i low_window  = _mm512_shldv_epi32(low.now,  low.next,  position);
    const __m512i high_window = _mm512_shldv_epi32(high.now, high.next, high_position);
    // bits 0..15 and 16..31 of the windows
    const __m512i upper = _mm512_mask_blend_epi16(ODD_WORDS, _mm512_srli_epi32(low_window, 16), high_window);
    const __m512i lower = _mm512_mask_blend_epi16(ODD_WORDS, low_window, _mm512_slli_epi32(high_window, 16));
    const __m512i zero  = _mm512_setzero_si512();

    // symbols are the low bytes of the sums
    __m512i t, bias;
    look_up(tab, _mm512_srli_epi16(upper, 8), t, bias);
    const __m512i first = _mm512_add_epi16(_mm512_shldv_epi16(zero, upper, t), bias);
    const __m512i rest  = _mm512_shldv_epi16(upper, lower, t);
    position = _mm512_add_epi16(position, t);

    look_up(tab, _mm512_srli_epi16(rest, 8), t, bias);
    const __m512i second = _mm512_add_epi16(_mm512_shldv_epi16(zero, rest, t), bias);
    position = _mm512_add_epi16(position, t);
    return _mm512_mask_blend_epi8(ODD_BYTES, first, _mm512_slli_epi16(second, 8));
}

// Part p of a vector, 128 bits, holds lanes 4*p .. 4*p + 3. Of four vectors, one after the other: lanes[j] gets lanes j, 4 + j, 8 + j and 12 + j,
// each with its four elements side by side.
static INLINE void transpose_parts(const uint32_t (*fours)[LANES], __m512i & lanes0, __m512i & lanes1, __m512i & lanes2, __m512i & lanes3) {
    const __m512i v0 = load(fours[0]), v1 = load(fours[1]), v2 = load(fours[2]), v3 = load(fours[3]);
    const __m512i low01  = _mm512_unpacklo_epi32(v0, v1), low23  = _mm512_unpacklo_epi32(v2, v3);
    const __m512i high01 = _mm512_unpackhi_epi32(v0, v1), high23 = _mm512_unpackhi_epi32(v2, v3);
    lanes0 = _mm512_unpacklo_epi64(low01, low23);
    lanes1 = _mm512_unpackhi_epi64(low01, low23);
    lanes2 = _mm512_unpacklo_epi64(high01, high23);
    lanes3 = _mm512_unpackhi_epi64(high01, high23);
}

// Lanes j, 4 + j, 8 + j and 12 + j, in four vectors, stored at to, which is lane j's place.
static INLINE void store_four(__m512i a, __m512i b, __m512i c, __m512i d, uint8_t (*to)[GGML_ENTROPY_MAX_TILE_COLS], int at) {
    const __m512i even_ab = _mm512_shuffle_i32x4(a, b, 0x88), even_cd = _mm512_shuffle_i32x4(c, d, 0x88); // lanes j, 8 + j
    const __m512i odd_ab  = _mm512_shuffle_i32x4(a, b, 0xdd), odd_cd  = _mm512_shuffle_i32x4(c, d, 0xdd); // lanes 4 + j, 12 + j
    _mm512_storeu_si512(&to[0] [at], _mm512_shuffle_i32x4(even_ab, even_cd, 0x88));
    _mm512_storeu_si512(&to[4] [at], _mm512_shuffle_i32x4(odd_ab,  odd_cd,  0x88));
    _mm512_storeu_si512(&to[8] [at], _mm512_shuffle_i32x4(even_ab, even_cd, 0xdd));
    _mm512_storeu_si512(&to[12][at], _mm512_shuffle_i32x4(odd_ab,  odd_cd,  0xdd));
}

// 16 vectors of 16 lanes, four symbols an element, to 16 lanes of 64 symbols: a transpose of 16 x 16 elements. Without arrays, which the
// compiler would leave in memory.
static INLINE void store_lanes(const uint32_t (*fours)[LANES], uint8_t (*to)[GGML_ENTROPY_MAX_TILE_COLS], int at) {
    __m512i a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3;
    transpose_parts(fours,      a0, a1, a2, a3);
    transpose_parts(fours + 4,  b0, b1, b2, b3);
    transpose_parts(fours + 8,  c0, c1, c2, c3);
    transpose_parts(fours + 12, d0, d1, d2, d3);
    store_four(a0, b0, c0, d0, to,     at);
    store_four(a1, b1, c1, d1, to + 1, at);
    store_four(a2, b2, c2, d2, to + 2, at);
    store_four(a3, b3, c3, d3, to + 3, at);
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

    const table tab = load_table(view.table);
    half low  = start(rows, n_rows, 0);
    half high = start(rows, n_rows, 16);
    __m512i position = _mm512_setzero_si512();

    alignas(64) uint32_t fours[BLOCK/4][LANES] = {};
    for (int at = 0; at < n_symbols; at += BLOCK) { // a row of symbols has room for the whole last block
        const int n_fours = std::min(BLOCK, n_symbols - at)/4;
        for (int i = 0; i < n_fours; i++) {
            const __m512i two0 = decode_two(tab, low, high, position, rows);
            const __m512i two1 = decode_two(tab, low, high, position, rows);
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
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("avx512vbmi2")) {
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
