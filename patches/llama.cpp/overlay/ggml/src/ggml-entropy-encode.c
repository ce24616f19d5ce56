// SPDX-License-Identifier: MIT
//
// Writing entropy-coded tensors; see ggml-entropy.h for the contract and docs/format.md 5 and 7 for the bits. Reading: ggml-entropy.c.
//
// Order of this file: the code (a search over all parameters), then counting, measuring and writing. One file, since measuring has to count
// exactly the bits that writing writes.

#include "ggml-entropy-hash.h"
#include "ggml-entropy-impl.h"

#include <string.h>

// ---- the code ----------------------------------------------------------------------------------------------------------------------

#define N_CODES 256

// Bits behind the raw ones that name each class, and those of a far weight less its byte.
static void tail_lengths(const struct ggml_entropy_tail * tail, int classes[GGML_ENTROPY_MAX_CLASSES], int * far) {
    int n_bits = 0;
    for (int digit = 0, c = 0; digit < tail->n_digits; digit++) {
        n_bits += tail->width[digit];
        for (int value = 0; value < (1 << tail->width[digit]) - 1; value++) {
            classes[c++] = n_bits;
        }
    }
    *far = n_bits;
}

// Sums of counts: those of the codes [from, to), by their number q + 128, which may lie outside of 0..256.
static inline uint64_t sum_of(const uint64_t sums[N_CODES + 1], int from, int to) {
    from = MAX(0, MIN(from, N_CODES));
    to   = MAX(0, MIN(to,   N_CODES));
    return to > from ? sums[to] - sums[from] : 0;
}

struct bin {
    int      from; // number of its first code
    uint64_t count;
};

// n bins beside the direct interval [from, to), n_above of them above: class 0 is the one right above, the others follow by count. Returns
// the bits of their tails and, in *covered, what they count.
static uint64_t place_bins(
        const uint64_t sums[N_CODES + 1], int from, int to, int width, int n_above, int n, const int lengths[], struct bin bins[],
        uint64_t * covered) {
    uint64_t n_bits = 0;
    *covered = 0;
    for (int i = 0; i < n; i++) {
        const int at = i < n_above ? to + i * width : from - (i - n_above + 1) * width;
        const struct bin b = { at, sum_of(sums, at, at + width) };
        int j = i;
        for (; j > 1 && bins[j - 1].count < b.count; j--) { // class 0 stays where it is
            bins[j] = bins[j - 1];
        }
        bins[j] = b;
        *covered += b.count;
    }
    for (int i = 0; i < n; i++) {
        n_bits += bins[i].count * (uint64_t) lengths[i];
    }
    return n_bits;
}

static void assign_lengths(struct ggml_entropy_plan * plan, const uint64_t counts[N_CODES]) {
    const struct ggml_entropy_code * code = &plan->code;
    const struct ggml_entropy_tail * tail = ggml_entropy_tail_of(code->tail);
    int lengths[GGML_ENTROPY_MAX_CLASSES];
    int far;
    tail_lengths(tail, lengths, &far);
    const int direct = direct_codes(code);
    const int width  = 1 << code->bin_bits;
    plan->n_bits = plan->n_tail = plan->n_far = 0;
    for (int i = 0; i < N_CODES; i++) {
        const int q = i - 128;
        plan->length[i] = code->raw_bits;
        if ((uint8_t) (q - code->base) >= direct) {
            int c = 0;
            while (c < tail->n_classes && (uint8_t) (q - code->class_base[c]) >= width) {
                c++;
            }
            const bool is_far = c == tail->n_classes;
            plan->length[i] = (uint8_t) (code->raw_bits + (is_far ? far + 8 : lengths[c]));
            plan->n_tail   += counts[i];
            plan->n_far    += is_far ? counts[i] : 0;
        }
        plan->n_bits += counts[i] * plan->length[i];
    }
}

enum ggml_entropy_status ggml_entropy_plan_code(const uint64_t counts[256], struct ggml_entropy_plan * plan) {
    memset(plan, 0, sizeof(*plan));
    uint64_t sums[N_CODES + 1] = { 0 };
    int first = N_CODES;
    int last  = -1;
    for (int i = 0; i < N_CODES; i++) {
        sums[i + 1] = sums[i] + counts[i];
        if (counts[i] > 0) {
            first = MIN(first, i);
            last  = i;
        }
    }
    const uint64_t total = sums[N_CODES];
    if (total == 0) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    // bytes as they are: what every other code has to beat
    struct ggml_entropy_code best = { 8, 0, 0, -128, { 0 }, { 0 } };
    double best_cost = 8.0 * (double) total;

    for (int number = 1; ggml_entropy_tail_of(number); number++) {
        const struct ggml_entropy_tail * tail = ggml_entropy_tail_of(number);
        int lengths[GGML_ENTROPY_MAX_CLASSES];
        int far;
        tail_lengths(tail, lengths, &far);
        const double tail_bit    = 1.0 + GGML_ENTROPY_TAIL_COST;
        const double far_weight  = far * tail_bit + 8.0 + GGML_ENTROPY_FAR_COST;
        const double planes_cost = GGML_ENTROPY_PLANE_COST * tail->n_planes * (double) total;
        for (int raw_bits = 1; raw_bits < 8; raw_bits++) {
            for (int bin_bits = 0; bin_bits < raw_bits; bin_bits++) {
                const int direct = (1 << raw_bits) - (1 << bin_bits);
                const int width  = 1 << bin_bits;
                // the direct interval lies among the codes that occur, as far as there is room
                const int lowest  = MAX(0, MIN(first, N_CODES - direct));
                const int highest = MAX(lowest, MIN(last - direct + 1, N_CODES - direct));
                for (int from = lowest; from <= highest; from++) {
                    const uint64_t open  = total - sum_of(sums, from, from + direct);
                    const double   least = (double) raw_bits * (double) total + planes_cost + tail_bit * (double) (open * (uint64_t) lengths[0]);
                    if (least >= best_cost) {
                        continue;
                    }
                    for (int n_above = 1; n_above <= tail->n_classes; n_above++) {
                        struct bin bins[GGML_ENTROPY_MAX_CLASSES];
                        uint64_t covered;
                        const uint64_t n_bits = place_bins(sums, from, from + direct, width, n_above, tail->n_classes, lengths, bins, &covered);
                        const double cost = (double) raw_bits * (double) total + planes_cost + tail_bit * (double) n_bits
                                          + far_weight * (double) (open - covered);
                        if (cost < best_cost) {
                            best_cost = cost;
                            best = (struct ggml_entropy_code) { (uint8_t) raw_bits, (uint8_t) bin_bits, (uint8_t) number,
                                (int8_t) (from - 128), { 0 }, { 0 } };
                            for (int c = 0; c < tail->n_classes; c++) {
                                best.class_base[c] = (int8_t) (uint8_t) (bins[c].from - 128);
                            }
                        }
                    }
                }
            }
        }
    }
    plan->code = best;
    assign_lengths(plan, counts);
    return GGML_ENTROPY_OK;
}

// ---- encoding ----------------------------------------------------------------------------------------------------------------------

static bool matrix_is_valid(enum ggml_type type, int64_t n_rows, int64_t n_cols, int64_t group0, int64_t group1) {
    return ggml_entropy_is_type(type) && ggml_entropy_shape_is_valid(n_cols, n_rows, 1)
        && 0 <= group0 && group0 <= group1 && group1 <= count_groups(n_rows);
}

enum ggml_entropy_status ggml_entropy_count(
        enum ggml_type type, int64_t n_rows, int64_t n_cols, const int8_t * q, int64_t group0, int64_t group1, uint64_t counts[256]) {
    if (!matrix_is_valid(type, n_rows, n_cols, group0, group1)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    const int8_t * from = q + group0 * GROUP_ROWS * n_cols;
    const int64_t  n    = (MIN(n_rows, group1 * GROUP_ROWS) - group0 * GROUP_ROWS) * n_cols;
    // two tables, so that runs of one code do not wait for their own increments
    uint64_t even[256] = { 0 };
    uint64_t odd [256] = { 0 };
    for (int64_t i = 0; i < n; i += 2) { // n is even: rows are multiples of 32 columns
        even[(uint8_t) (from[i]     ^ 0x80)]++;
        odd [(uint8_t) (from[i + 1] ^ 0x80)]++;
    }
    for (int i = 0; i < 256; i++) {
        if (type == GGML_TYPE_EQ4 && (i < 120 || i > 135) && even[i] + odd[i] > 0) {
            return GGML_ENTROPY_BAD_CODE;
        }
    }
    for (int i = 0; i < 256; i++) {
        counts[i] += even[i] + odd[i];
    }
    return GGML_ENTROPY_OK;
}

// What a code looks like, for all 256 of them.
struct code_book {
    uint8_t raw  [256]; // r
    uint8_t digit[256]; // digits of the tail: how many that mean "go on" come before the last one; n_digits: far; DIRECT
    uint8_t value[256]; // of the last digit
    uint8_t bits [256]; // of the tail
};

#define DIRECT 255

static void make_book(const struct ggml_entropy_code * code, struct code_book * book) {
    const struct ggml_entropy_tail * tail = ggml_entropy_tail_of(code->tail);
    const int direct = direct_codes(code);
    const int width  = 1 << code->bin_bits;
    for (int i = 0; i < 256; i++) {
        const int q = (int8_t) (uint8_t) i;
        book->raw  [i] = (uint8_t) (q - code->base);
        book->digit[i] = DIRECT;
        book->value[i] = 0;
        book->bits [i] = 0;
        if ((uint8_t) (q - code->base) < direct) {
            continue;
        }
        book->raw  [i] = (uint8_t) direct;
        book->digit[i] = (uint8_t) tail->n_digits;
        for (int digit = 0, c = 0; digit < tail->n_digits && book->digit[i] == tail->n_digits; digit++) {
            book->bits[i] += (uint8_t) tail->width[digit];
            for (int value = 0; value < (1 << tail->width[digit]) - 1; value++, c++) {
                const uint8_t place = (uint8_t) (q - code->class_base[c]);
                if (place < width) {
                    book->raw  [i] = (uint8_t) (direct + place);
                    book->digit[i] = (uint8_t) digit;
                    book->value[i] = (uint8_t) value;
                    break;
                }
            }
        }
    }
}

enum ggml_entropy_status ggml_entropy_measure(
        enum ggml_type type, int64_t n_rows, int64_t n_cols, const int8_t * q, const struct ggml_entropy_code * code,
        int64_t group0, int64_t group1, struct ggml_entropy_extent * extents) {
    if (!matrix_is_valid(type, n_rows, n_cols, group0, group1) || !code_is_valid(code)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    struct code_book book;
    make_book(code, &book);
    const int n_digits = ggml_entropy_tail_of(code->tail)->n_digits;
    uint32_t cost[256]; // far << 8 | bits: sums of up to 2^28 of these are kept in 64 bits
    for (int i = 0; i < 256; i++) {
        cost[i] = book.bits[i] | (uint32_t) (book.digit[i] == n_digits) << 8;
    }
    for (int64_t group = group0; group < group1; group++) {
        const int8_t * from = q + group * GROUP_ROWS * n_cols;
        const int64_t  n    = (MIN(n_rows, (group + 1) * GROUP_ROWS) - group * GROUP_ROWS) * n_cols;
        uint64_t n_bits = 0;
        uint64_t n_far  = 0;
        for (int64_t i = 0; i < n; i++) {
            const uint32_t c = cost[(uint8_t) from[i]];
            n_bits += c & 255;
            n_far  += c >> 8;
        }
        extents[group].tail = (uint32_t) ((n_bits + 7) / 8); // at most 2^28 * 6 / 8
        extents[group].far  = (uint32_t) n_far;
    }
    return GGML_ENTROPY_OK;
}

static bool fill_header(
        const struct ggml_entropy_spec * spec, const struct ggml_entropy_code * code, const struct ggml_entropy_extent * extents,
        struct ggml_entropy_header * h) {
    memset(h, 0, sizeof(*h));
    if (!ggml_entropy_is_type(spec->type) || !ggml_entropy_shape_is_valid(spec->n_cols, spec->n_rows, spec->n_slabs)
            || !tile_cols_is_valid(spec->tile_cols) || !code_is_valid(code)
            || (spec->n_scales != 1 && spec->n_scales != spec->n_rows)
            || (spec->n_offsets != 0 && spec->n_offsets != 1 && spec->n_offsets != spec->n_rows)
            || (spec->type == GGML_TYPE_EBF16) != (spec->rests != NULL)) {
        return false;
    }
    memcpy(h->magic, ggml_entropy_magic, sizeof(ggml_entropy_magic));
    h->version     = GGML_ENTROPY_VERSION;
    h->kind        = (uint8_t) kind_of_type(spec->type);
    h->n_cols      = (uint32_t) spec->n_cols;
    h->n_rows      = (uint32_t) spec->n_rows;
    h->n_slabs     = (uint32_t) spec->n_slabs;
    h->scale_mode  = spec->n_scales  == 1 ? GGML_ENTROPY_SCALE_ONE : GGML_ENTROPY_SCALE_ROW;
    h->offset_mode = spec->n_offsets == 0 ? GGML_ENTROPY_OFFSET_NONE
                   : spec->n_offsets == 1 ? GGML_ENTROPY_OFFSET_ONE : GGML_ENTROPY_OFFSET_ROW;
    h->tile_cols   = (uint32_t) spec->tile_cols;
    h->device_size = spec->device_size;
    h->code        = *code;
    layout_sections(h);
    for (int64_t group = 0; group < count_groups(spec->n_rows); group++) {
        h->body_size += align_up(raw_size(h) + extents[group].tail + extents[group].far, 8);
    }
    h->slab_size = min_slab_size(h);
    return h->body_size <= MAX_BODY;
}

size_t ggml_entropy_slab_size(
        const struct ggml_entropy_spec * spec, const struct ggml_entropy_code * code, const struct ggml_entropy_extent * extents) {
    struct ggml_entropy_header h;
    return fill_header(spec, code, extents, &h) ? h.slab_size : 0;
}

enum ggml_entropy_status ggml_entropy_begin(
        const struct ggml_entropy_spec * spec, const struct ggml_entropy_code * code, const struct ggml_entropy_extent * extents,
        void * slab, size_t slab_size) {
    struct ggml_entropy_header h;
    if (!fill_header(spec, code, extents, &h) || slab_size < h.slab_size || slab_size % GGML_ENTROPY_ALIGN != 0
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
    if (h.scales_at) {
        memcpy(base + h.scales_at, spec->scales, (size_t) h.n_rows * 2);
    }
    if (h.offsets_at) {
        memcpy(base + h.offsets_at, spec->offsets, (size_t) h.n_rows * 4);
    }
    if (h.rests_at) {
        memcpy(base + h.rests_at, spec->rests, (size_t) h.n_rows * h.n_cols);
    }
    uint32_t * begin = (uint32_t *) (base + h.index_at);
    uint64_t at = 0;
    for (int64_t group = 0; group < count_groups(h.n_rows); group++) {
        begin[group] = (uint32_t) (at / 8);
        at += align_up(raw_size(&h) + extents[group].tail + extents[group].far, 8);
    }
    // catches scales, offsets and codes that a reader would refuse
    struct ggml_entropy_view v;
    return ggml_entropy_validate_slab(slab, slab_size, &v);
}

// Raw numbers of a unit (5.6). Returns the end of what was written.
static uint8_t * pack_raw(int raw_bits, const uint8_t r[UNIT], uint8_t * raw) {
    if (raw_bits == 8) {
        memcpy(raw, r, UNIT);
        return raw + UNIT;
    }
    int shift = 0;
    if (raw_bits & 4) {
        for (int i = 0; i < 32; i++) {
            raw[i] = (uint8_t) ((r[i] & 15) | (r[i + 32] & 15) << 4);
        }
        raw  += 32;
        shift = 4;
    }
    if (raw_bits & 2) {
        for (int i = 0; i < 16; i++) {
            raw[i] = 0;
            for (int part = 0; part < 4; part++) {
                raw[i] |= (uint8_t) ((r[i + 16 * part] >> shift & 3) << 2 * part);
            }
        }
        raw   += 16;
        shift += 2;
    }
    if (raw_bits & 1) {
        for (int part = 0; part < 8; part++) {
            raw[part] = 0;
            for (int i = 0; i < 8; i++) {
                raw[part] |= (uint8_t) ((r[8 * part + i] >> shift & 1) << i);
            }
        }
        raw += 8;
    }
    return raw;
}

// Bits, the first one lowest. What is pending is written when a byte is full, and at the end.
struct bit_writer {
    uint8_t * to;
    uint64_t  pending;
    int       n_pending; // below 8 between calls
};

// n <= 64 bits
static void put_bits(struct bit_writer * w, uint64_t bits, int n) {
    while (n > 0) {
        const int now = MIN(n, 56);
        w->pending   |= (bits & ((UINT64_C(1) << now) - 1)) << w->n_pending;
        w->n_pending += now;
        bits >>= now;
        n     -= now;
        while (w->n_pending >= 8) {
            *w->to++      = (uint8_t) w->pending;
            w->pending  >>= 8;
            w->n_pending -= 8;
        }
    }
}

// One row group: codes [n_rows][n_cols] of it to its place, which ends at far.
static void write_group(
        const struct ggml_entropy_code * code, const struct code_book * book, const int8_t * q, int n_rows, int64_t n_cols,
        uint8_t * raw, uint8_t * far) {
    const struct ggml_entropy_tail * tail = ggml_entropy_tail_of(code->tail);
    struct bit_writer w = { raw + n_cols / UNIT_COLS * 8 * code->raw_bits, 0, 0 };
    for (int64_t col = 0; col < n_cols; col += UNIT_COLS) {
        uint8_t r[UNIT] = { 0 };
        uint8_t open[UNIT]; // codes of the weights that have a tail
        int n_open = 0;
        for (int i = 0; i < n_rows * UNIT_COLS; i++) {
            const uint8_t u = (uint8_t) q[i / UNIT_COLS * n_cols + col + i % UNIT_COLS];
            r[i] = book->raw[u];
            open[n_open] = u;
            n_open += book->digit[u] != DIRECT;
        }
        raw = pack_raw(code->raw_bits, r, raw);
        for (int digit = 0; digit < tail->n_digits && n_open > 0; digit++) {
            uint64_t planes[2] = { 0, 0 };
            const int on = (1 << tail->width[digit]) - 1;
            int n_on = 0;
            for (int j = 0; j < n_open; j++) {
                const uint8_t u = open[j];
                const int value = book->digit[u] == digit ? book->value[u] : on;
                planes[0] |= (uint64_t) (value & 1) << j;
                planes[1] |= (uint64_t) (value >> 1) << j;
                open[n_on] = u;
                n_on += value == on;
            }
            for (int plane = 0; plane < tail->width[digit]; plane++) {
                put_bits(&w, planes[plane], n_open);
            }
            n_open = n_on;
        }
        for (int j = 0; j < n_open; j++) {
            *--far = open[j];
        }
    }
    if (w.n_pending > 0) {
        *w.to = (uint8_t) w.pending;
    }
}

enum ggml_entropy_status ggml_entropy_encode_groups(const int8_t * q, int64_t group0, int64_t group1, void * slab) {
    struct ggml_entropy_view v;
    const enum ggml_entropy_status st = ggml_entropy_open(slab, ((const struct ggml_entropy_header *) slab)->slab_size, &v);
    if (st != GGML_ENTROPY_OK) {
        return st;
    }
    if (!range_is_valid(&v, group0, group1)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    const struct ggml_entropy_header * h = &v.header;
    struct code_book book;
    make_book(&h->code, &book);
    for (int64_t group = group0; group < group1; group++) {
        const uint64_t begin = (uint64_t) v.begin[group] * 8;
        const uint64_t end   = group + 1 < v.n_groups ? (uint64_t) v.begin[group + 1] * 8 : h->body_size;
        uint8_t * body = (uint8_t *) slab + h->body_at;
        const int n_rows = (int) MIN(GROUP_ROWS, (int64_t) h->n_rows - group * GROUP_ROWS);
        write_group(&h->code, &book, q + group * GROUP_ROWS * h->n_cols, n_rows, h->n_cols, body + begin, body + end);
    }
    return GGML_ENTROPY_OK;
}

enum ggml_entropy_status ggml_entropy_finish(void * slab, uint64_t seed) {
    struct ggml_entropy_view v;
    const enum ggml_entropy_status st = ggml_entropy_open(slab, ((const struct ggml_entropy_header *) slab)->slab_size, &v);
    if (st != GGML_ENTROPY_OK) {
        return st;
    }
    ((struct ggml_entropy_header *) slab)->hash = slab_hash(slab, v.header.slab_size, seed);
    return GGML_ENTROPY_OK;
}
