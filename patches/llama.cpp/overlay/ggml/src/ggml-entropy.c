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

#if defined(__SSE2__) || defined(_M_X64)
#define HAVE_SSE2
#include <emmintrin.h>
#endif

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
//
// A lane is decoded through windows: 57 bits or more from any bit position, left-aligned. The table of runs takes RUN_BITS of a window and
// gives all symbols that end within them, at most four: at 5.3 bits per symbol that is 1.6 symbols a look-up, at 3 bits 3.2. What it cannot
// tell, a code longer than RUN_BITS, goes through the slab's own table. Measured against one symbol per look-up (bench/results): 1.9 times as
// fast at 5.3 bits, 3.3 times at 3.

#define RUN_BITS    GGML_ENTROPY_RUN_BITS
#define RUN_SYMBOLS 4
#define STEP_RUNS   4                        // look-ups per window: 4 * RUN_BITS = 44 of its 57 bits
#define STEP_MAX    (STEP_RUNS*RUN_SYMBOLS)  // symbols they give at most

// A run: bits used 0..5, number of symbols 8..10, symbols 32..63, the first one lowest. All zero: the first code does not fit.
static uint64_t make_run(const struct ggml_entropy_entry * table, uint32_t bits) {
    uint32_t n_bits    = 0;
    uint32_t n_symbols = 0;
    uint32_t symbols   = 0;
    while (n_symbols < RUN_SYMBOLS) {
        const struct ggml_entropy_entry entry = table[bits >> 24];
        if (n_bits + entry.t > RUN_BITS) {
            break;
        }
        symbols |= (uint32_t) (uint8_t) ((bits >> (32 - entry.t)) + entry.bias) << (8 * n_symbols);
        bits   <<= entry.t;
        n_bits  += entry.t;
        n_symbols++;
    }
    return (uint64_t) symbols << 32 | n_symbols << 8 | n_bits;
}

void ggml_entropy_decoder_open(struct ggml_entropy_decoder * d, const struct ggml_entropy_view * view) {
    d->view     = *view;
    d->has_runs = false;
}

// Takes some 10 us, which a single row or a kernel that decodes by other means need not wait for.
static void make_runs(struct ggml_entropy_decoder * d) {
    for (uint32_t i = 0; i < 1u << RUN_BITS; i++) {
        d->runs[i] = make_run(d->view.table, i << (32 - RUN_BITS));
    }
    d->has_runs = true;
}

static inline uint32_t swap_bytes(uint32_t x) {
    return x >> 24 | (x >> 8 & 0xff00) | (x << 8 & 0xff0000) | x << 24;
}

// Undo the word-row interleave of a tile: each lane becomes a string of bytes, most significant bit first, with eight zero bytes behind.
// Returns the words behind the tile's last.
static const uint32_t * gather_tile(struct ggml_entropy_decoder * d, struct tile_ref ref) {
    const uint32_t * src     = d->view.bitstream + d->view.word_offsets[ref.tile];
    const uint8_t  * n_words = d->view.lane_words + ref.tile * LANES;

    int shortest = 255;
    int longest  = 0;
    for (int l = 0; l < ref.n_lanes; l++) {
        shortest = MIN(shortest, n_words[l]);
        longest  = MAX(longest,  n_words[l]);
    }
    // word rows that every lane has need no test
    for (int j = 0; j < shortest; j++) {
        for (int l = 0; l < ref.n_lanes; l++) {
            d->words[l][j] = swap_bytes(*src++);
        }
    }
    for (int j = shortest; j < longest; j++) {
        for (int l = 0; l < ref.n_lanes; l++) {
            if (j < n_words[l]) {
                d->words[l][j] = swap_bytes(*src++);
            }
        }
    }
    for (int l = 0; l < ref.n_lanes; l++) {
        d->words[l][n_words[l]]     = 0;
        d->words[l][n_words[l] + 1] = 0;
    }
    return src;
}

// A lane on its way.
struct lane_state {
    const uint8_t * bytes;
    uint32_t        n_bytes;
    uint32_t        pos;     // of the next code, in bits; runs past the end for wrong bits: at most 1024 codes of 15 bits
    uint8_t       * out;
    uint8_t       * end;     // of its symbols
};

static inline struct lane_state lane_start(struct ggml_entropy_decoder * d, struct tile_ref ref, int lane) {
    struct lane_state s;
    s.bytes   = (const uint8_t *) d->words[lane];
    s.n_bytes = 4u * d->view.lane_words[ref.tile * LANES + lane];
    s.pos     = 0;
    s.out     = d->symbols[lane];
    s.end     = s.out + ref.n_symbols;
    return s;
}

// At least 57 bits from bit pos on, left-aligned; zeros behind the lane's end.
static inline uint64_t lane_window(const struct lane_state * s) {
    const uint8_t * p = s->bytes + MIN(s->pos >> 3, s->n_bytes);
    const uint64_t bytes = (uint64_t) p[0] << 56 | (uint64_t) p[1] << 48 | (uint64_t) p[2] << 40 | (uint64_t) p[3] << 32
                         | (uint64_t) p[4] << 24 | (uint64_t) p[5] << 16 | (uint64_t) p[6] <<  8 | (uint64_t) p[7];
    return bytes << (s->pos & 7);
}

// One code through the slab's table.
static inline void decode_one(const struct ggml_entropy_entry * table, struct lane_state * s, uint64_t window) {
    const struct ggml_entropy_entry entry = table[window >> 56];
    *s->out++ = (uint8_t) ((window >> (64 - entry.t)) + entry.bias);
    s->pos   += entry.t;
}

// One run. *used counts the bits taken from the window since s->pos; it stays below 64, above are the counts of symbols, which do not matter.
static inline void decode_run(const struct ggml_entropy_decoder * d, struct lane_state * s, uint64_t * window, uint32_t * used) {
    const uint64_t run = d->runs[*window >> (64 - RUN_BITS)];
    if ((run & 63) == 0) {
        // rare: start from a fresh window, of which the code takes up to 15 bits and the runs that follow up to 33
        s->pos += *used & 63;
        *used   = 0;
        const uint32_t before = s->pos;
        *window = lane_window(s);
        decode_one(d->view.table, s, *window);
        *window <<= s->pos - before;
        return;
    }
    // always four bytes: those behind the last symbol are overwritten by the next run, and there is one: see decode_four_lanes
    const uint32_t symbols = (uint32_t) (run >> 32);
    memcpy(s->out, &symbols, 4);
    s->out   += (uint8_t) (run >> 8);
    *window <<= run & 63;
    *used    += (uint32_t) run;
}

// Lanes differ in how far a step brings them. As long as none is closer to its end than a step can go, all take steps together: four lanes,
// because look-ups depend on each other within a lane only, and a core overlaps those of different lanes.
static void decode_four_lanes(const struct ggml_entropy_decoder * d, struct lane_state s[4]) {
    struct lane_state s0 = s[0], s1 = s[1], s2 = s[2], s3 = s[3];
    for (;;) {
        int64_t n_steps = MIN(MIN(s0.end - s0.out, s1.end - s1.out), MIN(s2.end - s2.out, s3.end - s3.out)) / STEP_MAX;
        if (n_steps == 0) {
            break;
        }
        for (; n_steps > 0; n_steps--) {
            uint64_t w0 = lane_window(&s0), w1 = lane_window(&s1), w2 = lane_window(&s2), w3 = lane_window(&s3);
            uint32_t u0 = 0, u1 = 0, u2 = 0, u3 = 0;
            for (int i = 0; i < STEP_RUNS; i++) {
                decode_run(d, &s0, &w0, &u0);
                decode_run(d, &s1, &w1, &u1);
                decode_run(d, &s2, &w2, &u2);
                decode_run(d, &s3, &w3, &u3);
            }
            s0.pos += u0 & 63;
            s1.pos += u1 & 63;
            s2.pos += u2 & 63;
            s3.pos += u3 & 63;
        }
    }
    s[0] = s0;
    s[1] = s1;
    s[2] = s2;
    s[3] = s3;
}

static void decode_rest(const struct ggml_entropy_decoder * d, struct lane_state * s) {
    while (s->out < s->end) {
        decode_one(d->view.table, s, lane_window(s));
    }
}

// Symbols of the lanes [lane0, lane1) of a tile; end positions of these lanes in bits into end. Returns the words behind the tile's last.
static const uint32_t * decode_lanes(struct ggml_entropy_decoder * d, struct tile_ref ref, int lane0, int lane1, uint32_t end[LANES]) {
    const uint32_t * src = gather_tile(d, ref);
    if (lane1 - lane0 >= 4 && !d->has_runs) {
        make_runs(d);
    }
    int l = lane0;
    for (; l + 4 <= lane1; l += 4) {
        struct lane_state s[4] = { lane_start(d, ref, l), lane_start(d, ref, l + 1), lane_start(d, ref, l + 2), lane_start(d, ref, l + 3) };
        decode_four_lanes(d, s);
        for (int i = 0; i < 4; i++) {
            decode_rest(d, &s[i]);
            end[l + i] = s[i].pos;
        }
    }
    for (; l < lane1; l++) {
        struct lane_state s = lane_start(d, ref, l);
        decode_rest(d, &s);
        end[l] = s.pos;
    }
    return src;
}

void ggml_entropy_decoder_lanes(struct ggml_entropy_decoder * d, int64_t group, int64_t slice, int lane0, int lane1) {
    uint32_t end[LANES];
    decode_lanes(d, tile_at(&d->view, group, slice), lane0, lane1, end);
}

static struct ggml_entropy_decoder * decoder_new(const struct ggml_entropy_view * view) {
    struct ggml_entropy_decoder * d = malloc(sizeof(*d));
    if (d) {
        ggml_entropy_decoder_open(d, view);
    }
    return d;
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
    struct ggml_entropy_decoder * d = decoder_new(v);
    if (!d) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    const struct ggml_entropy_header * h = v->header;
    for (int64_t group = group0; group < group1; group++) {
        for (int64_t slice = 0; slice < v->n_slices; slice++) {
            const struct tile_ref ref = tile_at(v, group, slice);
            ggml_entropy_decoder_lanes(d, group, slice, 0, ref.n_lanes);
            for (int l = 0; l < ref.n_lanes; l++) {
                const int64_t row = (group - group0) * LANES + l;
                symbols_to_codes(h->kind, d->symbols[l], ref.n_symbols, q + row * h->n_cols + slice * h->tile_cols);
            }
        }
    }
    free(d);
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
#ifdef HAVE_SSE2 // every x86-64; gcc does not find this for the loop below
    const __m128i low   = _mm_set1_epi8(15);
    const __m128i all   = _mm_loadu_si128((const __m128i *) symbols);
    const __m128i even  = _mm_and_si128(all, low);
    const __m128i odd   = _mm_and_si128(_mm_srli_epi16(all, 4), low);
    const __m128i above = _mm_slli_epi16(_mm_unpackhi_epi8(even, odd), 4); // weights 16..31
    _mm_storeu_si128((__m128i *) qs, _mm_or_si128(_mm_unpacklo_epi8(even, odd), above));
#else
    for (int k = 0; k < 8; k++) {
        const uint8_t lo = symbols[k];
        const uint8_t hi = symbols[k + 8];
        qs[2 * k]     = (uint8_t) ((lo & 15) | (hi & 15) << 4);
        qs[2 * k + 1] = (uint8_t) ((lo >> 4) | (hi & 0xf0));
    }
#endif
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

void ggml_entropy_decoder_rows(
        const struct ggml_entropy_decoder * d, int64_t group, int64_t slice, int lane0, int lane1, enum ggml_type type, void * dst, size_t row_size) {
    const struct ggml_entropy_view   * v = &d->view;
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
                symbols_to_f32(h->kind, d->symbols[l], ref.n_symbols, GGML_FP16_TO_FP32(scale), offset, (float *) out);
                break;
            case GGML_TYPE_F16:
                if (!lut_is_shared) {
                    fill_f16_lut(GGML_FP16_TO_FP32(scale), offset, lut);
                }
                symbols_to_f16(d->symbols[l], n_cols, lut, (uint16_t *) out);
                break;
            case GGML_TYPE_Q8_0:
                symbols_to_q8_0(d->symbols[l], n_blocks, scale, (block_q8_0 *) out);
                break;
            case GGML_TYPE_Q4_0:
                symbols_to_q4_0(d->symbols[l], n_blocks, scale, (block_q4_0 *) out);
                break;
            case GGML_TYPE_Q4_1:
                {
                    uint16_t m;
                    q4_1_min(GGML_FP16_TO_FP32(scale), offset, &m); // validated: exact
                    symbols_to_q4_1(d->symbols[l], n_blocks, scale, m, (block_q4_1 *) out);
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
    struct ggml_entropy_decoder * d = decoder_new(v);
    if (!d) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    const enum ggml_type type     = ggml_entropy_plain_type(v->header);
    const size_t         row_size = ggml_row_size(type, v->header->n_cols);
    for (int64_t group = group0; group < group1; group++) {
        char * rows = (char *) dst + (group - group0) * LANES * row_size;
        for (int64_t slice = 0; slice < v->n_slices; slice++) {
            const int n_lanes = tile_at(v, group, slice).n_lanes;
            ggml_entropy_decoder_lanes(d, group, slice, 0, n_lanes);
            ggml_entropy_decoder_rows(d, group, slice, 0, n_lanes, type, rows, row_size);
        }
    }
    free(d);
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
    struct ggml_entropy_decoder * d = decoder_new(v);
    if (!d) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    enum ggml_entropy_status st = GGML_ENTROPY_OK;
    for (int64_t group = group0; group < group1 && st == GGML_ENTROPY_OK; group++) {
        for (int64_t slice = 0; slice < v->n_slices && st == GGML_ENTROPY_OK; slice++) {
            const struct tile_ref ref = tile_at(v, group, slice);
            uint32_t end[LANES];
            const uint32_t * src = decode_lanes(d, ref, 0, ref.n_lanes, end);
            for (int l = 0; l < ref.n_lanes; l++) {
                const uint32_t n = v->lane_words[ref.tile * LANES + l];
                const uint32_t rest = end[l] & 31; // bits of the last word that are codes
                if ((end[l] + 31) / 32 != n || (rest != 0 && (swap_bytes(d->words[l][n - 1]) << rest) != 0)) {
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
    free(d);
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

