// SPDX-License-Identifier: MIT
//
// Reading entropy-coded tensors; see ggml-entropy.h for the contract and docs/format.md for the bits. Writing: ggml-entropy-encode.c.
//
// Order of this file: validation, decoding, rows of other types, verification. One file, since what is validated here is what decoding
// relies on, and both are read together.
//
// One thing that surprises: the header is copied when a slab is opened, and everything is bounded by that copy. A file that is mapped can
// change after it was validated; then weights are wrong, and nothing else is.

#include "ggml-entropy-decode.h"
#include "ggml-entropy-hash.h"
#include "ggml-entropy-lanes.h"

#define GGML_COMMON_DECL_C
#include "ggml-common.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static_assert(sizeof(struct ggml_entropy_header) == GGML_ENTROPY_HEADER_SIZE, "header size");
static_assert(sizeof(struct ggml_entropy_code)   == 16, "code size");
// planes of 64 bits, and a window of 9 bytes behind the last
static_assert(GGML_ENTROPY_CLAMP_UNITS*GGML_ENTROPY_MAX_PLANES*8 + 9 <= GGML_ENTROPY_SLACK, "slack");

bool ggml_entropy_is_type(enum ggml_type type) {
    return kind_of_type(type) != 0;
}

bool ggml_entropy_is_quantized(enum ggml_type type) {
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
        case GGML_ENTROPY_OLD_VERSION:   return "format version 1, which is no longer read: convert the model again";
        case GGML_ENTROPY_BAD_VERSION:   return "a format version that this runtime does not know";
        case GGML_ENTROPY_BAD_KIND:      return "the header names another type than the file";
        case GGML_ENTROPY_BAD_SHAPE:     return "the header names another shape than the file, or an impossible one";
        case GGML_ENTROPY_BAD_MODE:      return "unknown or inconsistent scale or offset mode";
        case GGML_ENTROPY_BAD_LAYOUT:    return "impossible section layout";
        case GGML_ENTROPY_BAD_RESERVED:  return "a reserved byte is not zero";
        case GGML_ENTROPY_BAD_SCALE:     return "a scale or offset is not a valid number";
        case GGML_ENTROPY_BAD_TABLE:     return "impossible code parameters";
        case GGML_ENTROPY_BAD_INDEX:     return "invalid index of row groups";
        case GGML_ENTROPY_BAD_HASH:      return "hash mismatch";
        case GGML_ENTROPY_BAD_STREAM:    return "a row group does not hold exactly its codes";
        case GGML_ENTROPY_STATUS_COUNT:  break;
    }
    return "unknown status";
}

bool ggml_entropy_shape_is_valid(int64_t n_cols, int64_t n_rows, int64_t n_slabs) {
    return n_cols  >= 32 && n_cols <= 1 << 24 && n_cols % 32 == 0
        && n_rows  >= 1  && n_rows <= INT32_MAX
        && n_slabs >= 1  && n_slabs <= 1 << 16;
}

size_t ggml_entropy_size_of(const char * structure) {
    static const struct { const char * name; size_t size; } known[] = {
        { "code",         sizeof(struct ggml_entropy_code)         },
        { "tail",         sizeof(struct ggml_entropy_tail)         },
        { "header",       sizeof(struct ggml_entropy_header)       },
        { "view",         sizeof(struct ggml_entropy_view)         },
        { "plan",         sizeof(struct ggml_entropy_plan)         },
        { "extent",       sizeof(struct ggml_entropy_extent)       },
        { "spec",         sizeof(struct ggml_entropy_spec)         },
        { "lanes_header", sizeof(struct ggml_entropy_lanes_header) },
        { "lanes_plan",   sizeof(struct ggml_entropy_lanes_plan)   },
    };
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (strcmp(structure, known[i].name) == 0) {
            return known[i].size;
        }
    }
    return 0;
}

const struct ggml_entropy_tail * ggml_entropy_tail_of(int number) {
    static const struct ggml_entropy_tail tails[GGML_ENTROPY_N_TAILS] = {
        { 0, { 0, 0, 0, 0 }, 0, 0 },
        { 2, { 2, 2, 0, 0 }, 6, 4 },
        { 4, { 1, 1, 2, 2 }, 8, 6 },
    };
    return number >= 0 && number < GGML_ENTROPY_N_TAILS ? &tails[number] : NULL;
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

// The device layout has at most 15 bits a symbol. More than this is not what an encoder made, and would reserve memory for nothing (5.1).
static uint64_t max_device_size(const struct ggml_entropy_header * h) {
    const uint64_t n_rows  = h->n_rows;
    const uint64_t n_tiles = (uint64_t) ceil_div(h->n_rows, GGML_ENTROPY_LANES) * (uint64_t) ceil_div(h->n_cols, h->tile_cols);
    // header, table and alignment of sections; scales and offsets; of a tile its offset, its lane lengths, and what fills up words and its
    // end
    return 4096 + 6 * n_rows + n_tiles * (4 + GGML_ENTROPY_LANES + 4 * GGML_ENTROPY_LANES + 12) + 2 * n_rows * h->n_cols;
}

static enum ggml_entropy_status check_header(const struct ggml_entropy_header * h) {
    if (memcmp(h->magic, "EQT1", 4) == 0) {
        return GGML_ENTROPY_OLD_VERSION;
    }
    if (memcmp(h->magic, ggml_entropy_magic, sizeof(ggml_entropy_magic)) != 0) {
        return GGML_ENTROPY_BAD_MAGIC;
    }
    if (h->version != GGML_ENTROPY_VERSION) {
        return GGML_ENTROPY_BAD_VERSION;
    }
    if (h->kind < GGML_ENTROPY_KIND_EQ8 || h->kind > GGML_ENTROPY_KIND_EBF16) {
        return GGML_ENTROPY_BAD_KIND;
    }
    if (h->reserved0 != 0 || !all_zero(h->reserved1, sizeof(h->reserved1))) {
        return GGML_ENTROPY_BAD_RESERVED;
    }
    if (!ggml_entropy_shape_is_valid(h->n_cols, h->n_rows, h->n_slabs) || !tile_cols_is_valid(h->tile_cols)) {
        return GGML_ENTROPY_BAD_SHAPE;
    }
    if (h->scale_mode > GGML_ENTROPY_SCALE_ROW || h->offset_mode > GGML_ENTROPY_OFFSET_ROW) {
        return GGML_ENTROPY_BAD_MODE;
    }

    const bool is_ebf16 = h->kind == GGML_ENTROPY_KIND_EBF16;
    if (is_ebf16 && (h->scale_mode != GGML_ENTROPY_SCALE_ONE || h->offset_mode != GGML_ENTROPY_OFFSET_NONE)) {
        return GGML_ENTROPY_BAD_MODE;
    }

    uint32_t offset_bits;
    memcpy(&offset_bits, &h->offset, 4);
    if (h->scale_mode == GGML_ENTROPY_SCALE_ONE && !is_ebf16 ? !f16_is_finite(h->scale) : h->scale != 0) {
        return GGML_ENTROPY_BAD_SCALE;
    }
    if (h->offset_mode == GGML_ENTROPY_OFFSET_ONE ? !isfinite(h->offset) : offset_bits != 0) {
        return GGML_ENTROPY_BAD_SCALE;
    }
    if (!code_is_valid(&h->code)) {
        return GGML_ENTROPY_BAD_TABLE;
    }

    struct ggml_entropy_header expect = *h;
    layout_sections(&expect);
    if (h->scales_at != expect.scales_at || h->offsets_at != expect.offsets_at || h->index_at != expect.index_at
            || h->rests_at != expect.rests_at || h->body_at != expect.body_at) {
        return GGML_ENTROPY_BAD_LAYOUT;
    }
    // n_groups * raw_size: at most 2^27 * 2^28, no overflow
    if (h->body_size % 8 != 0 || h->body_size > MAX_BODY || h->body_size < (uint64_t) count_groups(h->n_rows) * raw_size(h)) {
        return GGML_ENTROPY_BAD_LAYOUT;
    }
    if (is_ebf16 ? h->device_size != 0
            : h->device_size % GGML_ENTROPY_ALIGN != 0 || h->device_size < 1024 || h->device_size > MIN(MAX_SLAB, max_device_size(h))) {
        return GGML_ENTROPY_BAD_LAYOUT;
    }
    if (h->slab_size % GGML_ENTROPY_ALIGN != 0 || h->slab_size > MAX_SLAB
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
    if (st > GGML_ENTROPY_BAD_VERSION && out->kind != kind_of_type(type)) {
        return GGML_ENTROPY_BAD_KIND; // says more than what does not fit the other kind
    }
    return st != GGML_ENTROPY_OK ? st : check_against_gguf(out, type, ne);
}

enum ggml_type ggml_entropy_plain_type(const struct ggml_entropy_header * h) {
    const bool has_offset = h->offset_mode != GGML_ENTROPY_OFFSET_NONE;
    if (h->kind == GGML_ENTROPY_KIND_EBF16) {
        return GGML_TYPE_BF16;
    }
    if (h->kind == GGML_ENTROPY_KIND_EQ8) {
        return has_offset ? GGML_TYPE_F16 : GGML_TYPE_Q8_0;
    }
    return has_offset ? GGML_TYPE_Q4_1 : GGML_TYPE_Q4_0;
}

bool ggml_entropy_fits_f16(const struct ggml_entropy_view * v) {
    const float   low    = v->header.kind == GGML_ENTROPY_KIND_EQ8 ? -128.0f : -8.0f;
    const float   high   = -1.0f - low;
    const int64_t n_rows = v->scales || v->offsets ? v->header.n_rows : 1;
    for (int64_t row = 0; row < n_rows; row++) {
        const float scale  = GGML_FP16_TO_FP32(ggml_entropy_row_scale(v, row));
        const float offset = ggml_entropy_row_offset(v, row);
        if (!f16_is_finite(GGML_FP32_TO_FP16(scale * low + offset)) || !f16_is_finite(GGML_FP32_TO_FP16(scale * high + offset))) {
            return false;
        }
    }
    return true;
}

enum ggml_entropy_status ggml_entropy_open(const void * slab, size_t n_bytes, struct ggml_entropy_view * view) {
    if ((uintptr_t) slab % sizeof(uint64_t) != 0) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    if (n_bytes < GGML_ENTROPY_HEADER_SIZE) {
        return GGML_ENTROPY_TRUNCATED;
    }
    struct ggml_entropy_header * h = &view->header;
    memcpy(h, slab, sizeof(*h));
    const enum ggml_entropy_status st = check_header(h);
    if (st != GGML_ENTROPY_OK) {
        return st;
    }
    if (h->slab_size > n_bytes) {
        return GGML_ENTROPY_TRUNCATED;
    }
    const uint8_t * base = (const uint8_t *) slab;
    view->scales   = h->scales_at  ? (const uint16_t *) (base + h->scales_at)  : NULL;
    view->offsets  = h->offsets_at ? (const float    *) (base + h->offsets_at) : NULL;
    view->begin    = (const uint32_t *) (base + h->index_at);
    view->rests    = h->rests_at   ? base + h->rests_at : NULL;
    view->body     = base + h->body_at;
    view->n_groups = count_groups(h->n_rows);
    view->n_units  = h->n_cols / UNIT_COLS;
    view->decode   = ggml_entropy_decode_units;
    return GGML_ENTROPY_OK;
}

static enum ggml_entropy_status check_scales(const struct ggml_entropy_view * v) {
    const struct ggml_entropy_header * h = &v->header;
    const bool is_q4_1 = h->kind == GGML_ENTROPY_KIND_EQ4 && h->offset_mode != GGML_ENTROPY_OFFSET_NONE;
    if (!v->scales && !v->offsets && !is_q4_1) {
        return GGML_ENTROPY_OK;
    }
    for (int64_t r = 0; r < h->n_rows; r++) {
        const uint16_t scale  = ggml_entropy_row_scale (v, r);
        const float    offset = ggml_entropy_row_offset(v, r);
        uint16_t m;
        if (!f16_is_finite(scale) || !isfinite(offset) || (is_q4_1 && !q4_1_min(GGML_FP16_TO_FP32(scale), offset, &m))) {
            return GGML_ENTROPY_BAD_SCALE;
        }
    }
    return GGML_ENTROPY_OK;
}

// Row groups follow one another in the body, and each has room for its raw bits (5.5).
static enum ggml_entropy_status check_index(const struct ggml_entropy_view * v) {
    const uint64_t raw = raw_size(&v->header);
    if (v->begin[0] != 0) {
        return GGML_ENTROPY_BAD_INDEX;
    }
    for (int64_t i = 0; i < v->n_groups; i++) {
        const uint64_t begin = (uint64_t) v->begin[i] * 8;
        const uint64_t end   = i + 1 < v->n_groups ? (uint64_t) v->begin[i + 1] * 8 : v->header.body_size;
        if (begin + raw > end) {
            return GGML_ENTROPY_BAD_INDEX;
        }
    }
    return GGML_ENTROPY_OK;
}

enum ggml_entropy_status ggml_entropy_validate_slab(const void * slab, size_t n_bytes, struct ggml_entropy_view * v) {
    enum ggml_entropy_status st = ggml_entropy_open(slab, n_bytes, v);
    if (st != GGML_ENTROPY_OK) {
        return st;
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
        const struct ggml_entropy_header * h = &v.header;
        if (i == 0) {
            first = *h;
            // slab_size <= 2^46 and n_slabs <= 2^16: no overflow
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
        if (h->slab_size != first.slab_size || h->device_size != first.device_size) {
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
    return v.header.kind != kind_of_type(type) ? GGML_ENTROPY_BAD_KIND : validate_slabs(data, n_bytes, v.header.n_slabs);
}

// ---- decoding ----------------------------------------------------------------------------------------------------------------------
//
// A unit, drawn with B = 2, k = 0 and the tail shape 1, for the first weights of row 0; D = 3, base = -1, class bases 2 -2 3 -3 4 -4:
//
//     weight        0  1  2  3   4 ...
//     code          0 -1  3  1  -7
//     raw number    1  0  3  2   3       below D: the code is base + r
//     open                o      o       the tail has a bit of each plane for these two, in this order
//     digit 1             2      3       planes 0 (low) and 1 (high); 2 names class 2, whose base is 3; with 3 weight 4 goes on
//     digit 2                    3       again 3: weight 4 is far, and its code stands as a byte at the group's end
//
// The bits of a plane are spread over the open weights: bit j of the stream belongs to the j-th of them. That is what the instruction pdep
// does, for all 64 weights at once; here they are handed out one by one.

// Read once: the index may be changing under us.
static uint64_t group_begin(const struct ggml_entropy_view * v, int64_t group) {
    return (uint64_t) ((const volatile uint32_t *) v->begin)[group] * 8;
}

void ggml_entropy_stream_open(const struct ggml_entropy_view * v, int64_t group, struct ggml_entropy_stream * s) {
    // the index may have changed since it was validated: a group lies in the body whatever it says
    const uint64_t raw   = raw_size(&v->header);
    const uint64_t size  = v->header.body_size;
    const uint64_t at    = group_begin(v, group);
    const uint64_t next  = group + 1 < v->n_groups ? group_begin(v, group + 1) : size;
    const uint64_t begin = MIN(at, size - raw);
    const uint64_t end   = MIN(next, size);
    s->raw     = v->body + begin;
    s->tail    = s->raw + raw;
    s->far     = v->body + MAX(end, begin + raw);
    s->pos     = 0;
    s->end     = (uint64_t) (s->far - s->tail) * 8;
    s->unit    = 0;
    s->n_units = v->n_units;
    s->n_far   = 0;
}

void ggml_entropy_decode_units(const struct ggml_entropy_code * code, struct ggml_entropy_stream * s, int n_units, int8_t * out) {
    decode_units(code, s, n_units, out);
}

// Rows of codes from units: row i of the group is row[i]. n_rows of the group exist. n_units is a multiple of 8, as n_cols is one of 32.
static void units_to_rows(const int8_t * units, int n_units, int n_rows, int8_t * rows, int64_t row_size) {
    int i = 0;
#if PART_SIZE == 16 // SSE2 is there
    // squares of 4 units by 4 rows, whose elements are the 4 columns of a unit
    for (; i + 4 <= n_rows; i += 4) {
        for (int u = 0; u < n_units; u += 4) {
            const __m128i a  = _mm_loadu_si128((const __m128i *) (units + (u + 0) * UNIT + i * UNIT_COLS));
            const __m128i b  = _mm_loadu_si128((const __m128i *) (units + (u + 1) * UNIT + i * UNIT_COLS));
            const __m128i c  = _mm_loadu_si128((const __m128i *) (units + (u + 2) * UNIT + i * UNIT_COLS));
            const __m128i d  = _mm_loadu_si128((const __m128i *) (units + (u + 3) * UNIT + i * UNIT_COLS));
            const __m128i ab = _mm_unpacklo_epi32(a, b), AB = _mm_unpackhi_epi32(a, b);
            const __m128i cd = _mm_unpacklo_epi32(c, d), CD = _mm_unpackhi_epi32(c, d);
            int8_t * to = rows + i * row_size + u * UNIT_COLS;
            _mm_storeu_si128((__m128i *) to,                  _mm_unpacklo_epi64(ab, cd));
            _mm_storeu_si128((__m128i *) (to + 1 * row_size), _mm_unpackhi_epi64(ab, cd));
            _mm_storeu_si128((__m128i *) (to + 2 * row_size), _mm_unpacklo_epi64(AB, CD));
            _mm_storeu_si128((__m128i *) (to + 3 * row_size), _mm_unpackhi_epi64(AB, CD));
        }
    }
#endif
    for (; i < n_rows; i++) {
        for (int u = 0; u < n_units; u++) {
            memcpy(rows + i * row_size + u * UNIT_COLS, units + u * UNIT + i * UNIT_COLS, UNIT_COLS);
        }
    }
}

static int rows_of_group(const struct ggml_entropy_view * v, int64_t group) {
    return (int) MIN(GROUP_ROWS, (int64_t) v->header.n_rows - group * GROUP_ROWS);
}

enum ggml_entropy_status ggml_entropy_decode_groups(const struct ggml_entropy_view * v, int64_t group0, int64_t group1, int8_t * q) {
    if (!range_is_valid(v, group0, group1)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    const int64_t n_cols = v->header.n_cols;
    for (int64_t group = group0; group < group1; group++) {
        struct ggml_entropy_stream s;
        ggml_entropy_stream_open(v, group, &s);
        int8_t * rows = q + (group - group0) * GROUP_ROWS * n_cols;
        for (int64_t unit = 0; unit < v->n_units; unit += GGML_ENTROPY_MAX_UNITS) {
            int8_t memory[GGML_ENTROPY_MAX_UNITS * UNIT + UNIT];
            int8_t * units = memory + (0 - (uintptr_t) memory) % UNIT; // at a multiple of 64
            const int n_units = (int) MIN(GGML_ENTROPY_MAX_UNITS, v->n_units - unit);
            v->decode(&v->header.code, &s, n_units, units);
            units_to_rows(units, n_units, rows_of_group(v, group), rows + unit * UNIT_COLS, n_cols);
        }
    }
    return GGML_ENTROPY_OK;
}

// ---- rows of other types -----------------------------------------------------------------------------------------------------------

uint16_t ggml_entropy_row_scale(const struct ggml_entropy_view * v, int64_t row) {
    return v->scales ? v->scales[row] : v->header.scale;
}

float ggml_entropy_row_offset(const struct ggml_entropy_view * v, int64_t row) {
    return v->offsets ? v->offsets[row] : v->header.offset;
}

// Rows of the stock types (6.1): n codes, a multiple of 32.

static void codes_to_q8_0(const int8_t * q, int n, uint16_t d, block_q8_0 * dst) {
    for (int i = 0; i < n / QK8_0; i++) {
        dst[i].d = d;
        memcpy(dst[i].qs, q + i * QK8_0, QK8_0);
    }
}

// Nibbles of 32 weights: byte j holds weight j below and weight j + 16 above.
static void codes_to_nibbles(const int8_t * q, uint8_t * qs) {
    for (int j = 0; j < 16; j++) {
        qs[j] = (uint8_t) (((q[j] + 8) & 15) | ((q[j + 16] + 8) & 15) << 4);
    }
}

static void codes_to_q4_0(const int8_t * q, int n, uint16_t d, block_q4_0 * dst) {
    for (int i = 0; i < n / QK4_0; i++) {
        dst[i].d = d;
        codes_to_nibbles(q + i * QK4_0, dst[i].qs);
    }
}

static void codes_to_q4_1(const int8_t * q, int n, uint16_t d, uint16_t m, block_q4_1 * dst) {
    for (int i = 0; i < n / QK4_1; i++) {
        dst[i].d = d;
        dst[i].m = m;
        codes_to_nibbles(q + i * QK4_1, dst[i].qs);
    }
}

// The 16 bits of an EBF16 weight (5.8): sign, exponent q + 128, mantissa.
static inline uint16_t bf16_bits(int8_t q, uint8_t rest) {
    return (uint16_t) ((rest & 0x80) << 8 | (uint8_t) (q ^ 0x80) << 7 | (rest & 0x7f));
}

static void codes_to_bf16(const int8_t * q, const uint8_t * rests, int n, enum ggml_type type, void * dst) {
    for (int i = 0; i < n; i++) {
        const uint16_t bits = bf16_bits(q[i], rests[i]);
        if (type == GGML_TYPE_BF16) {
            ((uint16_t *) dst)[i] = bits;
        } else {
            const uint32_t wide = (uint32_t) bits << 16;
            memcpy((float *) dst + i, &wide, sizeof(wide));
        }
    }
}

// All 256 weights an EQ8 code of a row can stand for, by the code plus 128.
static void fill_f16_lut(float scale, float offset, uint16_t lut[256]) {
    for (int u = 0; u < 256; u++) {
        lut[u] = GGML_FP32_TO_FP16(scale * (float) (u - 128) + offset);
    }
}

enum ggml_entropy_status ggml_entropy_decode_groups_plain(
        const struct ggml_entropy_view * v, int64_t group0, int64_t group1, enum ggml_type type, void * dst) {
    const struct ggml_entropy_header * h = &v->header;
    if (!range_is_valid(v, group0, group1) || (type != GGML_TYPE_F32 && type != ggml_entropy_plain_type(h))) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    const int    n_cols   = (int) h->n_cols;
    const size_t row_size = ggml_row_size(type, n_cols);
    int8_t * codes = malloc((size_t) GROUP_ROWS * n_cols);
    if (!codes) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    uint16_t lut[256];
    const bool lut_is_shared = !v->scales && !v->offsets;
    if (type == GGML_TYPE_F16 && lut_is_shared) {
        fill_f16_lut(GGML_FP16_TO_FP32(h->scale), h->offset, lut);
    }
    for (int64_t group = group0; group < group1; group++) {
        ggml_entropy_decode_groups(v, group, group + 1, codes);
        for (int i = 0; i < rows_of_group(v, group); i++) {
            const int64_t  row    = group * GROUP_ROWS + i;
            const int8_t * q      = codes + (int64_t) i * n_cols;
            const uint16_t scale  = ggml_entropy_row_scale(v, row);
            const float    d      = GGML_FP16_TO_FP32(scale);
            const float    offset = ggml_entropy_row_offset(v, row);
            void * out = (char *) dst + (row - group0 * GROUP_ROWS) * row_size;
            if (v->rests) {
                codes_to_bf16(q, v->rests + row * n_cols, n_cols, type, out);
                continue;
            }
            switch (type) {
                case GGML_TYPE_F32:
                    for (int j = 0; j < n_cols; j++) {
                        ((float *) out)[j] = d * (float) q[j] + offset;
                    }
                    break;
                case GGML_TYPE_F16:
                    if (!lut_is_shared) {
                        fill_f16_lut(d, offset, lut);
                    }
                    for (int j = 0; j < n_cols; j++) {
                        ((uint16_t *) out)[j] = lut[(uint8_t) (q[j] ^ 0x80)];
                    }
                    break;
                case GGML_TYPE_Q8_0:
                    codes_to_q8_0(q, n_cols, scale, (block_q8_0 *) out);
                    break;
                case GGML_TYPE_Q4_0:
                    codes_to_q4_0(q, n_cols, scale, (block_q4_0 *) out);
                    break;
                default:
                    {
                        uint16_t m;
                        q4_1_min(d, offset, &m); // validated: exact
                        codes_to_q4_1(q, n_cols, scale, m, (block_q4_1 *) out);
                    } break;
            }
        }
    }
    free(codes);
    return GGML_ENTROPY_OK;
}

// ---- verification ------------------------------------------------------------------------------------------------------------------

uint64_t ggml_entropy_seed(const char * name, int64_t i_slab) {
    return XXH64(name, strlen(name), 0) + (uint64_t) i_slab;
}

enum ggml_entropy_status ggml_entropy_verify_hash(const struct ggml_entropy_view * v, const void * slab, uint64_t seed) {
    return slab_hash(slab, v->header.slab_size, seed) == v->header.hash ? GGML_ENTROPY_OK : GGML_ENTROPY_BAD_HASH;
}

// Rows that fill up the last group hold r = 0.
static bool fill_is_zero(int raw_bits, const uint8_t * raw, int64_t n_units, int n_rows) {
    for (int64_t u = 0; u < n_units && n_rows < GROUP_ROWS; u++, raw += 8 * raw_bits) {
        part    parts[N_PARTS];
        uint8_t r[UNIT];
        unpack_raw(raw_bits, raw, parts);
        for (int i = 0; i < N_PARTS; i++) {
            part_store(parts[i], r + PART_SIZE * i);
        }
        if (!all_zero(r + n_rows * UNIT_COLS, UNIT - n_rows * UNIT_COLS)) {
            return false;
        }
    }
    return true;
}

enum ggml_entropy_status ggml_entropy_verify_groups(const struct ggml_entropy_view * v, int64_t group0, int64_t group1) {
    if (!range_is_valid(v, group0, group1)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    for (int64_t group = group0; group < group1; group++) {
        struct ggml_entropy_stream s;
        ggml_entropy_stream_open(v, group, &s);
        const uint8_t * const end = s.far;
        if (!fill_is_zero(v->header.code.raw_bits, s.raw, v->n_units, rows_of_group(v, group))) {
            return GGML_ENTROPY_BAD_STREAM;
        }
        // from one look at the end to the next: a position beyond it must not be moved back unseen
        for (int64_t unit = 0; unit < v->n_units && s.pos <= s.end; unit += GGML_ENTROPY_CLAMP_UNITS) {
            int8_t units[GGML_ENTROPY_CLAMP_UNITS * UNIT];
            ggml_entropy_decode_units(&v->header.code, &s, GGML_ENTROPY_CLAMP_UNITS, units);
        }
        // between tail and far stream: the rest of a byte and up to 7 whole ones, all zero
        const uint8_t * rest = s.tail + (s.pos >> 3);
        const int       used = s.pos & 7;
        if (s.n_far != end - s.far || s.pos > (uint64_t) (s.far - s.tail) * 8 || (used != 0 && *rest >> used != 0)) {
            return GGML_ENTROPY_BAD_STREAM;
        }
        rest += used != 0;
        if (s.far - rest >= 8 || !all_zero(rest, (uint64_t) (s.far - rest))) {
            return GGML_ENTROPY_BAD_STREAM;
        }
    }
    return GGML_ENTROPY_OK;
}

enum ggml_entropy_status ggml_entropy_verify_padding(const struct ggml_entropy_view * v, const void * slab) {
    const struct ggml_entropy_header * h = &v->header;
    const uint8_t * base = (const uint8_t *) slab;
    // end of each section that is present; the next starts at the multiple of 64 behind it
    const uint64_t ends[] = {
        h->scales_at  ? h->scales_at  + (uint64_t) h->n_rows * 2 : 0,
        h->offsets_at ? h->offsets_at + (uint64_t) h->n_rows * 4 : 0,
        h->index_at + (uint64_t) v->n_groups * sizeof(uint32_t),
        h->rests_at   ? h->rests_at   + (uint64_t) h->n_rows * h->n_cols : 0,
    };
    for (size_t i = 0; i < sizeof(ends) / sizeof(ends[0]); i++) {
        if (!all_zero(base + ends[i], ends[i] == 0 ? 0 : align_up(ends[i], SECTION) - ends[i])) {
            return GGML_ENTROPY_BAD_RESERVED;
        }
    }
    const uint64_t end = h->body_at + h->body_size;
    return all_zero(base + end, h->slab_size - end) ? GGML_ENTROPY_OK : GGML_ENTROPY_BAD_RESERVED;
}
