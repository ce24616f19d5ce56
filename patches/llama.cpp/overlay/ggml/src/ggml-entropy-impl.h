// SPDX-License-Identifier: MIT
//
// What the reading and the writing half of the codec share: layout of a slab and its arithmetic. Private to ggml-entropy.c and
// ggml-entropy-encode.c.

#pragma once

#define XXH_INLINE_ALL
#define XXH_STATIC_LINKING_ONLY
#include "../../vendor/hash/xxhash/xxhash.h"

#include "ggml-entropy.h"
#include "ggml-impl.h"

#define LANES        GGML_ENTROPY_LANES
#define MAX_COLS     (1 << 24)
#define MAX_SLABS    (1 << 16)
#define MAX_T        15               // longest code: two of them fit in a 32-bit window
#define MAX_PREFIX   8
#define HASH_FROM    16               // the hash covers the slab from here to its end

static const uint8_t ggml_entropy_magic[4] = { 'E', 'Q', 'T', '1' };

static inline uint64_t align_up(uint64_t x, uint64_t a) {
    return (x + a - 1) / a * a;
}

static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static inline int kind_of_type(enum ggml_type type) {
    return type == GGML_TYPE_EQ8 ? GGML_ENTROPY_KIND_EQ8 : type == GGML_TYPE_EQ4 ? GGML_ENTROPY_KIND_EQ4 : 0;
}

// columns that share one symbol
static inline int cols_per_symbol(int kind) {
    return kind == GGML_ENTROPY_KIND_EQ4 ? 2 : 1;
}

static inline bool shape_is_valid(int64_t n_cols, int64_t n_rows, int64_t n_slabs, int64_t tile_cols) {
    return n_cols  >= 32 && n_cols <= MAX_COLS && n_cols % 32 == 0
        && n_rows  >= 1  && n_rows <= INT32_MAX
        && n_slabs >= 1  && n_slabs <= MAX_SLABS
        && tile_cols >= 32 && tile_cols <= GGML_ENTROPY_MAX_TILE_COLS && tile_cols % 32 == 0;
}

// n_rows < 2^31 and n_cols <= 2^24: at most 2^26 * 2^19 = 2^45 tiles, no overflow; the header's u32 narrows it further
static inline int64_t count_tiles(int64_t n_cols, int64_t n_rows, int64_t tile_cols) {
    return ceil_div(n_rows, LANES) * ceil_div(n_cols, tile_cols);
}

// Fill the section offsets that follow from shape and modes (docs/format.md 5).
static inline void layout_sections(struct ggml_entropy_header * h) {
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

static inline uint64_t min_slab_size(const struct ggml_entropy_header * h) {
    return align_up(h->bitstream_at + 4 * h->bitstream_words, GGML_ENTROPY_ALIGN) + GGML_ENTROPY_SLACK;
}

// Tile number, its lanes and its symbols per lane.
struct tile_ref {
    int64_t tile;
    int     n_lanes;
    int     n_symbols;
};

static inline struct tile_ref tile_at(const struct ggml_entropy_view * v, int64_t group, int64_t slice) {
    const struct ggml_entropy_header * h = v->header;
    const int64_t n_cols = MIN((int64_t) h->tile_cols, (int64_t) h->n_cols - slice * h->tile_cols);
    struct tile_ref ref;
    ref.tile      = group * v->n_slices + slice;
    ref.n_lanes   = (int) MIN(LANES, (int64_t) h->n_rows - group * LANES);
    ref.n_symbols = (int) (n_cols / cols_per_symbol(h->kind));
    return ref;
}

static inline bool range_is_valid(const struct ggml_entropy_view * v, int64_t group0, int64_t group1) {
    return 0 <= group0 && group0 <= group1 && group1 <= v->n_groups;
}

static inline uint64_t slab_hash(const struct ggml_entropy_header * h) {
    return XXH64((const uint8_t *) h + HASH_FROM, h->slab_size - HASH_FROM, 0);
}
