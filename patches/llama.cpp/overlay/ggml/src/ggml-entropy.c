// SPDX-License-Identifier: MIT
//
// Codec of the entropy-coded tensor types; see ggml-entropy.h for the contract and docs/format.md for the bits.
//
// Order of this file: layout of a slab, validation, decoding, verification, the code (class partition), encoding.
//
// Two things that surprise: the table is stored expanded, so validation has to find the classes again (table_is_valid), and a lane's words
// are scattered over the tile's word rows, so that decoding first gathers a tile into a scratch where each lane is contiguous.

#define XXH_INLINE_ALL
#define XXH_STATIC_LINKING_ONLY
#include "../../vendor/hash/xxhash/xxhash.h"

#include "ggml-entropy.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"
#include "ggml-impl.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define LANES        GGML_ENTROPY_LANES
#define MAX_COLS     (1 << 24)
#define MAX_SLABS    (1 << 16)
#define MAX_T        15               // longest code: two of them fit in a 32-bit window
#define MAX_PREFIX   8
#define HASH_FROM    16               // the hash covers the slab from here to its end

static_assert(sizeof(struct ggml_entropy_header) == GGML_ENTROPY_HEADER_SIZE, "header size");
static_assert(sizeof(struct ggml_entropy_entry)  == 2, "table entry size");

static const uint8_t magic[4] = { 'E', 'Q', 'T', '1' };

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

// ---- layout ------------------------------------------------------------------------------------------------------------------------

static uint64_t align_up(uint64_t x, uint64_t a) {
    return (x + a - 1) / a * a;
}

static int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static int kind_of_type(enum ggml_type type) {
    return type == GGML_TYPE_EQ8 ? GGML_ENTROPY_KIND_EQ8 : type == GGML_TYPE_EQ4 ? GGML_ENTROPY_KIND_EQ4 : 0;
}

// columns that share one symbol
static int cols_per_symbol(int kind) {
    return kind == GGML_ENTROPY_KIND_EQ4 ? 2 : 1;
}

static bool shape_is_valid(int64_t n_cols, int64_t n_rows, int64_t n_slabs, int64_t tile_cols) {
    return n_cols  >= 32 && n_cols <= MAX_COLS && n_cols % 32 == 0
        && n_rows  >= 1  && n_rows <= INT32_MAX
        && n_slabs >= 1  && n_slabs <= MAX_SLABS
        && tile_cols >= 32 && tile_cols <= GGML_ENTROPY_MAX_TILE_COLS && tile_cols % 32 == 0;
}

// n_rows < 2^31 and n_cols <= 2^24: at most 2^26 * 2^19 = 2^45 tiles, no overflow; the header's u32 narrows it further
static int64_t count_tiles(int64_t n_cols, int64_t n_rows, int64_t tile_cols) {
    return ceil_div(n_rows, LANES) * ceil_div(n_cols, tile_cols);
}

// Fill the section offsets that follow from shape and modes (docs/format.md 5).
static void layout_sections(struct ggml_entropy_header * h) {
    uint64_t at = GGML_ENTROPY_HEADER_SIZE;
    h->table_at = at;
    at += 256 * sizeof(struct ggml_entropy_entry);
    h->scales_at = 0;
    if (h->scale_mode == GGML_ENTROPY_SCALE_ROW) {
        h->scales_at = at;
        at = align_up(at + (uint64_t) h->n_rows * 2, GGML_ENTROPY_ALIGN);
    }
    h->offsets_at = 0;
    if (h->offset_mode == GGML_ENTROPY_OFFSET_ROW) {
        h->offsets_at = at;
        at = align_up(at + (uint64_t) h->n_rows * 4, GGML_ENTROPY_ALIGN);
    }
    h->word_offsets_at = at;
    at = align_up(at + (uint64_t) h->n_tiles * 4, GGML_ENTROPY_ALIGN);
    h->lane_words_at = at;
    at = align_up(at + (uint64_t) h->n_tiles * LANES, GGML_ENTROPY_ALIGN);
    h->bitstream_at = at;
}

static uint64_t min_slab_size(const struct ggml_entropy_header * h) {
    return align_up(h->bitstream_at + 4 * h->bitstream_words, GGML_ENTROPY_ALIGN) + GGML_ENTROPY_SLACK;
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
    if (memcmp(h->magic, magic, sizeof(magic)) != 0) {
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

static enum ggml_entropy_status validate_slab(const void * slab, size_t n_bytes, struct ggml_entropy_view * v) {
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
        const enum ggml_entropy_status st = validate_slab((const uint8_t *) data + at, n_bytes - at, &v);
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

// A lane's words, contiguous, with two zero words behind the last: the window of a decoder that has run past its end.
typedef uint32_t lane_scratch[GGML_ENTROPY_MAX_LANE_WORDS + 2];

struct tile_scratch {
    lane_scratch words[LANES];
    uint8_t      symbols[LANES][GGML_ENTROPY_MAX_TILE_COLS];
};

// Tile number, its lanes and its symbols per lane.
struct tile_ref {
    int64_t tile;
    int     n_lanes;
    int     n_symbols;
};

static struct tile_ref tile_at(const struct ggml_entropy_view * v, int64_t group, int64_t slice) {
    const struct ggml_entropy_header * h = v->header;
    const int64_t n_cols = MIN((int64_t) h->tile_cols, (int64_t) h->n_cols - slice * h->tile_cols);
    struct tile_ref ref;
    ref.tile      = group * v->n_slices + slice;
    ref.n_lanes   = (int) MIN(LANES, (int64_t) h->n_rows - group * LANES);
    ref.n_symbols = (int) (n_cols / cols_per_symbol(h->kind));
    return ref;
}

// Undo the word-row interleave of a tile. Returns the words behind its last word.
static const uint32_t * gather_tile(const struct ggml_entropy_view * v, struct tile_ref ref, lane_scratch * words) {
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
static void decode_four_lanes(const struct ggml_entropy_view * v, struct tile_ref ref, int l0, struct tile_scratch * s, uint32_t pos[4]) {
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

static uint32_t decode_one_lane(const struct ggml_entropy_view * v, struct tile_ref ref, int l, struct tile_scratch * s) {
    const uint32_t n = v->lane_words[ref.tile * LANES + l];
    uint32_t pos = 0;
    for (int k = 0; k < ref.n_symbols; k += 2) {
        pos += decode_two(v->table, lane_window(s->words[l], n, pos), &s->symbols[l][k]);
    }
    return pos;
}

// Symbols of a tile into s->symbols; end positions of the lanes in bits into end. Returns the words behind the tile's last.
static const uint32_t * decode_tile(const struct ggml_entropy_view * v, struct tile_ref ref, struct tile_scratch * s, uint32_t end[LANES]) {
    const uint32_t * src = gather_tile(v, ref, s->words);
    int l = 0;
    for (; l + 4 <= ref.n_lanes; l += 4) {
        decode_four_lanes(v, ref, l, s, end + l);
    }
    for (; l < ref.n_lanes; l++) {
        end[l] = decode_one_lane(v, ref, l, s);
    }
    return src;
}

static bool range_is_valid(const struct ggml_entropy_view * v, int64_t group0, int64_t group1) {
    return 0 <= group0 && group0 <= group1 && group1 <= v->n_groups;
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
    struct tile_scratch * s = malloc(sizeof(*s));
    if (!s) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    const struct ggml_entropy_header * h = v->header;
    for (int64_t group = group0; group < group1; group++) {
        for (int64_t slice = 0; slice < v->n_slices; slice++) {
            const struct tile_ref ref = tile_at(v, group, slice);
            uint32_t end[LANES];
            decode_tile(v, ref, s, end);
            for (int l = 0; l < ref.n_lanes; l++) {
                const int64_t row = (group - group0) * LANES + l;
                symbols_to_codes(h->kind, s->symbols[l], ref.n_symbols, q + row * h->n_cols + slice * h->tile_cols);
            }
        }
    }
    free(s);
    return GGML_ENTROPY_OK;
}

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

enum ggml_entropy_status ggml_entropy_decode_groups_plain(const struct ggml_entropy_view * v, int64_t group0, int64_t group1, void * dst) {
    if (!range_is_valid(v, group0, group1)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    struct tile_scratch * s = malloc(sizeof(*s));
    if (!s) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    const struct ggml_entropy_header * h = v->header;
    const enum ggml_type type     = ggml_entropy_plain_type(h);
    const size_t         row_size = ggml_row_size(type, h->n_cols);

    uint16_t lut[256];
    if (type == GGML_TYPE_F16 && !v->scales && !v->offsets) {
        fill_f16_lut(GGML_FP16_TO_FP32(h->scale), h->offset, lut);
    }
    for (int64_t group = group0; group < group1; group++) {
        for (int64_t slice = 0; slice < v->n_slices; slice++) {
            const struct tile_ref ref = tile_at(v, group, slice);
            uint32_t end[LANES];
            decode_tile(v, ref, s, end);
            const int n_cols   = ref.n_symbols * cols_per_symbol(h->kind);
            const int n_blocks = n_cols / 32;
            for (int l = 0; l < ref.n_lanes; l++) {
                const int64_t  row    = group * LANES + l;
                const uint16_t scale  = v->scales  ? v->scales [row] : h->scale;
                const float    offset = v->offsets ? v->offsets[row] : h->offset;
                char * out = (char *) dst + (row - group0 * LANES) * row_size + ggml_row_size(type, slice * h->tile_cols);
                switch (type) {
                    case GGML_TYPE_Q8_0:
                        symbols_to_q8_0(s->symbols[l], n_blocks, scale, (block_q8_0 *) out);
                        break;
                    case GGML_TYPE_Q4_0:
                        symbols_to_q4_0(s->symbols[l], n_blocks, scale, (block_q4_0 *) out);
                        break;
                    case GGML_TYPE_Q4_1:
                        {
                            uint16_t m;
                            q4_1_min(GGML_FP16_TO_FP32(scale), offset, &m); // validated: exact
                            symbols_to_q4_1(s->symbols[l], n_blocks, scale, m, (block_q4_1 *) out);
                        } break;
                    default: // GGML_TYPE_F16
                        if (v->scales || v->offsets) {
                            fill_f16_lut(GGML_FP16_TO_FP32(scale), offset, lut);
                        }
                        symbols_to_f16(s->symbols[l], n_cols, lut, (uint16_t *) out);
                        break;
                }
            }
        }
    }
    free(s);
    return GGML_ENTROPY_OK;
}

// ---- verification ------------------------------------------------------------------------------------------------------------------

static uint64_t slab_hash(const struct ggml_entropy_header * h) {
    return XXH64((const uint8_t *) h + HASH_FROM, h->slab_size - HASH_FROM, 0);
}

enum ggml_entropy_status ggml_entropy_verify_hash(const struct ggml_entropy_view * v) {
    return slab_hash(v->header) == v->header->hash ? GGML_ENTROPY_OK : GGML_ENTROPY_BAD_HASH;
}

enum ggml_entropy_status ggml_entropy_verify_groups(const struct ggml_entropy_view * v, int64_t group0, int64_t group1) {
    if (!range_is_valid(v, group0, group1)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    struct tile_scratch * s = malloc(sizeof(*s));
    if (!s) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    enum ggml_entropy_status st = GGML_ENTROPY_OK;
    for (int64_t group = group0; group < group1 && st == GGML_ENTROPY_OK; group++) {
        for (int64_t slice = 0; slice < v->n_slices && st == GGML_ENTROPY_OK; slice++) {
            const struct tile_ref ref = tile_at(v, group, slice);
            uint32_t end[LANES];
            const uint32_t * src = decode_tile(v, ref, s, end);
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

// ---- the code: class partition -----------------------------------------------------------------------------------------------------

// Exact joint optimum of intervals, prefix lengths and escape (docs/format.md 7). Dynamic programme over states (position, used), where used is
// the Kraft budget spent so far in units of 2^-8: a class of prefix length p takes 256 >> p units. At each position one either skips a
// symbol that never occurs, sends it through the escape, or opens a class (e, p) that covers the next 2^e symbols. One pass per prefix
// length of the escape (and one without), since the escape's share of the budget is spent in advance.
//
// Costs are integers: the counts are scaled to a sum of at most 2^26, so that 15 bits a symbol stay below DP_INF and DP_INF + cost below 2^31.
#define DP_SYMBOLS   256
#define DP_BUDGET    256
#define DP_STATES    (DP_BUDGET + 1)
#define DP_MAX_TOTAL (1u << 26)
#define DP_INF       (1 << 30)

#define DP_SKIP      1
#define DP_ESCAPE    2
#define DP_CLASS(e, p) (uint16_t) (4 | (p) << 4 | (e) << 8)
#define DP_CLASS_P(step) ((step) >> 4 & 15)
#define DP_CLASS_E(step) ((step) >> 8 & 15)

struct code_class {
    int base;
    int e;
    int p;
};

struct dp_tables {
    int32_t  cost[DP_SYMBOLS + 1][DP_STATES];
    uint16_t step[DP_SYMBOLS + 1][DP_STATES];
};

// to[u + k] = min(to[u + k], from[u] + add), remembering the step. Branch-free, so that compilers vectorise it.
// from and to are rows of different positions: they never overlap.
static void dp_relax(
        const int32_t * restrict from, int k, int32_t add, uint16_t step, int32_t * restrict to, uint16_t * restrict to_step) {
    to      += k;
    to_step += k;
    const int n = DP_STATES - k;
    for (int u = 0; u < n; u++) {
        const int32_t c = from[u] + add;
        const bool better = c < to[u];
        to[u]      = better ? c    : to[u];
        to_step[u] = better ? step : to_step[u];
    }
}

// Cheapest partition with an escape of prefix length escape_p (0: no escape). Returns its cost, DP_INF if there is none.
static int32_t dp_run(const int32_t counts[DP_SYMBOLS], const int32_t sums[DP_SYMBOLS + 1], int escape_p, struct dp_tables * dp) {
    for (int j = 0; j <= DP_SYMBOLS; j++) {
        for (int u = 0; u < DP_STATES; u++) {
            dp->cost[j][u] = DP_INF;
        }
    }
    dp->cost[0][escape_p ? DP_BUDGET >> escape_p : 0] = 0;

    for (int j = 0; j < DP_SYMBOLS; j++) {
        const int32_t * from = dp->cost[j];
        if (counts[j] == 0) {
            dp_relax(from, 0, 0, DP_SKIP, dp->cost[j + 1], dp->step[j + 1]);
        } else if (escape_p) {
            dp_relax(from, 0, counts[j] * (escape_p + 8), DP_ESCAPE, dp->cost[j + 1], dp->step[j + 1]);
        }
        for (int e = 0; e <= 8 && j + (1 << e) <= DP_SYMBOLS; e++) {
            const int     next  = j + (1 << e);
            const int32_t count = sums[next] - sums[j];
            if (count == 0) {
                continue; // a class nobody uses
            }
            for (int p = 0; p <= MAX_PREFIX; p++) {
                const int t = p + e;
                if (t >= 1 && t <= MAX_T) {
                    dp_relax(from, DP_BUDGET >> p, count * t, DP_CLASS(e, p), dp->cost[next], dp->step[next]);
                }
            }
        }
    }
    // a cheapest partition spends the whole budget: with some left, its longest prefix could be one bit shorter
    return dp->cost[DP_SYMBOLS][DP_BUDGET];
}

// Walk back from the end. Returns the number of classes.
static int dp_trace(const struct dp_tables * dp, int escape_p, struct code_class classes[DP_SYMBOLS + 1]) {
    int n = 0;
    int j = DP_SYMBOLS;
    int u = DP_BUDGET;
    while (j > 0) {
        const uint16_t step = dp->step[j][u];
        if (step == DP_SKIP || step == DP_ESCAPE) {
            j--;
            continue;
        }
        const int p = DP_CLASS_P(step);
        const int e = DP_CLASS_E(step);
        j -= 1 << e;
        u -= DP_BUDGET >> p;
        classes[n++] = (struct code_class) { j, e, p };
    }
    if (escape_p) {
        classes[n++] = (struct code_class) { 0, 8, escape_p };
    }
    return n;
}

static int compare_classes(const void * va, const void * vb) {
    const struct code_class * a = va;
    const struct code_class * b = vb;
    return a->p != b->p ? a->p - b->p : a->base != b->base ? a->base - b->base : a->e - b->e;
}

// Canonical prefixes, the expanded table, and the code of every symbol that some class covers.
static void assign_codes(struct code_class * classes, int n_classes, struct ggml_entropy_plan * plan) {
    qsort(classes, n_classes, sizeof(classes[0]), compare_classes);
    int entry = 0; // first free entry of the table; prefixes are handed out in this order
    for (int i = 0; i < n_classes; i++) {
        const struct code_class c = classes[i];
        const int t      = c.p + c.e;
        const int run    = 256 >> c.p;
        const int prefix = entry / run;
        for (int j = 0; j < run; j++) {
            plan->table[entry + j].t    = (uint8_t) t;
            plan->table[entry + j].bias = (uint8_t) (c.base - (prefix << c.e));
        }
        for (int u = c.base; u < c.base + (1 << c.e); u++) {
            if (plan->length[u] == 0 || t < plan->length[u]) {
                plan->length[u] = (uint8_t)  t;
                plan->code  [u] = (uint16_t) (prefix << c.e | (u - c.base));
            }
        }
        entry += run;
    }
    assert(entry == 256);
}

enum ggml_entropy_status ggml_entropy_plan_code(const uint64_t counts[256], struct ggml_entropy_plan * plan) {
    memset(plan, 0, sizeof(*plan));
    uint64_t total = 0;
    for (int u = 0; u < 256; u++) {
        total += counts[u];
    }
    if (total == 0) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }

    // scaled so that the sum, each count rounded up to 1, stays within DP_MAX_TOTAL
    int32_t scaled[DP_SYMBOLS];
    int32_t sums[DP_SYMBOLS + 1] = { 0 };
    const double scale = total <= DP_MAX_TOTAL ? 1.0 : (DP_MAX_TOTAL - 256.0) / (double) total;
    for (int u = 0; u < 256; u++) {
        scaled[u]   = counts[u] == 0 ? 0 : MAX(1, (int32_t) ((double) counts[u] * scale));
        sums[u + 1] = sums[u] + scaled[u];
    }

    struct dp_tables * dp = malloc(sizeof(*dp));
    if (!dp) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    struct code_class best[DP_SYMBOLS + 1];
    int     n_best    = 0;
    int32_t best_cost = DP_INF;
    for (int escape_p = 0; escape_p <= MAX_T - 8; escape_p++) {
        const int32_t cost = dp_run(scaled, sums, escape_p, dp);
        if (cost < best_cost) {
            best_cost = cost;
            n_best    = dp_trace(dp, escape_p, best);
        }
    }
    free(dp);

    assign_codes(best, n_best, plan);
    for (int u = 0; u < 256; u++) {
        plan->n_bits += counts[u] * plan->length[u];
    }
    return GGML_ENTROPY_OK;
}

// ---- encoding ----------------------------------------------------------------------------------------------------------------------

static bool matrix_is_valid(enum ggml_type type, int64_t n_rows, int64_t n_cols, int64_t group0, int64_t group1) {
    return ggml_entropy_is_type(type) && shape_is_valid(n_cols, n_rows, 1, 32)
        && 0 <= group0 && group0 <= group1 && group1 <= ceil_div(n_rows, LANES);
}

static inline uint8_t symbol_at(int kind, const int8_t * q, int64_t k) {
    return kind == GGML_ENTROPY_KIND_EQ8 ? (uint8_t) (q[k] ^ 0x80) : (uint8_t) ((q[2 * k] + 8) | (q[2 * k + 1] + 8) << 4);
}

enum ggml_entropy_status ggml_entropy_count(
        enum ggml_type type, int64_t n_rows, int64_t n_cols, const int8_t * q, int64_t group0, int64_t group1, uint64_t counts[256]) {
    if (!matrix_is_valid(type, n_rows, n_cols, group0, group1)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    const int     kind = kind_of_type(type);
    const int64_t row1 = MIN(n_rows, group1 * LANES);
    const int8_t * from = q + group0 * LANES * n_cols;
    const int64_t n     = (row1 - group0 * LANES) * n_cols;
    if (kind == GGML_ENTROPY_KIND_EQ4) {
        int bad = 0;
        for (int64_t i = 0; i < n; i++) {
            bad |= from[i] < -8 || from[i] > 7;
        }
        if (bad) {
            return GGML_ENTROPY_BAD_CODE;
        }
    }
    // two tables, so that runs of one symbol do not wait for their own increments
    uint64_t even[256] = { 0 };
    uint64_t odd [256] = { 0 };
    const int64_t n_symbols = n / cols_per_symbol(kind); // even: rows are multiples of 32 columns
    for (int64_t k = 0; k < n_symbols; k += 2) {
        even[symbol_at(kind, from, k)]++;
        odd [symbol_at(kind, from, k + 1)]++;
    }
    for (int u = 0; u < 256; u++) {
        counts[u] += even[u] + odd[u];
    }
    return GGML_ENTROPY_OK;
}

int64_t ggml_entropy_default_tile_cols(int64_t n_rows, int64_t n_cols) {
    const int64_t small = 4 * 1000 * 1000;
    if (n_rows * n_cols < small) {
        return MIN(n_cols, GGML_ENTROPY_MAX_TILE_COLS);
    }
    const int64_t wide = MIN(n_cols, 512);
    return count_tiles(n_cols, n_rows, wide) >= 2048 ? wide : MIN(n_cols, 256);
}

enum ggml_entropy_status ggml_entropy_measure(
        enum ggml_type type, int64_t n_rows, int64_t n_cols, const int8_t * q, const struct ggml_entropy_plan * plan, int64_t tile_cols,
        int64_t group0, int64_t group1, uint8_t * lane_words, int64_t * max_words) {
    if (!matrix_is_valid(type, n_rows, n_cols, group0, group1) || !shape_is_valid(n_cols, n_rows, 1, tile_cols)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    const int     kind     = kind_of_type(type);
    const int64_t n_slices = ceil_div(n_cols, tile_cols);
    for (int64_t row = group0 * LANES; row < MIN(n_rows, group1 * LANES); row++) {
        for (int64_t slice = 0; slice < n_slices; slice++) {
            const int8_t * from      = q + row * n_cols + slice * tile_cols;
            const int64_t  n_symbols = MIN(tile_cols, n_cols - slice * tile_cols) / cols_per_symbol(kind);
            uint32_t n_bits = 0;
            bool     coded  = true;
            for (int64_t k = 0; k < n_symbols; k++) {
                const uint8_t t = plan->length[symbol_at(kind, from, k)];
                n_bits += t;
                coded  &= t != 0;
            }
            if (!coded) {
                return GGML_ENTROPY_BAD_CODE;
            }
            const int64_t n_words = (n_bits + 31) / 32;
            *max_words = MAX(*max_words, n_words);
            lane_words[((row / LANES) * n_slices + slice) * LANES + row % LANES] = (uint8_t) n_words;
        }
    }
    return GGML_ENTROPY_OK;
}

static bool fill_header(const struct ggml_entropy_spec * spec, const uint8_t * lane_words, struct ggml_entropy_header * h) {
    memset(h, 0, sizeof(*h));
    const int64_t n_tiles = count_tiles(spec->n_cols, spec->n_rows, spec->tile_cols);
    if (!ggml_entropy_is_type(spec->type) || !shape_is_valid(spec->n_cols, spec->n_rows, spec->n_slabs, spec->tile_cols)
            || n_tiles > UINT32_MAX
            || (spec->n_scales != 1 && spec->n_scales != spec->n_rows)
            || (spec->n_offsets != 0 && spec->n_offsets != 1 && spec->n_offsets != spec->n_rows)) {
        return false;
    }
    memcpy(h->magic, magic, sizeof(magic));
    h->version     = 1;
    h->kind        = (uint8_t) kind_of_type(spec->type);
    h->n_cols      = (uint32_t) spec->n_cols;
    h->n_rows      = (uint32_t) spec->n_rows;
    h->n_slabs     = (uint32_t) spec->n_slabs;
    h->tile_cols   = (uint32_t) spec->tile_cols;
    h->n_tiles     = (uint32_t) n_tiles;
    h->scale_mode  = spec->n_scales  == 1 ? GGML_ENTROPY_SCALE_ONE : GGML_ENTROPY_SCALE_ROW;
    h->offset_mode = spec->n_offsets == 0 ? GGML_ENTROPY_OFFSET_NONE
                   : spec->n_offsets == 1 ? GGML_ENTROPY_OFFSET_ONE : GGML_ENTROPY_OFFSET_ROW;
    layout_sections(h);
    for (int64_t tile = 0; tile < n_tiles; tile++) {
        uint64_t n = 0;
        for (int l = 0; l < LANES; l++) {
            n += lane_words[tile * LANES + l];
        }
        h->bitstream_words += align_up(n, 4);
    }
    h->slab_size = min_slab_size(h);
    return h->bitstream_words <= UINT32_MAX;
}

size_t ggml_entropy_slab_size(const struct ggml_entropy_spec * spec, const uint8_t * lane_words) {
    struct ggml_entropy_header h;
    return fill_header(spec, lane_words, &h) ? h.slab_size : 0;
}

enum ggml_entropy_status ggml_entropy_begin(
        const struct ggml_entropy_spec * spec, const struct ggml_entropy_plan * plan, const uint8_t * lane_words, void * slab, size_t slab_size) {
    struct ggml_entropy_header h;
    if (!fill_header(spec, lane_words, &h) || slab_size < h.slab_size || slab_size % GGML_ENTROPY_ALIGN != 0
            || (spec->n_slabs == 1 && slab_size != h.slab_size) || (uintptr_t) slab % sizeof(uint64_t) != 0) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    h.slab_size = slab_size;
    if (h.scale_mode == GGML_ENTROPY_SCALE_ONE) {
        h.scale = spec->scales[0];
    }
    if (h.offset_mode == GGML_ENTROPY_OFFSET_ONE) {
        h.offset = spec->offsets[0];
    }
    uint8_t * base = (uint8_t *) slab;
    memcpy(base, &h, sizeof(h));
    memcpy(base + h.table_at, plan->table, sizeof(plan->table));
    if (h.scales_at) {
        memcpy(base + h.scales_at, spec->scales, (size_t) h.n_rows * 2);
    }
    if (h.offsets_at) {
        memcpy(base + h.offsets_at, spec->offsets, (size_t) h.n_rows * 4);
    }
    memcpy(base + h.lane_words_at, lane_words, (size_t) h.n_tiles * LANES);

    uint32_t * word_offsets = (uint32_t *) (base + h.word_offsets_at);
    uint64_t at = 0;
    for (int64_t tile = 0; tile < (int64_t) h.n_tiles; tile++) {
        word_offsets[tile] = (uint32_t) at;
        for (int l = 0; l < LANES; l++) {
            at += lane_words[tile * LANES + l];
        }
        at = align_up(at, 4);
    }
    // catches scales, offsets and tables that a reader would refuse
    struct ggml_entropy_view v;
    return validate_slab(slab, slab_size, &v);
}

// Codes of one lane, most significant bit first. The lane was measured: words has room for exactly its codes.
static void write_lane(const uint32_t codes[256], int kind, const int8_t * q, int n_symbols, uint32_t * words) {
    uint64_t acc    = 0; // pending bits, right-aligned
    int      n_bits = 0; // their number, below 32 before each code
    for (int k = 0; k < n_symbols; k++) {
        const uint32_t c = codes[symbol_at(kind, q, k)];
        acc     = acc << (c & 15) | c >> 4;
        n_bits += c & 15;
        if (n_bits >= 32) {
            n_bits -= 32;
            *words++ = (uint32_t) (acc >> n_bits);
        }
    }
    if (n_bits > 0) {
        *words = (uint32_t) (acc << (32 - n_bits));
    }
}

enum ggml_entropy_status ggml_entropy_encode_groups(
        const struct ggml_entropy_plan * plan, const int8_t * q, int64_t group0, int64_t group1, void * slab) {
    struct ggml_entropy_view v;
    const enum ggml_entropy_status st = ggml_entropy_open(slab, ((const struct ggml_entropy_header *) slab)->slab_size, &v);
    if (st != GGML_ENTROPY_OK) {
        return st;
    }
    if (!range_is_valid(&v, group0, group1)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    lane_scratch * words = malloc(LANES * sizeof(*words));
    if (!words) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    uint32_t codes[256]; // code << 4 | length: one look-up a symbol
    for (int u = 0; u < 256; u++) {
        codes[u] = (uint32_t) plan->code[u] << 4 | plan->length[u];
    }
    const struct ggml_entropy_header * h = v.header;
    uint32_t * bitstream = (uint32_t *) ((uint8_t *) slab + h->bitstream_at);
    for (int64_t group = group0; group < group1; group++) {
        for (int64_t slice = 0; slice < v.n_slices; slice++) {
            const struct tile_ref ref = tile_at(&v, group, slice);
            for (int l = 0; l < ref.n_lanes; l++) {
                const int64_t row = group * LANES + l;
                write_lane(codes, h->kind, q + row * h->n_cols + slice * h->tile_cols, ref.n_symbols, words[l]);
            }
            const uint8_t * n_words = v.lane_words + ref.tile * LANES;
            uint32_t * dst = bitstream + v.word_offsets[ref.tile];
            for (int j = 0; j < GGML_ENTROPY_MAX_LANE_WORDS; j++) {
                uint32_t * const word_row = dst;
                for (int l = 0; l < ref.n_lanes; l++) {
                    if (j < n_words[l]) {
                        *dst++ = words[l][j];
                    }
                }
                if (dst == word_row) {
                    break;
                }
            }
        }
    }
    free(words);
    return GGML_ENTROPY_OK;
}

enum ggml_entropy_status ggml_entropy_finish(void * slab) {
    struct ggml_entropy_view v;
    const enum ggml_entropy_status st = ggml_entropy_open(slab, ((const struct ggml_entropy_header *) slab)->slab_size, &v);
    if (st != GGML_ENTROPY_OK) {
        return st;
    }
    ((struct ggml_entropy_header *) slab)->hash = slab_hash(v.header);
    return GGML_ENTROPY_OK;
}
