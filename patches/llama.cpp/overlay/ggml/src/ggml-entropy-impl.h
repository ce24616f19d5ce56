// SPDX-License-Identifier: MIT
//
// What the parts of the codec share: layout of a slab and its arithmetic. Private to ggml-entropy*.c and to ggml-entropy-decode.h.

#pragma once

#include "ggml-entropy.h"
#include "ggml-impl.h"

#include <string.h>

#define GROUP_ROWS   GGML_ENTROPY_GROUP_ROWS
#define UNIT         GGML_ENTROPY_UNIT
#define UNIT_COLS    GGML_ENTROPY_UNIT_COLS
#define MAX_SLAB     (UINT64_C(1) << 46)           // bytes: more than any machine maps
#define MAX_BODY     (((uint64_t) UINT32_MAX) * 8) // index entries count units of 8 bytes
#define SECTION      64                            // alignment of sections

static const uint8_t ggml_entropy_magic[4] = { 'E', 'Q', 'T', 'P' };

static inline uint64_t align_up(uint64_t x, uint64_t a) {
    return (x + a - 1) / a * a;
}

static inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

static inline int kind_of_type(enum ggml_type type) {
    switch (type) {
        case GGML_TYPE_EQ8:   return GGML_ENTROPY_KIND_EQ8;
        case GGML_TYPE_EQ4:   return GGML_ENTROPY_KIND_EQ4;
        case GGML_TYPE_EBF16: return GGML_ENTROPY_KIND_EBF16;
        default:              return 0;
    }
}

static inline bool tile_cols_is_valid(int64_t tile_cols) {
    return tile_cols >= 32 && tile_cols <= 1024 && tile_cols % 32 == 0;
}

static inline bool all_zero(const uint8_t * p, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) {
        if (p[i] != 0) {
            return false;
        }
    }
    return true;
}

// Raw numbers below are direct (docs/format.md 5.2).
static inline int direct_codes(const struct ggml_entropy_code * code) {
    return code->raw_bits == 8 ? 256 : (1 << code->raw_bits) - (1 << code->bin_bits);
}

// 5.2
static inline bool code_is_valid(const struct ggml_entropy_code * code) {
    const struct ggml_entropy_tail * tail = ggml_entropy_tail_of(code->tail);
    if (code->raw_bits < 1 || code->raw_bits > 8 || !tail || (code->raw_bits == 8) != (code->tail == 0)
            || (code->raw_bits == 8 ? code->bin_bits != 0 : code->bin_bits >= code->raw_bits)) {
        return false;
    }
    // kernels use number 0 for direct weights and for class 0: both need the same addend
    if (tail->n_classes > 0 && (uint8_t) code->class_base[0] != (uint8_t) (code->base + direct_codes(code))) {
        return false;
    }
    return all_zero((const uint8_t *) code->class_base + tail->n_classes, GGML_ENTROPY_MAX_CLASSES - tail->n_classes)
        && all_zero(code->reserved, sizeof(code->reserved));
}

// Bytes of the raw bits of a row group: at most 2^22 units of 64 bytes.
static inline uint64_t raw_size(const struct ggml_entropy_header * h) {
    return (uint64_t) (h->n_cols / UNIT_COLS) * 8 * h->code.raw_bits;
}

static inline int64_t count_groups(int64_t n_rows) {
    return ceil_div(n_rows, GROUP_ROWS);
}

// Fill the section offsets that follow from shape and modes (5).
static inline void layout_sections(struct ggml_entropy_header * h) {
    uint64_t at = GGML_ENTROPY_HEADER_SIZE;
    h->scales_at = 0;
    if (h->scale_mode == GGML_ENTROPY_SCALE_ROW) {
        h->scales_at = at;
        at = align_up(at + (uint64_t) h->n_rows * 2, SECTION);
    }
    h->offsets_at = 0;
    if (h->offset_mode == GGML_ENTROPY_OFFSET_ROW) {
        h->offsets_at = at;
        at = align_up(at + (uint64_t) h->n_rows * 4, SECTION);
    }
    h->index_at = at;
    at = align_up(at + (uint64_t) count_groups(h->n_rows) * sizeof(uint32_t), SECTION);
    h->rests_at = 0;
    if (h->kind == GGML_ENTROPY_KIND_EBF16) {
        h->rests_at = at;
        at = align_up(at + (uint64_t) h->n_rows * h->n_cols, SECTION);
    }
    h->body_at = at;
}

// body_at is below 2^56 and body_size at most MAX_BODY: no overflow.
static inline uint64_t min_slab_size(const struct ggml_entropy_header * h) {
    return align_up(h->body_at + h->body_size, GGML_ENTROPY_ALIGN) + GGML_ENTROPY_SLACK;
}

static inline bool range_is_valid(const struct ggml_entropy_view * v, int64_t group0, int64_t group1) {
    return 0 <= group0 && group0 <= group1 && group1 <= v->n_groups;
}
