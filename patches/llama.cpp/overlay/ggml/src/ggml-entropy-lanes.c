// SPDX-License-Identifier: MIT
//
// The device layout of entropy-coded tensors; see ggml-entropy-lanes.h for the contract and docs/format.md 8 for the bits.
//
// Order of this file: layout of a slab, the code (class partition), counting, measuring and writing, reading one row. One file, since it is
// all that the CPU knows of this layout.

#include "ggml-entropy-lanes.h"
#include "ggml-entropy-impl.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#define LANES      GGML_ENTROPY_LANES
#define MAX_T      15 // longest code: two of them fit in a 32-bit window
#define MAX_PREFIX 8

static_assert(sizeof(struct ggml_entropy_lanes_header) == GGML_ENTROPY_HEADER_SIZE, "header size");
static_assert(sizeof(struct ggml_entropy_entry) == 2, "table entry size");

static const uint8_t lanes_magic[4] = { 'E', 'Q', 'T', 'L' };

// ---- layout ------------------------------------------------------------------------------------------------------------------------

// columns that share one symbol
static inline int cols_per_symbol(int kind) {
    return kind == GGML_ENTROPY_KIND_EQ4 ? 2 : 1;
}

static bool lanes_shape_is_valid(int64_t n_cols, int64_t n_rows, int64_t n_slabs, int64_t tile_cols) {
    return ggml_entropy_shape_is_valid(n_cols, n_rows, n_slabs) && tile_cols_is_valid(tile_cols);
}

// n_rows < 2^31 and n_cols <= 2^24: at most 2^26 * 2^19 = 2^45 tiles, no overflow; the header's u32 narrows it further
static int64_t count_tiles(int64_t n_cols, int64_t n_rows, int64_t tile_cols) {
    return ceil_div(n_rows, LANES) * ceil_div(n_cols, tile_cols);
}

// Fill the section offsets that follow from shape and modes.
static void layout_lanes(struct ggml_entropy_lanes_header * h) {
    uint64_t at = GGML_ENTROPY_HEADER_SIZE;
    h->table_at = at;
    at += 256 * sizeof(struct ggml_entropy_entry);
    h->scales_at = 0;
    if (h->scale_mode == GGML_ENTROPY_SCALE_ROW) {
        h->scales_at = at;
        at = align_up(at + (uint64_t) h->n_rows * 2, GGML_ENTROPY_LANES_ALIGN);
    }
    h->offsets_at = 0;
    if (h->offset_mode == GGML_ENTROPY_OFFSET_ROW) {
        h->offsets_at = at;
        at = align_up(at + (uint64_t) h->n_rows * 4, GGML_ENTROPY_LANES_ALIGN);
    }
    h->word_offsets_at = at;
    at = align_up(at + (uint64_t) h->n_tiles * 4, GGML_ENTROPY_LANES_ALIGN);
    h->lane_words_at = at;
    at = align_up(at + (uint64_t) h->n_tiles * LANES, GGML_ENTROPY_LANES_ALIGN);
    h->bitstream_at = at;
}

// Tile number, its lanes and its symbols per lane.
struct tile_ref {
    int64_t tile;
    int     n_lanes;
    int     n_symbols;
};

static struct tile_ref tile_at(const struct ggml_entropy_lanes_header * h, int64_t group, int64_t slice) {
    const int64_t n_cols = MIN((int64_t) h->tile_cols, (int64_t) h->n_cols - slice * h->tile_cols);
    struct tile_ref ref;
    ref.tile      = group * ceil_div(h->n_cols, h->tile_cols) + slice;
    ref.n_lanes   = (int) MIN(LANES, (int64_t) h->n_rows - group * LANES);
    ref.n_symbols = (int) (n_cols / cols_per_symbol(h->kind));
    return ref;
}

bool ggml_entropy_is_lanes(const void * slab) {
    return memcmp(slab, lanes_magic, sizeof(lanes_magic)) == 0;
}

// ---- the code: class partition -----------------------------------------------------------------------------------------------------

// Exact joint optimum of intervals, prefix lengths and escape (docs/format.md 8.2). Dynamic programme over states (position, used), where
// used is the Kraft budget spent so far in units of 2^-8: a class of prefix length p takes 256 >> p units. At each position one either
// skips a symbol that never occurs, sends it through the escape (a class of all 256 symbols), or opens a class (e, p) that covers the
// next 2^e symbols. One pass per prefix length of the escape (and one without), since the escape's share of the budget is spent in
// advance.
//
// Costs are integers: the counts are scaled to a sum of at most 2^26, so that 15 bits a symbol stay below DP_INF and DP_INF + cost below
// 2^31.
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

// ggml-base is built for any processor of its kind; this one loop gains a factor of three from AVX2. Sanitizers run too late for ifuncs.
#if defined(__GNUC__) && defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__) \
        && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define DP_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define DP_CLONES
#endif

// to[u + k] = min(to[u + k], from[u] + add), remembering the step. Branch-free, so that compilers vectorise it.
// from and to are rows of different positions: they never overlap.
DP_CLONES static void dp_relax(
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
static void assign_codes(struct code_class * classes, int n_classes, struct ggml_entropy_lanes_plan * plan) {
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

enum ggml_entropy_status ggml_entropy_lanes_plan_code(const uint64_t counts[256], struct ggml_entropy_lanes_plan * plan) {
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

// ---- writing -----------------------------------------------------------------------------------------------------------------------

static bool matrix_is_valid(enum ggml_type type, int64_t n_rows, int64_t n_cols, int64_t tile_cols, int64_t group0, int64_t group1) {
    return ggml_entropy_is_quantized(type) && lanes_shape_is_valid(n_cols, n_rows, 1, tile_cols)
        && 0 <= group0 && group0 <= group1 && group1 <= ceil_div(n_rows, LANES);
}

static inline uint8_t symbol_at(int kind, const int8_t * q, int64_t k) {
    return kind == GGML_ENTROPY_KIND_EQ8 ? (uint8_t) (q[k] ^ 0x80) : (uint8_t) (((q[2 * k] + 8) & 15) | ((q[2 * k + 1] + 8) & 15) << 4);
}

enum ggml_entropy_status ggml_entropy_lanes_count(
        enum ggml_type type, int64_t n_rows, int64_t n_cols, const int8_t * q, int64_t group0, int64_t group1, uint64_t counts[256]) {
    if (!matrix_is_valid(type, n_rows, n_cols, 32, group0, group1)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    const int      kind = kind_of_type(type);
    const int64_t  row1 = MIN(n_rows, group1 * LANES);
    const int8_t * from = q + group0 * LANES * n_cols;
    const int64_t  n    = (row1 - group0 * LANES) * n_cols;
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

// Narrow tiles cost memory (128 columns: 0.16 bits a weight more than 512), wide ones leave a GPU idle: a tile is decoded code by code,
// some 30 ns each. A block has 32 rows and at most 32 warps with a tile each, so that a row of 4096 wants 128 columns. Matrices of many
// rows fill a GPU anyway.
int64_t ggml_entropy_lanes_default_tile_cols(int64_t n_rows, int64_t n_cols) {
    int64_t width = n_rows < 8192 ? 128 : 256;
    while (width < 512 && 32 * width < n_cols) {
        width *= 2;
    }
    return MIN(n_cols, width);
}

enum ggml_entropy_status ggml_entropy_lanes_measure(
        enum ggml_type type, int64_t n_rows, int64_t n_cols, const int8_t * q, const struct ggml_entropy_lanes_plan * plan,
        int64_t tile_cols, int64_t group0, int64_t group1, uint8_t * lane_words, int64_t * max_words) {
    if (!matrix_is_valid(type, n_rows, n_cols, tile_cols, group0, group1)) {
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

static bool fill_lanes_header(const struct ggml_entropy_spec * spec, const uint8_t * lane_words, struct ggml_entropy_lanes_header * h) {
    memset(h, 0, sizeof(*h));
    if (!ggml_entropy_is_quantized(spec->type) || !lanes_shape_is_valid(spec->n_cols, spec->n_rows, spec->n_slabs, spec->tile_cols)
            || count_tiles(spec->n_cols, spec->n_rows, spec->tile_cols) > UINT32_MAX
            || (spec->n_scales != 1 && spec->n_scales != spec->n_rows)
            || (spec->n_offsets != 0 && spec->n_offsets != 1 && spec->n_offsets != spec->n_rows)) {
        return false;
    }
    memcpy(h->magic, lanes_magic, sizeof(lanes_magic));
    h->version     = 1;
    h->kind        = (uint8_t) kind_of_type(spec->type);
    h->n_cols      = (uint32_t) spec->n_cols;
    h->n_rows      = (uint32_t) spec->n_rows;
    h->n_slabs     = (uint32_t) spec->n_slabs;
    h->tile_cols   = (uint32_t) spec->tile_cols;
    h->n_tiles     = (uint32_t) count_tiles(spec->n_cols, spec->n_rows, spec->tile_cols);
    h->scale_mode  = spec->n_scales  == 1 ? GGML_ENTROPY_SCALE_ONE : GGML_ENTROPY_SCALE_ROW;
    h->offset_mode = spec->n_offsets == 0 ? GGML_ENTROPY_OFFSET_NONE
                   : spec->n_offsets == 1 ? GGML_ENTROPY_OFFSET_ONE : GGML_ENTROPY_OFFSET_ROW;
    layout_lanes(h);
    for (int64_t tile = 0; tile < (int64_t) h->n_tiles; tile++) {
        uint64_t n = 0;
        for (int l = 0; l < LANES; l++) {
            n += lane_words[tile * LANES + l];
        }
        h->bitstream_words += align_up(n, 4);
    }
    h->slab_size = align_up(h->bitstream_at + 4 * h->bitstream_words, GGML_ENTROPY_LANES_ALIGN) + GGML_ENTROPY_SLACK;
    return h->bitstream_words <= UINT32_MAX;
}

size_t ggml_entropy_lanes_size(const struct ggml_entropy_spec * spec, const uint8_t * lane_words) {
    struct ggml_entropy_lanes_header h;
    return fill_lanes_header(spec, lane_words, &h) ? h.slab_size : 0;
}

enum ggml_entropy_status ggml_entropy_lanes_begin(
        const struct ggml_entropy_spec * spec, const struct ggml_entropy_lanes_plan * plan, const uint8_t * lane_words,
        void * slab, size_t slab_size) {
    struct ggml_entropy_lanes_header h;
    if (!fill_lanes_header(spec, lane_words, &h) || slab_size < h.slab_size || slab_size % GGML_ENTROPY_LANES_ALIGN != 0
            || (uintptr_t) slab % sizeof(uint64_t) != 0) {
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
    return GGML_ENTROPY_OK;
}

// Codes of one lane, most significant bit first; n_symbols is even. The lane was measured: words has room for exactly its codes.
static void write_lane(const uint32_t codes[256], int kind, const int8_t * q, int n_symbols, uint32_t * words) {
    uint64_t acc    = 0; // pending bits, right-aligned
    int      n_bits = 0; // their number, below 32 before two codes of at most 15 bits each
    for (int k = 0; k < n_symbols; k += 2) {
        const uint32_t a = codes[symbol_at(kind, q, k)];
        const uint32_t b = codes[symbol_at(kind, q, k + 1)];
        acc     = (acc << (a & 15) | a >> 4) << (b & 15) | b >> 4;
        n_bits += (a & 15) + (b & 15);
        // left-aligned in the next word, which is written again if it is not full: no branch that depends on the codes
        *words  = (uint32_t) (n_bits < 32 ? acc << (32 - n_bits) : acc >> (n_bits - 32));
        words  += n_bits >> 5;
        n_bits &= 31;
    }
    if (n_bits > 0) {
        *words = (uint32_t) (acc << (32 - n_bits));
    }
}

// Word j of every lane that has more than j words, for j = 0, 1, ...
static void write_word_rows(uint32_t words[LANES][GGML_ENTROPY_LANES_MAX_WORDS], const uint8_t * n_words, int n_lanes, uint32_t * dst) {
    int longest = 0;
    for (int l = 0; l < n_lanes; l++) {
        longest = MAX(longest, n_words[l]);
    }
    for (int j = 0; j < longest; j++) {
        for (int l = 0; l < n_lanes; l++) {
            if (j < n_words[l]) {
                *dst++ = words[l][j];
            }
        }
    }
}

// q, slab and plan belong together: then no lane is longer than the slab says.
enum ggml_entropy_status ggml_entropy_lanes_encode_groups(
        const struct ggml_entropy_lanes_plan * plan, const int8_t * q, int64_t group0, int64_t group1, void * slab) {
    const struct ggml_entropy_lanes_header * h = (const struct ggml_entropy_lanes_header *) slab;
    uint8_t * base = (uint8_t *) slab;
    if (!ggml_entropy_is_lanes(slab) || group0 < 0 || group0 > group1 || group1 > ceil_div(h->n_rows, LANES)) {
        return GGML_ENTROPY_BAD_ARGUMENT;
    }
    uint32_t (* words)[GGML_ENTROPY_LANES_MAX_WORDS] = malloc(LANES * sizeof(*words));
    if (!words) {
        return GGML_ENTROPY_NO_MEMORY;
    }
    uint32_t codes[256]; // code << 4 | length: one look-up a symbol
    for (int u = 0; u < 256; u++) {
        codes[u] = (uint32_t) plan->code[u] << 4 | plan->length[u];
    }
    const uint8_t  * lane_words   = base + h->lane_words_at;
    const uint32_t * word_offsets = (const uint32_t *) (base + h->word_offsets_at);
    uint32_t       * bitstream    = (uint32_t *) (base + h->bitstream_at);
    const int64_t    n_slices     = ceil_div(h->n_cols, h->tile_cols);
    for (int64_t group = group0; group < group1; group++) {
        for (int64_t slice = 0; slice < n_slices; slice++) {
            const struct tile_ref ref = tile_at(h, group, slice);
            for (int l = 0; l < ref.n_lanes; l++) {
                const int64_t row = group * LANES + l;
                write_lane(codes, h->kind, q + row * h->n_cols + slice * h->tile_cols, ref.n_symbols, words[l]);
            }
            write_word_rows(words, lane_words + ref.tile * LANES, ref.n_lanes, bitstream + word_offsets[ref.tile]);
        }
    }
    free(words);
    return GGML_ENTROPY_OK;
}

// ---- reading -----------------------------------------------------------------------------------------------------------------------

void ggml_entropy_lanes_decode_row(const void * slab, int64_t row, int8_t * q) {
    const struct ggml_entropy_lanes_header * h = (const struct ggml_entropy_lanes_header *) slab;
    const uint8_t * base = (const uint8_t *) slab;
    const struct ggml_entropy_entry * table = (const struct ggml_entropy_entry *) (base + h->table_at);
    const int64_t n_slices = ceil_div(h->n_cols, h->tile_cols);
    const int     lane     = (int) (row % LANES);
    for (int64_t slice = 0; slice < n_slices; slice++) {
        const struct tile_ref ref = tile_at(h, row / LANES, slice);
        const uint8_t  * n_words = base + h->lane_words_at + ref.tile * LANES;
        const uint32_t * word    = (const uint32_t *) (base + h->bitstream_at) + ((const uint32_t *) (base + h->word_offsets_at))[ref.tile];

        // bits that were read and not used, left-aligned; zeros follow the lane's last word
        uint64_t bits   = 0;
        int      n_bits = 0;
        int      j      = 0; // next word of the lane
        for (int k = 0; k < ref.n_symbols; k++) {
            if (n_bits < MAX_T && j < n_words[lane]) {
                // word row j: one word of every lane that is longer than j
                uint64_t next = 0;
                for (int l = 0; l < LANES; l++) {
                    if (l == lane) {
                        next = *word;
                    }
                    word += j < n_words[l];
                }
                bits   |= next << (32 - n_bits);
                n_bits += 32;
                j++;
            }
            const struct ggml_entropy_entry entry = table[bits >> 56];
            const uint8_t u = (uint8_t) ((bits >> (64 - entry.t)) + entry.bias);
            bits  <<= entry.t;
            n_bits -= entry.t;
            if (h->kind == GGML_ENTROPY_KIND_EQ8) {
                *q++ = (int8_t) (u ^ 0x80);
            } else {
                *q++ = (int8_t) ((u & 15) - 8);
                *q++ = (int8_t) ((u >> 4) - 8);
            }
        }
    }
}

void ggml_entropy_lanes_row_grid(const void * slab, int64_t row, float * scale, float * offset) {
    const struct ggml_entropy_lanes_header * h = (const struct ggml_entropy_lanes_header *) slab;
    const uint8_t * base = (const uint8_t *) slab;
    *scale  = GGML_FP16_TO_FP32(h->scales_at ? ((const uint16_t *) (base + h->scales_at))[row] : h->scale);
    *offset = h->offsets_at ? ((const float *) (base + h->offsets_at))[row] : h->offset;
}
