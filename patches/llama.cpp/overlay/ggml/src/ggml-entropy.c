// SPDX-License-Identifier: MIT
//
// Reading entropy-coded tensors; see ggml-entropy.h for the contract and docs/format.md for the bits. Writing: ggml-entropy-encode.c.
//
// Order of this file: validation, decoding, rows of other types, verification.
//
// Two things that surprise: the table is stored expanded, so validation has to find the classes again (table_is_valid), and a lane's words
// are scattered over the tile's word rows, so that decoding first gathers a tile into a scratch where each lane is contiguous.

#include "ggml-entropy-impl.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static_assert(sizeof(struct ggml_entropy_header) == GGML_ENTROPY_HEADER_SIZE, "header size");
static_assert(sizeof(struct ggml_entropy_entry)  == 2, "table entry size");

bool ggml_entropy_is_type(enum ggml_type type) {
    return type == GGML_TYPE_EQ8 || type == GGML_TYPE_EQ4;
}

const char * ggml_entropy_status_str(enum ggml_entropy_status status) {
    switch (status) {
        case GGML_ENTROPY_OK:            return "ok";
        case GGML_ENTROPY_BAD_ARGUMENT:  return "bad argument (shape, alignment or range)";
        case GGML_ENTROPY_BAD_CODE:      return "a code is outside the range of the type";
        case GGML_ENTROPY_NO_MEMORY:     return "out of memory";
        case GGML_ENTROPY_TRUNCATED:     return "the data is shorter than its header says";
        case GGML_ENTROPY_BAD_MAGIC:     return "no entropy-coded data (wrong magic)";
        case GGML_ENTROPY_BAD_VERSION:   return "unknown format version";
        case GGML_ENTROPY_BAD_KIND:      return "the header names another type than the file";
        case GGML_ENTROPY_BAD_SHAPE:     return "the header names another shape than the file, or an impossible one";
        case GGML_ENTROPY_BAD_MODE:      return "unknown or inconsistent scale or offset mode";
        case GGML_ENTROPY_BAD_LAYOUT:    return "impossible section layout";
        case GGML_ENTROPY_BAD_RESERVED:  return "a reserved byte is not zero";
        case GGML_ENTROPY_BAD_SCALE:     return "a scale or offset is not a valid number";
        case GGML_ENTROPY_BAD_TABLE:     return "invalid decode table";
        case GGML_ENTROPY_BAD_INDEX:     return "invalid tile index";
        case GGML_ENTROPY_BAD_HASH:      return "hash mismatch";
        case GGML_ENTROPY_BAD_STREAM:    return "a row does not decode to exactly its codes";
        case GGML_ENTROPY_STATUS_COUNT:  break;
    }
    return "unknown status";
}

// ---- validation --------------------------------------------------------------------------------------------------------------------

static bool f16_is_finite(uint16_t bits) {
    return (bits & 0x7c00) != 0x7c00;
}

// EQ4 with offsets decodes to Q4_1, whose minimum is an f16: m = offset - 8 * scale must be one.
static bool q4_1_min(float scale, float offset, uint16_t * m_bits) {
    const float m = offset - 8.0f * scale;
    *m_bits = GGML_FP32_TO_FP16(m);
    return f16_is_finite(*m_bits) && GGML_FP16_TO_FP32(*m_bits) == m;
}

static bool all_zero(const uint8_t * p, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) {
        if (p[i] != 0) {
            return false;
        }
    }
    return true;
}

static enum ggml_entropy_status check_header(const struct ggml_entropy_header * h) {
    if (memcmp(h->magic, ggml_entropy_magic, sizeof(ggml_entropy_magic)) != 0) {
        return GGML_ENTROPY_BAD_MAGIC;
    }
    if (h->version != 1) {
        return GGML_ENTROPY_BAD_VERSION;
    }
    if (h->kind != GGML_ENTROPY_KIND_EQ8 && h->kind != GGML_ENTROPY_KIND_EQ4) {
        return GGML_ENTROPY_BAD_KIND;
    }
    if (h->reserved0 != 0 || h->reserved1 != 0 || !all_zero(h->reserved2, sizeof(h->reserved2))) {
        return GGML_ENTROPY_BAD_RESERVED;
    }
    if (!shape_is_valid(h->n_cols, h->n_rows, h->n_slabs, h->tile_cols)
            || count_tiles(h->n_cols, h->n_rows, h->tile_cols) != (int64_t) h->n_tiles) {
        return GGML_ENTROPY_BAD_SHAPE;
    }
    if (h->scale_mode > GGML_ENTROPY_SCALE_ROW || h->offset_mode > GGML_ENTROPY_OFFSET_ROW) {
        return GGML_ENTROPY_BAD_MODE;
    }

    uint32_t offset_bits;
    memcpy(&offset_bits, &h->offset, 4);
    if (h->scale_mode == GGML_ENTROPY_SCALE_ONE ? !f16_is_finite(h->scale) : h->scale != 0) {
        return GGML_ENTROPY_BAD_SCALE;
    }
    if (h->offset_mode == GGML_ENTROPY_OFFSET_ONE ? !isfinite(h->offset) : offset_bits != 0) {
        return GGML_ENTROPY_BAD_SCALE;
    }

    struct ggml_entropy_header expect = *h;
    layout_sections(&expect);
    if (h->table_at           != expect.table_at
            || h->scales_at       != expect.scales_at
            || h->offsets_at      != expect.offsets_at
            || h->word_offsets_at != expect.word_offsets_at
            || h->lane_words_at   != expect.lane_words_at
            || h->bitstream_at    != expect.bitstream_at) {
        return GGML_ENTROPY_BAD_LAYOUT;
    }
    // the bound on bitstream_words also keeps min_slab_size from overflowing; 2^46 bytes are more than any machine maps
    if (h->bitstream_words > UINT32_MAX || h->slab_size % GGML_ENTROPY_ALIGN != 0 || h->slab_size > (UINT64_C(1) << 46)
            || h->slab_size < min_slab_size(h) || (h->n_slabs == 1 && h->slab_size != min_slab_size(h))) {
        return GGML_ENTROPY_BAD_LAYOUT;
    }
    return GGML_ENTROPY_OK;
}

static enum ggml_entropy_status check_against_gguf(const struct ggml_entropy_header * h, enum ggml_type type, const int64_t ne[4]) {
    if (h->kind != kind_of_type(type)) {
        return GGML_ENTROPY_BAD_KIND;
    }
    if (h->n_cols != ne[0] || h->n_rows != ne[1] || h->n_slabs != ne[2] || ne[3] != 1) {
        return GGML_ENTROPY_BAD_SHAPE;
    }
    return GGML_ENTROPY_OK;
}

enum ggml_entropy_status ggml_entropy_check_header(
        enum ggml_type type, const int64_t ne[4], const void * header, struct ggml_entropy_header * out) {
    memcpy(out, header, sizeof(*out));
    const enum ggml_entropy_status st = check_header(out);
    return st != GGML_ENTROPY_OK ? st : check_against_gguf(out, type, ne);
}

enum ggml_type ggml_entropy_plain_type(const struct ggml_entropy_header * h) {
    const bool has_offset = h->offset_mode != GGML_ENTROPY_OFFSET_NONE;
    if (h->kind == GGML_ENTROPY_KIND_EQ8) {
        return has_offset ? GGML_TYPE_F16 : GGML_TYPE_Q8_0;
    }
    return has_offset ? GGML_TYPE_Q4_1 : GGML_TYPE_Q4_0;
}

enum ggml_entropy_status ggml_entropy_open(const void * slab, size_t n_bytes, struct ggml_entropy_view * view) {
    if ((uintptr_t) slab % sizeof(uint64_t) != 0) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    if (n_bytes < GGML_ENTROPY_HEADER_SIZE) {
        return GGML_ENTROPY_TRUNCATED;
    }
    const uint8_t * base = (const uint8_t *) slab;
    const struct ggml_entropy_header * h = (const struct ggml_entropy_header *) slab;
    const enum ggml_entropy_status st = check_header(h);
    if (st != GGML_ENTROPY_OK) {
        return st;
    }
    if (h->slab_size > n_bytes) {
        return GGML_ENTROPY_TRUNCATED;
    }
    view->header       = h;
    view->table        = (const struct ggml_entropy_entry *) (base + h->table_at);
    view->scales       = h->scales_at  ? (const uint16_t *) (base + h->scales_at)  : NULL;
    view->offsets      = h->offsets_at ? (const float    *) (base + h->offsets_at) : NULL;
    view->word_offsets = (const uint32_t *) (base + h->word_offsets_at);
    view->lane_words   = base + h->lane_words_at;
    view->bitstream    = (const uint32_t *) (base + h->bitstream_at);
    view->n_groups     = ceil_div(h->n_rows, LANES);
    view->n_slices     = ceil_div(h->n_cols, h->tile_cols);
    return GGML_ENTROPY_OK;
}

// Cut the table into classes again (5.2): the smallest prefix length that fits at entry i, then on behind its run.
static bool table_is_valid(const struct ggml_entropy_entry table[256]) {
    int i = 0;
    while (i < 256) {
        const int t    = table[i].t;
        const int bias = table[i].bias;
        if (t < 1 || t > MAX_T) {
            return false;
        }
        int same = 1; // entries from i on that are equal
        while (i + same < 256 && table[i + same].t == t && table[i + same].bias == bias) {
            same++;
        }
        int p = 0;
        for (; p <= MAX_PREFIX; p++) {
            const int run = 256 >> p;
            const int e   = t - p;
            if (i % run != 0 || run > same || e < 0 || e > 8) {
                continue;
            }
            const int base = (bias + ((i / run) << e)) & 255;
            if (base + (1 << e) <= 256) {
                break;
            }
        }
        if (p > MAX_PREFIX) {
            return false;
        }
        i += 256 >> p;
    }
    return true;
}

static enum ggml_entropy_status check_scales(const struct ggml_entropy_view * v) {
    const struct ggml_entropy_header * h = v->header;
    const bool is_q4_1 = h->kind == GGML_ENTROPY_KIND_EQ4 && h->offset_mode != GGML_ENTROPY_OFFSET_NONE;
    if (!v->scales && !v->offsets && !is_q4_1) {
        return GGML_ENTROPY_OK;
    }
    for (int64_t r = 0; r < h->n_rows; r++) {
        const uint16_t scale  = v->scales  ? v->scales [r] : h->scale;
        const float    offset = v->offsets ? v->offsets[r] : h->offset;
        uint16_t m;
        if (!f16_is_finite(scale) || !isfinite(offset) || (is_q4_1 && !q4_1_min(GGML_FP16_TO_FP32(scale), offset, &m))) {
            return GGML_ENTROPY_BAD_SCALE;
        }
    }
    return GGML_ENTROPY_OK;
}

// The tile index is the running sum of the lane lengths (5.5, 5.6), so that every tile lies inside the bitstream; and no lane is shorter than
// its codes can be, so that a small file cannot claim a huge matrix.
static enum ggml_entropy_status check_index(const struct ggml_entropy_view * v) {
    const struct ggml_entropy_header * h = v->header;
    int t_min = MAX_T;
    for (int i = 0; i < 256; i++) {
        t_min = MIN(t_min, v->table[i].t);
    }
    uint64_t at = 0;
    for (int64_t tile = 0; tile < (int64_t) h->n_tiles; tile++) {
        const uint8_t * n_words = v->lane_words + tile * LANES;
        const int64_t   n_lanes = MIN(LANES, (int64_t) h->n_rows - tile / v->n_slices * LANES);
        const int64_t   n_codes = MIN((int64_t) h->tile_cols, (int64_t) h->n_cols - tile % v->n_slices * h->tile_cols) / cols_per_symbol(h->kind);
        const int64_t   n_min   = ceil_div(n_codes * t_min, 32);
        if (v->word_offsets[tile] != at) {
            return GGML_ENTROPY_BAD_INDEX;
        }
        for (int64_t l = 0; l < LANES; l++) {
            if (l < n_lanes ? n_words[l] < n_min : n_words[l] != 0) {
                return GGML_ENTROPY_BAD_INDEX;
            }
            at += n_words[l];
        }
        at = align_up(at, 4);
    }
    return at == h->bitstream_words ? GGML_ENTROPY_OK : GGML_ENTROPY_BAD_INDEX;
}

enum ggml_entropy_status ggml_entropy_validate_slab(const void * slab, size_t n_bytes, struct ggml_entropy_view * v) {
    enum ggml_entropy_status st = ggml_entropy_open(slab, n_bytes, v);
    if (st != GGML_ENTROPY_OK) {
        return st;
    }
    if (!table_is_valid(v->table)) {
        return GGML_ENTROPY_BAD_TABLE;
    }
    st = check_scales(v);
    return st != GGML_ENTROPY_OK ? st : check_index(v);
}

static enum ggml_entropy_status validate_slabs(const void * data, size_t n_bytes, int64_t n_slabs) {
    struct ggml_entropy_header first = { 0 };
    for (int64_t i = 0; i < n_slabs; i++) {
        const size_t at = i * first.slab_size; // slab 0: 0; then <= n_bytes, see below
        struct ggml_entropy_view v;
        const enum ggml_entropy_status st = ggml_entropy_validate_slab((const uint8_t *) data + at, n_bytes - at, &v);
        if (st != GGML_ENTROPY_OK) {
            return st;
        }
        const struct ggml_entropy_header * h = v.header;
        if (i == 0) {
            first = *h;
            // slab_size < 2^46 and n_slabs <= 2^16: no overflow
            if ((uint64_t) n_slabs * first.slab_size > n_bytes) {
                return GGML_ENTROPY_TRUNCATED;
            }
            if ((uint64_t) n_slabs * first.slab_size != n_bytes) {
                return GGML_ENTROPY_BAD_LAYOUT;
            }
        }
        if (h->kind != first.kind) {
            return GGML_ENTROPY_BAD_KIND;
        }
        if (h->n_cols != first.n_cols || h->n_rows != first.n_rows || h->n_slabs != n_slabs || h->tile_cols != first.tile_cols) {
            return GGML_ENTROPY_BAD_SHAPE;
        }
        if (h->scale_mode != first.scale_mode || h->offset_mode != first.offset_mode) {
            return GGML_ENTROPY_BAD_MODE;
        }
        if (h->slab_size != first.slab_size) {
            return GGML_ENTROPY_BAD_LAYOUT;
        }
    }
    return GGML_ENTROPY_OK;
}

enum ggml_entropy_status ggml_entropy_validate(enum ggml_type type, const int64_t ne[4], const void * data, size_t n_bytes) {
    if (!ggml_entropy_is_type(type) || (uintptr_t) data % sizeof(uint64_t) != 0) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    if (n_bytes < GGML_ENTROPY_HEADER_SIZE) {
        return GGML_ENTROPY_TRUNCATED;
    }
    struct ggml_entropy_header h;
    const enum ggml_entropy_status st = ggml_entropy_check_header(type, ne, data, &h);
    return st != GGML_ENTROPY_OK ? st : validate_slabs(data, n_bytes, h.n_slabs);
}

enum ggml_entropy_status ggml_entropy_validate_slabs(enum ggml_type type, const void * data, size_t n_bytes) {
    if (!ggml_entropy_is_type(type) || (uintptr_t) data % sizeof(uint64_t) != 0) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    struct ggml_entropy_view v;
    const enum ggml_entropy_status st = ggml_entropy_open(data, n_bytes, &v);
    if (st != GGML_ENTROPY_OK) {
        return st;
    }
    return v.header->kind != kind_of_type(type) ? GGML_ENTROPY_BAD_KIND : validate_slabs(data, n_bytes, v.header->n_slabs);
}

// ---- decoding ----------------------------------------------------------------------------------------------------------------------

// Undo the word-row interleave of a tile. Returns the words behind its last word.
static const uint32_t * gather_tile(const struct ggml_entropy_view * v, struct tile_ref ref, struct ggml_entropy_tile * tile) {
    uint32_t (* words)[GGML_ENTROPY_MAX_LANE_WORDS + 2] = tile->words;
    const uint32_t * src     = v->bitstream + v->word_offsets[ref.tile];
    const uint8_t  * n_words = v->lane_words + ref.tile * LANES;

    int shortest = 255;
    int longest  = 0;
    for (int l = 0; l < ref.n_lanes; l++) {
        shortest = MIN(shortest, n_words[l]);
        longest  = MAX(longest,  n_words[l]);
    }
    // word rows that every lane has need no test
    for (int j = 0; j < shortest; j++) {
        for (int l = 0; l < ref.n_lanes; l++) {
            words[l][j] = *src++;
        }
    }
    for (int j = shortest; j < longest; j++) {
        for (int l = 0; l < ref.n_lanes; l++) {
            if (j < n_words[l]) {
                words[l][j] = *src++;
            }
        }
    }
    for (int l = 0; l < ref.n_lanes; l++) {
        words[l][n_words[l]]     = 0;
        words[l][n_words[l] + 1] = 0;
    }
    return src;
}

// 32 bits of a lane from bit pos on; zeros behind its end. n is the lane's length in words.
static inline uint32_t lane_window(const uint32_t * words, uint32_t n, uint32_t pos) {
    const uint32_t j = MIN(pos >> 5, n);
    const uint64_t w = (uint64_t) words[j] << 32 | words[j + 1];
    return (uint32_t) ((w << (pos & 31)) >> 32);
}

// One code at the top of a window: returns its length.
static inline uint32_t decode_one(const struct ggml_entropy_entry * table, uint32_t window, uint8_t * symbol) {
    const struct ggml_entropy_entry entry = table[window >> 24];
    *symbol = (uint8_t) ((window >> (32 - entry.t)) + entry.bias);
    return entry.t;
}

// Two codes of at most 15 bits each fit in a window of 32.
static inline uint32_t decode_two(const struct ggml_entropy_entry * table, uint32_t window, uint8_t * symbols) {
    const uint32_t t0 = decode_one(table, window, symbols);
    return t0 + decode_one(table, window << t0, symbols + 1);
}

// n_symbols (even: slices are multiples of 32 columns) codes of four lanes at a time: the chains of table look-ups are independent, so a core
// overlaps them. Returns the end positions in bits through pos.
static void decode_four_lanes(const struct ggml_entropy_view * v, struct tile_ref ref, int l0, struct ggml_entropy_tile * s, uint32_t pos[4]) {
    const struct ggml_entropy_entry * table   = v->table;
    const uint8_t                   * n_words = v->lane_words + ref.tile * LANES + l0;
    const uint32_t n0 = n_words[0], n1 = n_words[1], n2 = n_words[2], n3 = n_words[3];
    uint32_t p0 = 0, p1 = 0, p2 = 0, p3 = 0;
    for (int k = 0; k < ref.n_symbols; k += 2) {
        p0 += decode_two(table, lane_window(s->words[l0 + 0], n0, p0), &s->symbols[l0 + 0][k]);
        p1 += decode_two(table, lane_window(s->words[l0 + 1], n1, p1), &s->symbols[l0 + 1][k]);
        p2 += decode_two(table, lane_window(s->words[l0 + 2], n2, p2), &s->symbols[l0 + 2][k]);
        p3 += decode_two(table, lane_window(s->words[l0 + 3], n3, p3), &s->symbols[l0 + 3][k]);
    }
    pos[0] = p0;
    pos[1] = p1;
    pos[2] = p2;
    pos[3] = p3;
}

static uint32_t decode_one_lane(const struct ggml_entropy_view * v, struct tile_ref ref, int l, struct ggml_entropy_tile * s) {
    const uint32_t n = v->lane_words[ref.tile * LANES + l];
    uint32_t pos = 0;
    for (int k = 0; k < ref.n_symbols; k += 2) {
        pos += decode_two(v->table, lane_window(s->words[l], n, pos), &s->symbols[l][k]);
    }
    return pos;
}

// Symbols of the lanes [lane0, lane1) of a tile; end positions of these lanes in bits into end. Returns the words behind the tile's last.
static const uint32_t * decode_lanes(
        const struct ggml_entropy_view * v, struct tile_ref ref, int lane0, int lane1, struct ggml_entropy_tile * s, uint32_t end[LANES]) {
    const uint32_t * src = gather_tile(v, ref, s);
    int l = lane0;
    for (; l + 4 <= lane1; l += 4) {
        decode_four_lanes(v, ref, l, s, end + l);
    }
    for (; l < lane1; l++) {
        end[l] = decode_one_lane(v, ref, l, s);
    }
    return src;
}

void ggml_entropy_decode_lanes(
        const struct ggml_entropy_view * v, int64_t group, int64_t slice, int lane0, int lane1, struct ggml_entropy_tile * tile) {
    uint32_t end[LANES];
    decode_lanes(v, tile_at(v, group, slice), lane0, lane1, tile, end);
}

static void symbols_to_codes(int kind, const uint8_t * symbols, int n_symbols, int8_t * q) {
    if (kind == GGML_ENTROPY_KIND_EQ8) {
        for (int k = 0; k < n_symbols; k++) {
            q[k] = (int8_t) (symbols[k] ^ 0x80); // u - 128
        }
        return;
    }
    for (int k = 0; k < n_symbols; k++) {
        q[2 * k]     = (int8_t) ((symbols[k] & 15) - 8);
        q[2 * k + 1] = (int8_t) ((symbols[k] >> 4) - 8);
    }
}

enum ggml_entropy_status ggml_entropy_decode_groups(const struct ggml_entropy_view * v, int64_t group0, int64_t group1, int8_t * q) {
    if (!range_is_valid(v, group0, group1)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    struct ggml_entropy_tile * tile = malloc(sizeof(*tile));
    if (!tile) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    const struct ggml_entropy_header * h = v->header;
    for (int64_t group = group0; group < group1; group++) {
        for (int64_t slice = 0; slice < v->n_slices; slice++) {
            const struct tile_ref ref = tile_at(v, group, slice);
            ggml_entropy_decode_lanes(v, group, slice, 0, ref.n_lanes, tile);
            for (int l = 0; l < ref.n_lanes; l++) {
                const int64_t row = (group - group0) * LANES + l;
                symbols_to_codes(h->kind, tile->symbols[l], ref.n_symbols, q + row * h->n_cols + slice * h->tile_cols);
            }
        }
    }
    free(tile);
    return GGML_ENTROPY_OK;
}

// ---- rows of other types -----------------------------------------------------------------------------------------------------------

// Rows of the stock types (6.1). n_blocks blocks of 32 weights, symbols as decoded.

static void symbols_to_q8_0(const uint8_t * symbols, int n_blocks, uint16_t d, block_q8_0 * dst) {
    for (int i = 0; i < n_blocks; i++) {
        dst[i].d = d;
        for (int j = 0; j < QK8_0; j++) {
            dst[i].qs[j] = (int8_t) (symbols[i * QK8_0 + j] ^ 0x80);
        }
    }
}

// The nibbles of 32 weights: byte j holds weight j below and weight j + 16 above; a symbol holds weights 2k and 2k + 1.
static void symbols_to_nibbles(const uint8_t * symbols, uint8_t * qs) {
    for (int k = 0; k < 8; k++) {
        const uint8_t lo = symbols[k];
        const uint8_t hi = symbols[k + 8];
        qs[2 * k]     = (uint8_t) ((lo & 15) | (hi & 15) << 4);
        qs[2 * k + 1] = (uint8_t) ((lo >> 4) | (hi & 0xf0));
    }
}

static void symbols_to_q4_0(const uint8_t * symbols, int n_blocks, uint16_t d, block_q4_0 * dst) {
    for (int i = 0; i < n_blocks; i++) {
        dst[i].d = d;
        symbols_to_nibbles(symbols + i * 16, dst[i].qs);
    }
}

static void symbols_to_q4_1(const uint8_t * symbols, int n_blocks, uint16_t d, uint16_t m, block_q4_1 * dst) {
    for (int i = 0; i < n_blocks; i++) {
        dst[i].d = d;
        dst[i].m = m;
        symbols_to_nibbles(symbols + i * 16, dst[i].qs);
    }
}

// All 256 weights an EQ8 symbol of a row can stand for.
static void fill_f16_lut(float scale, float offset, uint16_t lut[256]) {
    for (int u = 0; u < 256; u++) {
        lut[u] = GGML_FP32_TO_FP16(scale * (float) (u - 128) + offset);
    }
}

static void symbols_to_f16(const uint8_t * symbols, int n, const uint16_t lut[256], uint16_t * dst) {
    for (int k = 0; k < n; k++) {
        dst[k] = lut[symbols[k]];
    }
}

static void symbols_to_f32(int kind, const uint8_t * symbols, int n_symbols, float scale, float offset, float * dst) {
    if (kind == GGML_ENTROPY_KIND_EQ8) {
        for (int k = 0; k < n_symbols; k++) {
            dst[k] = scale * (float) (symbols[k] - 128) + offset;
        }
        return;
    }
    for (int k = 0; k < n_symbols; k++) {
        dst[2 * k]     = scale * (float) ((symbols[k] & 15) - 8) + offset;
        dst[2 * k + 1] = scale * (float) ((symbols[k] >> 4) - 8) + offset;
    }
}

float ggml_entropy_row_offset(const struct ggml_entropy_view * v, int64_t row) {
    return v->offsets ? v->offsets[row] : v->header->offset;
}

void ggml_entropy_tile_rows(
        const struct ggml_entropy_view * v, int64_t group, int64_t slice, int lane0, int lane1, const struct ggml_entropy_tile * tile,
        enum ggml_type type, void * dst, size_t row_size) {
    const struct ggml_entropy_header * h = v->header;
    const struct tile_ref ref = tile_at(v, group, slice);
    const int n_cols   = ref.n_symbols * cols_per_symbol(h->kind);
    const int n_blocks = n_cols / 32;

    uint16_t lut[256];
    const bool lut_is_shared = !v->scales && !v->offsets;
    if (type == GGML_TYPE_F16 && lut_is_shared) {
        fill_f16_lut(GGML_FP16_TO_FP32(h->scale), h->offset, lut);
    }
    for (int l = lane0; l < lane1; l++) {
        const int64_t  row    = group * LANES + l;
        const uint16_t scale  = v->scales ? v->scales[row] : h->scale;
        const float    offset = ggml_entropy_row_offset(v, row);
        char * out = (char *) dst + (l - lane0) * row_size + ggml_row_size(type, slice * h->tile_cols);
        switch (type) {
            case GGML_TYPE_F32:
                symbols_to_f32(h->kind, tile->symbols[l], ref.n_symbols, GGML_FP16_TO_FP32(scale), offset, (float *) out);
                break;
            case GGML_TYPE_F16:
                if (!lut_is_shared) {
                    fill_f16_lut(GGML_FP16_TO_FP32(scale), offset, lut);
                }
                symbols_to_f16(tile->symbols[l], n_cols, lut, (uint16_t *) out);
                break;
            case GGML_TYPE_Q8_0:
                symbols_to_q8_0(tile->symbols[l], n_blocks, scale, (block_q8_0 *) out);
                break;
            case GGML_TYPE_Q4_0:
                symbols_to_q4_0(tile->symbols[l], n_blocks, scale, (block_q4_0 *) out);
                break;
            case GGML_TYPE_Q4_1:
                {
                    uint16_t m;
                    q4_1_min(GGML_FP16_TO_FP32(scale), offset, &m); // validated: exact
                    symbols_to_q4_1(tile->symbols[l], n_blocks, scale, m, (block_q4_1 *) out);
                } break;
            default:
                GGML_ABORT("no rows of type %s", ggml_type_name(type));
        }
    }
}

enum ggml_entropy_status ggml_entropy_decode_groups_plain(const struct ggml_entropy_view * v, int64_t group0, int64_t group1, void * dst) {
    if (!range_is_valid(v, group0, group1)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    struct ggml_entropy_tile * tile = malloc(sizeof(*tile));
    if (!tile) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    const enum ggml_type type     = ggml_entropy_plain_type(v->header);
    const size_t         row_size = ggml_row_size(type, v->header->n_cols);
    for (int64_t group = group0; group < group1; group++) {
        char * rows = (char *) dst + (group - group0) * LANES * row_size;
        for (int64_t slice = 0; slice < v->n_slices; slice++) {
            const int n_lanes = tile_at(v, group, slice).n_lanes;
            ggml_entropy_decode_lanes(v, group, slice, 0, n_lanes, tile);
            ggml_entropy_tile_rows(v, group, slice, 0, n_lanes, tile, type, rows, row_size);
        }
    }
    free(tile);
    return GGML_ENTROPY_OK;
}

// ---- verification ------------------------------------------------------------------------------------------------------------------

enum ggml_entropy_status ggml_entropy_verify_hash(const struct ggml_entropy_view * v) {
    return slab_hash(v->header) == v->header->hash ? GGML_ENTROPY_OK : GGML_ENTROPY_BAD_HASH;
}

enum ggml_entropy_status ggml_entropy_verify_groups(const struct ggml_entropy_view * v, int64_t group0, int64_t group1) {
    if (!range_is_valid(v, group0, group1)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    struct ggml_entropy_tile * s = malloc(sizeof(*s));
    if (!s) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    enum ggml_entropy_status st = GGML_ENTROPY_OK;
    for (int64_t group = group0; group < group1 && st == GGML_ENTROPY_OK; group++) {
        for (int64_t slice = 0; slice < v->n_slices && st == GGML_ENTROPY_OK; slice++) {
            const struct tile_ref ref = tile_at(v, group, slice);
            uint32_t end[LANES];
            const uint32_t * src = decode_lanes(v, ref, 0, ref.n_lanes, s, end);
            for (int l = 0; l < ref.n_lanes; l++) {
                const uint32_t n = v->lane_words[ref.tile * LANES + l];
                const uint32_t rest = end[l] & 31; // bits of the last word that are codes
                if ((end[l] + 31) / 32 != n || (rest != 0 && (s->words[l][n - 1] << rest) != 0)) {
                    st = GGML_ENTROPY_BAD_STREAM;
                }
            }
            // up to three words align the next tile
            const uint64_t next = align_up((uint64_t) (src - v->bitstream), 4);
            if (!all_zero((const uint8_t *) src, 4 * (next - (uint64_t) (src - v->bitstream)))) {
                st = GGML_ENTROPY_BAD_STREAM;
            }
        }
    }
    free(s);
    return st;
}

enum ggml_entropy_status ggml_entropy_verify_padding(const struct ggml_entropy_view * v) {
    const struct ggml_entropy_header * h = v->header;
    const uint8_t * base = (const uint8_t *) h;
    // end of each section that is present; the next starts at the multiple of 256 behind it
    const uint64_t ends[] = {
        h->scales_at  ? h->scales_at  + (uint64_t) h->n_rows * 2 : 0,
        h->offsets_at ? h->offsets_at + (uint64_t) h->n_rows * 4 : 0,
        h->word_offsets_at + (uint64_t) h->n_tiles * 4,
        h->lane_words_at   + (uint64_t) h->n_tiles * LANES,
    };
    for (size_t i = 0; i < sizeof(ends) / sizeof(ends[0]); i++) {
        if (!all_zero(base + ends[i], ends[i] == 0 ? 0 : align_up(ends[i], GGML_ENTROPY_ALIGN) - ends[i])) {
            return GGML_ENTROPY_BAD_RESERVED;
        }
    }
    const uint64_t end = h->bitstream_at + 4 * h->bitstream_words;
    return all_zero(base + end, h->slab_size - end) ? GGML_ENTROPY_OK : GGML_ENTROPY_BAD_RESERVED;
}

